"""Comparing two jobs task by task: how much they differ, how sure that is, where it comes from, and what was varied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from gym_bus.errors import DataError
from gym_bus.results.files import JobFiles
from gym_bus.results.identity import TaskIdentity, manifest_of, model_told, task_identities
from gym_bus.results.manifest import Manifest
from gym_bus.results.paired import RESAMPLES, Difference, adjust, paired_difference
from gym_bus.results.statistics import Estimate, Floats, Ints, pass_at_1
from gym_bus.results.subsets import task_subsets
from gym_bus.results.table import Counts, Table, read_table

Aspect = Literal["model", "agent", "prompt", "verifier", "data", "sampling", "limit"]


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two jobs."""

    path: str
    """Its rollouts file."""
    job: str
    """Empty where it has no manifest."""
    model: str
    agent: str
    verifier: str
    counts: Counts
    tasks: int
    pass_at_1: Estimate
    """Over all its tasks, the paired ones and the others."""


class Pairing(msgspec.Struct, frozen=True, kw_only=True):
    """Which tasks are compared: `paired` of those of A and of B; the others are in no number."""

    paired: int
    """In both jobs, with a reward in both."""
    only_a: int
    """Tasks that B has not."""
    only_b: int
    changed: int
    """Tasks of one index whose rows differ, which makes them two tasks."""
    unscored: int
    """Tasks of both without any reward in one of them."""
    rollouts_a: int
    """Rewards of the paired tasks."""
    rollouts_b: int
    by: Literal["index and row", "index"]
    """What tells that two tasks are the same; by their index alone where a job has no materialized inputs."""


class Varied(msgspec.Struct, frozen=True, kw_only=True):
    """One thing in which the jobs differ."""

    what: Aspect
    a: str
    b: str


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """A task whose mean reward is not the same in both."""

    task: int
    a: float
    b: float
    rollouts_a: int
    rollouts_b: int
    subset: str | None = None


class SubsetChange(msgspec.Struct, frozen=True, kw_only=True):
    """What one subset adds to the difference."""

    subset: str | None
    """None for the tasks without the field."""
    difference: Difference
    contribution: float
    """Its share of the whole difference, weighted by its tasks: the contributions of all subsets sum up to it."""
    adjusted_p_value: float | None
    """Holm's, since there are as many tests as subsets."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How B differs from A."""

    a: Side
    b: Side
    pairing: Pairing
    varied: list[Varied]
    warnings: list[str]
    """What speaks against the comparison."""
    difference: Difference
    gained: int
    """Tasks that are better in B."""
    lost: int
    flips: list[Flip]
    """Every task that changed, the largest change first."""
    subsets: list[SubsetChange]
    """The largest contribution first; empty without a field to divide by."""


@dataclass(frozen=True)
class _Job:
    files: JobFiles
    table: Table
    manifest: Manifest | None
    identities: list[TaskIdentity] | None
    mean: Floats
    """Mean reward of each task, NaN where it has none; shape [tasks]."""

    @classmethod
    def read(cls, files: JobFiles) -> _Job:
        table = read_table(files)
        scored = table.task_scored
        total = np.bincount(table.row_task, table.numbers["reward"], len(table.tasks))
        mean = np.divide(total, scored, out=np.full(len(scored), np.nan), where=scored > 0)
        return cls(files, table, manifest_of(files), task_identities(files, table), mean)


def compare_jobs(a: JobFiles, b: JobFiles, *, by: str | None = None, resamples: int = RESAMPLES) -> Comparison:
    """Compare two jobs from their files, finished or not, NeMo Gym's too.

    Tasks are paired by their index and by what their rows say of the task; the value of a task is the mean of its
    rewards, so that jobs may differ in their repeats.

    Args:
        a: what is compared with.
        b: what is compared; a positive difference means that it is better.
        by: row field that divides the tasks into subsets.
        resamples: of the permutation test and the bootstrap.

    Raises:
        DataError: names file and line; or the two have no task in common.
        UsageError: no row has the field to divide by.
    """
    one, other = _Job.read(a), _Job.read(b)
    pairs, pairing = _pair(one, other)
    varied = list(_varied(one, other, pairs))
    single = bool((one.table.task_scored[pairs.a] == 1).all() and (other.table.task_scored[pairs.b] == 1).all())
    before, after = one.mean[pairs.a], other.mean[pairs.b]
    subsets = _subsets(one, other, pairs, by)

    def differ(of: Any) -> Difference:
        return paired_difference(before[of], after[of], single=single, resamples=resamples)

    return Comparison(
        a=_side(one),
        b=_side(other),
        pairing=pairing,
        varied=varied,
        warnings=list(_warnings(one, other, pairing, varied)),
        difference=differ(slice(None)),
        gained=int((after > before).sum()),
        lost=int((after < before).sum()),
        flips=_flips(one, other, pairs, subsets),
        subsets=_changes(subsets, differ) if subsets is not None else [],
    )


