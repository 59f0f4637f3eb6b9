"""The embedded nats-server: where its store may lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from gym_bus.bus import Bus
from gym_bus.errors import UsageError
from gym_bus.server import EmbeddedServer, running_at
from gym_bus.settings import BusConfig, EmbeddedConfig


async def test_a_store_may_lie_in_a_folder_of_any_name(tmp_path: Path) -> None:
    store = tmp_path / 'ü "quoted" $x; {y}\\z' / ".bus"
    server = EmbeddedServer(store, EmbeddedConfig())
    await server.start()
    try:
        async with await Bus.connect(BusConfig(url=server.url)) as bus:
            await bus.init()
        assert running_at(store) == server.url
    finally:
        await server.stop()
    assert (store / "jetstream").is_dir()


@pytest.mark.parametrize("name", ["server.conf", "server.log"])
async def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    server = EmbeddedServer(tmp_path, EmbeddedConfig())
    with pytest.raises(UsageError, match=f"{tmp_path}: nats-server cannot be started there"):
        await server.start()
    await server.stop()
