"""A pool of child processes on this machine: `executor: local`."""

from __future__ import annotations

import asyncio
import multiprocessing
import os

from pebble import ProcessExpired, ProcessPool

from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.batching import BatchingPool, WorkerLost
from gym_bus.verifiers.runner import VerifierRunner

_runner: VerifierRunner | None = None


def _judge(batch: bytes, sandbox_level: str) -> bytes:
    """Runs in the child."""
    global _runner
    if _runner is None:
        _runner = VerifierRunner(sandbox_level)
    return _runner.batch(batch)


class _Child:
    """A place in the process pool, which replaces its processes by itself when they die or run out of time."""

    def __init__(self, pool: ProcessPool, sandbox_level: str) -> None:
        self._pool, self._sandbox_level = pool, sandbox_level

    async def run(self, batch: bytes, limit_s: float) -> bytes:
        try:
            done = self._pool.schedule(_judge, args=[batch, self._sandbox_level], timeout=limit_s)
            answers: bytes = await asyncio.wrap_future(done)
        except ProcessExpired as e:
            raise WorkerLost(str(e)) from None
        except RuntimeError as e:  # the pool was stopped
            raise WorkerLost(str(e)) from None
        return answers

    async def kill(self) -> None:
        """The pool has done it."""


class LocalPool(BatchingPool):
    """`BatchingPool` on child processes, one per core unless `ray.actors` says otherwise."""

    def __init__(self, config: VerifierConfig) -> None:
        count = config.ray.actors or os.cpu_count() or 1
        # spawn: the worker has threads and an event loop, which do not survive a fork.
        self._processes = ProcessPool(
            max_workers=count,
            max_tasks=max(1, config.recycle_after // config.batch),
            context=multiprocessing.get_context("spawn"),
        )

        async def start() -> _Child:
            return _Child(self._processes, config.sandbox_level)

        super().__init__(config, count, start)

    async def close(self) -> None:
        """Kill the children."""
        await super().close()
        self._processes.stop()
        await asyncio.to_thread(self._processes.join, 10)
