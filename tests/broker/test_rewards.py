"""What a trainer gets, from a real nats-server."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest
from conftest import NatsServer, until

from gym_bus import rewards, subjects
from gym_bus.bus import Bus
from gym_bus.errors import BusError, FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Failed, Failure, Policy, Result, RolloutId, Scored
from gym_bus.rewards import TRAINERS, Committed, Group, RewardStream, SyncRewardStream
from gym_bus.settings import BusConfig


def scored(task: int, rollout: int, reward: float, size: int = 2, row: bytes = b"{}") -> Scored:
    return Scored(
        rollout=RolloutId("job", task, rollout),
        agent="simple",
        verifier="math",
        reward=reward,
        row=row,
        response=b"{}",
        policy=Policy(model="m"),
        group_size=size,
    )


def failed(task: int, rollout: int) -> Failed:
    failure = Failure(kind=FailureKind.MODEL_UNREACHABLE, detail="nobody there")
    return Failed(rollout=RolloutId("job", task, rollout), failure=failure, group_size=2)


async def a_job(bus: Bus, tasks: int, results: Sequence[Result], *, over: bool = True) -> None:
    state = "done" if over else "running"
    await bus.state.put(subjects.JOBS, "job", JobRecord(job="job", state=state, spans=[(0, tasks, 2)]))  # type: ignore[arg-type]
    await asyncio.gather(*(bus.publish(r, f"{r.rollout}#1") for r in results))


def all_scored(tasks: int) -> list[Result]:
    return [scored(task, rollout, float(task)) for rollout in range(2) for task in range(tasks)]


def cancelled(task: int, rollout: int) -> Failed:
    """As `cancel_job` makes them: of no known group."""
    return Failed(
        rollout=RolloutId("job", task, rollout),
        failure=Failure(kind=FailureKind.CANCELLED, detail="the job was cancelled", stage="bus"),
    )


async def set_state(bus: Bus, state: str) -> None:
    record = await bus.state.get(subjects.JOBS, "job", JobRecord)
    await bus.state.put(subjects.JOBS, "job", msgspec.structs.replace(record, state=state))


async def retry(bus: Bus, result: Result, number: int = 2) -> None:
    """Publish in the place of an earlier result, as a run that tries failures again does."""
    rollout = result.rollout
    await bus.streams.purge(subjects.RESULTS, subjects.result("job", rollout.task_index, rollout.rollout_index))
    await bus.publish(result, f"{rollout}#{number}")


async def unacked(bus: Bus) -> int:
    info = await bus.consumers.info(subjects.RESULTS, "trainer-job-a")
    return int(info.num_ack_pending or 0)


async def take(stream: RewardStream) -> list[Group]:
    return [group async for group in stream]


async def take_while_they_come(stream: RewardStream, least: int) -> list[Group]:
    """So many groups, however long they take, and what more there is, none of them acked."""
    groups = []
    while group := await stream.next(60 if len(groups) < least else 2.0):
        groups.append(group)
    assert len(groups) >= least
    return groups


async def take_and_ack(stream: RewardStream) -> list[int]:
    tasks = []
    async for group in stream:
        await group.ack()
        tasks.append(group.task_index)
    return tasks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that look often whether their job is over."""
    monkeypatch.setattr(rewards, "LOOK_S", 0.1)


@pytest.fixture
async def impatient(own_server: NatsServer) -> AsyncIterator[Bus]:
    """A bus on a server of the test's own, with leases of a second, that puts bodies over 1000 bytes in the store."""
    config = BusConfig(url=own_server.url, ack_wait_s=1.0, heartbeat_s=0.2, inline_limit_bytes=1000)
    async with await Bus.connect(config) as bus:
        await bus.init()
        yield bus


async def test_groups_are_complete_and_come_once(bus: Bus) -> None:
    await a_job(bus, 20, all_scored(20))
    async with RewardStream(bus, job="job", group_size=2, durable="a") as stream:
        groups = []
        async for group in stream:
            groups.append(group)
            await group.ack()
    assert sorted(g.task_index for g in groups) == list(range(20))
    assert all(g.rewards == [float(g.task_index)] * 2 for g in groups)
    async with RewardStream(bus, job="job", group_size=2, durable="a") as again:
        assert await take(again) == []


