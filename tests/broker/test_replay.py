"""Trying failed rollouts again on a real stream: attempts, late results, and orders to a results worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import until

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Attempt, Call, Failed, Failure, Policy, Request, RolloutId, Scored, Timings, Usage, decode
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.reader import iter_jsonl
from gym_bus.results.writer import ResultsWriter
from gym_bus.settings import Config, ResultsConfig
from gym_bus.workers.again import Again
from gym_bus.workers.publish import order_of
from gym_bus.workers.recorder import Recorder
from gym_bus.workers.replay import ReplayOrder, Selection, choose, order_replay, replay_key
from gym_bus.workers.results import ResultsConsumer, open_writer
from gym_bus.workers.run import cancel_job, enrol

QUICK = ResultsConfig(idle_s=0.5)
LIMIT_S = 60.0
ANSWER = b'{"output":[]}'
MANIFEST = Manifest(
    job="job",
    created_at=0.0,
    benchmark="b",
    dataset_digest="d",
    rows=2,
    num_repeats=1,
    agent="simple",
    agent_options={"max_steps": 3},
    model="m",
    model_kind="simulated",
    model_name="m",
    verifier="mcqa",
    verifier_options={"strict": True},
    config_digest="c",
    gym_bus_version="0",
)


def a_record(**more: Any) -> JobRecord:
    manifest = msgspec.to_builtins(MANIFEST)
    return JobRecord(
        job="job", spans=[(0, 2, 1)], agent="simple", model="m", verifier="mcqa", manifest=manifest, **more
    )


def scored(task: int, number: int = 1, reward: float = 1.0) -> Scored:
    policy = Policy(model="m")
    common = {"agent": "simple", "verifier": "mcqa", "row": b'{"q":1}', "response": ANSWER, "policy": policy}
    return Scored(rollout=RolloutId("job", task, 0), number=number, reward=reward, **common)  # type: ignore[arg-type]


def failed(task: int, number: int = 1, kind: FailureKind = FailureKind.MODEL_ERROR, **more: Any) -> Failed:
    failure = Failure(kind=kind, detail="as it happened", stage="agent")
    return Failed(
        **{"rollout": RolloutId("job", task, 0), "number": number, "failure": failure, "row": b'{"q":1}'} | more
    )


def lay_down(folder: Path) -> JobFiles:
    files = JobFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.inputs.write_bytes(
        b"".join(b'{"q":%d,"_ng_task_index":%d,"_ng_rollout_index":0}\n' % (i, i) for i in range(2))
    )
    return files


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for _, line in iter_jsonl(path)]


async def stored(bus: Bus, stream: str, subject: str) -> list[tuple[str, Any]]:
    """Message ids and messages of a subject."""
    return [(message.message_id, decode(message.body)) async for message in bus.streams.messages(stream, subject)]


@asynccontextmanager
async def replaying(
    bus: Bus, files: JobFiles, selection: Selection | None = None
) -> AsyncIterator[tuple[ResultsConsumer, ResultsWriter, asyncio.Task[None]]]:
    """A results consumer that has ordered the failed rollouts again and waits for their results."""
    record = a_record()
    with open_writer(record, files, QUICK) as writer:
        again = Again(bus, record, order_of(record, MANIFEST), files, writer)
        consumer = ResultsConsumer(bus, record, files, writer, QUICK, again.order, retries_only=True)
        chosen = choose(writer.ledger, selection or Selection())
        again.afresh |= chosen.afresh
        consumer.retry(chosen.attempts.items())
        await again.order({rollout: (number, 0) for rollout, number in chosen.attempts.items()})
        running = asyncio.create_task(consumer.run())
        try:
            yield consumer, writer, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def record(bus: Bus, files: JobFiles) -> None:
    """Record what is on the stream; the job has two rollouts."""
    with open_writer(a_record(), files, QUICK) as writer:
        consumer = ResultsConsumer(bus, a_record(), files, writer, QUICK, nothing)
        await asyncio.wait_for(consumer.run(), LIMIT_S)


async def nothing(_: object) -> None:
    pass


async def test_a_late_result_of_an_older_attempt_replaces_no_newer_one(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path)
    await bus.publish(failed(0), "job.0.0#1")
    await bus.publish(scored(1), "job.1.0#1")
    await record(bus, files)

    async with replaying(bus, files) as (_, _, running):
        ((name, request),) = await stored(bus, subjects.REQUESTS, subjects.requests_of("job"))
        assert (name, request.number) == ("job.0.0#2", 2)
        assert await bus.publish(scored(0, 2, 1.0), "job.0.0#2")
        assert not await bus.publish(scored(0, 1, 0.0), "job.0.0#1.late")
        await asyncio.wait_for(running, LIMIT_S)

    newest = [line for line in lines_of(files.rollouts) if line["_ng_task_index"] == 0]
    assert [(line["reward"], line["gym_bus"]["attempt"]) for line in newest] == [(1.0, 2)]
    assert [name for name, _ in await stored(bus, subjects.RESULTS, subjects.result("job", 0, 0))] == ["job.0.0#2"]


@pytest.mark.parametrize("late", [scored(0, 1), failed(0, 1)], ids=["scored", "failed"])
async def test_a_late_result_does_not_keep_the_place_of_the_newer_one(
    bus: Bus, tmp_path: Path, late: Scored | Failed
) -> None:
    files = lay_down(tmp_path)
    with open_writer(a_record(), files, QUICK) as writer:
        writer.append([(1, failed(0, 1)), (2, failed(0, 2)), (3, scored(1))])

    async with replaying(bus, files) as (_, writer, running):
        assert await bus.publish(late, "job.0.0#1.late")  # the place was cleared for attempt 3
        await until(lambda: is_empty(bus))
        assert await bus.publish(scored(0, 3, 0.25), "job.0.0#3")
        await asyncio.wait_for(running, LIMIT_S)

        assert writer.ledger.rewards()[0, 0] == 0.25


async def is_empty(bus: Bus) -> bool:
    return await bus.streams.count(subjects.RESULTS, subjects.results_of("job")) == 0


def lost(task: int) -> Failed:
    """A failure of the check; the answer, its tokens and the agent's own fields are there."""
    return failed(
        task,
        failure=Failure(kind=FailureKind.SANDBOX_LOST, detail="gone", stage="verifier"),
        response=ANSWER,
        extra=b'{"turns":2}',
        calls=(Call(prompt_token_ids=b"\1\0\0\0", token_ids=b"\2\0\0\0", logprobs=b"\0\0\0\0"),),
        policy=Policy(model="m", version_start=4, version_end=5, temperature=0.5),
        usage=Usage(input_tokens=7),
        timings=Timings(model_s=1.5, model_calls=1),
        agent_worker="agent-1",
    )


