"""A task that is cancelled while it waits for the broker ends, whatever arrives at that moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from broker.test_replay import QUICK, a_record, lay_down, nothing, open_writer
from conftest import NatsServer, until

from gym_bus import subjects
from gym_bus.bus import Bus, Follower
from gym_bus.bus.client import Client, heeding_cancellation
from gym_bus.deadline import within
from gym_bus.workers.results import ResultsConsumer

LIMIT_S = 60.0


class CancelledWithAnswer(dict[str, asyncio.Future[object]]):
    """The client's open requests; `task` is cancelled so many steps of the loop after its `number`th is answered."""

    def __init__(self, number: int, steps: int) -> None:
        self.left, self.steps = number, steps
        self.task: asyncio.Future[object] | None = None
        self.in_time = False
        """Whether it had not ended before."""

    def __setitem__(self, token: str, answer: asyncio.Future[object]) -> None:
        super().__setitem__(token, answer)
        answer.add_done_callback(self._answered)

    def _answered(self, _: asyncio.Future[object]) -> None:
        self.left -= 1
        if self.left == 0:
            self._cancel(self.steps)

    def _cancel(self, steps: int) -> None:
        if steps:
            asyncio.get_running_loop().call_soon(self._cancel, steps - 1)
        elif self.task:
            self.in_time = self.task.cancel()


async def heeds(bus: Bus, work: Awaitable[object], *, answer: int = 1, steps: int) -> bool:
    """Whether `work`, cancelled together with its `answer`th answer, ends as cancelled, unless it was over before."""
    bus.client._resp_map = requests = CancelledWithAnswer(answer, steps)
    task = requests.task = asyncio.ensure_future(work)
    ended, _ = await asyncio.wait({task}, timeout=LIMIT_S)
    return bool(ended) and task.cancelled() == requests.in_time


@pytest.mark.parametrize("steps", range(4))
async def test_a_cancellation_that_comes_with_the_answer_is_heeded(steps: int) -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    calling = asyncio.create_task(within(LIMIT_S, heeding_cancellation(asyncio.wait_for(answer, LIMIT_S))))
    await asyncio.sleep(0)
    answer.set_result(1)
    for _ in range(steps):
        await asyncio.sleep(0)
    cancelled = calling.cancel()
    await asyncio.wait({calling})
    assert calling.cancelled() == cancelled


async def test_a_timeout_around_a_call_stays_a_timeout() -> None:
    never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await within(0.01, heeding_cancellation(asyncio.wait_for(never, LIMIT_S)))
    task = asyncio.current_task()
    assert task
    assert not task.cancelling()


async def test_who_cleans_up_after_a_cancellation_may_use_the_bus(bus: Bus) -> None:
    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append((await bus.streams.state(subjects.REQUESTS)).messages)
            await bus.announce("gym.test")

    cleaned: list[int] = []
    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=LIMIT_S)
    assert (task.cancelled(), cleaned) == (True, [0])


@pytest.mark.parametrize(
    "call",
    [
        lambda bus: bus.streams.state(subjects.REQUESTS),
        lambda bus: bus.state.get(subjects.JOBS, "job"),
        lambda bus: bus.streams.at(subjects.RESULTS, 1),
        lambda bus: Follower(bus, subjects.RESULTS, "gym.result.>", 1).batch(LIMIT_S),
    ],
    ids=["size", "get", "message_at", "batch"],
)
async def test_a_call_that_is_cancelled_with_its_answer_ends(
    bus: Bus, call: Callable[[Bus], Awaitable[object]]
) -> None:
    await bus.state.bucket(subjects.JOBS)
    assert [await heeds(bus, call(bus), steps=steps) for steps in range(5)] == [True] * 5


async def test_a_flush_that_is_cancelled_with_its_answer_ends(bus: Bus) -> None:
    flushing = asyncio.create_task(bus.client.flush())
    await asyncio.sleep(0)
    bus.client._pongs[-1].add_done_callback(lambda _: flushing.cancel())
    await asyncio.wait({flushing}, timeout=LIMIT_S)
    assert flushing.cancelled()


async def test_a_publish_that_waits_for_room_can_be_cancelled(nats_server: NatsServer) -> None:
    async def publish() -> None:
        while True:
            await client.publish("gym.test", bytes(1000))

    client = Client()
    await client.connect(nats_server.url, pending_size=100)
    publishing = asyncio.create_task(publish())
    await until(lambda: client.stats["out_msgs"] > 3)
    publishing.cancel()
    await asyncio.wait({publishing}, timeout=LIMIT_S)
    ended = publishing.cancelled()
    await client.close()
    assert ended


@pytest.mark.parametrize("answer", range(1, 6))
async def test_recording_that_is_cancelled_with_any_answer_ends(bus: Bus, tmp_path: Path, answer: int) -> None:
    for steps in (0, 1, 3):
        files = lay_down(tmp_path / str(steps))
        with open_writer(a_record(), files, QUICK) as writer:
            consumer = ResultsConsumer(bus, a_record(), files, writer, QUICK, nothing)
            assert await heeds(bus, consumer.run(), answer=answer, steps=steps)
