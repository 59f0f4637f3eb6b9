"""`gym-bus eval suite`: several benchmarks times several models, by one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.benchmarks.spec import brings_code
from gym_bus.cli import common, display
from gym_bus.config import Config, Layer
from gym_bus.errors import ConfigError, GymBusError, UsageError, did_you_mean
from gym_bus.results.disk import replace_file
from gym_bus.results.profile import profile_job
from gym_bus.settings import MOST_REPEATS
from gym_bus.workers.plan import Job, Plan, Size, Wanted, plan_job, size_of, write_down
from gym_bus.workers.run import RunResult
from gym_bus.workers.suite import Part, Suite, read_suite
from gym_bus.workers.together import run_jobs

FAILURES = 1


class Planned(msgspec.Struct, frozen=True):
    """A job of the suite, checked."""

    part: Part
    plan: Plan
    folder: Path


class JobSummary(display.Summary, kw_only=True):
    """The end of one job, and which of the suite's it is."""

    name: str
    """Of the benchmark in the suite."""


class SuiteSummary(msgspec.Struct, kw_only=True):
    """The contents of `summary.json`."""

    suite: str
    file: str
    output: str
    jobs: list[JobSummary]
    """In the suite's order; those of earlier runs with `--only`, too."""


@click.command("suite")
@click.argument("file", type=click.Path(path_type=Path), metavar="SUITE.yaml")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of all jobs; default: runs/NAME of the suite.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this benchmark of the suite; may be repeated.")
@click.option("--num-repeats", type=click.IntRange(1, MOST_REPEATS), help="Rollouts per task, whatever the suite says.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many tasks of each benchmark.")
@click.option("--split", help="This dataset of each benchmark.")
@common.sampling_options
@click.option("--concurrency", type=click.IntRange(1), help="Rollouts in flight per agent worker, all jobs together.")
@click.option("--no-workers", is_flag=True, help="Only publish and record; workers are elsewhere (with --nats).")
@click.option("--dry-run", is_flag=True, help="Check everything and show the jobs with their sizes; run nothing.")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def suite(file: Path, only: tuple[str, ...], dry_run: bool, no_workers: bool, as_json: bool, **options: Any) -> int:
    """Run every benchmark of SUITE.yaml with every model, over one server and one set of workers.

    Each job has a folder of its own, OUTPUT/BENCHMARK/MODEL. The same command again resumes what is not complete.

    KEY=VALUE are settings; benchmark.KEY=VALUE changes every benchmark, suite.KEY=VALUE the suite itself.
    """
    overrides, own = common.take_prefixed("suite", options["overrides"])
    overrides, changes = common.take_prefixed("benchmark", overrides)
    found = read_suite(file, own)
    output: Path = options["output"] or Path("runs") / found.name
    more = [f"agent.concurrency={options['concurrency']}"] if options["concurrency"] else []
    options["overrides"] = [*common.sampling_overrides(options), *more, *overrides]
    config = _settings(found, options)
    if no_workers and config.bus.url is None:
        raise UsageError("--no-workers needs --nats URL: nobody else can join an embedded server")
    planned = _plan(found, only, changes, options, output)
    if dry_run:
        return _show(found, planned, as_json=as_json)
    if config.bus.url is not None:  # before anything is written: a suite that cannot start must not take the folder
        common.run(common.reach(config))
    return _run(found, file, planned, _for_workers(config, planned), output, workers=not no_workers, as_json=as_json)


def _settings(found: Suite, options: dict[str, Any], over: Sequence[Layer] = ()) -> Config:
    return common.settings(
        options["config_files"], options["overrides"], options["nats"], base=[found.settings], over=over
    )


def _plan(
    found: Suite, only: Sequence[str], changes: tuple[Layer, ...], options: dict[str, Any], output: Path
) -> list[Planned]:
    """Every job. Raises ConfigError that names all parts of the suite that cannot be run."""
    planned: list[Planned] = []
    problems = []
    for part in found.chosen(only):
        try:
            config = _settings(found, options, part.job)
            planned += [_planned(part, model, config, changes, options, output) for model in _models(part, config)]
        except GymBusError as e:
            problems.append(str(e))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return planned


def _models(part: Part, config: Config) -> Sequence[str]:
    """The part's models, checked."""
    for model in part.models:
        if model not in config.models:
            raise ConfigError(f"{part.models_where}: unknown model {model!r}: {did_you_mean(model, config.models)}")
        if "/" in model or model.startswith("."):
            raise ConfigError(f"{part.models_where}: {model!r} cannot name a folder: call the model otherwise")
        common.check_model(model, config.models[model])
    return part.models


def _planned(
    part: Part, model: str, config: Config, changes: tuple[Layer, ...], options: dict[str, Any], output: Path
) -> Planned:
    wanted = Wanted(
        benchmark=part.benchmark,
        model=model,
        num_repeats=options["num_repeats"],
        limit=options["limit"] or part.limit,
        split=options["split"] or part.split,
        input=part.input,
        changes=(*part.changes, *changes),
    )
    try:
        return Planned(part, plan_job(wanted, config), output / part.name / model)
    except GymBusError as e:
        raise ConfigError(f"{part.where}: {e}") from None


def _for_workers(config: Config, planned: Sequence[Planned]) -> Config:
    """The settings of workers that serve all of these jobs."""
    names = config.verifier.names or tuple(dict.fromkeys(p.plan.verifier for p in planned))
    config = msgspec.structs.replace(config, verifier=msgspec.structs.replace(config.verifier, names=names))
    benchmarks = [p.plan.benchmark for p in planned if brings_code(p.plan.benchmark.spec)]
    return common.with_folders(config, *(b.folder / b.config for b in benchmarks))


