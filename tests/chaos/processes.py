"""The processes of a chaos run: killed at any moment, started again, and watched for deaths of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from gym_bus.server import die_with_parent

GYM_BUS = [sys.executable, "-m", "gym_bus.cli.main"]


class Player:
    """A command that is started again whenever it ends, until it has ended as it should."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        folder: Path,
        say: Callable[[str], None],
        *,
        through: Callable[[int, str], bool] = lambda code, said: False,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            name: for logs.
            arguments: of `gym-bus`.
            folder: to run in.
            say: writes the event log.
            through: whether this exit code, with this output, is the end of its work; any other exit is a fault.
        """
        self.name, self._arguments, self._folder, self._say, self._through = name, arguments, folder, say, through
        self.log = folder / "logs" / f"{name}.log"
        self.process: asyncio.subprocess.Process | None = None
        self.finished = asyncio.Event()
        self.faults: list[str] = []
        """How it ended when nobody had killed it."""
        self.kills = 0
        self._killed = False
        self._back_s = 0.0
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Launch, and launch again."""
        self.log.parent.mkdir(exist_ok=True)
        await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name=self.name)

    async def _launch(self) -> None:
        self._killed = False
        with self.log.open("ab") as output:
            self._from = output.tell()
            self.process = await asyncio.create_subprocess_exec(
                *GYM_BUS,
                *self._arguments,
                cwd=self._folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,  # a test run that is killed leaves nothing behind
            )

    @property
    def said(self) -> str:
        """The output of the present process."""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    async def _supervise(self) -> None:
        assert self.process
        while True:
            code = await self.process.wait()
            if not self._killed:
                if self._through(code, self.said):
                    self._say(f"{self.name} is through, exit {code}")
                    self.finished.set()
                    return
                self._say(f"{self.name} ENDED BY ITSELF, exit {code}")
                self.faults.append(f"{self.name}: exit {code}: {self.said[-1500:]}")
            await asyncio.sleep(self._back_s)
            await self._launch()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.returncode is None and not self._killed

    def kill(self, back_s: float) -> None:
        """Kill -9 of this process alone; it comes back after `back_s` seconds."""
        if self.alive:
            assert self.process
            self._killed, self._back_s = True, back_s
            self.kills += 1
            self.process.kill()

    async def pause(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after that time."""
        if not self.alive:
            return
        assert self.process
        pid = self.process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            os.kill(pid, signal.SIGCONT)

    def descendants(self) -> list[psutil.Process]:
        """Everything that the process has started, and what that has."""
        if not self.alive:
            return []
        assert self.process
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    async def stop(self) -> None:
        """For good, and at once."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()
