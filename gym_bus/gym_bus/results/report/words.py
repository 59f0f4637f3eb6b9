"""What the report says in words and tables: scores, denominators, warnings, failures, times."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from gym_bus.errors import RETRYABLE, TREATMENTS
from gym_bus.results.paired import Difference, paired_difference
from gym_bus.results.report.jobs import Entry
from gym_bus.results.report.plots import colour
from gym_bus.results.report.tasks import Family, TaskRow
from gym_bus.results.report.times import seconds
from gym_bus.results.report.transcripts import advice
from gym_bus.results.statistics import Estimate

MOST_DETAILS = 4
"""Different messages shown per class of failure."""
DETAIL_CHARS = 300
NOTEWORTHY = 0.01
"""Share of cut-off answers from which the report warns of them."""


def per_cent(value: float | None, digits: int = 2) -> str:
    """A fraction as per cent."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f} %"


@dataclass(frozen=True)
class Interval:
    """An estimate, drawn: places in per cent of the width of the scale."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """What all intervals of one table are drawn on."""

    low: float
    high: float

    def place(self, estimate: Estimate) -> Interval | None:
        """Where an estimate lies; None where there is none."""
        if estimate.mean is None:
            return None
        low = estimate.mean if estimate.low is None else estimate.low
        high = estimate.mean if estimate.high is None else estimate.high
        return Interval(
            *(round(100 * (at - self.low) / (self.high - self.low), 2) for at in (estimate.mean, low, high))
        )


def scale(entries: Sequence[Entry]) -> Scale:
    """From 0 to 1 for one job; for several the stretch that their intervals cover, in steps of 5 per cent."""
    known = [e for entry in entries if (e := entry.estimates.get("pass@1")) and e.mean is not None]
    ends = [end for e in known for end in (e.mean, e.low, e.high) if end is not None]
    if not ends or (len(entries) == 1 and min(ends) >= 0 and max(ends) <= 1):
        return Scale(0.0, 1.0)
    low, high = np.floor(min(ends) * 20) / 20, np.ceil(max(ends) * 20) / 20
    return Scale(float(low), float(high if high > low else low + 0.05))


def headline(entries: Sequence[Entry], families: Sequence[Family]) -> list[dict[str, Any]]:
    """A row per job: its scores, what they are over, and its difference to the first job with the same tasks."""
    on = scale(entries)
    first = {place: family.members[0] for family in families for place in family.members}
    return [_headline(entries, place, first[place], on) for place in range(len(entries))]


def _headline(entries: Sequence[Entry], place: int, first: int, on: Scale) -> dict[str, Any]:
    entry = entries[place]
    estimates = entry.estimates
    most = max((int(name[5:]) for name in estimates if name.startswith("pass@")), default=1)
    one = estimates.get("pass@1")
    lengths, unit = entry.lengths
    known = lengths[np.isfinite(lengths) & (entry.frame["outcome"] == "scored").to_numpy()]
    return {
        "label": entry.label,
        "colour": colour(place),
        "benchmark": entry.benchmark,
        "model": entry.model,
        "pass_1": one,
        "interval": one and on.place(one),
        "k": most,
        "pass_k": estimates.get(f"pass@{most}") if most > 1 else None,
        "all_k": estimates.get(f"pass^{most}") if most > 1 else None,
        "majority": entry.votes.get(f"majority@{most}"),
        "no_answer": entry.votes.get("no answer"),
        "counts": entry.counts,
        "tasks": len(entry.table.tasks),
        "length": float(np.median(known)) if len(known) else None,
        "unit": unit,
        "work": seconds(float(np.nanmedian(entry.work_s))) if entry.timed else None,
        "difference": _difference(entries[first], entry) if place != first else None,
        "estimates": estimates,
        "components": _components(entry),
    }


def _difference(first: Entry, other: Entry) -> Difference:
    """Of the mean rewards of the tasks that both have scored, those left out whose rows differ."""
    a, b = first.scored_means, other.scored_means
    tasks = sorted(task for task in a.keys() & b.keys() if first.identity(task) == other.identity(task))
    single = max(first.table.task_scored.max(initial=0), other.table.task_scored.max(initial=0)) <= 1
    before, after = (np.array([means[task] for task in tasks]) for means in (a, b))
    return paired_difference(before, after, single=bool(single))


def _components(entry: Entry) -> dict[str, float]:
    prefix = "reward_components."
    means = {name.removeprefix(prefix): entry.frame[name].mean() for name in entry.frame if name.startswith(prefix)}
    return {name: float(mean) for name, mean in means.items() if mean == mean}


def notes(entries: Sequence[Entry], families: Sequence[Family]) -> list[str]:
    """What a reader must know before quoting a number; what holds for all jobs is said once."""
    said: dict[str, list[str]] = {}
    for entry in entries:
        for note in _notes(entry):
            said.setdefault(note, []).append(entry.label)
    told = [note if len(of) == len(entries) else f"{', '.join(of)}: {note}" for note, of in said.items()]
    if len(families) > 1:
        groups = "; ".join(_labels(entries, family) for family in families)
        told.append(f"These jobs do not all run the same tasks, or do not say which. Compare only within: {groups}.")
    return told + [
        f"{family.strangers:,} tasks of {_labels(entries, family)} have equal numbers and different rows: the data set "
        "has changed in between."
        for family in families
        if family.strangers
    ]


def _labels(entries: Sequence[Entry], family: Family) -> str:
    return ", ".join(entries[place].label for place in family.members)


def _notes(entry: Entry) -> Iterator[str]:
    counts = entry.counts
    if not counts.scored:
        yield f"None of the {counts.expected:,} rollouts has a reward, so there is no score."
        return
    if missing := counts.expected - counts.scored:
        text = f"{missing:,} of {counts.expected:,} rollouts have no reward; all scores are over the others."
        if bounds := entry.bounds():
            low, high = map(per_cent, bounds)
            text += f" If they were all wrong, pass@1 would be {low}; if all right, {high}."
        yield text
    if not entry.table.has_inputs and entry.manifest is None:
        yield "The files do not say how many rollouts were expected, only which were recorded."
    top = list(entry.estimates.values())[-1]
    if top.skipped:
        k = entry.table.rewards().shape[1]
        yield f"pass@{k} and pass^{k} leave out {top.skipped:,} tasks with fewer than {k} rewards."
    cut = float(entry.frame.loc[entry.frame["outcome"] == "scored", "incomplete"].notna().mean())
    if cut >= NOTEWORTHY:
        yield f"{per_cent(cut, 1)} of the answers were cut off before their end, mostly by the limit on tokens."
    if not entry.binary:
        yield "Rewards are not only 0 and 1: pass@1 is the mean reward, and a task's colour its mean reward."


SETUP = {
    "benchmark": "benchmark",
    "rows": "tasks",
    "num_repeats": "rollouts per task",
    "model": "model",
    "model_name": "the endpoint's model, or file of recorded answers",
    "agent": "agent",
    "agent_options": "agent options",
    "verifier": "verifier",
    "verifier_options": "verifier options",
    "verifier_digest": "verifier digest",
    "dataset_digest": "data set digest",
    "config_digest": "digest of settings that change results",
    "limit_s": "limit of a rollout, seconds",
    "gym_bus_version": "gym_bus",
    "job": "job",
}
ALWAYS_DIFFERENT = ("job", "started", "files")


@dataclass(frozen=True)
class Setting:
    """One thing about all jobs."""

    name: str
    values: list[str]
    differs: bool
    """Whether it is not the same in all, and might be a reason why scores differ."""


def setup(entries: Sequence[Entry]) -> list[Setting]:
    """What the jobs are, and in what they differ."""
    told = [_setup(entry) for entry in entries]
    names = dict.fromkeys(name for own in told for name in own)
    settings = [(name, [own.get(name, "–") for own in told]) for name in names]
    return [
        Setting(name, values, len(set(values)) > 1 and name not in ALWAYS_DIFFERENT)
        for name, values in settings
        if any(value not in ("–", "", "{}") for value in values)
    ]


def _setup(entry: Entry) -> dict[str, str]:
    manifest = entry.manifest
    told = {words: _plain(getattr(manifest, key)) for key, words in SETUP.items()} if manifest else _guessed(entry)
    if entry.sampling:
        told["sampling parameters"] = _plain(entry.sampling)
    if manifest:
        told["started"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(manifest.created_at))
    told["files"] = str(entry.files.rollouts)
    return told


def _guessed(entry: Entry) -> dict[str, str]:
    agents = entry.frame["agent"].dropna().unique()
    return {"tasks": str(len(entry.table.tasks)), "model": entry.model, "agent": ", ".join(map(str, agents))}


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return f"{value[:12]}…" if re.fullmatch("[0-9a-f]{32,}", value) else value
    return msgspec.json.encode(value).decode()


def failures(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row per job and class of failure, the most frequent first."""
    return [
        {
            "label": entry.label,
            "colour": colour(place),
            "entry": place,
            "kind": kind,
            "count": count,
            "share": count / entry.counts.expected,
            "stages": _stages(entry, kind),
            "again": kind in RETRYABLE,
            "known": kind in TREATMENTS,
            "advice": advice_parts(kind),
            "details": _details(entry, kind),
        }
        for place, entry in enumerate(entries)
        for kind, count in sorted(entry.counts.failed_by_class.items(), key=lambda item: -item[1])
    ]


