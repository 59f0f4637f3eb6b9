"""One real nats-server per test session, a fresh account of names per test."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gym_bus import registry
from gym_bus.benchmarks import spec
from gym_bus.bus import Bus
from gym_bus.sandbox import owner
from gym_bus.server import find_binary, held_port
from gym_bus.settings import BusConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here, and not beside the tests: pytest reads options before it knows of deeper folders."""
    chaos = parser.getgroup("chaos", "breaking a running system on purpose (tests/chaos)")
    chaos.addoption(
        "--chaos-rollouts", type=int, metavar="N", help="a long chaos run of N rollouts; default: a short one"
    )
    chaos.addoption("--chaos-seed", type=int, default=1, metavar="SEED", help="what is broken, and when")
    chaos.addoption("--chaos-minutes", type=float, metavar="M", help="break nothing more after M minutes; default: 20")
    chaos.addoption("--chaos-period", type=float, metavar="S", help="mean seconds from blow to blow; default: 1")
    chaos.addoption("--chaos-executor", default="local", choices=["local", "ray"], help="where programs are checked")
    chaos.addoption("--chaos-long", action="store_true", help="also the scenarios that take longer than a few seconds")


class NatsServer:
    """The real binary on a port of its own; can be killed and started again on the same store."""

    def __init__(self, store: Path) -> None:
        self._held, self.port = held_port()
        self.store = store
        self.url = f"nats://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = self.store / "server.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nmax_payload: 8MB\n'
            f'jetstream {{ store_dir: "{self.store}/js", max_file: 64G, sync_interval: "1s" }}\n'
        )
        self.process = subprocess.Popen(
            [find_binary(), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self.port)

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self._held.close()


def wait_for_port(port: int, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 1.0) as s:
                if s.recv(4) == b"INFO":
                    return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"nothing answers on port {port}"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _nothing_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that one test makes known are not there for the next."""
    monkeypatch.setattr(registry, "_OFFERED", {})
    monkeypatch.setattr(spec, "_added", {})


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """The session's server. Tests that kill a server start their own (`own_server`)."""
    try:
        find_binary()
    except Exception as e:
        pytest.skip(f"no nats-server: {e}")
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()
    shutil.rmtree(server.store, ignore_errors=True)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of the test's own, to be killed."""
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """A connection with empty streams."""
    async with await Bus.connect(BusConfig(url=nats_server.url)) as bus:
        for stream in await bus.js.streams_info():  # deleted, not purged: a purge leaves the dedupe window behind
            await bus.js.delete_stream(str(stream.config.name))
        await bus.init()
        yield bus


@pytest.fixture
def zygotes(monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    """The first process of each sandbox that the test starts: what else this process has may belong to other tests."""
    launch, started = owner._launch, list[psutil.Process]()

    def noted(*arguments: Any) -> subprocess.Popen[bytes]:
        made = launch(*arguments)
        started.append(psutil.Process(made.pid))
        return made

    monkeypatch.setattr(owner, "_launch", noted)
    return started


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nothing listens, and that nobody else can take meanwhile."""
    held, port = held_port()
    with held:
        yield port


async def until(condition: object, limit_s: float = 60.0) -> None:
    """Wait until `condition()` (plain or async) is true; fail with its name when it never is."""
    deadline = time.monotonic() + limit_s
    while True:
        value = condition()  # type: ignore[operator]
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        assert time.monotonic() < deadline, f"never true: {condition}"
        await asyncio.sleep(0.01)
