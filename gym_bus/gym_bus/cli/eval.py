"""`gym-bus eval`: run, submit, watch and cancel jobs, score stored rollouts again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.benchmarks.spec import brings_code
from gym_bus.bus import Bus
from gym_bus.cli import common, display
from gym_bus.cli.adaptive import run_adaptively, take_aim, until_ci, until_options
from gym_bus.cli.analysis import aggregate, compare, profile
from gym_bus.cli.replay import replay
from gym_bus.cli.report import export, report
from gym_bus.cli.suite import suite
from gym_bus.config import Config
from gym_bus.errors import UsageError
from gym_bus.jobs import JobRecord, find_job, list_jobs
from gym_bus.results.profile import profile_job
from gym_bus.settings import MOST_REPEATS
from gym_bus.workers.plan import Job, Shard, Wanted, plan_job, write_down
from gym_bus.workers.run import RunResult, Status, cancel_job, job_status, run_job, submit_job

FAILURES = 1
POLL_S = 1.0


@click.group("eval")
def command() -> None:
    """Run benchmarks and look after the jobs."""


for part in (aggregate, compare, export, profile, replay, report, suite):
    command.add_command(part)


def job_options(function: common.F) -> common.F:
    """The options that say what a job is."""
    options = [
        click.argument("benchmark"),
        click.option("--model", metavar="NAME", help="A model of the configuration."),
        click.option("--replay", type=click.Path(path_type=Path), help="Recorded answers (JSONL) in place of a model."),
        click.option(
            "--num-repeats",
            type=click.IntRange(1, MOST_REPEATS),
            help="Rollouts per task; default: the benchmark's own.",
        ),
        click.option("--limit", type=click.IntRange(1), help="Only the first so many tasks."),
        click.option("--split", help="The benchmark's dataset, by type or name; default: its main one."),
        click.option("--input", "input_file", type=click.Path(path_type=Path), help="Rows of this file instead."),
        click.option("--shard", metavar="I/N", help="Only tasks I, I+N, I+2N, ...; `eval aggregate` merges them."),
        click.option("--agent", metavar="NAME", help="Another agent than the benchmark's own."),
        click.option(
            "--prompt", type=click.Path(path_type=Path), help="Prompt (YAML) in place of the benchmark's own."
        ),
        common.sampling_options,
        click.option(
            "--output", type=click.Path(path_type=Path), help="Folder of the files; default: runs/BENCHMARK-MODEL."
        ),
        common.config_option,
        common.nats_option,
        common.json_option,
        common.overrides_argument,
    ]
    for option in reversed(options):
        function = option(function)
    return function


def prepare_job(options: dict[str, Any], more: tuple[str, ...] = ()) -> tuple[Job, Config]:
    """The job that the options describe, written down in its folder."""
    replay: Path | None = options["replay"]
    base = [common.replay_layer(replay)] if replay else []
    overrides, changes = common.take_prefixed("benchmark", options["overrides"])
    if options["prompt"]:
        changes = (*changes, common.prompt_layer(options["prompt"]))
    sampling = common.sampling_overrides(options)
    config = common.settings(options["config_files"], [*sampling, *more, *overrides], options["nats"], base=base)
    model = common.choose_model(config, options["model"] or ("replay" if replay else None))
    common.check_model(model, config.models[model])
    wanted = Wanted(
        benchmark=options["benchmark"],
        model=model,
        num_repeats=options["num_repeats"],
        limit=options["limit"],
        split=options["split"],
        input=options["input_file"],
        agent=options["agent"],
        shard=Shard.parse(options["shard"]) if options["shard"] else None,
        changes=changes,
    )
    plan = plan_job(wanted, config)
    if brings_code(plan.benchmark.spec):
        config = common.with_folders(config, plan.benchmark.folder / plan.benchmark.config)
    if config.bus.url is not None:  # before anything is written: a run that cannot start must not take the folder
        common.run(common.reach(config))
    shard = f"-{wanted.shard.index}-of-{wanted.shard.count}" if wanted.shard else ""
    output: Path = options["output"] or Path("runs") / f"{plan.benchmark.spec.name}-{model}{shard}"
    return write_down(plan, output), config


@command.command("run")
@job_options
@click.option("--concurrency", type=click.IntRange(1), help="Rollouts in flight per agent worker.")
@click.option("--no-workers", is_flag=True, help="Only publish and record; workers are elsewhere (with --nats).")
@until_options
def run(concurrency: int | None, no_workers: bool, as_json: bool, **options: Any) -> int:
    """Run BENCHMARK to the end and show its scores. The same command again resumes it.

    Without --nats everything runs on this machine: an embedded nats-server, worker processes, the results consumer.
    """
    if no_workers and not options["nats"] and not _has_url(options):
        raise UsageError("--no-workers needs --nats URL: nobody else can join an embedded server")
    more = (f"agent.concurrency={concurrency}",) if concurrency else ()
    aim = take_aim(options)
    job, config = prepare_job(options, more)
    if aim is not None:
        adapted = run_adaptively(job, config, aim, workers=not no_workers, quiet=as_json)
        return finish(adapted.job, adapted.result, as_json=as_json, known=until_ci(adapted, aim))
    with display.live(quiet=as_json) as shown:
        result = common.run(run_job(job, config, workers=not no_workers, on_start=shown.begin))
    return finish(job, result, as_json=as_json)


def finish(job: Job, result: RunResult, *, as_json: bool, known: dict[str, Any] | None = None) -> int:
    """Profile, report, and say by the exit code whether there are failures."""
    summary = display.summarize(job, result, profile_job(job.files), known)
    if as_json:
        common.print_json(summary)
    else:
        display.print_summary(summary)
    return FAILURES if summary.failed else 0


@command.command("submit")
@job_options
def submit(as_json: bool, **options: Any) -> int:
    """Publish BENCHMARK for workers elsewhere and return the job's id; a results worker writes the files."""
    if not options["nats"] and not _has_url(options):
        raise UsageError("submit needs --nats URL: the job lives on the bus when this command has ended")
    job, config = prepare_job(options)
    count = common.run(_submit(job, config))
    if as_json:
        common.print_json({"job": job.record.job, "rollouts": count})
    else:
        click.echo(job.record.job)
    return 0


