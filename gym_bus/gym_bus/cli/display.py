"""What a person sees of a job: a live line while it runs, a table when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gym_bus.cli import common
from gym_bus.results.profile import Profile
from gym_bus.workers.plan import Job
from gym_bus.workers.run import RunResult, Status

if TYPE_CHECKING:
    from gym_bus.results.flips import Totals
    from gym_bus.workers.bench import Report
    from gym_bus.workers.capacity import Needs
    from gym_bus.workers.reverify import Reverified
    from gym_bus.workers.run import Progress as RunProgress

PLAIN_EVERY_S = 10.0
"""Without a terminal, a line so often."""
MOST_FLIPS = 20
"""Changed tasks to list; all of them are in the file."""


class Live:
    """The live display of runs: a bar for each job on a terminal, a line now and then elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._runs: dict[str, RunProgress] = {}
        self._said_at = time.monotonic()

    def begin(self, run: RunProgress) -> None:
        """A run has started, or its next round has; the loop's timer keeps the display fresh."""
        first = not self._runs
        self._runs[run.job] = run
        if self._quiet:
            return
        if first and common.err.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=common.err,
                transient=True,
            )
            self._bars.start()
        if self._bars is not None and run.job not in self._tasks:
            self._tasks[run.job] = self._bars.add_task(run.job_name, state="")
        self.refresh()
        if first:
            _every(0.25, self.refresh)

    def refresh(self) -> None:
        """Show the present state."""
        if self._bars is not None:
            for job, run in self._runs.items():
                self._bars.update(self._tasks[job], total=run.total, completed=run.recorded, state=self._state(run))
        elif time.monotonic() - self._said_at > PLAIN_EVERY_S:
            self._said_at = time.monotonic()
            for run in self._runs.values():
                if run.recorded < run.total or len(self._runs) == 1:
                    counts = f"{run.recorded} of {run.total}"
                    click.echo(f"{run.job_name}: {counts}, {self._state(run)}{_left(run)}", err=True)

    @staticmethod
    def _state(run: RunProgress) -> str:
        tally = run.ledger.tally
        failed = " ".join(f"{kind} {count}" for kind, count in sorted(tally.failed.items()))
        mean = f"mean reward {tally.reward_sum / tally.scored:.4f}" if tally.scored else "no reward yet"
        parts = [f"{run.in_flight} in flight", f"{run.rate:,.0f}/s", mean, f"failed: {failed}" if failed else ""]
        return " · ".join(part for part in parts if part)

    def end(self) -> None:
        """Take the display away."""
        self._runs.clear()
        if self._bars is not None:
            self._bars.stop()


def _left(run: RunProgress) -> str:
    """Words for the time to the end, if the rate stays what it is; nothing where there is no rate yet."""
    return f" · {timedelta(seconds=round((run.total - run.recorded) / run.rate))} left" if run.finished else ""


def _every(period_s: float, action: Any) -> None:
    import asyncio

    loop = asyncio.get_running_loop()

    def tick() -> None:
        action()
        loop.call_later(period_s, tick)

    loop.call_later(period_s, tick)


@contextmanager
def live(*, quiet: bool) -> Iterator[Live]:
    """A display that is taken away however the run ends."""
    shown = Live(quiet=quiet)
    try:
        yield shown
    finally:
        shown.end()


class Summary(msgspec.Struct, kw_only=True):
    """The end of a run, for people and for `--json`. Shares and estimates are fractions of 1, not per cent."""

    job: str
    benchmark: str
    model: str
    agent: str
    verifier: str
    tasks: int
    num_repeats: int
    expected: int
    """Rollouts of the job."""
    scored: int
    failed: int
    failed_by_class: dict[str, int]
    pass_at: dict[str, Any]
    """`pass@k` to {mean, low, high, method, tasks}: 95 % intervals."""
    mean_reward: float | None
    input_tokens: int
    output_tokens: int
    wall_s: float
    rollouts_per_s: float
    resumed: bool
    files: dict[str, str]
    until_ci: dict[str, Any] | None = None
    """Of a run with `--until-ci`: the interval of pass@1 over these very tasks, and how it ended."""