async def test_what_a_crashed_trainer_had_not_acked_comes_again(bus: Bus) -> None:
    await a_job(bus, 6, all_scored(6))
    used = []
    async with RewardStream(bus, job="job", durable="a") as stream:
        for n in range(6):
            group = await stream.next(60)
            assert group
            if n < 2:
                await group.ack()
                used.append(group.task_index)
    async with RewardStream(bus, job="job", durable="a") as stream:
        rest = await take(stream)
    assert sorted(used + [g.task_index for g in rest]) == list(range(6))
    assert all(len(g.results) == 2 for g in rest)


async def test_acked_groups_do_not_come_again_from_a_server_that_was_killed(
    impatient: Bus, own_server: NatsServer
) -> None:
    await a_job(impatient, 30, all_scored(30), over=False)
    async with RewardStream(impatient, job="job", durable="a") as stream:
        used = []
        for _ in range(20):
            group = await stream.next(60)
            assert group
            await group.ack()
            used.append(group.task_index)
        own_server.kill()  # it flushes the acks of consumers later than it confirms them
        own_server.start()
        await set_state(impatient, "done")
        used += await take_and_ack(stream)
    assert sorted(used) == list(range(30))
    own_server.kill()
    own_server.start()
    async with RewardStream(impatient, job="job", durable="a") as stream:
        assert await take(stream) == []


@pytest.mark.parametrize("group_size", [None, 1])
async def test_acked_groups_do_not_come_again_where_the_server_has_forgotten_the_consumer(
    bus: Bus, group_size: int | None
) -> None:
    await a_job(bus, 10, all_scored(10))
    async with RewardStream(bus, job="job", durable="a", group_size=group_size) as stream:
        used = []
        for _ in range(5):
            group = await stream.next(60)
            assert group
            await group.ack()
            used += [r.rollout for r in group.results]
        await bus.js.delete_consumer(subjects.RESULTS, "trainer-job-a")
        async for group in stream:
            await group.ack()
            used += [r.rollout for r in group.results]
    assert sorted(used) == [RolloutId("job", task, rollout) for task in range(10) for rollout in range(2)]
    await bus.js.delete_consumer(subjects.RESULTS, "trainer-job-a")
    async with RewardStream(bus, job="job", durable="a", group_size=group_size) as stream:
        assert await take(stream) == []