# -- pairing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    a: Ints
    """Places of the paired tasks in A's table."""
    b: Ints


def _pair(one: _Job, other: _Job) -> tuple[_Pairs, Pairing]:
    _, a, b = np.intersect1d(one.table.tasks, other.table.tasks, assume_unique=True, return_indices=True)
    in_both = len(a)
    by_row = one.identities is not None and other.identities is not None
    if one.identities is not None and other.identities is not None:
        same = np.array([one.identities[i].row == other.identities[j].row for i, j in zip(a, b, strict=True)], bool)
        a, b = a[same], b[same]
    changed = in_both - len(a)
    scored = ~np.isnan(one.mean[a]) & ~np.isnan(other.mean[b])
    unscored = int((~scored).sum())
    pairs = _Pairs(a[scored], b[scored])
    pairing = Pairing(
        paired=len(pairs.a),
        only_a=len(one.table.tasks) - in_both,
        only_b=len(other.table.tasks) - in_both,
        changed=changed,
        unscored=unscored,
        rollouts_a=int(one.table.task_scored[pairs.a].sum()),
        rollouts_b=int(other.table.task_scored[pairs.b].sum()),
        by="index and row" if by_row else "index",
    )
    if not len(pairs.a):
        raise DataError(
            f"{one.files.rollouts} and {other.files.rollouts} have no task in common that is scored in both: "
            f"{pairing.only_a} are in the first only, {pairing.only_b} in the second only, {changed} have the same "
            f"index and another row, {unscored} have no reward in one of them"
        )
    return pairs, pairing


# -- what was varied --------------------------------------------------------------------------------------------------


def _varied(one: _Job, other: _Job, pairs: _Pairs) -> Iterator[Varied]:
    a, b = one.manifest, other.manifest
    if a is not None and b is not None:
        yield from _varied_settings(a, b)
    else:
        yield from _one("model", model_told(one.files, one.table), model_told(other.files, other.table))
        yield from _one("agent", ", ".join(one.table.agents), ", ".join(other.table.agents))
    yield from _varied_tasks(one, other, pairs)


def _varied_settings(a: Manifest, b: Manifest) -> Iterator[Varied]:
    model_a, model_b = _model(a), _model(b)
    yield from _one("model", model_a, model_b)
    yield from _one("agent", _with_options(a.agent, a.agent_options), _with_options(b.agent, b.agent_options))
    verifier_a, verifier_b = (_with_options(m.verifier, m.verifier_options) for m in (a, b))
    if verifier_a == verifier_b and a.verifier_digest != b.verifier_digest:
        verifier_a, verifier_b = (f"{m.verifier} {m.verifier_digest[:8]}" for m in (a, b))
    yield from _one("verifier", verifier_a, verifier_b)
    yield from _one("data", a.benchmark, b.benchmark)
    yield from _one("limit", f"{a.limit_s:g} s", f"{b.limit_s:g} s")
    if a.config_digest != b.config_digest and a.limit_s == b.limit_s:
        # The digest is over the model's settings, and of recorded or simulated models over the answers themselves.
        recorded = {"replay", "simulated"} & {a.model_kind, b.model_kind}
        if not recorded:
            yield Varied(what="sampling", a=f"settings {a.config_digest[:8]}", b=f"settings {b.config_digest[:8]}")
        elif model_a == model_b:
            yield Varied(what="model", a=f"answers {a.config_digest[:8]}", b=f"answers {b.config_digest[:8]}")


def _varied_tasks(one: _Job, other: _Job, pairs: _Pairs) -> Iterator[Varied]:
    if one.identities is None or other.identities is None:
        return
    a, b = [one.identities[at] for at in pairs.a], [other.identities[at] for at in pairs.b]
    prompts = sum(x.prompt != y.prompt for x, y in zip(a, b, strict=True))
    if prompts:
        yield Varied(what="prompt", a="its own", b=f"another one for {prompts:,} of {len(a):,} tasks")
    for key in sorted({key for identity in (*a, *b) for key in identity.sampling}):
        differing = [
            (x.sampling.get(key), y.sampling.get(key))
            for x, y in zip(a, b, strict=True)
            if x.sampling.get(key) != y.sampling.get(key)
        ]
        if differing:
            before, after = differing[0]
            yield Varied(what="sampling", a=f"{key} {_shown(before)}", b=f"{key} {_shown(after)}")


