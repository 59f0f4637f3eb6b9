"""`gym-bus bus`: set up the streams, see what they hold, run a server."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import click
import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.cli import common
from gym_bus.config import Config
from gym_bus.server import EmbeddedServer


@click.group("bus")
def command() -> None:
    """Set up and look at the bus."""


@command.command("init")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def init(config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Create or update streams, buckets and the object store. Safe to repeat."""
    config = common.settings(config_files, overrides, nats)
    names = common.run(_init(config))
    if as_json:
        common.print_json(names)
    else:
        click.echo("ready: " + ", ".join(names))


async def _init(config: Config) -> list[str]:
    async with await Bus.connect(config.bus) as bus:
        return await bus.init()


@command.command("status")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def status(config_files: tuple[str, ...], nats: str | None, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Show the streams and the workers that are there."""
    config = common.settings(config_files, overrides, nats)
    streams, workers = common.run(_status(config))
    if as_json:
        common.print_json({"streams": streams, "workers": workers})
        return
    shown = common.table("streams", "stream", "messages", "bytes")
    for stream in streams:
        shown.add_row(str(stream["stream"]), f"{stream['messages']:,}", f"{stream['bytes']:,}")
    common.out.print(shown)
    listed = common.table("workers", "worker", "in flight", "done")
    for worker in workers:
        listed.add_row(str(worker["worker"]), str(worker["in_flight"]), str(worker["done"]))
    common.out.print(listed)


async def _status(config: Config) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    async with await Bus.connect(config.bus) as bus:
        streams: list[dict[str, object]] = []
        for name in (subjects.REQUESTS, subjects.ATTEMPTS, subjects.RESULTS, subjects.ADVISORIES):
            state = await bus.streams.state(name)
            streams.append({"stream": name, "messages": state.messages, "bytes": state.size_bytes})
        workers = [await bus.state.get(subjects.WORKERS, key) for key in await bus.state.keys(subjects.WORKERS)]
        return streams, [w for w in workers if w is not None]


@command.command("serve")
@click.option("--store", type=click.Path(path_type=Path), default=Path(".gym_bus/nats"), help="Folder of the streams.")
@click.option("--port", type=click.IntRange(0, 65535), default=4222, show_default=True, help="0 takes a free one.")
@common.config_option
@common.overrides_argument
def serve(store: Path, port: int, config_files: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Run the bundled nats-server on the loopback interface until SIGTERM, its streams set up."""
    config = common.settings(config_files, overrides)
    common.run(_serve(config, store.resolve(), port))


async def _serve(config: Config, store: Path, port: int) -> None:
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    server = EmbeddedServer(store, config.bus.embedded, port=port)
    await server.start()
    try:
        async with await Bus.connect(msgspec.structs.replace(config.bus, url=server.url)) as bus:
            await bus.init()
        click.echo(f"serving at {server.url}")
        await stop.wait()
    finally:
        await server.stop()