async def test_an_acked_group_does_not_come_again_where_its_acks_are_lost_on_the_way(
    impatient: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a_job(impatient, 2, all_scored(2))
    real = impatient.respond
    acks: list[str] = []

    async def lose_the_second(reply: str, body: bytes) -> None:
        if body != b"+ACK" or len(acks) != 1:
            await real(reply, body)
        acks.append(reply)

    async with RewardStream(impatient, job="job", durable="a") as stream:
        group = await stream.next(60)
        assert group
        monkeypatch.setattr(impatient, "respond", lose_the_second)
        await group.ack()
        monkeypatch.undo()
    async with RewardStream(impatient, job="job", durable="a") as stream:
        rest = await take(stream)
    assert [g.task_index for g in rest] == [1 - group.task_index]


async def test_an_ack_that_the_broker_does_not_confirm_is_an_error_and_can_be_repeated(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> None:
        raise BusError("away")

    await a_job(bus, 2, all_scored(2))
    async with RewardStream(bus, job="job", durable="a") as stream:
        first, second = await stream.next(60), await stream.next(60)
        assert first and second
        monkeypatch.setattr(bus.state, "swap", away)
        for group in (first, second):
            with pytest.raises(BusError, match="away"):
                await group.ack()
        monkeypatch.undo()
        await first.ack()
    async with RewardStream(bus, job="job", durable="a") as stream:
        assert [g.task_index for g in await take(stream)] == [second.task_index]


async def test_what_a_trainer_acked_is_one_small_record(bus: Bus) -> None:
    await a_job(bus, 60, all_scored(60))
    for rank in range(2):
        async with RewardStream(bus, job="job", durable="a", rank=rank, world_size=2) as stream:
            await asyncio.gather(*[group.ack() for group in await take(stream)])
    assert sorted(await bus.state.keys(TRAINERS)) == ["job.a-0of2", "job.a-1of2"]
    for key in await bus.state.keys(TRAINERS):
        assert (await bus.state.get(TRAINERS, key, Committed)).spans == [(0, 60)]


async def test_two_streams_of_one_name_do_not_overwrite_what_the_other_acked(bus: Bus) -> None:
    await a_job(bus, 20, all_scored(20))
    one, other = [RewardStream(bus, job="job", durable="a", group_size=1, max_held=4) for _ in range(2)]
    async with one, other:
        tasks = await asyncio.gather(take_and_ack(one), take_and_ack(other))
    assert sorted(tasks[0] + tasks[1]) == sorted([*range(20)] * 2)
    assert (await bus.state.get(TRAINERS, "job.a", Committed)).spans == [(0, 40)]


def test_spans_hold_what_was_added() -> None:
    drawn = random.Random(0)
    for _ in range(100):
        spans, numbers = rewards._Spans(), set()
        for _ in range(30):
            first = drawn.randrange(60)
            end = first + drawn.randrange(1, 6)
            spans.add(first, end)
            numbers |= set(range(first, end))
            assert {n for n in range(-1, 70) if n in spans} == numbers
            assert all(a[1] < b[0] for a, b in zip(spans.pairs, spans.pairs[1:], strict=False))


async def test_a_group_is_as_large_as_the_job_says_whatever_comes_first(bus: Bus) -> None:
    await a_job(bus, 1, [cancelled(0, 0)], over=False)
    await bus.publish(scored(0, 1, 1.0), "job.0.1#1")
    async with RewardStream(bus, job="job", durable="a") as stream:
        group = await stream.next(60)
    assert group
    assert (group.size, group.rewards, len(group.failures)) == (2, [1.0], 1)


async def test_groups_smaller_than_the_task_come_until_it_is_used_up(bus: Bus) -> None:
    await a_job(bus, 3, all_scored(3))
    async with RewardStream(bus, job="job", durable="a", group_size=1) as stream:
        assert sorted(await take_and_ack(stream)) == [0, 0, 1, 1, 2, 2]


async def test_a_retry_that_comes_after_its_group_was_acked_is_dropped(bus: Bus) -> None:
    await a_job(bus, 1, [scored(0, 0, 1.0), failed(0, 1)], over=False)
    async with RewardStream(bus, job="job", durable="a") as stream:
        group = await stream.next(60)
        assert group
        await group.ack()
        await retry(bus, scored(0, 1, 0.5))
        await set_state(bus, "done")
        assert await take(stream) == []
        assert await unacked(bus) == 0
        assert not stream._partial
    async with RewardStream(bus, job="job", durable="new") as stream:
        assert [g.rewards for g in await take(stream)] == [[1.0, 0.5]]


@pytest.mark.parametrize("crash", [False, True])
async def test_a_retry_that_comes_before_its_group_is_acked_waits_for_the_ack(impatient: Bus, crash: bool) -> None:
    bus = impatient  # its purge moves the server's ack floor past what is leased: a nak is ignored, the lease runs out
    await a_job(bus, 1, [scored(0, 0, 1.0), failed(0, 1)], over=False)
    async with RewardStream(bus, job="job", durable="a") as stream:
        group = await stream.next(60)
        assert group
        await retry(bus, scored(0, 1, 0.5))
        await set_state(bus, "done")
        assert await stream.next() is None
        if not crash:
            await group.ack()
            await until(lambda: _none_unacked(bus))
    async with RewardStream(bus, job="job", durable="a") as stream:
        assert [g.rewards for g in await take(stream)] == ([[1.0, 0.5]] if crash else [])


async def _none_unacked(bus: Bus) -> bool:
    return await unacked(bus) == 0


async def test_a_retry_takes_the_place_of_the_failure_in_a_group_that_waits(bus: Bus) -> None:
    await a_job(bus, 1, [failed(0, 1)], over=False)
    async with RewardStream(bus, job="job", durable="a") as stream:
        assert await stream.next(0.5) is None
        await retry(bus, scored(0, 1, 0.5))
        await bus.publish(scored(0, 0, 1.0), "job.0.0#1")
        group = await stream.next(60)
        assert group
        assert group.rewards == [1.0, 0.5]
        assert len(stream._held) == 2


async def test_a_trainer_outlives_a_server_that_is_away_for_longer_than_a_call_waits(
    impatient: Bus, own_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = impatient.state.get
    errors: list[BusError] = []

    async def get(*arguments: Any) -> Any:
        try:
            return await real(*arguments)
        except BusError as e:
            errors.append(e)
            raise

    await a_job(impatient, 2, all_scored(1), over=False)
    async with RewardStream(impatient, job="job", durable="a") as stream:
        with monkeypatch.context() as patched:
            patched.setattr("gym_bus.bus.asking.API_LIMIT_S", 0.2)
            patched.setattr(impatient.state, "get", get)
            own_server.kill()
            trainer = asyncio.create_task(take_and_ack(stream))
            await until(lambda: len(errors) >= 2 or trainer.done())
        own_server.start()
        for rollout in range(2):
            await impatient.publish(scored(1, rollout, 1.0), f"job.1.{rollout}#1")
        await set_state(impatient, "done")
        assert sorted(await asyncio.wait_for(trainer, 60)) == [0, 1]


BIG = b'{"text": "' + b"x" * 4000 + b'"}'


async def test_a_body_that_is_gone_is_a_lost_outcome_of_its_group(
    impatient: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "BODY_WAIT_S", 0.0)
    await a_job(impatient, 2, [*all_scored(2)[:3], scored(1, 1, 1.0, row=BIG)])
    (body,) = await (store := await impatient.js.object_store(subjects.BLOBS)).list()
    await store.delete(str(body.name))
    async with RewardStream(impatient, job="job", durable="a") as stream:
        groups = {group.task_index: group for group in await take(stream)}
        assert len(groups[0].rewards) == 2
        assert groups[1].rewards == [1.0]
        assert [f.failure.kind for f in groups[1].failures] == [FailureKind.LOST]
        assert groups[1].failures[0].rollout == RolloutId("job", 1, 1)


@pytest.mark.parametrize(("tries", "server_answers"), [(2, True), (3 * rewards.BODY_TRIES, False)])
async def test_a_body_that_does_not_come_at_once_is_asked_for_again(
    impatient: Bus, monkeypatch: pytest.MonkeyPatch, tries: int, server_answers: bool
) -> None:
    monkeypatch.setattr(rewards, "BODY_WAIT_S", 0.0)
    fetch, info = impatient.blobs.get, impatient.consumers.info
    failures: list[str] = []

    async def fetch_late(key: str) -> bytes:
        if len(failures) >= tries:
            return await fetch(key)
        failures.append(key)
        raise BusError("no answer")

    async def no_info(*arguments: str) -> Any:
        if len(failures) < tries and not server_answers:
            raise BusError("away")
        return await info(*arguments)

    monkeypatch.setattr(impatient.blobs, "get", fetch_late)
    monkeypatch.setattr(impatient.consumers, "info", no_info)
    await a_job(impatient, 1, [scored(0, 0, 1.0), scored(0, 1, 0.5, row=BIG)])
    async with RewardStream(impatient, job="job", durable="a") as stream:
        assert [group.rewards for group in await take(stream)] == [[1.0, 0.5]]


async def test_a_call_of_next_that_is_given_up_loses_nothing(impatient: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = impatient.blobs.get, asyncio.Event()

    async def hang(_: str) -> bytes:
        asked.set()
        return await asyncio.get_running_loop().create_future()

    await a_job(impatient, 1, [scored(0, 0, 1.0), scored(0, 1, 0.5, row=BIG)])
    async with RewardStream(impatient, job="job", durable="a") as stream:
        monkeypatch.setattr(impatient.blobs, "get", hang)
        call = asyncio.create_task(stream.next())
        await asked.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        monkeypatch.setattr(impatient.blobs, "get", real)
        assert [group.rewards for group in await take(stream)] == [[1.0, 0.5]]


async def test_a_cancelled_job_ends_when_its_last_failures_are_there(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bus.state.get
    looks: list[str] = []

    async def get(*arguments: Any) -> Any:
        looks.append((await real(*arguments)).state)
        return await real(*arguments)

    await a_job(bus, 3, all_scored(3)[:3], over=False)
    async with RewardStream(bus, job="job", durable="a") as stream:
        monkeypatch.setattr(bus.state, "get", get)
        trainer = asyncio.create_task(take(stream))
        await set_state(bus, "cancelled")
        # The state changes first, the failures come after; the trainer looks in between.
        await until(lambda: looks.count("cancelled") >= 2 or trainer.done())
        for task in range(3):
            await bus.publish(cancelled(task, 1), f"job.{task}.1#cancelled")
        groups = await trainer
    assert sorted(g.task_index for g in groups) == [0, 1, 2]
    assert all((len(g.results), len(g.failures)) == (1, 1) for g in groups)


async def test_a_job_that_is_over_and_never_gets_its_last_results_ends(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewards, "SETTLE_S", 0.5)
    await a_job(bus, 3, all_scored(3)[:4])
    async with RewardStream(bus, job="job", durable="a") as stream:
        assert [g.task_index for g in await take(stream)] == [0]


async def test_what_is_held_is_bounded_in_bytes(bus: Bus) -> None:
    row = b'{"text": "' + b"x" * 100_000 + b'"}'
    await a_job(bus, 100, [scored(task, rollout, 1.0, row=row) for task in range(100) for rollout in range(2)])
    async with RewardStream(bus, job="job", durable="a", max_held_bytes=4_000_000) as stream:
        groups = await take_while_they_come(stream, 20)
        assert len(groups) <= 50  # the first pull asks without knowing the size, for at most 9 MiB
        assert await unacked(bus) <= 100
        for group in groups:
            await group.ack()
        tasks = [g.task_index for g in groups] + await take_and_ack(stream)
    assert sorted(tasks) == list(range(100))


async def test_no_more_large_bodies_are_fetched_than_may_be_held(impatient: Bus) -> None:
    await a_job(impatient, 20, [scored(task, r, 1.0, row=BIG) for task in range(20) for r in range(2)])
    async with RewardStream(impatient, job="job", durable="a", max_held_bytes=20_000) as stream:
        groups = await take_while_they_come(stream, 1)
        assert len(groups) <= 3
        for group in groups:
            await group.ack()
        tasks = [g.task_index for g in groups] + await take_and_ack(stream)
    assert sorted(tasks) == list(range(20))


async def test_a_group_that_is_larger_than_may_be_held_is_refused(bus: Bus) -> None:
    await a_job(bus, 2, [scored(task, 0, 1.0, row=b'"' + b"x" * 5000 + b'"') for task in range(2)])
    async with RewardStream(bus, job="job", durable="a", max_held_bytes=6000) as stream:
        with pytest.raises(BusError, match="raise max_held_bytes"):
            await take(stream)


async def test_failures_are_visible_and_never_rewards(bus: Bus) -> None:
    await a_job(bus, 1, [scored(0, 0, 1.0), failed(0, 1)])
    async with RewardStream(bus, job="job", durable="a") as stream:
        group = await stream.next(60)
        assert group
        assert group.rewards == [1.0]
        assert [f.failure.kind for f in group.failures] == [FailureKind.MODEL_UNREACHABLE]
        await group.ack()


async def test_ranks_share_a_job_without_overlap(bus: Bus) -> None:
    await a_job(bus, 10, all_scored(10))
    seen: list[list[int]] = []
    for rank in range(3):
        async with RewardStream(bus, job="job", durable="a", rank=rank, world_size=3) as stream:
            groups = await take(stream)
            for group in groups:
                await group.ack()
            seen.append([g.task_index for g in groups])
    assert sorted(t for tasks in seen for t in tasks) == list(range(10))
    assert all(t % 3 == rank for rank, tasks in enumerate(seen) for t in tasks)


async def test_a_trainer_that_started_first_gets_groups_as_they_complete(bus: Bus) -> None:
    await a_job(bus, 2, [], over=False)
    async with RewardStream(bus, job="job", durable="a") as stream:
        waiting = asyncio.create_task(stream.next(60))
        await bus.publish(scored(1, 0, 1.0), "job.1.0#1")
        await bus.publish(scored(0, 0, 0.5), "job.0.0#1")
        await bus.publish(scored(1, 1, 0.0), "job.1.1#1")
        group = await waiting
        assert group
        assert (group.task_index, group.rewards) == (1, [1.0, 0.0])
        assert await stream.next(0.1) is None


async def test_a_group_size_that_cannot_be_held_is_refused(bus: Bus) -> None:
    with pytest.raises(UsageError, match="group_size 9"):
        RewardStream(bus, job="job", group_size=9, durable="a", max_held=8)
    await a_job(bus, 30, [scored(t, 0, 1.0) for t in range(30)])
    async with RewardStream(bus, job="job", durable="a", max_held=8) as stream:
        with pytest.raises(BusError, match="raise max_held"):
            await take(stream)


async def test_an_unknown_job_is_named(bus: Bus) -> None:
    with pytest.raises(UsageError, match="no job 'jbo'"):
        async with RewardStream(bus, job="jbo", durable="a"):
            pass


async def test_a_synchronous_trainer_iterates_without_an_event_loop(bus: Bus, nats_server: NatsServer) -> None:
    await a_job(bus, 5, all_scored(5))

    def train() -> list[float]:
        rewards = []
        with SyncRewardStream(nats_server.url, job="job", group_size=2, durable="s") as stream:
            for group in stream:
                rewards += group.rewards
                stream.ack(group)
        return rewards

    assert sorted(await asyncio.to_thread(train)) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]


def trained(url: str, take: int) -> list[int]:
    """The tasks that a trainer with a plain loop acks, before it leaves the loop at the group after them."""
    acked: list[int] = []
    for group in RewardStream(url, job="job", group_size=2, durable="a"):
        if len(acked) == take:
            break
        group.ack()
        acked.append(group.task_index)
    return acked


async def test_a_plain_loop_closes_its_stream_and_is_resumed_with_what_was_not_acked(
    bus: Bus, nats_server: NatsServer
) -> None:
    await a_job(bus, 5, all_scored(5))

    first = await asyncio.to_thread(trained, nats_server.url, 2)
    assert not [thread for thread in threading.enumerate() if thread.name == "reward stream"]
    rest = await asyncio.to_thread(trained, nats_server.url, 5)

    assert (len(first), sorted(first + rest)) == (2, [0, 1, 2, 3, 4])


async def test_a_loop_that_an_error_ends_acks_nothing(bus: Bus, nats_server: NatsServer) -> None:
    await a_job(bus, 1, all_scored(1))

    def fail() -> None:
        for _ in RewardStream(nats_server.url, job="job", group_size=2, durable="a"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(fail)
    assert await asyncio.to_thread(trained, nats_server.url, 1) == [0]


async def test_a_group_is_not_acked_once_its_plain_loop_is_over(bus: Bus, nats_server: NatsServer) -> None:
    await a_job(bus, 1, all_scored(1))
    stream = RewardStream(nats_server.url, job="job", group_size=2, durable="a")

    groups = await asyncio.to_thread(list, stream)

    with pytest.raises(UsageError, match="ack within it"):
        groups[0].ack()
    with pytest.raises(UsageError, match="was opened before: make another"):
        await asyncio.to_thread(list, stream)


def entered(stream: RewardStream) -> None:
    with SyncRewardStream(stream):
        pass


@pytest.mark.parametrize("use", [list, entered])
async def test_a_stream_without_a_loop_that_cannot_work_says_what_to_do(
    bus: Bus, nats_server: NatsServer, use: Callable[[RewardStream], object]
) -> None:
    await a_job(bus, 1, all_scored(1))
    with pytest.raises(UsageError, match="give the address"):
        await asyncio.to_thread(use, RewardStream(bus, job="job", durable="a"))
    async with RewardStream(nats_server.url, job="job", durable="a") as stream:
        with pytest.raises(UsageError, match="was opened before"):
            await asyncio.to_thread(use, stream)


async def test_within_an_event_loop_a_plain_loop_is_a_slip_and_the_synchronous_stream_is_meant(
    bus: Bus, nats_server: NatsServer
) -> None:
    await a_job(bus, 1, all_scored(1))
    with pytest.raises(UsageError, match="use `async with"):
        list(RewardStream(nats_server.url, job="job", durable="a"))
    with SyncRewardStream(nats_server.url, job="job", group_size=2, durable="a") as stream:  # as in a notebook
        assert [group.task_index for group in stream] == [0]


async def test_a_stream_is_opened_once_and_goes_on_where_it_is_opened_again(bus: Bus, nats_server: NatsServer) -> None:
    await a_job(bus, 1, all_scored(1))

    def train() -> list[int]:
        with SyncRewardStream(nats_server.url, job="job", group_size=2, durable="a") as stream:
            with pytest.raises(UsageError, match="was opened before"):
                stream.__enter__()
            return [group.task_index for group in stream]

    assert await asyncio.to_thread(train) == [0]
    assert not [thread for thread in threading.enumerate() if thread.name == "reward stream"]
    async with RewardStream(nats_server.url, job="job", group_size=2, durable="b") as stream:
        with pytest.raises(UsageError, match="was opened before"):
            await stream.__aenter__()
        assert len(await take(stream)) == 1


async def test_a_stream_that_could_not_be_opened_can_be_opened_later(bus: Bus, nats_server: NatsServer) -> None:
    stream = RewardStream(nats_server.url, job="job", group_size=2, durable="a")
    with pytest.raises(UsageError, match="no job 'job'"):
        await asyncio.to_thread(entered, stream)
    await a_job(bus, 1, all_scored(1))

    assert [group.task_index for group in await asyncio.to_thread(list, stream)] == [0]
