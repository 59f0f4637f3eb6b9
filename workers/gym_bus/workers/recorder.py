"""The results worker: records submitted jobs, one recorder per job at a time however many such workers there are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.deadline import within
from gym_bus.errors import BusError, GymBusError, UsageError
from gym_bus.jobs import Issued, JobRecord, find_job, list_jobs
from gym_bus.logs import get_logger
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.profile import profile_job
from gym_bus.workers.again import Again
from gym_bus.workers.main import REPORT_S, WorkerReport, worker_id
from gym_bus.workers.publish import order_of
from gym_bus.workers.replay import OrderedReplays, ReplayOrder, replay_key
from gym_bus.workers.results import ResultsConsumer, open_writer
from gym_bus.workers.run import load_inputs

log = get_logger(__name__)

LOOK_S = 1.0
BEAT_S = 2.0
LEASE_S = 8.0
RETRY_S = 10.0
STANDS_STILL_S = 60.0
"""A publisher that has not moved its mark for so long is dead: what it has not published is missing."""
"""A recorder that has not renewed its lease for so long, by the looker's own clock, is dead."""


class Holder(msgspec.Struct):
    """Who records a job, under `<job>.recorder`."""

    worker: str
    beat: int = 0


class Lease:
    """The right to record a job: renewed by whoever holds it, taken over when it stands still."""

    def __init__(self, bus: Bus, job: str, worker: str) -> None:
        self._bus, self._key, self._worker = bus, f"{job}.recorder", worker
        self._revision = 0
        self._seen: tuple[int, float] | None = None
        self._beats = 0

    async def try_take(self) -> bool:
        """Take the lease where it is free or has stood still for `LEASE_S`."""
        found = await self._bus.state.get_entry(subjects.JOBS, self._key, Holder)
        revision = found[1] if found else 0
        if found and found[0].worker:
            if self._seen is None or self._seen[0] != revision:
                self._seen = (revision, time.monotonic())
                return False
            if time.monotonic() - self._seen[1] < LEASE_S:
                return False
        return await self._swap(Holder(self._worker), revision)

    async def _swap(self, holder: Holder, revision: int) -> bool:
        taken = await self._bus.state.swap(subjects.JOBS, self._key, holder, revision)
        if taken is not None:
            self._revision = taken
        return taken is not None

    async def keep(self) -> None:
        """Renew until somebody else has it. Returns then; never while the lease is ours."""
        held_at = time.monotonic()
        while time.monotonic() - held_at < LEASE_S:
            await asyncio.sleep(BEAT_S)
            self._beats += 1
            try:
                if not await self._swap(Holder(self._worker, self._beats), self._revision):
                    return
                held_at = time.monotonic()
            except BusError as e:
                log.warning("lease_not_renewed", key=self._key, error=str(e))

    async def release(self) -> None:
        """Give it back, so that another worker need not wait."""
        with contextlib.suppress(BusError):
            await self._swap(Holder(""), self._revision)


class Published:
    """Whether a submitted job's publisher is through, as far as the bus knows."""

    def __init__(self, bus: Bus, record: JobRecord) -> None:
        self._bus, self._record = bus, record
        self._seen, self._since = -1, time.monotonic()

    async def all_out(self) -> bool:
        """True when every request is out, or the publisher has not moved for `STANDS_STILL_S`."""
        issued: Issued | None = await self._bus.state.get(subjects.JOBS, f"{self._record.job}.issued", Issued)
        count = issued.count if issued else 0
        if count >= self._record.total:
            return True
        if count != self._seen:
            self._seen, self._since = count, time.monotonic()
        return time.monotonic() - self._since > STANDS_STILL_S