async def test_a_stored_answer_is_checked_again_with_all_that_belongs_to_it(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path)
    await bus.publish(lost(0), "job.0.0#1")
    await bus.publish(failed(1), "job.1.0#1")
    await record(bus, files)

    async with replaying(bus, files, Selection(stage="verifier")) as (consumer, _, running):
        assert list(consumer.retrying) == [RolloutId("job", 0, 0)]
        assert await stored(bus, subjects.REQUESTS, subjects.requests_of("job")) == []
        ((name, attempt),) = await stored(bus, subjects.ATTEMPTS, subjects.attempts_of("job"))
        await bus.publish(scored(0, 2), name)
        await asyncio.wait_for(running, LIMIT_S)

    before = lost(0)
    assert attempt == Attempt(
        rollout=before.rollout,
        number=2,
        agent="simple",
        verifier="mcqa",
        row=b'{"q":0}',
        response=ANSWER,
        verifier_options=b'{"strict":true}',
        policy=before.policy or Policy(model=""),
        usage=before.usage,
        calls=before.calls,
        extra=before.extra,
        timings=before.timings,
        agent_worker="agent-1",
        published_at=attempt.published_at,
    )
    (line,) = lines_of(files.rollouts)
    assert [past["class"] for past in line["gym_bus"]["history"]] == ["sandbox_lost"]


async def test_an_answer_is_generated_again_where_that_is_wanted(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path)
    with open_writer(a_record(), files, QUICK) as writer:
        writer.append([(1, lost(0)), (2, scored(1))])

    async with replaying(bus, files, Selection(stage="agent")):
        ((_, request),) = await stored(bus, subjects.REQUESTS, subjects.requests_of("job"))

    assert isinstance(request, Request)
    assert (request.number, request.row, request.agent_options) == (2, b'{"q":0}', b'{"max_steps":3}')
    assert await stored(bus, subjects.ATTEMPTS, subjects.attempts_of("job")) == []


async def test_a_check_that_the_bus_loses_is_ordered_again_as_a_check(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path)
    with open_writer(a_record(), files, QUICK) as writer:
        writer.append([(1, lost(0)), (2, scored(1))])

    async with replaying(bus, files):
        await bus.streams.purge(subjects.ATTEMPTS, subjects.attempts_of("job"))
        await until(lambda: stored(bus, subjects.ATTEMPTS, subjects.attempts_of("job")))
        ((name, _),) = await stored(bus, subjects.ATTEMPTS, subjects.attempts_of("job"))

    assert name == "job.0.0#2.1"


