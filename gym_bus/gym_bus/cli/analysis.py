"""`gym-bus eval profile|aggregate|compare`: what stored rollouts say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.cli import common
from gym_bus.cli.display import estimate_words
from gym_bus.errors import UsageError
from gym_bus.results.compare import Comparison, Flip, Side, compare_jobs
from gym_bus.results.files import JobFiles
from gym_bus.results.merge import Merged, merge_jobs
from gym_bus.results.paired import Difference
from gym_bus.results.profile import AgentProfile, Options, Profile, foreign_file, profile_job
from gym_bus.results.table import Counts

MOST_FLIPS = 20

by_option = click.option(
    "--by", metavar="FIELD", help="Row field that divides the tasks into subsets, such as difficulty or meta.level."
)
answer_key_option = click.option(
    "--answer-key", metavar="FIELD", help="Field that majority votes are held over; default: the verifier's known one."
)
path_type = click.Path(path_type=Path)


@click.command("profile")
@click.argument("path", type=path_type, metavar="FOLDER_OR_FILE")
@click.option("--output", type=path_type, help="Folder of the profile; default: beside the rollouts.")
@by_option
@answer_key_option
@common.json_option
def profile(path: Path, output: Path | None, by: str | None, answer_key: str | None, as_json: bool) -> int:
    """Compute the statistics of stored rollouts, ours or NeMo Gym's, finished or not.

    Names and formulas are NeMo Gym's. Several files of one run are merged first, with `gym-bus eval aggregate`.
    """
    files = JobFiles.found_at(path)
    into = _output_of(files, output)
    found = profile_job(files, Options(by=by, answer_key=answer_key), into=into)
    written = [str(at) for at in (into.profile, into.aggregate, into.agent_metrics)]
    if as_json:
        common.print_json({**msgspec.to_builtins(found), "files": written})
    else:
        print_profile(found, str(files.rollouts), written)
    return 0


def _output_of(files: JobFiles, output: Path | None) -> JobFiles:
    if output is None:
        if foreign := foreign_file(files):
            raise UsageError(
                f"{foreign} was written by NeMo Gym; say where ours go with --output FOLDER, so that it stays"
            )
        return files
    _make_folder(output)
    return JobFiles(output, files.stem)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"--output {output}: cannot be created: {e.strerror or e}") from None


@click.command("aggregate")
@click.argument("paths", nargs=-1, required=True, type=path_type, metavar="FOLDER_OR_FILE...")
@click.option("--output", required=True, type=path_type, help="Folder of the merged files and their profile.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier merge has left there.")
@by_option
@answer_key_option
@common.json_option
def aggregate(
    paths: tuple[Path, ...],
    output: Path,
    overwrite: bool,
    by: str | None,
    answer_key: str | None,
    as_json: bool,
) -> int:
    """Merge the shards of a run, or several files of one, and profile them together.

    A rollout that several of them have must be the same in all; then it counts once.
    """
    jobs = [JobFiles.found_at(path) for path in paths]
    into = JobFiles(output)
    if output.resolve() in {job.folder.resolve() for job in jobs}:
        raise UsageError(f"--output {output}: one of the folders to merge; choose another")
    if into.rollouts.exists() and not overwrite:
        raise UsageError(f"--output {output}: there are rollouts in it; --overwrite replaces them")
    merged = merge_jobs(jobs, into)
    found = profile_job(into, Options(by=by, answer_key=answer_key))
    written = [str(at) for at in (into.rollouts, into.profile, into.aggregate, into.agent_metrics)]
    if as_json:
        common.print_json({**msgspec.to_builtins(merged), **msgspec.to_builtins(found), "files": written})
    else:
        _print_merged(merged)
        print_profile(found, str(into.rollouts), written)
    return 0


def _print_merged(merged: Merged) -> None:
    repeated = f", {merged.repeated:,} of them in several" if merged.repeated else ""
    click.echo(f"merged {merged.rollouts:,} rollouts of {merged.jobs} files{repeated}")
    if merged.missing_shards:
        click.echo(f"warning: shards that are missing: {', '.join(merged.missing_shards)}", err=True)


def print_profile(found: Profile, title: str, files: list[str]) -> None:
    """A table per agent."""
    for agent in found.agents:
        shown = common.table(f"{title} · {agent.agent}", "", "")
        shown.add_row("rollouts", _completion(agent.counts))
        for name, estimate in agent.estimates.items():
            shown.add_row(name, estimate_words(msgspec.to_builtins(estimate)))
        _add_metrics(shown, agent)
        common.out.print(shown, soft_wrap=True)
        _print_subsets(agent)
    if not found.agents:
        click.echo(f"{title}: no rollouts")
    click.echo("\n".join(files))


def _completion(counts: Counts) -> str:
    share = f" ({100 * counts.scored / counts.expected:.1f} %)" if counts.expected else ""
    failed = ", ".join(f"{kind} {count:,}" for kind, count in counts.failed_by_class.items())
    rest = [
        f"{counts.failed:,} failed: {failed}" if counts.failed else "",
        f"{counts.pending:,} without a result" if counts.pending else "",
    ]
    return "; ".join([f"{counts.scored:,} of {counts.expected:,} scored{share}", *filter(None, rest)])


def _add_metrics(shown: Any, agent: AgentProfile) -> None:
    metrics = agent.agent_metrics
    k = len(metrics.get("per_sample_aggregate", {}).get("accuracy", ()))
    for name, words in (
        (f"majority@{k}/accuracy", f"majority@{k}"),
        ("pass@1/no_answer", "no answer"),
        (f"pass@1[avg-of-{k}]/accuracy/std_dev_across_runs", "spread between repeats"),
    ):
        if name in metrics:
            shown.add_row(words, f"{metrics[name]:.2f} %")
    for name in ("mean/reward", "mean/output_tokens"):
        if name in metrics:
            shown.add_row(name.replace("mean/", "mean "), f"{metrics[name]:,.4f}".rstrip("0").rstrip("."))


def _print_subsets(agent: AgentProfile) -> None:
    if not agent.subsets:
        return
    shown = common.table("by subset", "subset", "scored", "of", "pass@1")
    for name, subset in agent.subsets.items():
        estimate = msgspec.to_builtins(subset.estimates["pass@1"]) if subset.estimates else None
        shown.add_row(
            name,
            f"{subset.counts.scored:,}",
            f"{subset.counts.expected:,}",
            estimate_words(estimate) if estimate else "nothing scored",
        )
    common.out.print(shown, soft_wrap=True)


@click.command("compare")
@click.argument("a", type=path_type)
@click.argument("b", type=path_type)
@by_option
@click.option("--flips", type=click.IntRange(0), default=MOST_FLIPS, show_default=True, help="Changed tasks to list.")
@common.json_option
def compare(a: Path, b: Path, by: str | None, flips: int, as_json: bool) -> int:
    """Tell how B differs from A, task by task: how much, how surely, where, and whether only one thing was varied.

    A and B are folders of jobs or their rollouts files, ours or NeMo Gym's.
    """
    found = compare_jobs(JobFiles.found_at(a), JobFiles.found_at(b), by=by)
    if as_json:
        common.print_json(found)
    else:
        _print_comparison(found, by, flips)
    return 0


def _print_comparison(found: Comparison, by: str | None, flips: int) -> None:
    for warning in found.warnings:
        click.secho(f"WARNING: {warning}", err=True, fg="yellow", bold=True)
    shown = common.table("compared", "", "A", "B")
    for words, values in (
        ("job", [side.job or side.path for side in (found.a, found.b)]),
        ("model", [side.model or "unknown" for side in (found.a, found.b)]),
        ("rollouts", [_completion(side.counts) for side in (found.a, found.b)]),
        ("pass@1 of all its tasks", [_pass_at_1(side) for side in (found.a, found.b)]),
    ):
        shown.add_row(words, *values)
    for change in found.varied:
        shown.add_row(f"varied: {change.what}", change.a, change.b)
    common.out.print(shown, soft_wrap=True)
    _print_difference(found)
    if found.subsets:
        _print_subset_changes(found, by or "")
    if flips and found.flips:
        _print_flips(found.flips[:flips], len(found.flips))


def _pass_at_1(side: Side) -> str:
    mean = side.pass_at_1.mean
    return "nothing scored" if mean is None else f"{100 * mean:.2f} % of {side.pass_at_1.tasks:,} tasks"


def _print_difference(found: Comparison) -> None:
    d, pairing = found.difference, found.pairing
    shown = common.table("difference, B - A", "", "")
    shown.add_row("tasks", f"{pairing.paired:,} paired by {pairing.by}{_left_out(found)}")
    shown.add_row("rollouts", f"{pairing.rollouts_a:,} of A, {pairing.rollouts_b:,} of B")
    shown.add_row("mean", f"{_share(d.mean_a)} to {_share(d.mean_b)}")
    shown.add_row("difference", f"{_points(d.difference)} points{_interval(d.low, d.high)}")
    if d.p_value is not None:
        beside = f", paired t {d.t_p_value:.2g}" if d.t_p_value is not None else ""
        shown.add_row("p value", f"{d.p_value:.2g} ({d.method.partition(',')[0]}{beside})")
    if d.bootstrap_low is not None:
        shown.add_row("bootstrap", _interval(d.bootstrap_low, d.bootstrap_high).strip(" ()"))
    if d.detectable is not None:
        shown.add_row("could have shown", f"{100 * d.detectable:.2f} points or more (power 80 %, level 5 %)")
    shown.add_row("changed", f"tasks better in B: {found.gained:,}, worse: {found.lost:,}")
    shown.add_row("so", _verdict(d))
    common.out.print(shown, soft_wrap=True)


def _left_out(found: Comparison) -> str:
    p = found.pairing
    parts = {
        "only in A": p.only_a,
        "only in B": p.only_b,
        "with another row": p.changed,
        "without a reward in one": p.unscored,
    }
    named = ", ".join(f"{count:,} {words}" for words, count in parts.items() if count)
    return f"; left out: {named}" if named else ""


def _verdict(d: Difference) -> str:
    if d.p_value is None:
        return "one task says nothing about others"
    if not d.significant:
        return "no difference is shown; that is no proof that there is none"
    return f"B is {'better' if (d.difference or 0) > 0 else 'worse'} on tasks like these"


def _print_subset_changes(found: Comparison, by: str) -> None:
    title = f"by {by}: what adds up to the difference"
    shown = common.table(title, "subset", "tasks", "A", "B", "difference", "adds", "p (Holm)")
    for change in found.subsets:
        d = change.difference
        shown.add_row(
            change.subset if change.subset is not None else "(none)",
            f"{d.tasks:,}",
            _share(d.mean_a),
            _share(d.mean_b),
            f"{_points(d.difference)}{_interval(d.low, d.high)}",
            _points(change.contribution),
            "-" if change.adjusted_p_value is None else f"{change.adjusted_p_value:.2g}",
        )
    common.out.print(shown, soft_wrap=True)


def _print_flips(flips: list[Flip], total: int) -> None:
    title = f"changed tasks, {len(flips):,} of {total:,}" if len(flips) < total else f"changed tasks, all {total:,}"
    shown = common.table(title, "task", "A", "B", *(["subset"] if any(flip.subset for flip in flips) else []))
    for flip in flips:
        shown.add_row(
            str(flip.task),
            f"{flip.a:.3g} (of {flip.rollouts_a})",
            f"{flip.b:.3g} (of {flip.rollouts_b})",
            *([flip.subset or ""] if len(shown.columns) > 3 else []),
        )
    common.out.print(shown, soft_wrap=True)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95 % interval {100 * low:+.2f} to {100 * high:+.2f})"
