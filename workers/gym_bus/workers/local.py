"""The local stack: an embedded nats-server and worker processes, started, watched and stopped with the command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.deadline import within
from gym_bus.errors import BusError, UsageError
from gym_bus.logs import get_logger
from gym_bus.server import EmbeddedServer, die_with_parent
from gym_bus.verifiers.service import require_sandbox

log = get_logger(__name__)

STORE = ".bus"
"""The embedded server's store, in the job's folder."""
RESTART_WAIT_S = 0.5
CHECK_S = 0.5
STOP_LIMIT_S = 30.0
MOST_RESTARTS = 20
"""Of one worker in a row that lived shortly: after that something is wrong that restarting does not mend."""
LIVED_S = 10.0
"""Less than a lease: a worker that is killed by one message after the other, each time when its lease is over, goes on
until all of them count as poison."""
LOG_TAIL_BYTES = 2000


def local_config(config: Config) -> Config:
    """`config` with shorter leases: the stack's workers are on this machine, and a dead one is noticed at once."""
    bus = config.bus
    if (bus.ack_wait_s, bus.heartbeat_s) == (60.0, 20.0):
        bus = msgspec.structs.replace(bus, ack_wait_s=15.0, heartbeat_s=5.0)
    return msgspec.structs.replace(config, bus=bus)


class WorkerProcess:
    """One worker child; started again when it dies."""

    def __init__(self, role: str, number: int, config: Config, log_file: Path) -> None:
        self._role, self._config, self._log_file = role, config, log_file
        self.name = f"{role} {number}"
        self.process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.restarts = 0

    async def start(self) -> None:
        """Launch and watch."""
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"{self.name} supervisor")

    async def _launch(self) -> None:
        with self._log_file.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gym_bus.cli.main",
                "worker",
                self._role,
                "--config",
                "-",
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        # Through a pipe: keys in the configuration show up neither in a file nor in the process list.
        assert self.process.stdin
        self.process.stdin.write(msgspec.json.encode(self._config))
        with contextlib.suppress(OSError):
            await self.process.stdin.drain()
        self.process.stdin.close()

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while self.process:
            started = loop.time()
            code = await self.process.wait()
            if self._stopping:
                return
            failures = 0 if loop.time() - started > LIVED_S else failures + 1
            if failures > MOST_RESTARTS:
                raise BusError(f"worker {self.name} keeps dying (exit {code}): {self.log_tail()}")
            log.warning("worker_died", worker=self.name, returncode=code, log=self.log_tail())
            self.restarts += 1
            await asyncio.sleep(min(RESTART_WAIT_S * failures, 10.0))
            await self._launch()

    def log_tail(self) -> str:
        """The end of what the worker wrote."""
        with contextlib.suppress(OSError):
            return self._log_file.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return ""

    @property
    def fault(self) -> BaseException | None:
        """Why the worker was given up, None while it is not."""
        supervisor = self._supervisor
        return supervisor.exception() if supervisor and supervisor.done() and not supervisor.cancelled() else None

    async def stop(self) -> None:
        """Let it drain; kill it where it does not."""
        self._stopping = True
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await within(STOP_LIMIT_S, process.wait())
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if self._supervisor:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError, BusError):
                await self._supervisor


class LocalStack:
    """Server (unless `bus.url` is set), connection and workers of one local run."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        verifier: str,
        workers: bool = True,
        verifiers_only: bool = False,
        workers_later: bool = False,
    ) -> None:
        """Its workers serve `verifier` alone, unless `verifier.names` is set: not every job needs a sandbox.

        With `workers_later` they begin when `start_workers` is called.
        """
        names = config.verifier.names or ((verifier,) if verifier else ())
        verifiers = msgspec.structs.replace(config.verifier, names=names)
        self.config, self._folder = msgspec.structs.replace(config, verifier=verifiers), folder
        self._roles = (
            [*(["agent"] * (0 if verifiers_only else config.local.agents)), *(["verifier"] * config.local.verifiers)]
            if workers
            else []
        )
        self._workers_later = workers_later
        self.server: EmbeddedServer | None = None
        self.workers: list[WorkerProcess] = []
        self.bus: Bus
        self._complete = False

    @property
    def store(self) -> Path:
        """Where the embedded server keeps its streams."""
        embedded = self.config.bus.embedded.store_dir
        return Path(embedded) if embedded else self._folder / STORE

    async def __aenter__(self) -> Self:
        """Start everything.

        Raises:
            BusError: the server did not start, or is not reachable.
            SandboxRefused: this machine does not give the isolation that the verifier demands.
        """
        if "verifier" in self._roles:
            await require_sandbox(self.config.verifier)
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def _start(self) -> None:
        if self.config.bus.url is None:
            self.server = EmbeddedServer(self.store.resolve(), self.config.bus.embedded)
            await self.server.start()
            bus_config = msgspec.structs.replace(local_config(self.config).bus, url=self.server.url)
            self.config = msgspec.structs.replace(self.config, bus=bus_config)
        self.bus = await Bus.connect(self.config.bus, name="gym-bus-run")
        if self.server:
            # Left by a run that was killed: its workers are gone, so what they held is free now, not when leases end.
            await self.bus.consumers.forget()
        await self.bus.init()
        if not self._workers_later:
            await self.start_workers()

    async def start_workers(self) -> None:
        """Launch every worker process."""
        logs = self._folder / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            for number, role in enumerate(self._roles):
                worker = WorkerProcess(role, number, self.config, logs / f"{role}-{number}.log")
                self.workers.append(worker)
                await worker.start()
        except OSError as e:
            raise UsageError(f"{e.filename or logs}: a worker cannot be started: {e.strerror or e}") from None

    async def until(self, work: Coroutine[Any, Any, None], *beside: asyncio.Task[None]) -> None:
        """Await `work`; what goes wrong beside it, in a task or in a worker that keeps dying, ends it early."""
        main = asyncio.ensure_future(work)
        watch = asyncio.create_task(self._watch(), name="stack watch")
        pending: set[asyncio.Future[None]] = {main, watch, *beside}
        try:
            while not main.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (main, watch):
                task.cancel()
            await asyncio.gather(main, watch, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            for worker in self.workers:
                if fault := worker.fault:
                    raise fault

    def complete(self) -> None:
        """Everything is in the files: the embedded store may go."""
        self._complete = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self.workers), return_exceptions=True)
        if hasattr(self, "bus"):
            await self.bus.close()
        if self.server:
            await self.server.stop()
            own = self.config.bus.embedded.store_dir is None  # a folder that the user named is the user's
            if self._complete and own and not self.config.local.keep_bus:
                self.server.remove_store()