class Recorder:
    """Looks for submitted jobs that nobody records and records them."""

    def __init__(self, bus: Bus, config: Config, output: Path, worker: str) -> None:
        self._bus, self._config, self._output, self._worker = bus, config, output, worker
        self._leases: dict[str, Lease] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        """Jobs that could not be recorded, and when, by the monotonic clock, to try again."""
        self.finished: set[str] = set()
        """Jobs that this worker has recorded to their end."""
        self.done = 0

    @property
    def in_flight(self) -> int:
        """Jobs being recorded."""
        return len(self._tasks)

    @property
    def jobs(self) -> list[str]:
        """The jobs being recorded."""
        return list(self._tasks)

    async def look(self) -> list[str]:
        """Take on every free job; returns the jobs being recorded now."""
        for job, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[job]
                self._ended(job, task)
        for record in await list_jobs(self._bus):
            if record.state == "running":  # also a job that we had recorded: it is being replayed
                self.finished.discard(record.job)
            free = record.shared and record.state != "done" and record.job not in self._tasks
            if free and record.job not in self.finished and time.monotonic() >= self._not_before.get(record.job, 0.0):
                lease = self._leases.setdefault(record.job, Lease(self._bus, record.job, self._worker))
                if await lease.try_take():
                    log.info("recording", job=record.job)
                    self._tasks[record.job] = asyncio.create_task(self._record(record, lease), name=record.job)
        return list(self._tasks)

    def _ended(self, job: str, task: asyncio.Task[None]) -> None:
        self._leases.pop(job, None)
        if task.cancelled():
            return
        if error := task.exception():
            log.error("recording_failed", job=job, error=str(error))
            if not (isinstance(error, GymBusError) and error.retryable):
                # The disk may be full, or the folder in the hands of a worker that is about to die.
                self._not_before[job] = time.monotonic() + RETRY_S
        else:
            self.finished.add(job)

    async def _record(self, record: JobRecord, lease: Lease) -> None:
        keeping = asyncio.create_task(lease.keep(), name=f"{record.job} lease")
        recording = asyncio.create_task(self._record_files(record), name=f"{record.job} results")
        try:
            await asyncio.wait({keeping, recording}, return_when=asyncio.FIRST_COMPLETED)
            if recording.done():
                recording.result()
                self.done += 1
            else:
                raise BusError(f"another worker took over job {record.job}")
        finally:
            for task in (keeping, recording):
                task.cancel()
            await asyncio.gather(keeping, recording, return_exceptions=True)
            await lease.release()

    async def _record_files(self, record: JobRecord) -> None:
        files = JobFiles(self._output / record.job)
        if not files.inputs.exists():
            await self._fetch_inputs(record.job, files)
        manifest = msgspec.convert(record.manifest, Manifest)
        if not files.manifest.exists():
            manifest.save(files.manifest)
        writer = await asyncio.to_thread(open_writer, record, files, self._config.results)
        with writer:
            first = Published(self._bus, record)
            again = Again(self._bus, record, order_of(record, manifest), files, writer)
            replays = OrderedReplays(self._bus, record.job, again)

            async def all_out() -> bool:
                return await replays.published() and await first.all_out()

            consumer = ResultsConsumer(
                self._bus, record, files, writer, self._config.results, again.order, published=all_out
            )
            await _consume(consumer, replays)
        await asyncio.to_thread(profile_job, files)
        known = await find_job(self._bus, record.job)
        if known.state == "running":
            await self._bus.state.put(subjects.JOBS, record.job, msgspec.structs.replace(known, state="done"))
        await self._bus.blobs.delete_of(record.job)

    async def _fetch_inputs(self, job: str, files: JobFiles) -> None:
        try:
            await load_inputs(self._bus, job, files.inputs)
        except BusError:
            order: ReplayOrder | None = await self._bus.state.get(subjects.JOBS, replay_key(job), ReplayOrder)
            if order is None or order.ended:
                raise
            raise UsageError(
                f"{files.folder}: job {job} is to be replayed, and its files are not here; "
                "the results worker that has them will take it"
            ) from None

    async def stop(self) -> None:
        """Stop recording; the files are whole, and another worker goes on from them."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


async def _consume(consumer: ResultsConsumer, replays: OrderedReplays) -> None:
    """Record until every rollout has its result, those included that are replayed meanwhile."""
    await replays.look(consumer)
    serving = asyncio.create_task(replays.serve(consumer), name="replays")
    consuming = asyncio.create_task(_until_none_is_left(consumer, replays), name="consumer")
    try:
        done, _ = await asyncio.wait({serving, consuming}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (serving, consuming):
            task.cancel()
        await asyncio.gather(serving, consuming, return_exceptions=True)
        await replays.close()


async def _until_none_is_left(consumer: ResultsConsumer, replays: OrderedReplays) -> None:
    while True:
        await consumer.run()
        await replays.look(consumer)
        if not consumer.left:
            return


async def run_recorder(config: Config, output: Path, *, once: str | None = None, ready: Callable[[], None]) -> None:
    """Serve the results role until SIGTERM or SIGINT, or until job `once` is recorded.

    Raises:
        BusError: no NATS server.
        UsageError: no job `once`.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    worker = worker_id("results")
    structlog.contextvars.bind_contextvars(worker=worker)
    _make_folder(output)
    async with await Bus.connect(config.bus, name=worker) as bus:
        await bus.init()
        if once is not None:
            await find_job(bus, once)
        recorder = Recorder(bus, config, output, worker)
        ready()
        started_at, reported_at = time.time(), 0.0
        while not stop.is_set():
            with contextlib.suppress(BusError):
                await recorder.look()
                if once is not None and (once in recorder.finished or (await find_job(bus, once)).state == "done"):
                    break
                if time.monotonic() - reported_at > REPORT_S:
                    reported_at = time.monotonic()
                    await bus.state.put(subjects.WORKERS, worker, _report(worker, recorder, started_at))
            with contextlib.suppress(TimeoutError):
                await within(LOOK_S, stop.wait())
        await recorder.stop()
        with contextlib.suppress(BusError):
            await bus.state.remove(subjects.WORKERS, worker)


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{output}: cannot be written: {e.strerror or e}") from None


def _report(worker: str, recorder: Recorder, started_at: float) -> WorkerReport:
    return WorkerReport(
        worker=worker,
        role="results",
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=started_at,
        reported_at=time.time(),
        in_flight=recorder.in_flight,
        buffered=0,
        done=recorder.done,
        serves=recorder.jobs,
    )
