"""The consume loop against a real nats-server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from conftest import until

from gym_bus import subjects
from gym_bus.bus import FREE_DELIVERIES, Bus, as_result
from gym_bus.errors import AgentError, BusError, FailureKind, SandboxError
from gym_bus.messages import Attempt, Failed, Message, Policy, Request, Result, RolloutId, decode
from gym_bus.settings import BusConfig, MiB, StreamConfig
from gym_bus.workers.loop import Cancellations, Loop, Source


def a_request(task: int = 0, job: str = "job") -> Request:
    return Request(rollout=RolloutId(job, task, 0), agent="simple", model="m", verifier="v", row=b'{"q":1}')


def an_attempt(message: Message) -> Attempt:
    return Attempt(
        rollout=message.rollout, agent="simple", verifier="v", row=b"{}", response=b"{}", policy=Policy(model="m")
    )


class Handler:
    """Does what the test says, and remembers what it was given."""

    stage = "agent"

    def __init__(self, do: Callable[[Message], Awaitable[Attempt | Result]]) -> None:
        self.cancellations = Cancellations()
        self.given: list[Message] = []
        self.running = self.most = 0
        self._do = do

    async def handle(self, message: Message, stored_at: float) -> Attempt | Result:
        self.given.append(message)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._do(message)
        finally:
            self.running -= 1


async def at_once(message: Message) -> Attempt:
    return an_attempt(message)


@asynccontextmanager
async def looping(bus: Bus, handler: Handler, concurrency: int = 8, prefetch: int = 4) -> AsyncIterator[Loop]:
    sources = [
        Source(
            stream=subjects.REQUESTS,
            consumer=f"agent-{lane}-simple",
            subject=subjects.request(lane, "simple", "*"),
            urgent=lane == "interactive",
        )
        for lane in ("interactive", "batch")
    ]
    loop = Loop(
        bus, handler, sources, concurrency=concurrency, prefetch=prefetch, max_ack_pending=1000, worker="agent-test"
    )
    await loop.start()
    try:
        yield loop
    finally:
        await loop.drain(0.1)


async def order(bus: Bus, count: int, job: str = "job") -> None:
    await asyncio.gather(*(bus.publish(a_request(i, job), f"{job}.{i}.0#1") for i in range(count)))


async def waiting(bus: Bus, stream: str = subjects.REQUESTS) -> int:
    return (await bus.streams.state(stream)).messages


async def the_result(bus: Bus, task: int = 0) -> Result:
    stored = await bus.streams.last(subjects.RESULTS, subjects.result("job", task, 0))
    assert stored
    return as_result(decode(stored.body))


async def test_every_request_becomes_one_attempt_and_is_acked_after_it(bus: Bus) -> None:
    handler = Handler(at_once)
    async with looping(bus, handler):
        await order(bus, 200)
        await until(lambda: drained(bus))
    assert await waiting(bus, subjects.ATTEMPTS) == 200
    assert len(handler.given) == 200


async def drained(bus: Bus) -> bool:
    return await waiting(bus) == 0


async def test_no_more_than_the_concurrency_is_handled_at_a_time(bus: Bus) -> None:
    gate = asyncio.Event()

    async def wait(message: Message) -> Attempt:
        await gate.wait()
        return an_attempt(message)

    handler = Handler(wait)
    async with looping(bus, handler, concurrency=5, prefetch=1) as loop:
        await order(bus, 30)
        await until(lambda: handler.running == 5 and loop.buffered == 1)
        gate.set()
        await until(lambda: drained(bus))
    assert handler.most == 5


async def test_an_urgent_lane_is_served_before_a_long_queue(bus: Bus) -> None:
    gate = asyncio.Event()

    async def wait(message: Message) -> Attempt:
        if message.rollout.job == "job":
            await asyncio.wait_for(gate.wait(), 60)
        return an_attempt(message)

    handler = Handler(wait)
    async with looping(bus, handler, concurrency=2, prefetch=2) as loop:
        await order(bus, 50)
        await until(lambda: loop.in_flight == 2)
        await bus.publish(a_request(0, "urgent"), "urgent.0.0#1", lane="interactive")
        await until(lambda: any(m.rollout.job == "urgent" for m in handler.given))
        assert len(handler.given) == 2 + 1
        gate.set()
        await until(lambda: drained(bus))


async def test_an_error_of_foreign_code_is_a_failure_with_its_request(bus: Bus) -> None:
    async def explode(message: Message) -> Attempt:
        raise ZeroDivisionError("oops")

    async with looping(bus, Handler(explode)):
        await order(bus, 1)
        await until(lambda: drained(bus))
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.AGENT_ERROR
    assert "ZeroDivisionError: oops" in result.failure.detail
    assert result.row == b'{"q":1}'


async def test_an_error_with_a_class_keeps_it(bus: Bus) -> None:
    async def refuse(message: Message) -> Attempt:
        raise AgentError("cannot do this")

    async with looping(bus, Handler(refuse)):
        await order(bus, 1)
        await until(lambda: drained(bus))
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.AGENT_ERROR
    assert result.failure.detail == "cannot do this"


async def test_a_lost_sandbox_is_tried_again_elsewhere(bus: Bus) -> None:
    tries: list[int] = []

    async def lose_once(message: Message) -> Attempt:
        tries.append(1)
        if len(tries) == 1:
            raise SandboxError("the actor died")
        return an_attempt(message)

    async with looping(bus, Handler(lose_once)):
        await order(bus, 1)
        await until(lambda: drained(bus))
    assert len(tries) == 2
    assert await waiting(bus, subjects.RESULTS) == 0


async def test_an_undecodable_message_ends_as_poison_and_blocks_nobody(bus: Bus) -> None:
    await bus.js.publish("gym.request.batch.simple.job", b"\xc1garbage", headers={"Nats-Msg-Id": "job.7.0#1"})
    await order(bus, 3)
    async with looping(bus, Handler(at_once)):
        await until(lambda: drained(bus))
    result = await the_result(bus, task=7)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.POISON
    assert await waiting(bus, subjects.ATTEMPTS) == 3


async def test_a_message_that_keeps_coming_back_ends_as_poison(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.workers.loop.RETRY_MOST_S", 0.1)

    async def as_if_the_worker_died(message: Message) -> Attempt:
        raise BusError("no outcome")

    async with await Bus.connect(BusConfig(url=bus.config.url, max_deliver=2)) as impatient:
        await order(bus, 1)
        async with looping(impatient, Handler(as_if_the_worker_died)):
            await until(lambda: drained(bus))
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.POISON


async def test_a_cancelled_job_is_not_started_and_what_is_ordered_later_is(bus: Bus) -> None:
    handler = Handler(at_once)
    await order(bus, 5)
    handler.cancellations.add("job", 2e9)
    async with looping(bus, handler):
        await until(lambda: drained(bus))
        assert handler.given == []
        handler.cancellations.add("job", 1.0)
        await bus.publish(a_request(9), "job.9.0#2")
        await until(lambda: drained(bus))
    assert len(handler.given) == 1
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.CANCELLED


async def test_draining_hands_back_what_is_not_finished(bus: Bus) -> None:
    async with looping(bus, Handler(forever), concurrency=3, prefetch=3) as loop:
        await order(bus, 6)
        await until(lambda: loop.in_flight == 3)
    handler = Handler(at_once)
    async with looping(bus, handler):
        await until(lambda: drained(bus))
    assert len(handler.given) == 6


async def test_a_full_stream_makes_the_outcome_wait_and_costs_no_second_try(bus: Bus) -> None:
    tight = BusConfig(
        url=bus.config.url, attempts=StreamConfig(max_msgs=1), publish_limit_s=0.2, max_deliver=2, heartbeat_s=0.2
    )
    handler = Handler(at_once)
    async with await Bus.connect(tight) as narrow:
        await narrow.init()
        publish, tries = narrow.publish, 0
        respond, extended = narrow.respond, Counter[str]()

        async def counted(*args: Any, **options: Any) -> bool:
            nonlocal tries
            tries += 1
            return await publish(*args, **options)

        async def answered(reply: str, body: bytes) -> None:
            extended[reply] += body == b"+WPI"
            await respond(reply, body)

        narrow.publish = counted  # type: ignore[method-assign]
        narrow.respond = answered  # type: ignore[method-assign]
        try:
            async with looping(narrow, handler) as loop:
                await order(bus, 3)
                await until(lambda: tries >= 9 and loop.in_flight == 2)  # three at once, two of them three times more
                extended.clear()
                await until(lambda: len(extended) == 2 and min(extended.values()) >= 2)  # their leases are kept
                await until(lambda: emptied(bus))
        finally:
            await bus.init()
    assert len(handler.given) == 3
    assert await waiting(bus, subjects.RESULTS) == 0


async def emptied(bus: Bus) -> bool:
    """Verify nothing, drop every attempt: whether no request is left."""
    await bus.streams.purge(subjects.ATTEMPTS, subjects.attempts_of("job"))
    return await drained(bus)


async def test_an_outcome_that_waits_for_a_full_stream_is_dropped_with_its_job(bus: Bus) -> None:
    async with await Bus.connect(BusConfig(url=bus.config.url, attempts=StreamConfig(max_msgs=1))) as narrow:
        await narrow.init()
        handler = Handler(at_once)
        try:
            async with looping(narrow, handler) as loop:
                await order(bus, 3)
                await until(lambda: loop.in_flight == 2 and len(handler.given) == 3 and not handler.running)
                handler.cancellations.add("job", 2e9)
                await bus.streams.purge(subjects.REQUESTS, subjects.requests_of("job"))
                loop.drop("job")
                await until(lambda: loop.in_flight == 0)
        finally:
            await bus.init()


async def test_handing_back_never_makes_a_message_poison(bus: Bus) -> None:
    async with await Bus.connect(BusConfig(url=bus.config.url, max_deliver=3)) as impatient:
        await order(bus, 2)
        for _ in range(6):
            async with looping(impatient, Handler(forever), concurrency=1, prefetch=1) as loop:
                await until(lambda: loop.in_flight == 1 and loop.buffered == 1)
        async with looping(impatient, Handler(at_once)):
            await until(lambda: drained(bus))
    assert await waiting(bus, subjects.ATTEMPTS) == 2
    assert await waiting(bus, subjects.RESULTS) == 0


async def test_what_was_handed_back_still_ends_as_poison_where_it_kills_its_workers(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gym_bus.workers.loop.RETRY_MOST_S", 0.1)

    async def as_if_the_worker_died(message: Message) -> Attempt:
        raise BusError("no outcome")

    dying = Handler(as_if_the_worker_died)
    async with await Bus.connect(BusConfig(url=bus.config.url, max_deliver=2)) as impatient:
        await order(bus, 1)
        for _ in range(3):
            async with looping(impatient, Handler(forever)) as loop:
                await until(lambda: loop.in_flight == 1)
        async with looping(impatient, dying):
            await until(lambda: drained(bus))
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.POISON
    assert len(dying.given) == 2
    assert result.row == b'{"q":1}'


async def test_draining_under_load_leaves_nothing_leased(bus: Bus) -> None:
    await order(bus, 3000)
    async with await Bus.connect(BusConfig(url=bus.config.url, ack_wait_s=600.0)) as patient:
        for _ in range(5):
            given = (handler := Handler(at_once)).given
            async with looping(patient, handler, concurrency=64, prefetch=16):
                await until(lambda given=given: len(given) > 50)
        async with looping(patient, Handler(at_once), concurrency=64, prefetch=16):
            await until(lambda: drained(bus))  # a lease of nobody would last longer
    assert await waiting(bus, subjects.ATTEMPTS) == 3000


async def test_what_is_held_is_bounded_in_bytes(bus: Bus) -> None:
    gate = asyncio.Event()

    async def wait(message: Message) -> Attempt:
        await gate.wait()
        return an_attempt(message)

    for i in range(40):
        request = msgspec.structs.replace(a_request(i), row=b"x" * MiB)
        await bus.publish(request, f"job.{i}.0#1")
    async with (
        await Bus.connect(BusConfig(url=bus.config.url, held_bytes=4 * MiB)) as small,
        looping(small, Handler(wait), concurrency=32, prefetch=8) as loop,
    ):
        await until(lambda: loop.in_flight > 3 and not loop._pulls[1].outstanding)
        assert loop.in_flight + loop.buffered <= 4 + 9  # one pull request more than the bound
        gate.set()
        await until(lambda: drained(bus))


def verifier_sources(count: int) -> list[Source]:
    return [
        Source(stream=subjects.ATTEMPTS, consumer=f"verifier-v{i}", subject=subjects.attempt(f"v{i}", "*"))
        for i in range(count)
    ]


async def attempts(bus: Bus, verifier: str, count: int) -> None:
    await asyncio.gather(
        *(
            bus.publish(
                msgspec.structs.replace(an_attempt(a_request(i, f"job-{verifier}")), verifier=verifier),
                f"job-{verifier}.{i}.0#1",
            )
            for i in range(count)
        )
    )


async def leased(bus: Bus, sources: list[Source]) -> int:
    infos = [await bus.consumers.info(subjects.ATTEMPTS, source.consumer) for source in sources]
    return sum(info.num_ack_pending or 0 for info in infos)


async def test_several_sources_share_the_room(bus: Bus) -> None:
    sources = verifier_sources(5)
    for i in range(5):
        await attempts(bus, f"v{i}", 60)
    loop = Loop(bus, Handler(forever), sources, concurrency=32, prefetch=8, max_ack_pending=1000, worker="w")
    await loop.start()
    await until(lambda: loop.in_flight == 32 and loop.buffered >= 8)
    for _ in range(20):  # round trips: what was asked for too much would have come
        assert await leased(bus, sources) <= 32 + 8 + 4
    await loop.drain(0.0)


async def test_one_busy_source_of_several_fills_every_slot(bus: Bus) -> None:
    loop = Loop(
        bus, Handler(forever), verifier_sources(5), concurrency=32, prefetch=8, max_ack_pending=1000, worker="w"
    )
    await loop.start()
    await attempts(bus, "v3", 200)
    await until(lambda: loop.in_flight == 32 and loop.buffered)
    await loop.drain(0.0)


async def test_empty_sources_do_not_keep_the_only_slot(bus: Bus) -> None:
    loop = Loop(bus, Handler(at_once), verifier_sources(5), concurrency=1, prefetch=0, max_ack_pending=9, worker="w")
    await loop.start()
    await attempts(bus, "v4", 20)
    await attempts(bus, "v1", 20)
    await until(lambda: loop.done >= 40)
    await loop.drain(0.0)


async def test_an_outcome_that_cannot_be_encoded_is_a_failure(bus: Bus) -> None:
    async def unencodable(message: Message) -> Attempt:
        return msgspec.structs.replace(an_attempt(message), agent_worker="\ud800")

    async with looping(bus, Handler(unencodable)):
        await order(bus, 1)
        await until(lambda: drained(bus))
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.AGENT_ERROR


async def test_an_error_whose_words_cannot_be_encoded_is_a_failure(bus: Bus) -> None:
    async def refuse(message: Message) -> Attempt:
        raise AgentError("no \ud800")

    async with looping(bus, Handler(refuse)):
        await order(bus, 1)
        await until(lambda: drained(bus))
    result = await the_result(bus)
    assert isinstance(result, Failed)
    assert result.failure.detail == "no ?"


async def test_a_worker_that_dies_loses_its_lease_not_its_work(bus: Bus) -> None:
    sources = [Source(stream=subjects.REQUESTS, consumer="short", subject=subjects.request("batch", "simple", "*"))]
    short = BusConfig(url=bus.config.url, ack_wait_s=1.0, heartbeat_s=0.2)
    held = Handler(forever)
    handler = Handler(at_once)
    async with await Bus.connect(short) as first, await Bus.connect(short) as second:
        dying = Loop(first, held, sources, concurrency=2, prefetch=1, max_ack_pending=10, worker="dying")
        await dying.start()
        await order(bus, 2)
        await until(lambda: dying.in_flight == 2)
        await until(lambda: leases_are_kept(bus, short.ack_wait_s))
        living = Loop(second, handler, sources, concurrency=2, prefetch=1, max_ack_pending=10, worker="living")
        await living.start()
        await first.client.close()  # as a killed process: no goodbye
        lease = (await bus.consumers.info(subjects.REQUESTS, "short")).config
        await bus.js.add_consumer(subjects.REQUESTS, lease, ack_wait=0.5)  # its end need not be waited for
        await until(lambda: len(handler.given) >= 2)
        await living.drain(1.0)
        await dying.drain(0.0)


async def leases_are_kept(bus: Bus, lease_s: float) -> bool:
    """Whether nothing is delivered again while leases would run out; a machine that stalls may need another look."""

    async def deliveries() -> int:
        return int((await bus.consumers.info(subjects.REQUESTS, "short")).delivered.consumer_seq)

    before = await deliveries()
    await asyncio.sleep(1.5 * lease_s)
    return await deliveries() == before


async def die_of(culprit: int, bus: Bus, handler: Handler) -> bool:
    """One life of a worker that dies of one message; True where there is none left to die of."""
    died = asyncio.Event()

    async def work(message: Message) -> Attempt:
        if message.rollout.task_index == culprit:
            died.set()
            await forever(message)
        await asyncio.sleep(0.03)  # the model takes its time: the culprit's company dies in mid-work
        return an_attempt(message)

    handler._do = work
    async with await Bus.connect(BusConfig(url=bus.config.url, ack_wait_s=0.5, heartbeat_s=0.1)) as own:
        sources = [Source(stream=subjects.REQUESTS, consumer="short", subject=subjects.request("batch", "simple", "*"))]
        worker = Loop(own, handler, sources, concurrency=16, prefetch=4, max_ack_pending=1000, worker="mortal")
        await worker.start()
        await until(lambda: died.is_set() or drained(bus))
        if died.is_set():
            await own.client.close()  # as a killed process: no goodbye
        await worker.drain(0.0)
    return not died.is_set()


async def test_a_message_that_kills_its_workers_ends_as_poison_and_takes_no_other_with_it(bus: Bus) -> None:
    handler = Handler(at_once)
    await order(bus, 40)
    lives = 0
    while not await die_of(7, bus, handler):
        lives += 1
    # Of the first deliveries each counts as a try, also one of a lease that ran out while the machine stood still.
    assert bus.config.max_deliver - FREE_DELIVERIES <= lives <= bus.config.max_deliver
    result = await the_result(bus, task=7)
    assert isinstance(result, Failed)
    assert result.failure.kind is FailureKind.POISON
    assert await waiting(bus, subjects.RESULTS) == 1
    assert await waiting(bus, subjects.ATTEMPTS) == 39
    assert [m.rollout.task_index for m in handler.given].count(7) == lives


async def test_an_order_that_was_stored_twice_is_worked_on_once(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.bus.topology.DEDUPE_WINDOW_S", 0.1)
    await bus.init()
    gate = asyncio.Event()

    async def wait(message: Message) -> Attempt:
        await gate.wait()
        return an_attempt(message)

    async def stored_again() -> bool:
        return await bus.publish(a_request(), "job.0.0#1")

    handler = Handler(wait)
    try:
        await order(bus, 1)
        async with looping(bus, handler) as loop:
            await until(lambda: loop.in_flight == 1)
            await until(stored_again)  # the broker has forgotten the first one's id, as after a restart
            await until(lambda: both_are_leased(bus))
            gate.set()
            await until(lambda: drained(bus))
    finally:
        monkeypatch.undo()
        await bus.init()
    assert len(handler.given) == 1


async def both_are_leased(bus: Bus) -> bool:
    info = await bus.consumers.info(subjects.REQUESTS, "agent-batch-simple")
    return bool(info.num_ack_pending >= 2)  # the broker may have got it again from a publisher that waited long


async def forever(message: Message) -> Attempt:
    await asyncio.Event().wait()
    raise AssertionError