def _one(what: Aspect, a: str, b: str) -> Iterator[Varied]:
    if a != b:
        yield Varied(what=what, a=a or "unknown", b=b or "unknown")


def _model(manifest: Manifest) -> str:
    name = manifest.model
    return name if manifest.model_name in ("", name) else f"{name} ({manifest.model_name})"


def _with_options(name: str, options: dict[str, Any]) -> str:
    return f"{name} {_shown(options)}" if options else name


def _shown(value: Any) -> str:
    return "not set" if value is None else msgspec.json.encode(value, order="sorted").decode()


def _warnings(one: _Job, other: _Job, pairing: Pairing, varied: Sequence[Varied]) -> Iterator[str]:
    aspects = list(dict.fromkeys(change.what for change in varied))
    if len(aspects) > 1:
        yield (
            f"{len(aspects)} things differ at once ({', '.join(aspects)}): "
            "nobody can tell which of them made the difference"
        )
    if "verifier" in aspects:
        yield "the two were scored by different verifiers; `gym-bus eval reverify` scores stored rollouts alike"
    if not aspects and one.manifest is not None and other.manifest is not None:
        yield "nothing is known to differ: what is seen is the noise between two runs"
    if pairing.by == "index":
        yield "a job has no materialized inputs: tasks are paired by index, and prompt, data and sampling go unchecked"
    if one.manifest is None or other.manifest is None:
        yield "a job has no job.json: verifier, agent options and limits go unchecked"
    left_out = pairing.only_a + pairing.only_b + pairing.changed + pairing.unscored
    if left_out:
        yield f"{left_out:,} tasks are left out: they are not the same in both, or have no reward in one"
    for name, job in (("A", one), ("B", other)):
        counts = job.table.counts
        if counts.scored < counts.expected:
            yield (
                f"{counts.expected - counts.scored:,} of {counts.expected:,} rollouts of {name} have no reward; "
                "where hard tasks fail more often, the others look better than they are"
            )


# -- what changed -----------------------------------------------------------------------------------------------------


def _side(job: _Job) -> Side:
    manifest = job.manifest
    return Side(
        path=str(job.files.rollouts),
        job=manifest.job if manifest else "",
        model=_model(manifest) if manifest else model_told(job.files, job.table),
        agent=manifest.agent if manifest else ", ".join(job.table.agents),
        verifier=manifest.verifier if manifest else "",
        counts=job.table.counts,
        tasks=len(job.table.tasks),
        pass_at_1=pass_at_1(job.table.rewards()),
    )


def _subsets(one: _Job, other: _Job, pairs: _Pairs, by: str | None) -> list[str | None] | None:
    if by is None:
        return None
    job, places = (one, pairs.a) if one.table.has_inputs or not other.table.has_inputs else (other, pairs.b)
    subsets = task_subsets(job.files, job.table, by)
    return [subsets[at] for at in places.tolist()]


def _flips(one: _Job, other: _Job, pairs: _Pairs, subsets: list[str | None] | None) -> list[Flip]:
    scored_a, scored_b = one.table.task_scored, other.table.task_scored
    flips = [
        Flip(
            task=int(one.table.tasks[a]),
            a=float(one.mean[a]),
            b=float(other.mean[b]),
            rollouts_a=int(scored_a[a]),
            rollouts_b=int(scored_b[b]),
            subset=subsets[at] if subsets else None,
        )
        for at, (a, b) in enumerate(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
        if one.mean[a] != other.mean[b]
    ]
    return sorted(flips, key=lambda flip: -abs(flip.b - flip.a))


def _changes(subsets: list[str | None], differ: Callable[[Any], Difference]) -> list[SubsetChange]:
    column = np.array(subsets, object)
    names = sorted(set(subsets), key=lambda name: (name is None, name or ""))
    differences = [differ(np.array([subset == name for subset in column])) for name in names]
    adjusted = adjust([difference.p_value for difference in differences])
    changes = [
        SubsetChange(
            subset=name,
            difference=difference,
            contribution=(difference.difference or 0.0) * difference.tasks / len(subsets),
            adjusted_p_value=p_value,
        )
        for name, difference, p_value in zip(names, differences, adjusted, strict=True)
    ]
    return sorted(changes, key=lambda change: -abs(change.contribution))
