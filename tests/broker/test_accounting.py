"""The books of a job, read from a real server."""

from __future__ import annotations

import pytest

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import FailureKind
from gym_bus.jobs import Issued, JobProgress, JobRecord
from gym_bus.messages import Attempt, Failed, Failure, Policy, Request, RolloutId, Scored
from gym_bus.workers import accounting
from gym_bus.workers.accounting import Account, Place, read_account, read_books
from gym_bus.workers.publish import make_room

RECORD = JobRecord(job="job", spans=[(0, 2, 2), (5, 3, 1)])
"""Rollouts 0.0, 0.1, 1.0, 1.1, 5.0, 6.0, 7.0."""


def a_request(task: int, rollout: int = 0, number: int = 1) -> Request:
    return Request(
        rollout=RolloutId("job", task, rollout), number=number, agent="simple", model="m", verifier="v", row=b"{}"
    )


def an_attempt(task: int, rollout: int = 0) -> Attempt:
    identity = RolloutId("job", task, rollout)
    return Attempt(rollout=identity, agent="simple", verifier="v", row=b"{}", response=b"{}", policy=Policy(model="m"))


def scored(task: int, rollout: int = 0, number: int = 1) -> Scored:
    return Scored(
        rollout=RolloutId("job", task, rollout),
        number=number,
        agent="simple",
        verifier="v",
        reward=1.0,
        row=b"{}",
        response=b"{}",
        policy=Policy(model="m"),
    )


def failed(task: int, rollout: int = 0, kind: FailureKind = FailureKind.MODEL_ERROR, number: int = 1) -> Failed:
    failure = Failure(kind=kind, detail="as it happened")
    return Failed(rollout=RolloutId("job", task, rollout), number=number, failure=failure)


async def publish(bus: Bus, *messages: Request | Attempt | Scored | Failed) -> None:
    for message in messages:
        await bus.publish(message, f"{message.rollout}#{getattr(message, 'number', 1)}")


async def issued(bus: Bus, count: int) -> None:
    await bus.state.put(subjects.JOBS, "job.issued", Issued(count))


async def test_every_rollout_is_in_the_furthest_place_where_it_is_seen(bus: Bus) -> None:
    await publish(bus, a_request(0, 0), a_request(0, 1), an_attempt(0, 1), an_attempt(1, 0), scored(1, 0))
    await publish(bus, an_attempt(1, 1), scored(5), failed(6))
    await bus.publish(failed(7, kind=FailureKind.CANCELLED), "job.7.0#cancelled")
    await issued(bus, 4)

    books, account = await read_books(bus, RECORD)

    places = [Place.REQUESTS, Place.ATTEMPTS, Place.SCORED, Place.ATTEMPTS, Place.SCORED, Place.FAILED, Place.CANCELLED]
    assert list(books.places) == places
    assert account == Account(
        job="job",
        total=7,
        accepted=7,
        requests=1,
        attempts=2,
        retrying=0,
        scored=2,
        failed={"model_error": 1},
        cancelled=1,
    )
    assert (account.in_flight, account.unaccounted) == (3, 0)


async def test_what_the_broker_took_and_has_nowhere_is_unaccounted_for(bus: Bus) -> None:
    await publish(bus, a_request(0, 0), scored(0, 1))
    await issued(bus, 7)
    account = await read_account(bus, RECORD)
    assert (account.accepted, account.in_flight, account.scored, account.unaccounted) == (7, 1, 1, 5)


async def test_a_failure_that_is_tried_again_is_in_flight(bus: Bus) -> None:
    await publish(bus, failed(0, 0), a_request(0, 0, number=2), failed(0, 1, number=2), a_request(0, 1))
    account = await read_account(bus, RECORD)
    assert (account.requests, account.failed) == (1, {"model_error": 1})


async def test_a_failure_on_its_way_into_a_queue_is_in_flight_and_a_second_look_finds_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "SECOND_LOOK_S", 0.0)
    await publish(bus, scored(0, 0), failed(0, 1))
    await issued(bus, 2)
    assert await make_room(bus, RolloutId("job", 0, 1), 2)
    looks = 0
    read = accounting.read_books

    async def read_and_count(*arguments: object) -> object:
        nonlocal looks
        looks += 1
        return await read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(accounting, "read_books", read_and_count)
    assert (await read_account(bus, RECORD)).unaccounted == 1
    assert looks == 2
    await bus.state.put(subjects.JOBS, "job.progress", JobProgress(retrying=1))
    account = await read_account(bus, RECORD)
    assert (account.retrying, account.in_flight, account.unaccounted, looks) == (1, 1, 0, 3)


async def test_other_jobs_and_rollouts_that_the_job_does_not_have_do_not_count(bus: Bus) -> None:
    await publish(bus, a_request(0, 2), a_request(4), a_request(8), scored(3))
    await bus.js.publish("gym.request.batch.simple.job", b"no rollout", headers={"Nats-Msg-Id": "nonsense"})
    assert (await read_account(bus, RECORD)).accepted == 0


async def test_stored_ids_are_listed_batch_by_batch(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.bus.streams.IDS_MESSAGES", 4)
    for task in range(11):
        await publish(bus, a_request(task))
        await bus.publish(
            Request(rollout=RolloutId("other", task, 0), agent="simple", model="m", verifier="v", row=b"{}"),
            f"other.{task}.0#1",
        )
    ids = await bus.streams.ids(subjects.REQUESTS, subjects.requests_of("job"))
    assert ids == [f"job.{task}.0#1" for task in range(11)]
    assert await bus.streams.ids(subjects.REQUESTS, subjects.requests_of("nobody")) == []


async def test_only_an_older_failure_makes_room(bus: Bus) -> None:
    await publish(bus, failed(0, 0), failed(0, 1, number=2), scored(1, 0))
    at = [RolloutId("job", 0, 0), RolloutId("job", 0, 1), RolloutId("job", 1, 0), RolloutId("job", 1, 1)]
    assert [await make_room(bus, rollout, 2) for rollout in at] == [True, False, False, True]
    results = bus.streams.outcomes(subjects.RESULTS, subjects.results_of("job"))
    left = {(o.task_index, o.rollout_index) async for o in results}
    assert left == {(0, 1), (1, 0)}
