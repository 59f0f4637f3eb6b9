"""`gym-bus eval replay`: try failed rollouts of a job again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.cli import common, display
from gym_bus.cli.target import Target, find_target, locate, nowhere
from gym_bus.config import Config
from gym_bus.errors import UsageError
from gym_bus.jobs import JobRecord
from gym_bus.results.profile import profile_job
from gym_bus.workers.again import Chosen
from gym_bus.workers.plan import Job, check_verifier, config_digest, open_job
from gym_bus.workers.replay import ReplayOrder, Selection, order_replay, parse_classes, parse_tasks, replay_job

FAILURES = 1


@click.command("replay")
@click.argument("job", metavar="JOB_OR_FOLDER")
@click.option("--class", "classes", multiple=True, metavar="CLASS", help="Only this failure class; may be repeated.")
@click.option("--task", "tasks", multiple=True, metavar="TASKS", help="Only task 17, tasks 10-19, or rollout 17/3.")
@click.option(
    "--from-stage",
    "stage",
    type=common.Choice(["agent", "verifier"]),
    help="agent: generate again; verifier: only check stored answers again. Default: check where there is an answer.",
)
@click.option("--limit-s", type=click.FloatRange(0, min_open=True), help="Another wall-clock limit of a rollout.")
@click.option(
    "--replay", "recorded", type=click.Path(path_type=Path), help="Recorded answers, of a job that was run with them."
)
@click.option("--concurrency", type=click.IntRange(1), help="Rollouts in flight per agent worker.")
@click.option("--workers", is_flag=True, help="With --nats: start workers here, too.")
@click.option("--force", is_flag=True, help="Even if the model's settings are not those of the job.")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def replay(
    job: str,
    classes: tuple[str, ...],
    tasks: tuple[str, ...],
    stage: Literal["agent", "verifier"] | None,
    limit_s: float | None,
    recorded: Path | None,
    concurrency: int | None,
    workers: bool,
    force: bool,
    config_files: tuple[str, ...],
    nats: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> int:
    """Try failed rollouts of a job again, in the same job: results join its files, with the history of what failed.

    Without --nats everything runs on this machine, as with `eval run`; the models are those of the configuration. With
    --nats the workers that have joined do the work, and of a submitted job its results worker writes the files.
    """
    chosen_classes = parse_classes(classes)
    more = (f"agent.concurrency={concurrency}",) if concurrency else ()
    base = [common.replay_layer(recorded)] if recorded else []
    config = common.settings(config_files, [*overrides, *more], nats, base=base)
    target = find_target(job)

    def selection_of(record: JobRecord) -> Selection:
        return Selection(classes=chosen_classes, tasks=parse_tasks(tasks, record), stage=stage)

    if config.bus.url is not None:
        ordered = common.run(_order(config, target, selection_of, limit_s))
        if isinstance(ordered, _Ordered):
            return _tell_ordered(target.job, ordered.order, as_json=as_json)
        target = msgspec.structs.replace(target, folder=ordered)
    if target.folder is None:
        raise nowhere(job)
    opened = _open(target.folder, config, limit_s)
    local = config.bus.url is None or workers

    def check(chosen: Chosen) -> None:
        _check_verifier(opened, config)
        if local and chosen.from_agent:
            _check_model(opened, config, force=force)

    selection = selection_of(opened.record)
    with display.live(quiet=as_json) as shown:
        done = common.run(
            replay_job(
                opened, _with_limit(config, limit_s), selection, workers=local, check=check, on_start=shown.begin
            )
        )
    if not done.chosen.attempts:
        return _tell_nothing(opened.record.job, done.result.ledger.tally.failed, done.chosen, as_json=as_json)
    summary = display.summarize(opened, done.result, profile_job(opened.files))
    if as_json:
        common.print_json({**_counts(done.chosen), **msgspec.structs.asdict(summary)})
    else:
        click.echo(_words(done.chosen))
        display.print_summary(summary)
    return FAILURES if summary.failed else 0


class _Ordered(msgspec.Struct):
    """A submitted job's replay; None where no results worker has taken it yet."""

    order: ReplayOrder | None


