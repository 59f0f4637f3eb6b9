"""The bus against a real nats-server."""

from __future__ import annotations

import asyncio
import time

import pytest
from conftest import NatsServer, until

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Follower, Pull
from gym_bus.errors import BusError, FailureKind
from gym_bus.messages import Failed, Failure, Policy, Request, RolloutId, Scored
from gym_bus.settings import BusConfig, StreamConfig


def a_request(job: str = "job", task: int = 0, rollout: int = 0, row: bytes = b'{"q":1}') -> Request:
    return Request(
        rollout=RolloutId(job, task, rollout), agent="simple", model="policy", verifier="string_match", row=row
    )


def a_result(task: int, reward: float = 1.0, job: str = "job") -> Scored:
    return Scored(
        rollout=RolloutId(job, task, 0),
        agent="simple",
        verifier="math",
        reward=reward,
        row=b"{}",
        response=b"{}",
        policy=Policy(model="m"),
    )


async def test_init_twice_changes_nothing_and_updates_limits(bus: Bus) -> None:
    await bus.init()
    changed = BusConfig(url=bus.config.url, requests=StreamConfig(max_msgs=1000))
    async with await Bus.connect(changed) as other:
        await other.init()
    assert (await bus.js.stream_info(subjects.REQUESTS)).config.max_msgs == 1000
    await bus.init()
    assert (await bus.js.stream_info(subjects.REQUESTS)).config.max_msgs == bus.config.requests.max_msgs


async def test_a_repeat_under_the_same_id_is_stored_once(bus: Bus) -> None:
    assert await bus.publish(a_request(), "job.0.0#1") is True
    assert await bus.publish(a_request(), "job.0.0#1") is False
    assert await bus.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 1


async def test_a_second_result_of_a_rollout_is_refused_whatever_its_id(bus: Bus) -> None:
    assert await bus.publish(a_result(0, 1.0), "job.0.0#1") is True
    assert await bus.publish(a_result(0, 0.0), "job.0.0#2") is False
    assert await bus.count(subjects.RESULTS, subjects.results_of("job")) == 1


async def test_a_full_stream_makes_the_publisher_wait(nats_server: NatsServer, bus: Bus) -> None:
    small = BusConfig(url=nats_server.url, requests=StreamConfig(max_msgs=1))
    async with await Bus.connect(small) as tight:
        await tight.init()
        try:
            await tight.publish(a_request(task=0), "job.0.0#1")
            second = asyncio.create_task(tight.publish(a_request(task=1), "job.1.0#1"))
            done, _ = await asyncio.wait({second}, timeout=0.3)
            assert not done
            await tight.purge(subjects.REQUESTS, subjects.requests_of("job"))
            assert await asyncio.wait_for(second, 5) is True
        finally:
            await bus.init()


async def test_a_body_over_the_inline_limit_travels_as_a_claim(nats_server: NatsServer, bus: Bus) -> None:
    small = BusConfig(url=nats_server.url, inline_limit_bytes=1000)
    row = b'{"text":"' + b"x" * 200_000 + b'"}'
    async with await Bus.connect(small) as claiming:
        await claiming.publish(a_request(row=row), "job.0.0#1")
        got = await receive(claiming, 1)
        assert len(got[0].data) == 0
        message = await got[0].message()
        assert isinstance(message, Request)
        assert message.row == row
        assert await claiming.delete_blobs("job") == 1
        assert await claiming.delete_blobs("job") == 0


async def receive(bus: Bus, count: int, wanted: int = 1000) -> list[Delivery]:
    got: list[Delivery] = []
    await bus.consumer(
        subjects.REQUESTS, "test", subjects.request("batch", "simple", "*"), max_ack_pending=10_000, max_deliver=5
    )
    pull = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: wanted - len(got))
    await pull.start()
    await until(lambda: len(got) >= count)
    await pull.stop()
    return got


async def test_a_pull_asks_for_no_more_than_there_is_room_for(bus: Bus) -> None:
    await asyncio.gather(*(bus.publish(a_request(task=i), f"job.{i}.0#1") for i in range(50)))
    got = await receive(bus, 10, wanted=10)
    info = await bus.consumer_info(subjects.REQUESTS, "test")
    assert len(got) == 10
    assert info.num_pending == 40


