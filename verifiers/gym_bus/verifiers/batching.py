"""Micro-batches over a few worker processes, with a deadline, replacement of the dead, and blame for the right check.

Ray actors and local child processes differ in how a batch reaches them; everything else is here.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from gym_bus.deadline import within
from gym_bus.errors import SandboxError
from gym_bus.logs import get_logger
from gym_bus.messages import Verdict
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.runner import Answer, Batch, Broken, Check, Judged, decode_answers, encode_checks, longest_s

log = get_logger(__name__)

BATCH_BYTES = 4 * 2**20
START_LIMIT_S = 120.0
FIRST_WAIT_S, MOST_WAIT_S = 1.0, 30.0
"""Between starts of a worker that fail; doubled with each."""


def workers_of(config: VerifierConfig) -> int:
    """How many pool workers a configuration asks for."""
    return config.ray.actors or len(os.sched_getaffinity(0))


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

    async def close(self) -> None:
        """End it, when it is idle: its sandbox is cleaned up."""
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
    """Runs checks on `places` worker processes, up to `config.batch` per call.

    A place starts its worker when there is work, and gives it up when it is lost, worn or when the pool closes.
    """

    def __init__(self, config: VerifierConfig, places: int, start: Callable[[], Awaitable[PoolWorker]]) -> None:
        self._config, self._start = config, start
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._serving = 0
        self._failed_starts = 0
        self._recycling: int | None = None
        self.replaced = 0
        """Workers that were lost and had to be replaced."""
        self.recycled = 0
        """Workers that were replaced because they had served long enough or had grown."""
        self._tasks = [asyncio.create_task(self._serve(place), name=f"pool worker {place}") for place in range(places)]

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
        """The next batch: checks of one kind, since their limits differ; a suspect one alone."""
        batch: list[_Waiting] = []
        size = 0
        while self._queue and len(batch) < self._config.batch and size < BATCH_BYTES:
            if batch and (self._queue[0].suspect or self._queue[0].sandboxed != batch[0].sandboxed):
                break
            waiting = self._queue.popleft()
            if waiting.future.done():  # cancelled by its caller
                continue
            batch.append(waiting)
            size += waiting.size
            if waiting.suspect:
                break
        return batch

    async def _work(self) -> None:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()

    async def _serve(self, place: int) -> None:
        worker: PoolWorker | None = None
        served = 0
        try:
            while True:
                await self._work()
                if worker is None:
                    worker, served = await self._started(place), 0  # while it starts, others may do the work
                elif batch := self._take():
                    served += len(batch)
                    done = await self._judged(worker, batch)
                    if done is None:
                        self._serving -= 1
                        self.replaced += 1
                        await worker.kill()
                        worker = None
                    elif self._recycling is None and self._worn(served, done.rss_bytes):
                        self._recycling = place  # one at a time: the others go on
                        self._serving -= 1
                        self.recycled += 1
                        await worker.close()
                        worker, served = await self._started(place), 0
        finally:
            if worker is not None:
                await worker.close()

    async def _started(self, place: int) -> PoolWorker | None:
        """A worker for the place; None, after a wait, where there is none to be had."""
        before = self._failed_starts
        try:
            worker = await within(START_LIMIT_S, self._start())
        except Exception as e:  # of whatever kind: a place that ended by it would leave its checks without an end
            if self._failed_starts == before:  # else another place has failed meanwhile, and has said so
                self._failed_starts += 1
                self._not_started(str(e) or f"{type(e).__name__}, after {START_LIMIT_S:g} s at most")
            await asyncio.sleep(min(FIRST_WAIT_S * 2 ** max(0, self._failed_starts - 1), MOST_WAIT_S))
            return None
        finally:
            if self._recycling == place:
                self._recycling = None
        self._failed_starts = 0
        self._serving += 1
        return worker

    def _not_started(self, why: str) -> None:
        """While others serve, the work is theirs. Else it must not wait for ever for a pool that does not come up."""
        log.warning("pool_worker_not_started", serving=self._serving, why=why)
        if not self._serving:
            self._again(self._taken_all(), f"a pool worker did not start: {why}", suspect=False)

    def _taken_all(self) -> list[_Waiting]:
        everything = list(self._queue)
        self._queue.clear()
        return everything

    async def _judged(self, worker: PoolWorker, batch: list[_Waiting]) -> Batch | None:
        """Have a batch judged; None where the worker is lost."""
        limit_s = self._limit_s(batch)
        try:
            done = decode_answers(await worker.run(encode_checks([w.check for w in batch]), limit_s))
            for waiting, answer in zip(batch, done.answers, strict=True):
                self._settle(waiting, answer)
        except TimeoutError:
            self._timed_out(batch, limit_s)
            return None
        except asyncio.CancelledError:
            self._again(batch, "the pool was closed")
            await worker.kill()
            raise
        except Exception as e:  # it died, or its answer cannot be read: whatever it is, the checks need another worker
            log.warning("pool_worker_lost", checks=len(batch), why=str(e))
            self._again(batch, f"a pool worker died under the check: {e}")
            return None
        return done

    def _limit_s(self, batch: list[_Waiting]) -> float:
        """One endless check must not hold up its batch for long; sandboxed ones may each use their time.

        One that could not be judged by then, alone or in company, gets all that its programs' own limits allow.
        """
        limit_s = self._config.limit_s * (1 + sum(waiting.sandboxed for waiting in batch))
        return limit_s + (longest_s(batch[0].check) if batch[0].sandboxed and batch[0].suspect else 0.0)

    def _worn(self, served: int, rss_bytes: int) -> bool:
        """Whether a worker has done enough, or has grown too large, and makes room for a fresh one."""
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

    def _again(self, checks: Iterable[_Waiting], why: str, *, suspect: bool = True) -> None:
        """An infrastructure fault: every check is repeated, a suspect one alone, until its tries are used up."""
        for waiting in checks:
            waiting.losses += 1
            waiting.suspect |= suspect
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

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A place that ends by a fault of ours takes the pool with it: nobody may wait for what nobody does."""
        if not task.cancelled() and (error := task.exception()):
            log.error("pool_fault", error=repr(error))
            self._closed = True
            self._again(self._taken_all(), f"the pool failed: {error!r}")

    async def close(self) -> None:
        """End the workers; whoever still waits gets a SandboxError."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._again(self._taken_all(), "the pool was closed")