def advice_parts(kind: str) -> list[tuple[str, bool]]:
    """What to do about a class of failure, in pieces: text, and whether it is code."""
    return [(text, at % 2 == 1) for at, text in enumerate(advice(kind).split("`")) if text]


def _of_kind(entry: Entry, kind: str) -> Any:
    return entry.frame[(entry.frame["failure_class"] == kind).to_numpy()]


def _stages(entry: Entry, kind: str) -> str:
    return ", ".join(sorted(map(str, _of_kind(entry, kind)["failure_stage"].dropna().unique())))


def _details(entry: Entry, kind: str) -> list[tuple[str, int]]:
    """The most frequent messages with their counts; those that differ in numbers only count as one."""
    count: Counter[str] = Counter()
    example: dict[str, str] = {}
    for detail in _of_kind(entry, kind)["failure_detail"].dropna():
        text = " ".join(str(detail)[:DETAIL_CHARS].split())
        form = re.sub(r"\d+", "#", text)
        count[form] += 1
        example.setdefault(form, text)
    return [(example[form], n) for form, n in count.most_common(MOST_DETAILS) if form]


def recovered(entries: Sequence[Entry]) -> int:
    """Rollouts that were scored after an earlier attempt had failed."""
    return sum(int(((entry.frame["attempt"] > 1) & (entry.frame["outcome"] == "scored")).sum()) for entry in entries)


def kinds(rows: Sequence[TaskRow], member: int) -> dict[str, int]:
    """How many tasks of one member of a family succeed always, sometimes and never."""
    own = [TaskRow(row.task, (row.rewards[member],)).kind for row in rows if row.rewards[member]]
    counted = Counter(own)
    return {kind: counted[kind] for kind in ("always", "sometimes", "never", "unscored")}


def title(entries: Sequence[Entry]) -> str:
    """What the page is about."""
    benchmarks = list(dict.fromkeys(filter(None, (entry.benchmark for entry in entries))))
    name = ", ".join(benchmarks) or entries[0].label
    if len(entries) > 1:
        return f"{name}: {len(entries)} jobs"
    return f"{name} · {entries[0].model}" if entries[0].model else name