async def test_what_is_not_acked_comes_again_and_what_is_acked_does_not(bus: Bus) -> None:
    for i in range(2):
        await bus.publish(a_request(task=i), f"job.{i}.0#1")
    first, second = await receive(bus, 2)
    assert first.deliveries == 1
    await first.ack()
    await second.nak()
    (again,) = await receive(bus, 1)
    assert again.message_id == second.message_id
    assert again.deliveries == 2
    assert again.rollout == RolloutId("job", 1, 0)


async def test_publishing_and_pulling_survive_a_killed_server(own_server: NatsServer) -> None:
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        await bus.init()
        got: list[Delivery] = []
        await bus.consumer(subjects.REQUESTS, "t", "gym.request.>", max_ack_pending=10_000, max_deliver=5)
        pull = Pull(bus, subjects.REQUESTS, "t", got.append, lambda: 100_000 - len(got))
        await pull.start()
        publishing = asyncio.gather(*(bus.publish(a_request(task=i), f"job.{i}.0#1") for i in range(3000)))
        await until(lambda: len(got) > 300)
        own_server.kill()
        own_server.start()
        await asyncio.wait_for(publishing, 30)
        await until(lambda: len({d.message_id for d in got}) == 3000, 30)
        await pull.stop()


async def test_a_follower_reads_all_results_in_order_across_a_killed_server(own_server: NatsServer) -> None:
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        await bus.init()
        follower = Follower(bus, subjects.RESULTS, subjects.results_of("job"), 1)
        seen: list[int] = []

        async def read(count: int) -> None:
            deadline = time.monotonic() + 30
            while len(seen) < count and time.monotonic() < deadline:
                try:
                    seen.extend(d.sequence for d in await follower.batch(0.2))
                except BusError:
                    continue

        for i in range(20):
            await bus.publish(a_result(i), f"job.{i}.0#1")
        await read(20)
        own_server.kill()
        own_server.start()
        for i in range(20, 40):
            await bus.publish(a_result(i), f"job.{i}.0#1")
        await read(40)
        assert seen == list(range(1, 41))
        assert await follower.pending() == 0
        await follower.close()


async def test_values_are_swapped_only_at_the_known_revision(bus: Bus) -> None:
    revision = await bus.swap(subjects.JOBS, "k", {"a": 1}, 0)
    assert revision
    assert await bus.swap(subjects.JOBS, "k", {"a": 2}, 0) is None
    newer = await bus.swap(subjects.JOBS, "k", {"a": 3}, revision)
    assert newer
    assert await bus.swap(subjects.JOBS, "k", {"a": 4}, revision) is None
    assert await bus.get(subjects.JOBS, "k") == {"a": 3}
    assert "k" in await bus.keys(subjects.JOBS)
    await bus.remove(subjects.JOBS, "k")
    assert await bus.get(subjects.JOBS, "k") is None


async def test_stored_messages_are_listed_with_their_ids(bus: Bus) -> None:
    for i in range(3):
        await bus.publish(a_request(task=i), f"job.{i}.0#1")
    await bus.publish(a_request(job="other"), "other.0.0#1")
    found = [m async for m in bus.messages(subjects.REQUESTS, subjects.requests_of("job"))]
    assert [message_id for _, _, message_id in found] == ["job.0.0#1", "job.1.0#1", "job.2.0#1"]
    await bus.delete(subjects.REQUESTS, found[0][0])
    assert await bus.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 2
    assert await bus.message_at(subjects.REQUESTS, found[0][0]) is None


async def test_an_unreachable_server_is_named_without_its_password() -> None:
    with pytest.raises(BusError) as e:
        await Bus.connect(BusConfig(url="nats://me:secret@127.0.0.1:1", connect_limit_s=1.0))
    assert "127.0.0.1:1" in str(e.value)
    assert "secret" not in str(e.value)


def test_a_failed_result_has_no_reward_by_type() -> None:
    failed = Failed(rollout=RolloutId("j", 0, 0), failure=Failure(kind=FailureKind.POISON, detail="x"))
    assert not hasattr(failed, "reward")