def summarize(job: Job, result: RunResult, profile: Profile, until_ci: dict[str, Any] | None = None) -> Summary:
    """Everything that the closing table shows."""
    tally = result.ledger.tally
    estimates = profile.agents[0].estimates if profile.agents else {}
    if until_ci and "pass@1" in estimates:
        # Only hard tasks have many repeats: pass@k over those alone would be of other tasks than pass@1.
        estimates = {name: e for name, e in estimates.items() if e.skipped == estimates["pass@1"].skipped}
    return Summary(
        job=job.record.job,
        benchmark=job.manifest.benchmark,
        model=job.manifest.model,
        agent=job.manifest.agent,
        verifier=job.manifest.verifier,
        tasks=job.record.tasks,
        num_repeats=job.manifest.num_repeats,
        expected=profile.counts.expected,
        scored=profile.counts.scored,
        failed=profile.counts.failed,
        failed_by_class=profile.counts.failed_by_class,
        pass_at={name: msgspec.to_builtins(e) for name, e in estimates.items() if name.startswith("pass@")},
        mean_reward=tally.reward_sum / tally.scored if tally.scored else None,
        input_tokens=tally.input_tokens,
        output_tokens=tally.output_tokens,
        wall_s=result.wall_s,
        rollouts_per_s=result.finished / result.wall_s if result.wall_s else 0.0,
        resumed=job.resumed,
        files={
            "rollouts": str(job.files.rollouts),
            "failures": str(job.files.failures),
            "materialized_inputs": str(job.files.inputs),
            "reward_profiling": str(job.files.profile),
            "aggregate_metrics": str(job.files.aggregate),
            "agent_metrics": str(job.files.agent_metrics),
            "manifest": str(job.files.manifest),
        },
        until_ci=until_ci,
    )


def print_summary(s: Summary) -> None:
    """The closing table."""
    shown = common.table(f"{s.benchmark} · {s.model} · {s.job}", "", "")
    for name, estimate in s.pass_at.items():
        shown.add_row(name, estimate_words(estimate))
    if s.until_ci:
        shown.add_row("pass@1, these tasks", _until_ci_words(s.until_ci))
    uneven = "  (of all rollouts, in which tasks with more repeats count more)" if s.until_ci else ""
    shown.add_row("mean reward", "none scored" if s.mean_reward is None else f"{s.mean_reward:.4f}{uneven}")
    repeats = f"{s.num_repeats} and more, as needed" if s.until_ci else str(s.num_repeats)
    shown.add_row("rollouts", f"{s.expected:,} = {s.tasks:,} tasks x {repeats}")
    shown.add_row("scored", f"{s.scored:,}")
    shown.add_row("failed", failed_words(s))
    if missing := s.expected - s.scored - s.failed:
        shown.add_row("missing", f"{missing:,}")
    shown.add_row("tokens", f"{s.input_tokens:,} in, {s.output_tokens:,} out")
    if s.wall_s:
        shown.add_row("throughput", f"{s.rollouts_per_s:,.1f} rollouts/s over {s.wall_s:,.1f} s")
    elif s.failed:
        why = "nothing left to try: what failed cannot be mended by a repetition, or has used up results.max_attempts"
        shown.add_row("throughput", why)
    else:
        shown.add_row("throughput", "nothing left to do: the job was complete")
    shown.add_row("files", next(iter(s.files.values())).rpartition("/")[0] + "/")
    for path in s.files.values():
        shown.add_row("", path.rpartition("/")[2])
    common.out.print(shown, soft_wrap=True)


def failed_words(s: Summary) -> str:
    """How many rollouts failed, and why."""
    return f"{s.failed:,}{_classes(s.failed_by_class)}"