async def test_cancelling_a_replay_fails_what_it_waits_for_and_keeps_the_answers(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path)
    await bus.publish(lost(0), "job.0.0#1")
    await bus.publish(failed(1), "job.1.0#1")
    await record(bus, files)
    await enrol(bus, a_record())

    async with replaying(bus, files) as (_, writer, running):
        await cancel_job(bus, a_record())
        await asyncio.wait_for(running, LIMIT_S)
        standing = {rollout.task_index: failed for rollout, failed in writer.ledger.failures()}

    assert {task: (one.kind, one.number) for task, one in standing.items()} == dict.fromkeys((0, 1), ("cancelled", 2))
    assert standing[0].stored_at >= 0 > standing[1].stored_at
    assert sorted(line["q"] for line in lines_of(files.failures)[2:]) == [0, 1]  # their rows, from the inputs


@asynccontextmanager
async def results_worker(bus: Bus, output: Path) -> AsyncIterator[Recorder]:
    recorder = Recorder(bus, Config(results=QUICK), output, "results-1")

    async def serve() -> None:
        while True:
            await recorder.look()
            await asyncio.sleep(0.05)

    serving = asyncio.create_task(serve())
    try:
        yield recorder
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await recorder.stop()


async def job_is_done(bus: Bus) -> bool:
    job = await bus.state.get(subjects.JOBS, "job", JobRecord)
    return bool(job.state == "done")


@pytest.mark.slow
async def test_a_results_worker_replays_a_job_that_it_had_finished(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path / "job")
    await enrol(bus, a_record(shared=True))
    await bus.publish(failed(0), "job.0.0#1")
    await bus.publish(lost(1), "job.1.0#1")
    async with results_worker(bus, tmp_path):
        await until(lambda: job_is_done(bus))

        taken = await order_replay(bus, "job", Selection(), limit_s=5.0)
        assert taken is not None and (taken.taken, taken.from_verifier) == (2, 1)
        await until(lambda: stored(bus, subjects.REQUESTS, subjects.requests_of("job")))
        ((_, request),) = await stored(bus, subjects.REQUESTS, subjects.requests_of("job"))
        assert request.limit_s == 5.0
        with pytest.raises(UsageError, match="under way"):
            await order_replay(bus, "job", Selection(), limit_s=None)
        for task in range(2):
            await bus.publish(scored(task, 2), f"job.{task}.0#2")
        await until(lambda: job_is_done(bus))

        again = await order_replay(bus, "job", Selection(), limit_s=None)
    assert again is not None and again.taken == 0
    assert sorted(line["gym_bus"]["attempt"] for line in lines_of(files.rollouts)) == [2, 2]


async def test_an_order_from_before_anybody_recorded_the_job_is_for_what_had_failed_by_then(
    bus: Bus, tmp_path: Path
) -> None:
    lay_down(tmp_path / "job")
    await enrol(bus, a_record(shared=True))
    await bus.publish(failed(0), "job.0.0#1")
    await bus.publish(scored(1), "job.1.0#1")
    up_to = (await bus.streams.state(subjects.RESULTS)).last_sequence
    await bus.state.put(subjects.JOBS, replay_key("job"), ReplayOrder(selection=Selection(up_to=up_to)))
    async with results_worker(bus, tmp_path):
        await until(lambda: stored(bus, subjects.REQUESTS, subjects.requests_of("job")))
    order = await bus.state.get(subjects.JOBS, replay_key("job"), ReplayOrder)
    assert (order.taken, order.ended) == (1, False)


@pytest.mark.slow
async def test_an_order_outlives_the_results_worker_that_took_it(bus: Bus, tmp_path: Path) -> None:
    files = lay_down(tmp_path / "job")
    await enrol(bus, a_record(shared=True))
    await bus.publish(failed(0), "job.0.0#1")
    await bus.publish(failed(1), "job.1.0#1")
    async with results_worker(bus, tmp_path):
        await until(lambda: job_is_done(bus))
        await order_replay(bus, "job", Selection(), limit_s=None)
        await bus.publish(failed(0, 2), "job.0.0#2")  # it fails again: that is its new result
        await until(lambda: len(lines_of(files.failures)) == 3)
    async with results_worker(bus, tmp_path) as second:
        await until(lambda: second.in_flight == 1)
        await bus.publish(scored(1, 2), "job.1.0#2")
        await until(lambda: job_is_done(bus))

    order = await bus.state.get(subjects.JOBS, replay_key("job"), ReplayOrder)
    assert (order.taken, order.ended) == (2, True)
    assert [line["gym_bus"]["attempt"] for line in lines_of(files.failures)] == [1, 1, 2]
    assert [line["_ng_task_index"] for line in lines_of(files.rollouts)] == [1]
