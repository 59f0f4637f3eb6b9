"""`gym-bus why`: what does a job wait for."""

from __future__ import annotations

import click

from gym_bus.bus import Bus
from gym_bus.cli import common
from gym_bus.cli.target import Target, find_target, locate, nowhere, with_bus_of
from gym_bus.config import Config
from gym_bus.workers.why import Event, Why, why, why_by_files


@click.command("why")
@click.argument("job", metavar="JOB_OR_FOLDER")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def command(
    job: str, config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]
) -> int:
    """Tell what a job waits for: stage, rollouts, worker, last event.

    With --nats, or the folder of a local run that is going on. What is blocked, until somebody does something about it,
    stands first and is marked with an exclamation mark.
    """
    target = find_target(job)
    config = with_bus_of(common.settings(config_files, overrides, nats), target)
    if config.bus.url is not None:
        told = common.run(_why(config, target))
    elif target.folder is not None:
        told = why_by_files(target.folder)
    else:
        raise nowhere(job)
    if as_json:
        common.print_json(told)
    else:
        _print(told)
    return 0


async def _why(config: Config, target: Target) -> Why:
    async with await Bus.connect(config.bus) as bus:
        record, _ = await locate(bus, target)
        return await why(bus, record)


def _print(told: Why) -> None:
    click.echo(
        f"{told.job} ({told.state}): {told.accepted:,} of {told.total:,} accepted, {told.results:,} results, "
        f"{told.recorded:,} recorded"
    )
    for wait in told.waits:
        click.echo(f"{'!' if wait.blocked else ' '} {wait.stage}: {wait.what}")
    if not told.waits:
        click.echo("  nothing in sight: look again")
    if told.last:
        click.echo(f"  last event: {_event(told.last)}")


def _event(event: Event) -> str:
    return f"{event.what} of {event.rollout}, {event.age_s:,.1f} s ago"
