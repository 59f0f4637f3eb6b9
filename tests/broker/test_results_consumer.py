"""The results consumer on a real stream: what it does after crashes, cancellations and outages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import until

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Pull
from gym_bus.errors import FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Attempt, Failed, Failure, Policy, Request, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.writer import ResultsWriter
from gym_bus.settings import ResultsConfig
from gym_bus.workers.recorder import Recorder
from gym_bus.workers.results import ResultsConsumer, open_writer
from gym_bus.workers.run import cancel_job, enrol, job_status, retire

QUICK = ResultsConfig(idle_s=0.5)
LIMIT_S = 60.0


def a_record(tasks: int = 3, repeats: int = 1, **more: Any) -> JobRecord:
    return JobRecord(job="job", spans=[(0, tasks, repeats)], agent="simple", verifier="mcqa", **more)


def scored(task: int, rollout: int = 0, number: int = 1, reward: float = 1.0) -> Scored:
    return Scored(
        rollout=RolloutId("job", task, rollout),
        number=number,
        agent="simple",
        verifier="mcqa",
        reward=reward,
        row=b'{"q":1}',
        response=b'{"output":[]}',
        policy=Policy(model="m"),
    )


def failed(task: int, kind: FailureKind = FailureKind.MODEL_UNREACHABLE, number: int = 1) -> Failed:
    failure = Failure(kind=kind, detail="as it happened", stage="agent")
    return Failed(rollout=RolloutId("job", task, 0), number=number, failure=failure, row=b'{"q":1}')


async def nothing(_: object) -> None:
    pass


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n")


async def record(bus: Bus, record: JobRecord, folder: Path, reissue: Any = nothing) -> ResultsWriter:
    files = JobFiles(folder)
    with open_writer(record, files, QUICK) as writer:
        await asyncio.wait_for(ResultsConsumer(bus, record, files, writer, QUICK, reissue).run(), LIMIT_S)
    return writer


async def test_a_failure_that_a_crash_kept_out_of_its_file_is_read_from_the_stream_again(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_record(2)
    await bus.publish(failed(0), "job.0.0#1")
    await bus.publish(scored(1), "job.1.0#1")
    files = JobFiles(tmp_path)
    sync, synced = os.fdatasync, []

    class Crash(BaseException):
        pass

    def crash_after_the_first(fd: int) -> None:
        if synced:
            raise Crash
        sync(fd)
        synced.append(fd)

    with open_writer(job, files, QUICK) as writer:
        monkeypatch.setattr(os, "fdatasync", crash_after_the_first)
        with pytest.raises(Crash):
            writer.append([(1, failed(0)), (2, scored(1))])
    monkeypatch.setattr(os, "fdatasync", sync)
    if lines_of(files.failures):  # the crash of a process, not of the machine, may have left both
        files.failures.write_bytes(b"")
    assert (lines_of(files.rollouts), lines_of(files.failures)) == (1, 0)

    await record(bus, job, tmp_path)

    assert (lines_of(files.rollouts), lines_of(files.failures)) == (1, 1)


async def test_cancelling_a_run_that_tries_again_ends_it_at_once(bus: Bus, tmp_path: Path) -> None:
    job, files = a_record(3), JobFiles(tmp_path)
    with open_writer(job, files, QUICK) as writer:
        writer.append([(i + 1, failed(i)) for i in range(3)])
    await enrol(bus, job)
    asked: list[object] = []

    async def reissue(again: object) -> None:
        asked.append(again)

    with open_writer(job, files, QUICK) as writer:
        consumer = ResultsConsumer(bus, job, files, writer, QUICK, reissue)
        assert consumer.retry_failed() == 3
        running = asyncio.create_task(consumer.run())
        await cancel_job(bus, job)
        await asyncio.wait_for(running, LIMIT_S)
        kinds = {failure.kind for _, failure in writer.ledger.failures()}

    assert (kinds, asked) == ({"cancelled"}, [])


async def test_failures_that_no_repetition_mends_are_not_tried_again(bus: Bus, tmp_path: Path) -> None:
    job, files = a_record(3), JobFiles(tmp_path)
    kinds = (FailureKind.REQUEST_REFUSED, FailureKind.TASK_BROKEN, FailureKind.CONTEXT_TOO_LONG)
    with open_writer(job, files, QUICK) as writer:
        writer.append([(i + 1, failed(i, kind)) for i, kind in enumerate(kinds)])

        assert ResultsConsumer(bus, job, files, writer, QUICK, nothing).retry_failed() == 0
    assert files.failures.read_text().count('"_ng_failure_terminal":true') == 3


async def test_failures_made_by_the_bus_say_how_large_their_group_is(bus: Bus) -> None:
    job = a_record(1, repeats=4)
    await enrol(bus, job)

    assert await cancel_job(bus, job) == 4
    bodies = [message.body async for message in bus.streams.messages(subjects.RESULTS, subjects.results_of("job"))]
    assert all(b"group_size\x04" in body for body in bodies)


async def test_a_writer_that_is_cancelled_has_finished_what_it_was_writing(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    begun, go_on, write = threading.Event(), threading.Event(), os.write

    def slow(fd: int, data: bytes) -> int:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            go_on.wait(60)
        return write(fd, data)

    monkeypatch.setattr(os, "write", slow)
    await bus.publish(scored(0), "job.0.0#1")
    running = asyncio.create_task(record(bus, a_record(2), tmp_path))
    await asyncio.to_thread(begun.wait, 60)
    running.cancel()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await running

    assert lines_of(JobFiles(tmp_path).rollouts) == 1


async def test_a_recorder_tries_again_when_the_folder_was_in_other_hands(
    bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gym_bus.settings import Config
    from gym_bus.workers import recorder as module

    monkeypatch.setattr(module, "RETRY_S", 0.1)
    job = a_record(1, shared=True, manifest=MANIFEST)
    files = JobFiles(tmp_path / "job")
    files.folder.mkdir()
    files.inputs.write_bytes(b'{"q":1,"_ng_task_index":0,"_ng_rollout_index":0}\n')
    await enrol(bus, job)
    await bus.publish(scored(0), "job.0.0#1")
    recorder = Recorder(bus, Config(), tmp_path, "me")
    with open_writer(job, files, QUICK):
        await until(looked(recorder, lambda: not recorder._tasks and bool(recorder._not_before)))
    await until(looked(recorder, lambda: "job" in recorder.finished))

    assert lines_of(files.rollouts) == 1
    assert (await job_status(bus, job)).state == "running"  # the record at hand; the bus knows better:
    assert (await bus.state.get(subjects.JOBS, "job", JobRecord)).state == "done"


def looked(recorder: Recorder, condition: Callable[[], bool]) -> Callable[[], Any]:
    async def look() -> bool:
        await recorder.look()
        return condition()

    return look


MANIFEST = {
    "job": "job",
    "created_at": 0.0,
    "benchmark": "b",
    "dataset_digest": "d",
    "rows": 1,
    "num_repeats": 1,
    "agent": "simple",
    "agent_options": {},
    "model": "m",
    "model_kind": "simulated",
    "model_name": "m",
    "verifier": "mcqa",
    "config_digest": "c",
    "gym_bus_version": "0",
}


async def test_a_cancelled_job_is_recorded_once(bus: Bus, tmp_path: Path) -> None:
    from gym_bus.settings import Config

    job = a_record(2, shared=True, manifest=MANIFEST)
    files = JobFiles(tmp_path / "job")
    files.folder.mkdir()
    files.inputs.write_bytes(b"".join(b'{"_ng_task_index":%d,"_ng_rollout_index":0}\n' % i for i in range(2)))
    await enrol(bus, job)
    await cancel_job(bus, job)
    recorder = Recorder(bus, Config(results=QUICK), tmp_path, "me")
    await until(looked(recorder, lambda: "job" in recorder.finished))

    assert await recorder.look() == []
    assert recorder.done == 1


async def test_the_status_of_a_job_that_is_over_does_not_age(bus: Bus, tmp_path: Path) -> None:
    job = a_record(2)
    await enrol(bus, job)
    for task in range(2):
        await bus.publish(scored(task), f"job.{task}.0#1")
    await record(bus, job, tmp_path)
    await retire(bus, job)
    await bus.streams.purge(subjects.RESULTS, subjects.results_of("job"))

    status = await job_status(bus, await bus.state.get(subjects.JOBS, "job", JobRecord))

    assert (status.state, status.results, status.in_flight) == ("done", 2, 0)


async def test_a_job_of_another_kind_of_run_is_enrolled_anew(bus: Bus) -> None:
    await enrol(bus, a_record(2))
    await enrol(bus, a_record(2, shared=True))

    assert (await bus.state.get(subjects.JOBS, "job", JobRecord)).shared


async def test_two_writers_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    with open_writer(a_record(1), JobFiles(tmp_path), QUICK), pytest.raises(UsageError, match="already being written"):
        open_writer(a_record(1), JobFiles(tmp_path), QUICK)


async def test_a_request_that_the_broker_kept_though_its_attempt_exists_is_no_failure(bus: Bus, tmp_path: Path) -> None:
    rollout = RolloutId("job", 0, 0)
    await bus.publish(Request(rollout=rollout, agent="simple", model="m", verifier="v", row=b"{}"), "job.0.0#1")
    await bus.publish(
        Attempt(rollout=rollout, agent="simple", verifier="v", row=b"{}", response=b"{}", policy=Policy(model="m")),
        "job.0.0#1",
    )
    await use_up_the_deliveries(bus)
    running = asyncio.create_task(record(bus, a_record(1), tmp_path))
    await until(lambda: nothing_waits(bus))
    assert await bus.streams.count(subjects.RESULTS, subjects.results_of("job")) == 0
    await bus.publish(scored(0), "job.0.0#1")
    assert (await running).ledger.tally.scored == 1


async def use_up_the_deliveries(bus: Bus) -> None:
    """Deliver the one request once, which is all that its consumer does."""
    got: list[Delivery] = []
    subject = subjects.request("batch", "simple", "*")
    await bus.consumers.ensure(subjects.REQUESTS, "test", subject, max_ack_pending=10, max_deliver=1)
    pull = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: 2 - len(got))
    await pull.start()
    await until(lambda: got)
    await got[0].nak()
    await until(lambda: is_stuck(bus))
    await pull.stop()


async def is_stuck(bus: Bus) -> bool:
    return await bus.consumers.stuck(subjects.REQUESTS, subjects.requests_of("job")) != []


async def nothing_waits(bus: Bus) -> bool:
    return await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 0
