"""Micro-batches over a few worker processes, with a deadline, replacement of the dead, and blame for the right check.

Ray actors and local child processes differ in how a batch reaches them; everything else is here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from gym_bus.errors import SandboxError
from gym_bus.logs import get_logger
from gym_bus.messages import Verdict
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.runner import Answer, Broken, Check, Judged, decode_answers, encode_checks

log = get_logger(__name__)

BATCH_BYTES = 4 * 2**20
START_LIMIT_S = 60.0


class WorkerLost(Exception):
    """The worker process died, or had to be killed, under a batch."""


class PoolWorker(Protocol):
    """One worker process."""

    async def run(self, batch: bytes, limit_s: float) -> bytes:
        """Judge an encoded batch within `limit_s` seconds.

        Raises:
            WorkerLost: it died.
            TimeoutError: it did not answer; it must be killed.
        """
        ...

    async def kill(self) -> None:
        """Kill it with everything it started."""
        ...


class _Waiting:
    __slots__ = ("check", "future", "losses", "sandboxed", "size", "suspect", "timeouts")

    def __init__(self, check: Check, future: asyncio.Future[Verdict], sandboxed: bool) -> None:
        self.check, self.future, self.sandboxed = check, future, sandboxed
        self.size = len(check.row) + len(check.response)
        self.losses = self.timeouts = 0
        self.suspect = False
        """It was in a batch that went wrong: it runs alone from now on, so that blame falls on the right one."""


class BatchingPool:
    """Runs checks on `workers` processes, up to `config.batch` per call."""

    def __init__(self, config: VerifierConfig, workers: int, start: Callable[[], Awaitable[PoolWorker]]) -> None:
        self._config, self._start = config, start
        self._queue: deque[_Waiting] = deque()
        self._served: dict[int, int] = {}
        self._arrived = asyncio.Event()
        self._tasks = [asyncio.create_task(self._serve(), name=f"pool worker {i}") for i in range(workers)]
        self._closed = False
        self.replaced = 0
        """Workers that had to be replaced."""
        self.recycled = 0
        """Workers that were replaced because they had served long enough or had grown."""

    async def verify(self, check: Check, *, sandboxed: bool) -> Verdict:
        """Judge one attempt.

        Args:
            check: what to judge.
            sandboxed: the check runs programs under the sandbox's own limits, so a worker that does not answer is
                broken; without, it is the answer that takes too long to judge.

        Raises:
            TaskError: the row is broken.
            VerifierError: the verifier is.
            SandboxError: the worker or its sandbox was lost more often than is retried; no verdict.
        """
        if self._closed:
            raise SandboxError("the pool is closed")
        waiting = _Waiting(check, asyncio.get_running_loop().create_future(), sandboxed)
        self._queue.append(waiting)  # bounded by the caller, who awaits each check
        self._arrived.set()
        return await waiting.future

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._queue and len(batch) < self._config.batch and size < BATCH_BYTES:
            if self._queue[0].suspect and batch:
                break
            waiting = self._queue.popleft()
            if waiting.future.done():  # cancelled by its caller
                continue
            batch.append(waiting)
            size += waiting.size
            if waiting.suspect:
                break
        return batch

    async def _serve(self) -> None:
        worker: PoolWorker | None = None
        try:
            while True:
                batch = self._take()
                if not batch:
                    self._arrived.clear()
                    if not self._queue:
                        await self._arrived.wait()
                    continue
                worker = await self._serve_batch(worker, batch)
        finally:
            if worker is not None:
                await worker.kill()

    async def _serve_batch(self, worker: PoolWorker | None, batch: list[_Waiting]) -> PoolWorker | None:
        try:
            if worker is None:
                worker = await asyncio.wait_for(self._start(), START_LIMIT_S)
        except (SandboxError, OSError, TimeoutError) as e:
            self._again(batch, f"a pool worker did not start: {e or type(e).__name__}")
            return None
        # One endless check must not hold up its batch for long; sandboxed ones may each use their time.
        limit_s = self._config.limit_s * (1 + sum(w.sandboxed for w in batch))
        try:
            done = decode_answers(await worker.run(encode_checks([w.check for w in batch]), limit_s))
        except TimeoutError:
            self._timed_out(batch, limit_s)
        except WorkerLost as e:
            self._again(batch, f"a pool worker died under the check: {e}")
        except asyncio.CancelledError:
            await worker.kill()
            self._again(batch, "the pool was closed")
            raise
        else:
            for waiting, answer in zip(batch, done.answers, strict=True):
                self._settle(waiting, answer)
            if not self._worn(worker, len(batch), done.rss_bytes):
                return worker
            self.recycled += 1
            self.replaced -= 1
        self._served.pop(id(worker), None)
        self.replaced += 1
        await worker.kill()
        return None

    def _worn(self, worker: PoolWorker, checks: int, rss_bytes: int) -> bool:
        """Whether a worker has done enough, or has grown too large, and makes room for a fresh one."""
        served = self._served[id(worker)] = self._served.get(id(worker), 0) + checks
        return served >= self._config.recycle_after or rss_bytes > self._config.recycle_bytes

    def _settle(self, waiting: _Waiting, answer: Answer) -> None:
        if waiting.future.done():
            return
        if isinstance(answer, Judged):
            waiting.future.set_result(answer.verdict)
        elif answer.kind == "sandbox":
            self._again([waiting], answer.detail)
        else:
            waiting.future.set_exception(answer.error())

    def _again(self, batch: list[_Waiting], why: str) -> None:
        """An infrastructure fault: every check of the batch is repeated, alone, until its tries are used up."""
        for waiting in batch:
            waiting.losses += 1
            waiting.suspect = True
            if waiting.future.done():
                continue
            if waiting.losses >= self._config.tries or self._closed:
                waiting.future.set_exception(Broken("sandbox", f"{why} ({waiting.losses} tries)").error())
            else:
                log.info("check_repeated", verifier=waiting.check.verifier, why=why)
                self._queue.append(waiting)
        self._arrived.set()

    def _timed_out(self, batch: list[_Waiting], limit_s: float) -> None:
        """In company, try each check alone. Alone and twice, the answer cannot be judged in time: it scores 0."""
        if batch[0].sandboxed and len(batch) == 1:
            self._again(batch, f"a pool worker did not answer within {limit_s:g} s")
            return
        for waiting in batch:
            waiting.timeouts += len(batch) == 1  # twice, so that a machine that stood still is not taken for it
            if waiting.future.done():
                continue
            if waiting.timeouts >= 2:
                extra = {"verifier_timeout": True, "verifier_limit_s": limit_s}
                waiting.future.set_result(Verdict(reward=0.0, extra=extra))
            else:
                waiting.suspect = True
                self._queue.append(waiting)
        self._arrived.set()

    async def close(self) -> None:
        """Kill the workers; whoever still waits gets a SandboxError."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiting in self._queue:
            if not waiting.future.done():
                with contextlib.suppress(asyncio.InvalidStateError):
                    waiting.future.set_exception(SandboxError("the pool is closed"))
