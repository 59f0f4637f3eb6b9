"""What a trainer gets, from a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from conftest import NatsServer

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import BusError, FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Failed, Failure, Policy, Result, RolloutId, Scored
from gym_bus.rewards import Group, RewardStream, SyncRewardStream


def scored(task: int, rollout: int, reward: float, size: int = 2) -> Scored:
    return Scored(
        rollout=RolloutId("job", task, rollout),
        agent="simple",
        verifier="math",
        reward=reward,
        row=b"{}",
        response=b"{}",
        policy=Policy(model="m"),
        group_size=size,
    )


def failed(task: int, rollout: int) -> Failed:
    failure = Failure(kind=FailureKind.MODEL_UNREACHABLE, detail="nobody there")
    return Failed(rollout=RolloutId("job", task, rollout), failure=failure, group_size=2)


async def a_job(bus: Bus, tasks: int, results: Sequence[Result], *, over: bool = True) -> None:
    state = "done" if over else "running"
    await bus.put(subjects.JOBS, "job", JobRecord(job="job", state=state, spans=[(0, tasks, 2)]))  # type: ignore[arg-type]
    await asyncio.gather(*(bus.publish(r, f"{r.rollout}#1") for r in results))


def all_scored(tasks: int) -> list[Result]:
    return [scored(task, rollout, float(task)) for rollout in range(2) for task in range(tasks)]


async def take(stream: RewardStream, limit_s: float = 10.0) -> list[Group]:
    return [group async for group in stream]


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
            group = await stream.next(10)
            assert group
            if n < 2:
                await group.ack()
                used.append(group.task_index)
    async with RewardStream(bus, job="job", durable="a") as stream:
        rest = await take(stream)
    assert sorted(used + [g.task_index for g in rest]) == list(range(6))
    assert all(len(g.results) == 2 for g in rest)


async def test_a_group_acked_in_part_is_dropped_and_not_handed_out_again(bus: Bus) -> None:
    await a_job(bus, 2, all_scored(2))
    async with RewardStream(bus, job="job", durable="a") as stream:
        group = await stream.next(10)
        assert group

        real, acks = bus.ack_confirmed, []

        async def die_after_one(reply: str) -> None:
            acks.append(reply)
            if len(acks) > 1:
                raise BusError("killed between two acks")
            await real(reply)

        bus.ack_confirmed = die_after_one  # type: ignore[method-assign]
        with pytest.raises(BusError):
            await group.ack()
        bus.ack_confirmed = real  # type: ignore[method-assign]
        half = group.task_index
    async with RewardStream(bus, job="job", durable="a") as stream:
        rest = await take(stream)
    assert [g.task_index for g in rest] == [1 - half]


async def test_failures_are_visible_and_never_rewards(bus: Bus) -> None:
    await a_job(bus, 1, [scored(0, 0, 1.0), failed(0, 1)])
    async with RewardStream(bus, job="job", durable="a") as stream:
        group = await stream.next(10)
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
        waiting = asyncio.create_task(stream.next(20))
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