async def _order(
    config: Config, target: Target, selection_of: Callable[[JobRecord], Selection], limit_s: float | None
) -> _Ordered | Path | None:
    """Order the replay of a submitted job; of another one, the folder of its files."""
    async with await Bus.connect(config.bus) as bus:
        if target.folder is not None and await bus.state.get(subjects.JOBS, target.job, JobRecord) is None:
            return target.folder  # a job of another server, or of a local run: it moves here
        record, folder = await locate(bus, target)
        if record.shared:
            return _Ordered(await order_replay(bus, record.job, selection_of(record), limit_s))
        if folder is None:
            raise UsageError(
                f"the files of job {record.job} are where it was run, and not on this machine: give their folder there"
            )
        return folder


def _open(folder: Path, config: Config, limit_s: float | None) -> Job:
    job = open_job(folder, config.job.lane)
    if limit_s is None:
        return job
    return msgspec.structs.replace(job, order=msgspec.structs.replace(job.order, limit_s=limit_s))


def _with_limit(config: Config, limit_s: float | None) -> Config:
    if limit_s is None or limit_s <= config.agent.limit_s:
        return config
    return msgspec.structs.replace(config, agent=msgspec.structs.replace(config.agent, limit_s=limit_s))


def _check_verifier(job: Job, config: Config) -> None:
    """Say where the verifier is another one than the rest of the job was scored with: it may just have been mended."""
    now = check_verifier(job.manifest.verifier, job.manifest.verifier_options, config)
    if now != job.manifest.verifier_digest:
        click.echo(
            f"note: verifier {job.manifest.verifier!r} has changed since the job began ({job.manifest.verifier_digest} "
            f"then, {now} now); `gym-bus eval reverify` scores all rollouts alike",
            err=True,
        )


def _check_model(job: Job, config: Config, *, force: bool) -> None:
    name = common.choose_model(config, job.manifest.model)
    model = config.models[name]
    common.check_model(name, model)
    if not force and config_digest(model, job.manifest.limit_s) != job.manifest.config_digest:
        raise UsageError(
            f"model {name!r} is not set up as when the job was run (sampling, extra_body, return_tokens, api or its "
            "recorded answers differ): its rollouts would not be of one kind. Give the settings of the run, or --force"
        )


def _counts(chosen: Chosen) -> dict[str, Any]:
    return {
        "replayed": len(chosen.attempts),
        "from_agent": chosen.from_agent,
        "from_verifier": chosen.from_verifier,
        "without_answer": chosen.without_answer,
    }


def _words(chosen: Chosen) -> str:
    parts = [f"{chosen.from_agent:,} generated again", f"{chosen.from_verifier:,} checked again"]
    if chosen.without_answer:
        parts.append(f"{chosen.without_answer:,} left out: they have no answer to check")
    return f"replayed {len(chosen.attempts):,} rollouts: {', '.join(parts)}"


def _tell_nothing(job: str, failed: dict[str, int], chosen: Chosen, *, as_json: bool) -> int:
    if as_json:
        common.print_json({"job": job, **_counts(chosen), "failed_by_class": failed})
        return 0
    there = ", ".join(f"{kind} {count:,}" for kind, count in sorted(failed.items())) or "none"
    left_out = f"; {chosen.without_answer:,} have no answer to check" if chosen.without_answer else ""
    click.echo(f"{job}: nothing to replay; failed rollouts: {there}{left_out}")
    return 0


def _tell_ordered(job: str, order: ReplayOrder | None, *, as_json: bool) -> int:
    if as_json:
        taken = msgspec.structs.asdict(order) if order else {}
        counts = {key: taken.get(key) for key in ("from_verifier", "without_answer")}
        common.print_json({"job": job, "replayed": order.taken if order else None, **counts})
    elif order is None:
        click.echo(f"{job}: ordered; no results worker has taken it yet, the next to join will")
    elif not order.taken:
        click.echo(f"{job}: nothing to replay")
    else:
        click.echo(f"{job}: {order.taken:,} rollouts are tried again; `gym-bus eval watch {job}` follows them")
    return 0