def _classes(failed: dict[str, int]) -> str:
    return f" ({', '.join(f'{kind} {count:,}' for kind, count in sorted(failed.items()))})" if failed else ""


def estimate_words(estimate: dict[str, Any]) -> str:
    """An estimate with its interval and the tasks that it is not over."""
    if estimate["mean"] is None:
        return "no task has enough scored rollouts"
    text = f"{100 * estimate['mean']:.2f} %"
    if estimate["low"] is not None:
        text += f"  (95 % interval {100 * estimate['low']:.2f} to {100 * estimate['high']:.2f})"
    if estimate["skipped"]:
        text += f"  [tasks left out, with too few rewards: {estimate['skipped']:,}]"
    return text


ENDED = {
    "reached": "as wanted",
    "limit": "the limits allow no more",
    "cancelled": "cancelled",
    "nothing scored": "no task has a reward",
    "too much fails": "with so many failures no number of rollouts gets there",
}


def _until_ci_words(until_ci: dict[str, Any]) -> str:
    low, high, half = 100 * until_ci["low"], 100 * until_ci["high"], 100 * until_ci["half_width"]
    how = f"{100 * until_ci['target']:.4g} wanted; {ENDED[until_ci['ended']]}; after {until_ci['rounds']} rounds"
    return f"{low:.2f} to {high:.2f} %, half-width {half:.2f} ({how})"


def print_statuses(statuses: list[Status]) -> None:
    """A line per job."""
    if not statuses:
        click.echo("no jobs on this server")
        return
    shown = common.table("jobs", "job", "state", "accepted", "results", "in flight", "failed", "mean reward")
    for s in statuses:
        shown.add_row(
            s.job,
            s.state,
            f"{s.accepted:,} of {s.total:,}",
            f"{s.results:,}",
            f"{s.in_flight:,}",
            f"{sum(s.failed.values()):,}{_classes(s.failed)}",
            "-" if s.mean_reward is None else f"{s.mean_reward:.4f}",
        )
    common.out.print(shown, soft_wrap=True)


def status_line(s: Status) -> str:
    """One job in one line."""
    mean = "-" if s.mean_reward is None else f"{s.mean_reward:.4f}"
    return (
        f"{s.job} {s.state}: {s.results:,} of {s.total:,} results, {s.requests_waiting:,} at the agents, "
        f"{s.attempts_waiting:,} at the verifiers, "
        f"failed {sum(s.failed.values()):,}{_classes(s.failed)}, mean reward {mean}"
    )


def print_reverified(report: Reverified, wall_s: float) -> None:
    """How a re-verification ended."""
    shown = common.table(f"reverified with {report.verifier}", "", "")
    shown.add_row("rollouts", f"{report.rollouts:,}")
    if report.kept:
        shown.add_row("passed on", f"{report.kept:,} lines as they were")
    for key, value in report.verifier_options.items():
        shown.add_row(key, str(value))
    flips = report.flips
    before = ", ".join(flips.verifier_digests_before) or "unknown"
    shown.add_row("verifier", f"{before} before, {report.verifier_digest} now")
    shown.add_row("mean reward", "none scored" if report.mean_reward is None else f"{report.mean_reward:.4f}")
    if flips.mean_before is not None and flips.mean_after is not None:
        means = f"{flips.mean_before:.4f} before, {flips.mean_after:.4f} now"
        shown.add_row("where both have one", f"{means} ({flips.compared:,} rollouts)")
    shown.add_row("changed", f"{report.changed:,} rewards differ from the stored ones{_flip_words(flips)}")
    shown.add_row("failed", f"{report.failed:,}{_classes(report.failed_by_class)}")
    shown.add_row("throughput", f"{report.rollouts / max(wall_s, 1e-9):,.1f} rollouts/s over {wall_s:,.1f} s")
    for words, path in (("file", report.output), ("failures", report.failures_file), ("flips", report.flips_file)):
        if path:
            shown.add_row(words, path)
    common.out.print(shown, soft_wrap=True)
    if report.tasks:
        _print_flips(report)


