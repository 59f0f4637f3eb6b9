"""`gym-bus worker`: join a bus."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, cast

import click

from gym_bus.cli import common


@click.command("worker")
@click.argument("role", type=common.Choice(["agent", "verifier", "results"]))
@common.config_option
@common.nats_option
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs"), help="results: folder of the jobs.")
@click.option("--job", help="results: record this job and exit when it is done.")
@common.overrides_argument
def command(
    role: str,
    config_files: tuple[str, ...],
    nats: str | None,
    output: Path,
    job: str | None,
    overrides: tuple[str, ...],
) -> None:
    r"""Serve ROLE until SIGTERM; then finish what is in hand and leave.

    Any number of workers, on any machines, may join and leave while jobs run:

    \b
        gym-bus worker agent    --nats nats://host:4222 models.policy.base_url=http://gpu:8000/v1
        gym-bus worker verifier --nats nats://host:4222
        gym-bus worker results  --nats nats://host:4222 --output runs
    """
    config = common.settings(config_files, overrides, nats)

    def ready() -> None:
        click.echo(f"{role} worker ready", err=True)

    if role == "results":
        from gym_bus.workers.recorder import run_recorder

        common.run(run_recorder(config, output, once=job, ready=ready))
    else:
        from gym_bus.workers.main import run_worker

        tell = partial(click.echo, err=True)
        common.run(run_worker(cast(Literal["agent", "verifier"], role), config, ready=ready, tell=tell))
