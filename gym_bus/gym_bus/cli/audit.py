"""`gym-bus audit`: does a job add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from gym_bus.bus import Bus
from gym_bus.cli import common
from gym_bus.cli.target import Target, find_target, locate, nowhere, with_bus_of
from gym_bus.config import Config
from gym_bus.workers.audit import Audit, audit_files, audit_job

if TYPE_CHECKING:
    from gym_bus.results.check import Finding

FAILURES = 1


@click.command("audit")
@click.argument("job", metavar="JOB_OR_FOLDER")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def command(
    job: str, config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]
) -> int:
    """Check that a job adds up; exit 1 where it does not, naming what.

    accepted = scored + failed + cancelled + in flight; every rollout has exactly one line; the inputs are whole; the
    lines are what the result stream holds; profile and metrics are what the rollouts say. With --nats, or beside a
    local run that is going on, files and bus; else the files alone.
    """
    target = find_target(job)
    config = with_bus_of(common.settings(config_files, overrides, nats), target)
    if config.bus.url is not None:
        audit = common.run(_audit(config, target))
    elif target.folder is not None:
        audit = audit_files(target.folder)
    else:
        raise nowhere(job)
    if as_json:
        common.print_json({**msgspec.structs.asdict(audit), "adds_up": audit.adds_up})
    else:
        _print(audit)
    return 0 if audit.adds_up else FAILURES


async def _audit(config: Config, target: Target) -> Audit:
    async with await Bus.connect(config.bus) as bus:
        record, folder = await locate(bus, target)
        return await audit_job(bus, record, folder)


def _print(audit: Audit) -> None:
    looked_at = " and ".join(filter(None, [audit.folder, "the bus" if audit.on_bus else ""]))
    click.echo(f"{audit.job} ({audit.state}), by {looked_at}")
    failed = f" ({', '.join(f'{kind} {count:,}' for kind, count in audit.failed.items())})" if audit.failed else ""
    click.echo(
        f"accepted {audit.accepted:,} of {audit.expected:,} = scored {audit.scored:,} + failed "
        f"{sum(audit.failed.values()):,}{failed} + cancelled {audit.cancelled:,} + in flight {audit.in_flight:,}"
        + (f" + UNACCOUNTED {audit.unaccounted:,}" if audit.unaccounted else "")
    )
    if audit.unrecorded:
        click.echo(f"{audit.unrecorded:,} results are on the stream and not in the files yet")
    for note in audit.notes:
        click.echo(f"note: {note}")
    for finding in audit.findings:
        _print_finding(finding)
    found = sum(finding.count for finding in audit.findings)
    click.echo("it adds up" if audit.adds_up else f"it does NOT add up: {found:,} findings")


def _print_finding(finding: Finding) -> None:
    click.echo(f"FOUND in {finding.check}: {finding.what} ({finding.count:,})")
    for example in finding.examples:
        click.echo(f"  {example}")
    if finding.examples and (more := finding.count - len(finding.examples)) > 0 and len(finding.examples) > 1:
        click.echo(f"  and {more:,} more")