def _flip_words(flips: Totals) -> str:
    parts = (("up", flips.up), ("down", flips.down), ("new", flips.newly_scored))
    words = ", ".join(f"{count:,} {which}" for which, count in parts if count)
    return f": {words}, in {flips.tasks_changed:,} of {flips.tasks:,} tasks" if words else ""


def _print_flips(report: Reverified) -> None:
    total, listed = len(report.tasks), min(len(report.tasks), MOST_FLIPS)
    title = f"changed tasks, {listed:,} of {total:,}" if listed < total else f"changed tasks, all {total:,}"
    shown = common.table(title, "task", "before", "now", "rollouts", "up", "down", "new", "failed")
    for task in report.tasks[:MOST_FLIPS]:
        means = ["-" if mean is None else f"{mean:.3g}" for mean in (task.mean_before, task.mean_after)]
        counts = (task.rollouts, task.up, task.down, task.newly_scored, task.unscored)
        shown.add_row(str(task.task_index), *means, *(f"{count:,}" for count in counts))
    common.out.print(shown, soft_wrap=True)


def print_bench(report: Report) -> None:
    """The figures of a measurement."""
    shown = common.table("pipeline", "", "")
    throughput = f"{report.rollouts_per_s:,.0f} rollouts/s"
    if report.ideal_per_s:
        throughput += f", {100 * report.rollouts_per_s / report.ideal_per_s:.0f} % of what the model takes"
    shown.add_row("throughput", throughput)
    if report.refused is not None and report.model_calls and (report.refused or report.ideal_per_s):
        share = 100 * report.refused / report.model_calls
        shown.add_row("refused calls", f"{report.refused:,}, {share:.1f} % of {report.model_calls:,}")
    if report.accepted_per_s is not None:
        shown.add_row("burst", f"{report.accepted:,} requests accepted at {report.accepted_per_s:,.0f}/s")
    shown.add_row(
        "CPU",
        f"{report.cpu_ms_per_rollout:.3f} ms per rollout (model server: {report.model_cpu_ms_per_rollout:.3f} ms more)",
    )
    shown.add_row("memory", f"{report.peak_rss_mb:,.0f} MB at most, all processes but the model server")
    shown.add_row(
        "rollouts",
        f"{report.rollouts:,}, {report.failed:,} failed, {report.wall_s:,.1f} s with the start of the workers",
    )
    common.out.print(shown, soft_wrap=True)
    roles = common.table("by role", "role", "processes", "CPU ms per rollout", "peak MB")
    for role, use in report.roles.items():
        roles.add_row(role, str(use.processes), f"{use.cpu_ms_per_rollout:.3f}", f"{use.peak_rss_mb:,.0f}")
    common.out.print(roles, soft_wrap=True)
    stages = common.table("by stage", "stage", "mean ms", "p50 ms", "p99 ms")
    for name, stage in report.stages.items():
        figures = [f"{1000 * seconds:,.1f}" for seconds in (stage.mean, stage.p50, stage.p99)]
        stages.add_row(name.removesuffix("_s"), *figures)
    common.out.print(stages, soft_wrap=True)
    if report.needs:
        _print_needs(report.needs)


def _print_needs(needs: Needs) -> None:
    shown = common.table(f"for {needs.rollouts_per_s:,.0f} rollouts/s on machines like this one", "", "")
    shown.add_row("agent workers", f"{needs.agents:,}")
    shown.add_row("verifier workers", f"{needs.verifiers:,}")
    if needs.pool_cores:
        shown.add_row("pool", f"{needs.pool_cores:,.1f} cores for sandboxes and CPU-heavy verifiers")
    shown.add_row("cores", f"{needs.cores:,.1f} in all, each at most 70 % busy; the model not included")
    shown.add_row("in flight", f"{needs.in_flight:,} rollouts, and so model calls, at a time")
    common.out.print(shown, soft_wrap=True)
