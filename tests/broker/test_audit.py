"""Auditing jobs on a real stream: what adds up, and what does not."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import FailureKind
from gym_bus.jobs import Issued, JobRecord
from gym_bus.messages import Attempt, Failed, Failure, Policy, Request, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.profile import profile_job
from gym_bus.settings import ResultsConfig
from gym_bus.workers import audit as module
from gym_bus.workers.audit import Audit, audit_job
from gym_bus.workers.results import ResultsConsumer, open_writer
from gym_bus.workers.run import cancel_job, enrol, retire

TASKS = 4
QUICK = ResultsConfig(idle_s=5.0)


def a_record(**more: Any) -> JobRecord:
    return JobRecord(job="job", spans=[(0, TASKS, 1)], agent="simple", model="m", verifier="mcqa", **more)


def scored(task: int, number: int = 1, reward: float = 1.0) -> Scored:
    common: dict[str, Any] = {"row": b'{"q":1}', "response": b'{"output":[]}', "policy": Policy(model="m")}
    rollout = RolloutId("job", task, 0)
    return Scored(rollout=rollout, number=number, agent="simple", verifier="mcqa", reward=reward, **common)


def failed(task: int) -> Failed:
    failure = Failure(kind=FailureKind.MODEL_ERROR, detail="500", stage="agent")
    return Failed(rollout=RolloutId("job", task, 0), failure=failure, row=b'{"q":1}')


def a_request(task: int, number: int = 1) -> Request:
    rollout = RolloutId("job", task, 0)
    return Request(rollout=rollout, number=number, agent="simple", model="m", verifier="mcqa", row=b"{}")


def an_attempt(task: int) -> Attempt:
    policy = Policy(model="m")
    rollout = RolloutId("job", task, 0)
    return Attempt(rollout=rollout, agent="simple", verifier="mcqa", row=b"{}", response=b"{}", policy=policy)


async def nothing(_: object) -> None:
    pass


@pytest.fixture
async def files(bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFiles:
    """A job that is done: task 0 failed, the others were scored."""
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.05)
    files = JobFiles(tmp_path)
    files.inputs.write_bytes(b"".join(b'{"_ng_task_index":%d,"_ng_rollout_index":0}\n' % i for i in range(TASKS)))
    Manifest(
        job="job",
        created_at=0.0,
        benchmark="b",
        dataset_digest=hashlib.sha256(files.inputs.read_bytes()).hexdigest(),
        rows=TASKS,
        num_repeats=1,
        agent="simple",
        model="m",
        model_kind="simulated",
        model_name="m",
        verifier="mcqa",
        config_digest="c",
        gym_bus_version="0",
    ).save(files.manifest)
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(TASKS))
    for task in range(TASKS):
        await bus.publish(scored(task) if task else failed(task), f"job.{task}.0#1")
    with open_writer(a_record(), files, QUICK) as writer:
        await asyncio.wait_for(ResultsConsumer(bus, a_record(), files, writer, QUICK, nothing).run(), 60)
    profile_job(files)
    await retire(bus, a_record())
    return files


async def audited(bus: Bus, files: JobFiles | None) -> Audit:
    return await audit_job(bus, await bus.state.get(subjects.JOBS, "job", JobRecord), files.folder if files else None)


def found(audit: Audit) -> list[tuple[str, str, int, list[str]]]:
    return [(finding.check, finding.what, finding.count, finding.examples) for finding in audit.findings]


@pytest.mark.parametrize("with_files", [True, False])
async def test_a_job_that_is_done_adds_up(bus: Bus, files: JobFiles, with_files: bool) -> None:
    audit = await audited(bus, files if with_files else None)

    assert (found(audit), audit.notes, audit.adds_up) == ([], [], True)
    assert (audit.accepted, audit.scored, audit.failed, audit.in_flight) == (4, 3, {"model_error": 1}, 0)


async def purge(bus: Bus, task: int) -> None:
    await bus.streams.purge(subjects.RESULTS, subjects.result("job", task, 0))


async def another_reward(bus: Bus) -> None:
    await purge(bus, 1)
    await bus.publish(scored(1, reward=0.0), "job.1.0#1.other")


async def an_older_attempt(bus: Bus) -> None:
    await purge(bus, 0)
    await bus.publish(scored(0, 2), "job.0.0#2")


async def a_stranger(bus: Bus) -> None:
    await bus.publish(scored(9), "job.9.0#1")


async def a_result_less(bus: Bus) -> None:
    await purge(bus, 2)


@pytest.mark.parametrize(
    ("damage", "what", "example"),
    [
        (another_reward, "another outcome than the line's", "1/0: reward 0.0 on the stream, reward 1.0 in line 1"),
        (an_older_attempt, "a result without a line", "0/0, attempt 2"),
        (a_stranger, "a result of no rollout of this job", "9/0"),
        (a_result_less, "a line whose result is not on the stream", "line 2: 2/0"),
    ],
)
async def test_files_that_are_not_what_the_stream_holds_are_named(
    bus: Bus, files: JobFiles, damage: Callable[[Bus], Awaitable[None]], what: str, example: str
) -> None:
    await damage(bus)

    ((check, said, count, examples),) = found(await audited(bus, files))

    assert (check, said, count) == ("results", what, 1)
    assert example in examples[0]


async def test_results_that_grew_too_old_for_the_stream_are_taken_from_the_files(bus: Bus, files: JobFiles) -> None:
    await bus.streams.purge(subjects.RESULTS, subjects.results_of("job"))
    await bus.publish(scored(0), "other")  # the stream's first message is now a later one
    await purge(bus, 0)

    audit = await audited(bus, files)

    assert (found(audit), audit.scored, audit.failed) == ([], 3, {"model_error": 1})
    assert "4 results are no longer on the stream" in audit.notes[0]
    assert (await audited(bus, None)).adds_up  # and without them from what the results consumer has said


async def test_a_job_that_runs_is_counted_where_it_is(bus: Bus) -> None:
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(TASKS))
    await bus.publish(a_request(0), "job.0.0#1")
    await bus.publish(a_request(1), "job.1.0#1")
    await bus.publish(an_attempt(1), "job.1.0#1")
    await bus.publish(an_attempt(2), "job.2.0#1")
    await bus.publish(scored(3), "job.3.0#1")

    audit = await audited(bus, None)

    assert (audit.accepted, audit.scored, audit.in_flight, found(audit)) == (4, 1, 3, [])


async def test_a_rollout_that_is_nowhere_is_named(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.05)
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(3))
    await bus.publish(a_request(0), "job.0.0#1")
    await bus.publish(scored(2), "job.2.0#1")

    audit = await audited(bus, None)

    assert (audit.accepted, audit.unaccounted) == (3, 1)
    assert found(audit) == [("account", "accepted, and in no queue, on no stream, in no file", 1, ["1/0"])]


async def test_a_failure_that_is_tried_again_is_in_flight(bus: Bus, files: JobFiles) -> None:
    await enrol(bus, a_record())  # it runs again
    await purge(bus, 0)
    await bus.publish(a_request(0, 2), "job.0.0#2")

    audit = await audited(bus, files)

    assert (found(audit), audit.scored, audit.failed, audit.in_flight) == ([], 3, {}, 1)


async def test_a_cancelled_job_adds_up(bus: Bus, tmp_path: Path) -> None:
    await enrol(bus, a_record())
    await bus.state.put(subjects.JOBS, "job.issued", Issued(2))
    await bus.publish(a_request(0), "job.0.0#1")
    await bus.publish(scored(1), "job.1.0#1")
    await cancel_job(bus, a_record())

    audit = await audited(bus, None)

    assert (audit.state, audit.accepted, audit.scored, audit.cancelled) == ("cancelled", 4, 1, 3)
    assert found(audit) == []


async def test_messages_left_behind_by_a_job_that_is_over_are_noted(bus: Bus, files: JobFiles) -> None:
    await bus.publish(a_request(1, 5), "job.1.0#5")

    audit = await audited(bus, files)

    assert (found(audit), audit.notes) == (
        [],
        ["1 messages of the job are still queued; they cannot make a second result"],
    )
    assert msgspec.json.decode(msgspec.json.encode(audit))["scored"] == 3
