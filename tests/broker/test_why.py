"""What a job waits for, told from a real server."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import NatsServer, until

from gym_bus import activity, subjects
from gym_bus.bus import Bus, Delivery, Pull
from gym_bus.errors import FailureKind
from gym_bus.jobs import Issued, JobProgress, JobRecord
from gym_bus.messages import Attempt, Failed, Failure, Message, Policy, Request, RolloutId, Scored
from gym_bus.models.fleet import Fleet, Member
from gym_bus.models.pacing import Pacing
from gym_bus.settings import BusConfig, StreamConfig
from gym_bus.workers.loop import Cancellations, Doing, Loop, Source
from gym_bus.workers.main import WorkerReport, _report
from gym_bus.workers.replay import ReplayOrder, Selection, replay_key
from gym_bus.workers.run import cancel_job, enrol
from gym_bus.workers.why import Wait, Why, why

TOTAL = 4


def a_record(**more: Any) -> JobRecord:
    return JobRecord(job="job", spans=[(0, TOTAL, 1)], agent="simple", model="m", verifier="mcqa", **more)


def a_request(task: int, job: str = "job") -> Request:
    return Request(rollout=RolloutId(job, task, 0), agent="simple", model="m", verifier="mcqa", row=b"{}")


def an_attempt(task: int) -> Attempt:
    policy = Policy(model="m")
    rollout = RolloutId("job", task, 0)
    return Attempt(rollout=rollout, agent="simple", verifier="mcqa", row=b"{}", response=b"{}", policy=policy)


def scored(task: int) -> Scored:
    common: dict[str, Any] = {"row": b"{}", "response": b"{}", "policy": Policy(model="m")}
    return Scored(rollout=RolloutId("job", task, 0), agent="simple", verifier="mcqa", reward=1.0, **common)


def a_report(role: str, **more: Any) -> WorkerReport:
    now = time.time()
    common: dict[str, Any] = {"host": "h", "pid": 1, "started_at": now, "reported_at": now}
    counts = {"in_flight": 3, "buffered": 2, "done": 0}
    return WorkerReport(**{"worker": f"{role}-1", "role": role, **common, **counts} | more)


async def told(bus: Bus) -> Why:
    return await why(bus, await bus.state.get(subjects.JOBS, "job", JobRecord))


def waits_of(told: Why, stage: str) -> list[Wait]:
    return [wait for wait in told.waits if wait.stage == stage]


@pytest.fixture
async def job(bus: Bus) -> Bus:
    """A job with all its requests queued."""
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(TOTAL))
    for task in range(TOTAL):
        await bus.publish(a_request(task), f"job.{task}.0#1")
    return bus


async def test_requests_that_no_worker_has_come_for(job: Bus) -> None:
    answer = await told(job)

    (wait,) = waits_of(answer, "requests")
    assert "4 requests of agent 'simple', lane batch, wait: no agent worker is joined" in wait.what
    assert (answer.waits[0], wait.blocked, wait.count) == (wait, True, 4)
    assert answer.last is not None and (answer.last.what, answer.last.rollout) == ("request", "3/0")


async def test_requests_that_no_worker_serves(job: Bus) -> None:
    await job.state.put(subjects.WORKERS, "agent-1", a_report("agent", serves=["agent-batch-other"]))

    (wait,) = waits_of(await told(job), "requests")
    assert "no worker that is joined serves 'agent-batch-simple' (agent-1)" in wait.what
    assert wait.blocked


class Slow:
    """A handler that works until it is told to end."""

    stage = "verifier"

    def __init__(self) -> None:
        self.cancellations = Cancellations()
        self.end = asyncio.Event()

    async def handle(self, message: Message, stored_at: float) -> Scored:
        activity.note("running the tests")
        await self.end.wait()
        return scored(message.rollout.task_index)


async def test_a_rollout_in_hand_is_named_with_its_worker_its_step_and_its_delivery(bus: Bus) -> None:
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(TOTAL))
    for task in range(2):
        await bus.publish(an_attempt(task), f"job.{task}.0#1")
    source = Source(stream=subjects.ATTEMPTS, consumer="verifier-mcqa", subject=subjects.attempt("mcqa", "*"))
    handler = Slow()
    loop = Loop(bus, handler, [source], concurrency=1, prefetch=4, max_ack_pending=8, worker="verifier-1")
    await loop.start()
    await until(lambda: loop.oldest() and loop.oldest()[0].what == "running the tests")
    reporting = asyncio.create_task(_report(bus, "verifier-1", "verifier", loop))
    try:
        await until(lambda: bus.state.get(subjects.WORKERS, "verifier-1"))
        answer = await told(bus)
        handler.end.set()
        await until(lambda: loop.done == 2)
        nothing_in_hand = loop.oldest()
    finally:
        reporting.cancel()
        await loop.drain(1.0)

    (wait,) = waits_of(answer, "verifier")
    aged = r"rollout 0/0 is being verified by worker verifier-1 for [\d.]+ s: running the tests, for [\d.]+ s"
    assert re.match(aged, wait.what), wait.what
    assert (wait.rollouts, wait.worker, nothing_in_hand) == (["0/0"], "verifier-1", [])
    (queue,) = waits_of(answer, "attempts")
    assert "2 attempts of verifier 'mcqa' wait or are in hand: 1 verifier worker" in queue.what


async def test_the_oldest_rollouts_of_the_job_stand_for_the_rest(job: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("gym_bus.workers.why.since", lambda at: now - at)
    oldest = [
        Doing(rollout=f"{name}.{task}.0", what="agent", since=now - age, started_at=now - age, delivery=delivery)
        for name, task, age, delivery in (("job", 1, 5, 1), ("other", 0, 300, 1), ("job", 2, 120, 2))
    ]
    await job.state.put(subjects.WORKERS, "a", a_report("agent", serves=["agent-batch-simple"], oldest=oldest))

    assert [wait.what.partition(".")[0] for wait in waits_of(await told(job), "agent")] == [
        "rollout 2/0 is being generated by worker agent-1 for 120 s (delivery 2)",
        "rollout 1/0 is being generated by worker agent-1 for 5",
    ]


async def test_a_full_stream_of_attempts_is_named(own_server: NatsServer) -> None:
    config = BusConfig(url=own_server.url, attempts=StreamConfig(max_msgs=2))
    async with await Bus.connect(config) as bus:
        await bus.init()
        await enrol(bus, a_record())
        for task in range(2):
            await bus.publish(an_attempt(task), f"job.{task}.0#1")

        full, queue = waits_of(await told(bus), "attempts")

    assert "the stream of attempts is full (2 messages" in full.what
    assert "agent workers wait with their answers" in full.what
    assert "no verifier worker is joined" in queue.what


async def test_a_message_whose_deliveries_are_used_up_is_named(bus: Bus) -> None:
    await enrol(bus, a_record())
    await bus.publish(a_request(3), "job.3.0#1")
    subject = subjects.request("batch", "simple", "*")
    await bus.consumers.ensure(subjects.REQUESTS, "agent-batch-simple", subject, max_ack_pending=4, max_deliver=1)
    naks: list[asyncio.Task[None]] = []
    pull = Pull(bus, subjects.REQUESTS, "agent-batch-simple", lambda d: naks.append(given_back(d)), lambda: 1)
    await pull.start()
    await until(lambda: bus.consumers.stuck(subjects.REQUESTS, subjects.requests_of("job")))

    (wait,) = waits_of(await told(bus), "requests")
    await pull.stop()

    assert "1 requests will not be delivered again, their deliveries are used up (3/0)" in wait.what
    assert wait.rollouts == ["3/0"]


def given_back(delivery: Delivery) -> asyncio.Task[None]:
    return asyncio.create_task(delivery.nak())


def the_consumer(silent_s: float = 0.0, **changes: Any) -> JobProgress:
    return JobProgress(**{"scored": 0, "sequence": 1, "updated_at": time.time() - silent_s} | changes)


@pytest.mark.parametrize(
    ("silent_s", "said", "blocked"),
    [
        (None, "no results consumer has recorded anything of the job, no results worker is joined", True),
        (600.0, "the results consumer is not running: not heard of for 60", True),
        (0.0, "the results consumer holds at sequence 1, 1 results wait", False),
    ],
)
async def test_results_that_nobody_records(bus: Bus, silent_s: float | None, said: str, blocked: bool) -> None:
    await enrol(bus, a_record(shared=True))
    for task in range(2):
        await bus.publish(scored(task), f"job.{task}.0#1")
    if silent_s is not None:
        await bus.state.put(subjects.JOBS, "job.progress", the_consumer(silent_s))

    (wait,) = waits_of(await told(bus), "results")

    assert said in wait.what
    assert (wait.blocked, wait.count) == (blocked, 2 if silent_s is None else 1)


@pytest.mark.parametrize(
    ("pacing", "takes"), [(Pacing(), "8 calls at a time"), (Pacing(pace=2.5), "2.5 calls per second")]
)
async def test_an_endpoint_that_refuses_calls_is_named(job: Bus, pacing: Pacing, takes: str) -> None:
    members = {"agent-1": Member(places=8, busy=8, wants=100)}
    await job.state.put(subjects.LIMITS, "m", Fleet(limit=8, members=members, pacing=pacing))
    gone = {"agent-9": Member(places=8, busy=8, wants=100)}
    await job.state.put(subjects.LIMITS, "other", Fleet(limit=8, members=gone))
    await job.state.put(subjects.LIMITS, "newer", {"limit": 12.5})
    await job.state.put(subjects.WORKERS, "agent-1", a_report("agent"))

    (wait,) = waits_of(await told(job), "endpoint")
    assert wait.what == f"the endpoint of model 'm' refuses more than {takes}: 100 are wanted, the others wait here"


async def test_an_endpoint_that_has_room_is_not(job: Bus) -> None:
    await job.state.put(subjects.LIMITS, "m", Fleet(limit=8, members={"agent-1": Member(places=8, busy=2, wants=2)}))

    assert not waits_of(await told(job), "endpoint")


async def test_rollouts_that_the_bus_has_lost_are_counted(bus: Bus) -> None:
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(TOTAL))
    await bus.state.put(subjects.JOBS, "job.progress", the_consumer(scored=1, sequence=9))
    await bus.publish(scored(0), "job.0.0#1")

    (wait,) = waits_of(await told(bus), "job")
    assert "3 accepted rollouts are in no queue and have no result" in wait.what


async def test_requests_that_are_not_published_yet(job: Bus) -> None:
    await job.state.put(subjects.JOBS, "job.issued", Issued(1))

    (wait,) = waits_of(await told(job), "publisher")
    assert "3 of 4 requests are not published yet" in wait.what


async def test_a_replay_that_nobody_takes(job: Bus) -> None:
    await job.state.put(subjects.JOBS, replay_key("job"), ReplayOrder(selection=Selection()))

    assert "a replay is ordered, and no results worker has taken it" in (await told(job)).waits[0].what


async def test_a_job_that_is_over_waits_for_nothing(bus: Bus, tmp_path: Path) -> None:
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.progress", the_consumer(scored=3, failed={"poison": 1}))
    await bus.state.put(subjects.JOBS, "job", a_record(state="done"))

    (wait,) = (await told(bus)).waits
    assert wait.what == "for nothing, it is complete: 3 scored, 1 failed (poison 1)"


async def test_a_cancelled_job_says_so(job: Bus) -> None:
    await job.publish(
        Failed(rollout=RolloutId("job", 0, 0), failure=Failure(kind=FailureKind.POISON, detail="?")), "job.0.0#1"
    )
    await cancel_job(job, a_record())

    assert "it was cancelled" in waits_of(await told(job), "job")[0].what