def _has_url(options: dict[str, Any]) -> bool:
    overrides, _ = common.take_prefixed("benchmark", options["overrides"])
    return common.settings(options["config_files"], overrides).bus.url is not None


async def _submit(job: Job, config: Config) -> int:
    async with await Bus.connect(config.bus) as bus:
        await bus.init()
        return await submit_job(bus, job)


def bus_options(function: common.F) -> common.F:
    """The options of commands that only look at the bus."""
    for option in (common.overrides_argument, common.json_option, common.nats_option, common.config_option):
        function = option(function)
    return function


@command.command("status")
@click.option("--job", help="Only this job.")
@bus_options
def status(
    job: str | None, config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]
) -> int:
    """Show how the jobs on a bus stand; `eval status JOB` and `--job JOB` show one."""
    names, overrides = map(tuple, common.names_and_overrides(overrides))
    if len(names) > (job is None):
        raise UsageError(f"one job, or all of them, not {', '.join((*filter(None, (job,)), *names))}")
    config = common.settings(config_files, overrides, nats)
    found = common.run(_statuses(config, job or next(iter(names), None)))
    if as_json:
        common.print_json(found)
    else:
        display.print_statuses(found)
    return 0


async def _statuses(config: Config, job: str | None) -> list[Status]:
    async with await Bus.connect(config.bus) as bus:
        records = [await find_job(bus, job)] if job else await list_jobs(bus)
        return [await job_status(bus, record) for record in records]


@command.command("watch")
@click.argument("job")
@bus_options
def watch(job: str, config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]) -> int:
    """Follow JOB until it is over; exit 1 where it has failures."""
    config = common.settings(config_files, overrides, nats)
    last = common.run(_watch(config, job, as_json=as_json))
    return FAILURES if last.failed else 0


async def _watch(config: Config, job: str, *, as_json: bool) -> Status:
    async with await Bus.connect(config.bus) as bus:
        while True:
            record = await find_job(bus, job)
            now = await job_status(bus, record)
            click.echo(msgspec.json.encode(now) if as_json else display.status_line(now))
            if record.over and now.in_flight == 0:
                return now
            await asyncio.sleep(POLL_S)


@command.command("cancel")
@click.argument("job")
@bus_options
def cancel(job: str, config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]) -> int:
    """Stop JOB: nothing of it starts any more; what has no result yet fails as cancelled."""
    config = common.settings(config_files, overrides, nats)
    count = common.run(_cancel(config, job))
    if as_json:
        common.print_json({"job": job, "cancelled": count})
    else:
        click.echo(f"{job}: {count} rollouts cancelled")
    return 0


async def _cancel(config: Config, job: str) -> int:
    async with await Bus.connect(config.bus) as bus:
        record: JobRecord = await find_job(bus, job)
        if record.over:
            raise UsageError(f"job {job} is {record.state} already")
        if (await job_status(bus, record)).results >= record.total:
            raise UsageError(f"job {job} has all its results already")
        return await cancel_job(bus, record)


@command.command("reverify")
@click.option("--rollouts", type=click.Path(path_type=Path), required=True, help="Stored rollouts (JSONL).")
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Their materialized inputs, where rollouts lack fields."
)
@click.option("--verifier", required=True, metavar="NAME", help="Who scores; options: job.verifier_options.KEY=VALUE.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="File of the scored rows (JSONL).")
@click.option(
    "--judge-failed-only",
    is_flag=True,
    help="Only rollouts whose check failed, those of the failures file included; the others are passed on.",
)
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def reverify(
    rollouts: Path,
    inputs: Path | None,
    verifier: str,
    output: Path,
    judge_failed_only: bool,
    config_files: tuple[str, ...],
    nats: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> int:
    """Score stored rollouts, ours or NeMo Gym's, again, through the bus and without a model.

    Rows keep their order and their keys. Beside OUTPUT are written OUTPUT_flips.jsonl, the tasks whose rewards changed,
    and, where there are any, OUTPUT_failures.jsonl, the rows that could not be judged.
    """
    from gym_bus.workers.reverify import Asked, reverify_file

    config = common.settings(config_files, overrides, nats)
    asked = Asked(
        rollouts=rollouts, inputs=inputs, verifier=verifier, output=output, judge_failed_only=judge_failed_only
    )
    started = time.monotonic()
    with display.live(quiet=as_json) as shown:
        report = common.run(reverify_file(asked, config, on_start=shown.begin))
    wall_s = time.monotonic() - started
    if as_json:
        common.print_json({**msgspec.to_builtins(report), "wall_s": wall_s})
    else:
        display.print_reverified(report, wall_s)
    return FAILURES if report.failed else 0
