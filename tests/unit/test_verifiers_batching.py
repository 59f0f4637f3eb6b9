"""Who does which check when: the scheduling of a pool, with workers whose every step the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from conftest import until

from gym_bus.errors import SandboxError
from gym_bus.messages import Verdict
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers import batching
from gym_bus.verifiers.batching import BatchingPool, WorkerLost
from gym_bus.verifiers.runner import Batch, Check, Judged, encode_checks

CHECK = Check("mcqa", b"{}", b"{}", b"{}")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "FIRST_WAIT_S", 0.001)


class Worker:
    """Judges everything 1.0, in the order of its batches, and remembers them."""

    def __init__(self, rss_bytes: int = 0) -> None:
        self.batches: list[list[Check]] = []
        self.limits: list[float] = []
        self.may_answer, self.may_close = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self.may_close.set()
        self.rss_bytes = rss_bytes
        self.closed = self.killed = False

    async def run(self, batch: bytes, limit_s: float) -> bytes:
        checks = msgspec.msgpack.decode(batch, type=list[Check])
        self.batches.append(checks)
        self.limits.append(limit_s)
        await self.may_answer.wait()
        await asyncio.sleep(0)
        return msgspec.msgpack.encode(Batch([Judged(Verdict(reward=1.0), 0.0) for _ in checks], self.rss_bytes))

    async def close(self) -> None:
        self.closed = True
        await self.may_close.wait()

    async def kill(self) -> None:
        self.killed = True


def starting(workers: list[Worker]) -> Callable[[], Awaitable[Worker]]:
    async def start() -> Worker:
        workers.append(Worker())
        return workers[-1]

    return start


async def verdicts(pool: BatchingPool, count: int, *, sandboxed: bool = False) -> list[float]:
    done = await asyncio.wait_for(asyncio.gather(*(pool.verify(CHECK, sandboxed=sandboxed) for _ in range(count))), 60)
    return [verdict.reward for verdict in done]


async def test_a_worn_worker_makes_room_while_the_others_go_on() -> None:
    workers: list[Worker] = []

    async def start() -> Worker:
        workers.append(Worker())
        if len(workers) <= 2:
            workers[-1].may_answer.clear()
            workers[-1].may_close.clear()
        return workers[-1]

    pool = BatchingPool(VerifierConfig(batch=1, recycle_after=1), 2, start)
    first = asyncio.ensure_future(verdicts(pool, 2))
    await until(lambda: len(workers) == 2 and all(worker.batches for worker in workers))
    for worker in workers:
        worker.may_answer.set()
    await first

    # Both are worn, and one is on its way out, which takes as long as it takes: the other serves on.
    assert await verdicts(pool, 20) == [1.0] * 20
    assert sorted(worker.closed for worker in workers) == [False, True]

    for worker in workers:
        worker.may_close.set()
    await until(lambda: pool.recycled == 1)
    assert await verdicts(pool, 20) == [1.0] * 20
    assert pool.recycled > 1
    assert pool.replaced == 0
    assert not any(worker.killed for worker in workers)
    await pool.close()


async def test_a_worker_that_has_grown_makes_room() -> None:
    workers: list[Worker] = []
    pool = BatchingPool(VerifierConfig(recycle_bytes=100), 1, starting(workers))
    await verdicts(pool, 1)
    workers[0].rss_bytes = 101
    await verdicts(pool, 1)
    await verdicts(pool, 1)
    assert (len(workers), pool.recycled, workers[0].closed) == (2, 1, True)
    await pool.close()


async def test_checks_do_not_wait_for_ever_for_workers_that_do_not_start() -> None:
    async def start() -> Worker:
        raise SandboxError("no cluster at nowhere:1")

    pool = BatchingPool(VerifierConfig(tries=3), 2, start)
    outcomes = await asyncio.wait_for(
        asyncio.gather(*(pool.verify(CHECK, sandboxed=True) for _ in range(100)), return_exceptions=True), 60
    )
    assert {str(outcome) for outcome in outcomes} == {
        "a pool worker did not start: no cluster at nowhere:1 (3 tries)",
    }
    await pool.close()


async def test_what_some_workers_cannot_start_for_is_done_by_those_that_have() -> None:
    workers: list[Worker] = []
    refused = 0

    async def start() -> Worker:
        nonlocal refused
        if workers:
            refused += 1
            raise SandboxError("the cluster is full")
        workers.append(Worker())
        workers[0].may_answer.clear()
        return workers[0]

    pool = BatchingPool(VerifierConfig(batch=1, tries=1), 3, start)
    work = asyncio.ensure_future(verdicts(pool, 50))
    await until(lambda: refused > 10)
    workers[0].may_answer.set()
    assert await work == [1.0] * 50
    await pool.close()


async def test_a_batch_holds_checks_of_one_kind_since_their_limits_differ() -> None:
    workers: list[Worker] = []
    pool = BatchingPool(VerifierConfig(batch=16, limit_s=10), 1, starting(workers))
    await asyncio.gather(*(pool.verify(CHECK, sandboxed=n < 3) for n in range(8)))
    assert [(len(batch), limit) for batch, limit in zip(workers[0].batches, workers[0].limits, strict=True)] == [
        (3, 40.0),
        (5, 10.0),
    ]
    await pool.close()


async def test_a_check_that_was_not_judged_in_time_gets_all_that_its_programs_may_take() -> None:
    row = {"verifier_metadata": {"unit_tests": {"inputs": ["1"] * 30, "outputs": ["1"] * 30}}}
    check = Check("code_gen", b'{"unit_test_timeout_secs": 10}', msgspec.json.encode(row), b"{}")
    workers: list[Worker] = []

    class Slow(Worker):
        async def run(self, batch: bytes, limit_s: float) -> bytes:
            self.limits.append(limit_s)
            if limit_s < 600:
                raise TimeoutError
            return await super().run(batch, limit_s)

    async def start() -> Worker:
        workers.append(Slow())
        return workers[-1]

    pool = BatchingPool(VerifierConfig(limit_s=30), 1, start)
    assert (await pool.verify(check, sandboxed=True)).reward == 1.0
    assert [worker.limits[0] for worker in workers] == [60.0, 60.0 + 30 * 20.0]
    await pool.close()


@pytest.mark.parametrize("answer", [b"", b"\xc1", encode_checks([CHECK])])
async def test_an_answer_that_cannot_be_read_is_a_lost_worker(answer: bytes) -> None:
    class Garbled(Worker):
        async def run(self, batch: bytes, limit_s: float) -> bytes:
            return answer

    async def start() -> Worker:
        return Garbled()

    pool = BatchingPool(VerifierConfig(tries=2), 1, start)
    with pytest.raises(SandboxError, match=r"died under the check.*2 tries"):
        await pool.verify(CHECK, sandboxed=True)
    assert pool.replaced == 2
    await pool.close()


async def test_a_pool_that_closes_ends_what_it_holds() -> None:
    worker = Worker()
    worker.may_answer.clear()

    async def start() -> Worker:
        return worker

    pool = BatchingPool(VerifierConfig(batch=2), 1, start)
    work = asyncio.gather(*(pool.verify(CHECK, sandboxed=True) for _ in range(5)), return_exceptions=True)
    await until(lambda: worker.batches)
    await pool.close()
    assert {str(e) for e in await work} == {"the pool was closed (1 tries)"}
    assert worker.killed


async def test_workers_that_are_lost_before_they_serve_are_not_started_without_end() -> None:
    starts = 0

    async def start() -> Worker:
        nonlocal starts
        starts += 1
        raise WorkerLost("Ray was lost")

    pool = BatchingPool(VerifierConfig(tries=2), 1, start)
    with pytest.raises(SandboxError, match="Ray was lost"):
        await pool.verify(CHECK, sandboxed=True)
    assert starts == 2
    await pool.close()