def _run(
    found: Suite,
    file: Path,
    planned: Sequence[Planned],
    config: Config,
    output: Path,
    *,
    workers: bool,
    as_json: bool,
) -> int:
    jobs = [write_down(p.plan, p.folder) for p in planned]
    whole = len(planned) == sum(len(part.models) for part in found.parts)
    with display.live(quiet=as_json) as shown:
        running = run_jobs(
            jobs,
            config,
            output,
            at_once=found.jobs_at_once,
            workers=workers,
            last=whole,
            on_start=shown.begin,
        )
        results = common.run(running)
    ended = [_summary(*job) for job in zip(planned, jobs, results, strict=True)]
    summary = SuiteSummary(
        suite=found.name, file=str(file), output=str(output), jobs=_with_earlier(found, ended, output / "summary.json")
    )
    replace_file(output / "summary.json", [msgspec.json.format(msgspec.json.encode(summary), indent=2), b"\n"])
    if as_json:
        common.print_json(summary)
    else:
        _print_summary(found, ended, output)
    return FAILURES if any(job.failed for job in ended) else 0


def _summary(planned: Planned, job: Job, result: RunResult) -> JobSummary:
    summary = display.summarize(job, result, profile_job(job.files))
    return JobSummary(name=planned.part.name, **{key: getattr(summary, key) for key in summary.__struct_fields__})


def _with_earlier(found: Suite, ended: Sequence[JobSummary], path: Path) -> list[JobSummary]:
    """The jobs of this run and, of those that it was not to run, what an earlier one has written down."""
    try:
        earlier = msgspec.json.decode(path.read_bytes(), type=SuiteSummary).jobs
    except (OSError, msgspec.DecodeError):
        earlier = []
    known = {(job.name, job.model): job for job in (*earlier, *ended)}
    order = [(part.name, model) for part in found.parts for model in part.models]
    return [known[key] for key in order if key in known]


def _print_summary(found: Suite, ended: Sequence[JobSummary], output: Path) -> None:
    models = dict.fromkeys(job.model for job in ended)
    cells = {(job.name, job.model): _cell(job) for job in ended}
    shown = common.table(f"{found.name}: pass@1 with 95 % intervals", "benchmark", *models)
    for name in dict.fromkeys(job.name for job in ended):
        shown.add_row(name, *(cells.get((name, model), "") for model in models))
    common.out.print(shown, soft_wrap=True)
    for job in ended:
        if job.failed:
            click.echo(f"{job.name}, {job.model}: {display.failed_words(job)}")
    click.echo(f"{output}/summary.json")


def _cell(job: JobSummary) -> str:
    estimate = job.pass_at.get("pass@1")
    if estimate is None or estimate["mean"] is None:
        text = "none scored"
    else:
        text = f"{100 * estimate['mean']:.2f} %"
        if estimate["low"] is not None:
            text += f" ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"
    return f"{text}, {job.failed:,} failed" if job.failed else text


class PlannedJob(msgspec.Struct, kw_only=True):
    """One line of `--dry-run --json`."""

    name: str
    benchmark: str
    model: str
    agent: str
    agent_options: dict[str, Any]
    verifier: str
    verifier_options: dict[str, Any]
    split: str
    sampling: dict[str, Any]
    seeds: int | None
    tasks: int
    num_repeats: int
    rollouts: int
    output: str
    written_down: bool
    """Whether its folder has a job already, which a run would resume."""


def _show(found: Suite, planned: Sequence[Planned], *, as_json: bool) -> int:
    sizes: dict[str, Size] = {}
    for p in planned:  # the models of a benchmark get the same rows
        sizes[p.part.name] = sizes.get(p.part.name) or size_of(p.plan)
    jobs = [_planned_job(p, sizes[p.part.name]) for p in planned]
    if as_json:
        common.print_json({"suite": found.name, "jobs": jobs, "rollouts": sum(job.rollouts for job in jobs)})
        return 0
    shown = common.table(found.name, "benchmark", "model", "data", "tasks", "repeats", "rollouts", "folder")
    for job in jobs:
        folder = f"{job.output} (resumed)" if job.written_down else job.output
        numbers = (f"{job.tasks:,}", f"{job.num_repeats:,}", f"{job.rollouts:,}")
        shown.add_row(job.name, job.model, f"{job.benchmark}/{job.split}", *numbers, folder)
    common.out.print(shown, soft_wrap=True)
    click.echo(f"{sum(job.rollouts for job in jobs):,} rollouts in {len(jobs):,} jobs; nothing was run")
    return 0


def _planned_job(planned: Planned, size: Size) -> PlannedJob:
    plan = planned.plan
    return PlannedJob(
        name=planned.part.name,
        benchmark=plan.benchmark.spec.name,
        model=plan.wanted.model,
        agent=plan.agent,
        agent_options=plan.agent_options,
        verifier=plan.verifier,
        verifier_options=plan.verifier_options,
        split=plan.split,
        sampling=plan.config.job.sampling,
        seeds=plan.config.job.seeds,
        tasks=size.tasks,
        num_repeats=plan.repeats,
        rollouts=size.rollouts,
        output=str(planned.folder),
        written_down=(planned.folder / "job.json").exists(),
    )
