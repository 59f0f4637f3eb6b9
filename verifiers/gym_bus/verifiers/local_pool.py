"""A pool of child processes on this machine: `executor: local`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from functools import partial
from typing import Self

from gym_bus.deadline import within
from gym_bus.errors import SandboxError
from gym_bus.registry import offered
from gym_bus.server import die_with_parent
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.batching import BatchingPool, WorkerLost, workers_of
from gym_bus.verifiers.runner import VerifierRunner

CLOSE_LIMIT_S = 5.0
_SIZE_BYTES = 8

_BOOT = (
    "import json, sys; sys.path[:], offers = json.loads(sys.argv[1]); "
    "from gym_bus.registry import take_over; take_over(offers); "
    "from gym_bus.verifiers.local_pool import serve; serve(int(sys.argv[2]), *sys.argv[3:])"
)


def serve(fd: int, sandbox_level: str, *preload: str) -> None:
    """A child's life: batches in, answers out, until the other end of the socket is closed."""
    runner = VerifierRunner(sandbox_level, preload)
    with socket.socket(fileno=fd) as end, end.makefile("rb") as stream:
        end.sendall(_framed(b""))  # it is up
        while size := stream.read(_SIZE_BYTES):
            end.sendall(_framed(runner.batch(stream.read(int.from_bytes(size, "little")))))
    runner.close()


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(_SIZE_BYTES, "little") + message


class _Child:
    """One child process."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls, config: VerifierConfig) -> Self:
        """A child that is ready. Raises SandboxError where it does not come up."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _BOOT,
                # It finds what this process finds: verifiers of installed packages and of folders included.
                json.dumps([sys.path, offered()]),
                str(theirs.fileno()),
                config.sandbox_level,
                *config.preload,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # standard output is the command's own
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is the parent's: it closes us
                preexec_fn=die_with_parent,
            )
        child = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            await child._receive()
        except WorkerLost as e:
            await child.kill()
            raise SandboxError(f"a child process of the pool did not start: {e}") from None
        except BaseException:
            await child.kill()
            raise
        return child

    async def _receive(self) -> bytes:
        try:
            size = await self._reader.readexactly(_SIZE_BYTES)
            return await self._reader.readexactly(int.from_bytes(size, "little"))
        except (OSError, asyncio.IncompleteReadError):
            raise WorkerLost(f"exit {await self._process.wait()}") from None

    async def run(self, batch: bytes, limit_s: float) -> bytes:
        """See `PoolWorker.run`."""
        self._writer.write(_framed(batch))
        return await within(limit_s, self._receive())

    async def close(self) -> None:
        """See `PoolWorker.close`."""
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            await within(CLOSE_LIMIT_S, self._process.wait())
        await self.kill()

    async def kill(self) -> None:
        """See `PoolWorker.kill`."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


class LocalPool(BatchingPool):
    """`BatchingPool` on child processes, one per core unless `ray.actors` says otherwise."""

    def __init__(self, config: VerifierConfig) -> None:
        super().__init__(config, workers_of(config), partial(_Child.start, config))
