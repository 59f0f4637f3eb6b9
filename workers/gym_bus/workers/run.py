"""Run one job from its output folder: publish what is missing, record until nothing is left, close the books."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import BusError, FailureKind, UsageError
from gym_bus.jobs import JobProgress, JobRecord
from gym_bus.logs import get_logger
from gym_bus.messages import Failed, Failure, Policy, Result
from gym_bus.results.ledger import Ledger
from gym_bus.results.writer import ResultsWriter
from gym_bus.workers.again import Again, Chosen
from gym_bus.workers.local import STORE, LocalStack
from gym_bus.workers.main import CONTROL_CANCEL
from gym_bus.workers.plan import Job
from gym_bus.workers.publish import issued_count, patiently, publish_requests
from gym_bus.workers.results import ResultsConsumer, open_writer, worth_retrying

log = get_logger(__name__)


class Progress:
    """What a running job shows: read by the display, written by the run."""

    def __init__(self, record: JobRecord, ledger: Ledger) -> None:
        self.job, self.job_name = record.job, f"{record.benchmark} {record.model}".strip()
        self.total = record.total
        self.ledger = ledger
        self.published = 0
        """Input lines that the broker has taken."""
        self.finished = 0
        """Results recorded by this run."""
        self._started = time.monotonic()

    @property
    def recorded(self) -> int:
        """Rollouts with a result."""
        return self.total - self.ledger.missing_count

    @property
    def in_flight(self) -> int:
        """Published and without a result."""
        return max(0, self.published - self.recorded)

    @property
    def rate(self) -> float:
        """Results per second of this run."""
        return self.finished / max(1e-9, time.monotonic() - self._started)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started


class ReplayProgress(Progress):
    """Of a replay: its own rollouts, not the whole job's."""

    def __init__(self, record: JobRecord, ledger: Ledger, total: int) -> None:
        super().__init__(record, ledger)
        self.total = self.published = total

    @property
    def recorded(self) -> int:
        """Replayed rollouts with a new result."""
        return self.finished


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended."""

    ledger: Ledger
    wall_s: float
    """Seconds of this run, the start of the stack not included."""
    finished: int
    """Results recorded by this run."""


async def run_job(
    job: Job,
    config: Config,
    *,
    workers: bool = True,
    on_start: Callable[[Progress], None] = lambda _: None,
) -> RunResult:
    """Run until every rollout has its result.

    Args:
        job: written down in its folder.
        config: `bus.url` set for a running server; else one is embedded.
        workers: start local workers.
        on_start: gets the progress, once the stack is up.

    Raises:
        BusError: no server, or a worker that keeps dying.
        UsageError: the folder is held by another run, or cannot be written.
    """
    with open_writer(job.record, job.files, config.results) as writer:
        if not writer.ledger.missing_count and not worth_retrying(writer.ledger, config.results.max_attempts):
            on_start(Progress(job.record, writer.ledger))
            await close_books([job.record], config, job.files.folder / STORE)
            return RunResult(ledger=writer.ledger, wall_s=0.0, finished=0)
        async with LocalStack(config, job.files.folder, verifier=job.record.verifier, workers=workers) as stack:
            result = await _run(job, stack, writer, on_start)
            stack.complete()
            return result


async def close_books(records: Iterable[JobRecord], config: Config, store: Path) -> None:
    """What a run that was killed at its very end has left undone: the files are complete, the bus does not know."""
    if config.bus.url is None:
        await asyncio.to_thread(shutil.rmtree, store, ignore_errors=True)
        return
    with contextlib.suppress(BusError):  # nothing is needed of the bus, so it may be gone
        async with await Bus.connect(config.bus) as bus:
            for record in records:
                await retire(bus, record)


async def run_on(job: Job, stack: LocalStack, writer: ResultsWriter, on_start: Callable[[Progress], None]) -> RunResult:
    """As `run_job`, on a stack that is up."""
    return await _run(job, stack, writer, on_start)


async def run_replay(
    job: Job, stack: LocalStack, writer: ResultsWriter, on_start: Callable[[Progress], None], chosen: Chosen
) -> RunResult:
    """Try failed rollouts again on a stack that is up, until each has a new result; see `run_job`."""
    return await _run(job, stack, writer, on_start, chosen)


async def _run(
    job: Job,
    stack: LocalStack,
    writer: ResultsWriter,
    on_start: Callable[[Progress], None],
    chosen: Chosen | None = None,
) -> RunResult:
    bus, config, name = stack.bus, stack.config, job.record.job
    await patiently(lambda: enrol(bus, job.record), name)
    if chosen is None:
        progress = Progress(job.record, writer.ledger)
    else:
        progress = ReplayProgress(job.record, writer.ledger, len(chosen.attempts))

    def recorded(fresh: list[Result], _: Ledger) -> None:
        progress.finished += len(fresh)

    again = Again(bus, job.record, job.order, job.files, writer)
    publishing: asyncio.Task[None] | None = None

    async def published() -> bool:
        return publishing is not None and publishing.done()

    consumer = ResultsConsumer(
        bus,
        job.record,
        job.files,
        writer,
        config.results,
        again.order,
        published=published,
        on_results=recorded,
        retries_only=chosen is not None,
    )
    # Before the consumer runs: with nothing else missing, it would see no work and end.
    if chosen is None:
        consumer.retry_failed()
    else:
        again.afresh |= chosen.afresh
        consumer.retry(chosen.attempts.items())
    on_start(progress)
    publishing = asyncio.create_task(_publish(bus, job, consumer, progress, again), name="publisher")
    try:
        await stack.until(consumer.run(), publishing)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    await patiently(lambda: retire(bus, job.record), name)
    return RunResult(ledger=writer.ledger, wall_s=progress.wall_s, finished=progress.finished)


async def _publish(bus: Bus, job: Job, consumer: ResultsConsumer, progress: Progress, again: Again) -> None:
    if retrying := consumer.retrying:
        await again.order({rollout: (number, 0) for rollout, number in retrying.items()})
    if consumer.retries_only:
        return
    start = progress.published = await patiently(lambda: issued_count(bus, job.record.job), job.record.job)

    def moved(behind: int) -> None:
        progress.published = behind

    await publish_requests(
        bus,
        job.order,
        job.files.inputs,
        consumer.first_number,
        job.record.group_size,
        start=start,
        on_progress=moved,
    )


async def enrol(bus: Bus, record: JobRecord) -> None:
    """Have the bus remember the job; a cancelled one runs again."""
    known: JobRecord | None = await bus.state.get(subjects.JOBS, record.job, JobRecord)
    if known is None or msgspec.structs.replace(known, created_at=record.created_at) != record:
        await bus.state.put(subjects.JOBS, record.job, record)


async def retire(bus: Bus, record: JobRecord) -> None:
    """Every rollout has its result: mark the job done and free what it kept on the bus."""
    known: JobRecord | None = await bus.state.get(subjects.JOBS, record.job, JobRecord)
    if known is not None and known.state == "running":
        await bus.state.put(subjects.JOBS, record.job, msgspec.structs.replace(known, state="done"))
    await bus.blobs.delete_of(record.job)


async def submit_job(bus: Bus, job: Job) -> int:
    """Publish a job for workers and a results worker elsewhere; returns the number of rollouts that are new to it.

    Raises:
        UsageError: the job is over already.
    """
    record = msgspec.structs.replace(job.record, shared=True)
    known: JobRecord | None = await bus.state.get(subjects.JOBS, record.job, JobRecord)
    if known is not None and known.over:
        raise UsageError(
            f"job {record.job} is {known.state} already; choose another --output to run it anew, or run "
            "`gym-bus eval run` with this one to try again what failed"
        )
    await patiently(lambda: bus.blobs.put_file(f"{record.job}/inputs", job.files.inputs), record.job)
    await patiently(lambda: enrol(bus, record), record.job)
    # Sent before, and perhaps worked on: the broker forgets the ids of what has left its queue when it is restarted.
    start = await patiently(lambda: issued_count(bus, record.job), record.job)
    return await publish_requests(bus, job.order, job.files.inputs, lambda _: 1, job.record.group_size, start=start)


async def cancel_job(bus: Bus, record: JobRecord) -> int:
    """Stop a job: nothing of it is started any more, and every rollout without a result fails as cancelled.

    Returns the number of rollouts that are cancelled, whoever wrote it down: workers and the results consumer hear of
    it at the same time.
    """
    job = record.job
    results = subjects.results_of(job)
    await bus.state.put(subjects.JOBS, job, msgspec.structs.replace(record, state="cancelled"))
    await bus.announce(f"{CONTROL_CANCEL}.{job}", str(time.time()).encode())
    await bus.streams.purge(subjects.REQUESTS, subjects.requests_of(job))
    await bus.streams.purge(subjects.ATTEMPTS, subjects.attempts_of(job))
    have = {(o.task_index, o.rollout_index) async for o in bus.streams.outcomes(subjects.RESULTS, results)}
    failure = Failure(kind=FailureKind.CANCELLED, detail="the job was cancelled", stage="bus")
    batch: list[Failed] = []
    for rollout in record.rollouts():
        if (rollout.task_index, rollout.rollout_index) in have:
            continue
        size = record.group_size(rollout.task_index)
        batch.append(
            Failed(
                rollout=rollout,
                failure=failure,
                agent=record.agent,
                verifier=record.verifier,
                group_size=size,
                policy=Policy(model=record.model),
            )
        )
        if len(batch) == 1024:
            await _publish_all(bus, batch)
            batch = []
    await _publish_all(bus, batch)
    return len([o async for o in bus.streams.outcomes(subjects.RESULTS, results) if o.failure == FailureKind.CANCELLED])


async def _publish_all(bus: Bus, failures: list[Failed]) -> None:
    await asyncio.gather(*(bus.publish(f, f"{f.rollout}#cancelled") for f in failures))


class Status(msgspec.Struct, kw_only=True):
    """How a job stands, read from the bus alone. `accepted = scored + failed + cancelled + in flight`."""

    job: str
    state: str
    benchmark: str
    model: str
    total: int
    accepted: int
    """Requests that the broker has taken."""
    results: int
    """Results on the stream."""
    requests_waiting: int
    """Queued or being generated."""
    attempts_waiting: int
    """Queued or being verified."""
    in_flight: int
    """Accepted and without a result."""
    scored: int
    """As recorded by the results consumer; the next ones too."""
    failed: dict[str, int]
    mean_reward: float | None
    output: str
    created_at: float
    """Seconds since the epoch."""


async def job_status(bus: Bus, record: JobRecord) -> Status:
    """Read a job's status."""
    job = record.job
    issued = await issued_count(bus, job)
    results = await bus.streams.count(subjects.RESULTS, subjects.results_of(job))
    requests = await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of(job))
    attempts = await bus.streams.waiting(subjects.ATTEMPTS, subjects.attempts_of(job))
    progress: JobProgress = await bus.state.get(subjects.JOBS, f"{job}.progress", JobProgress) or JobProgress()
    if record.over:  # results leave the stream with age; what was recorded stays
        results = max(results, progress.recorded)
    accepted = min(record.total, max(issued, results))
    return Status(
        job=job,
        state=record.state,
        benchmark=record.benchmark,
        model=record.model,
        total=record.total,
        accepted=accepted,
        results=results,
        requests_waiting=requests,
        attempts_waiting=attempts,
        in_flight=max(0, accepted - results),
        scored=progress.scored,
        failed=progress.failed,
        mean_reward=progress.reward_sum / progress.scored if progress.scored else None,
        output=progress.output,
        created_at=record.created_at,
    )


async def load_inputs(bus: Bus, job: str, path: Path) -> None:
    """Fetch the materialized inputs of a submitted job. Raises BusError where they are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    await bus.blobs.get_file(f"{job}/inputs", part)
    part.replace(path)
