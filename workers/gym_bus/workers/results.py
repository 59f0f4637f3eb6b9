"""The results consumer: one writer per job. Results in stream order, appended and synced; the file is the checkpoint.

Nothing is acked: each line carries its stream sequence, and a restart reads on behind the last line that the stream
still confirms. When a job stands still, what the bus lost is ordered again and what it cannot deliver is failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Follower, as_result
from gym_bus.errors import RETRYABLE, BodyLost, BusError, FailureKind
from gym_bus.jobs import JobProgress, JobRecord
from gym_bus.logs import get_logger
from gym_bus.messages import Failed, Failure, Policy, Result, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.ledger import Ledger, State
from gym_bus.results.writer import ResultsWriter
from gym_bus.settings import ResultsConfig
from gym_bus.workers.publish import make_room, number_in

log = get_logger(__name__)

PROGRESS_S = 1.0
BEAT_S = 5.0
"""How often the progress is told where nothing has changed: a sign of life."""
BATCH_WAIT_S = 0.25

Reissue = Callable[[dict[RolloutId, tuple[int, int]]], Awaitable[None]]
"""Orders rollouts again: by rollout, the attempt number and how often that attempt was ordered before."""


def open_writer(record: JobRecord, files: JobFiles, config: ResultsConfig) -> ResultsWriter:
    """The job's writer, holding the output folder; see `ResultsWriter` for what it raises."""
    last = max(first + tasks for first, tasks, _ in record.spans)
    most = max(rollouts for _, _, rollouts in record.spans)
    return ResultsWriter(files, record.job, last, most, tokens=config.tokens, spans=record.spans)


def worth_retrying(ledger: Ledger, most_attempts: int) -> list[tuple[RolloutId, int]]:
    """Failed rollouts that another attempt may mend, with that attempt's number.

    Not worth it: terminal failures, kinds that no repetition mends, and rollouts that have used up their attempts,
    cancelled ones apart.
    """
    return [
        (rollout, failure.number + 1)
        for rollout, failure in ledger.failures()
        if not failure.terminal
        and failure.kind in RETRYABLE
        and (failure.number < most_attempts or failure.kind == FailureKind.CANCELLED)
    ]


class Writer(Protocol):
    """Where results are recorded."""

    ledger: Ledger

    def append(self, results: Sequence[tuple[int, Result]]) -> list[Result]:
        """Record results with their stream sequences; returns those that were not recorded before."""
        ...


class ResultsConsumer:
    """Records the results of one job until every rollout has one."""

    def __init__(
        self,
        bus: Bus,
        record: JobRecord,
        files: JobFiles,
        writer: Writer,
        config: ResultsConfig,
        reissue: Reissue,
        *,
        published: Callable[[], Awaitable[bool]] | None = None,
        on_results: Callable[[list[Result], Ledger], None] | None = None,
        retries_only: bool = False,
    ) -> None:
        """Go on from what the files hold.

        Args:
            bus: where the results come from.
            record: the job.
            files: where they go.
            writer: holds the files open; see `open_writer`.
            config: limits.
            reissue: called with what the bus has lost.
            published: tells whether every request is out; before that, nothing is missing. None where all are.
            on_results: called with every batch of newly recorded results.
            retries_only: do not wait for rollouts that have no result at all.
        """
        self.retries_only = retries_only
        self._bus, self._record, self._files, self._config = bus, record, files, config
        self._reissue, self._published, self._on_results = reissue, published, on_results
        self._writer, self.ledger = writer, writer.ledger
        self._retrying: dict[RolloutId, int] = {}
        self._issues: dict[RolloutId, int] = {}
        self._progress_at = time.monotonic()
        self._told_at = 0.0
        self._told = JobProgress()
        self._put_at = 0.0
        self._read_to = 0
        self._cancelled = False
        self._rescanned: bool | None = False
        """Whether the stream was read from its start since something last moved; None where it is to be."""
        self._unread: list[Delivery] = []
        """Taken off the stream and not recorded yet: the bus was away when their bodies were fetched."""

    # -- what is to do ------------------------------------------------------------------------------------------------

    def number_of(self, rollout: RolloutId) -> int:
        """The attempt to order for a rollout, 0 where it has its result."""
        return self.first_number(rollout) or self.retry_number(rollout)

    def first_number(self, rollout: RolloutId) -> int:
        """1 where nothing is recorded of the rollout, else 0."""
        return 1 if self.ledger.state(rollout) is State.MISSING else 0

    def retry_number(self, rollout: RolloutId) -> int:
        """The attempt to order for a rollout that failed before, 0 where it is not tried again."""
        return self._retrying.get(rollout, 0)

    def retry_failed(self) -> int:
        """Wait for another attempt at every failed rollout that is worth it; returns how many are waited for."""
        return self.retry(worth_retrying(self.ledger, self._config.max_attempts))

    def retry(self, attempts: Iterable[tuple[RolloutId, int]]) -> int:
        """Wait for further attempts, given by their numbers, at failed rollouts; returns how many are waited for.

        Whoever orders them clears the place of the failed result on the stream.
        """
        self._retrying.update(attempts)
        return len(self._retrying)

    def waits_for(self, rollouts: Iterable[RolloutId]) -> bool:
        """Whether a further attempt at any of these is waited for."""
        return any(rollout in self._retrying for rollout in rollouts)

    async def is_behind(self, sequence: int | None) -> bool:
        """Whether there are results up to this sequence of the stream (None: its end) that are yet to be recorded.

        Raises:
            BusError: the broker did not answer.
        """
        if not self.left:  # all is recorded, also what has left the stream
            return False
        results = subjects.results_of(self._record.job)
        unread = await self._bus.streams.count(subjects.RESULTS, results, self._read_to + 1)
        if not unread or sequence is None:
            return unread > 0
        return unread > await self._bus.streams.count(subjects.RESULTS, results, max(sequence, self._read_to) + 1)

    @property
    def retrying(self) -> dict[RolloutId, int]:
        """The attempts that are waited for, by rollout."""
        return dict(self._retrying)

    @property
    def left(self) -> int:
        """Rollouts that still need a result."""
        return (0 if self.retries_only else self.ledger.missing_count) + len(self._retrying)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Record results until none is left.

        Raises:
            UsageError: the files cannot be written; nothing on the bus is lost.
        """
        start = await self._start()
        self._read_to = start - 1
        follower = Follower(self._bus, subjects.RESULTS, subjects.results_of(self._record.job), start)
        self._progress_at = time.monotonic()
        try:
            while self.left:
                await self._turn(follower)
                if self._rescanned is None:
                    await follower.close()
                    follower = Follower(self._bus, subjects.RESULTS, subjects.results_of(self._record.job), 1)
                    self._rescanned = True
        finally:
            await follower.close()
            with contextlib.suppress(BusError):
                await self._tell(force=True)

    async def _turn(self, follower: Follower) -> None:
        try:
            self._unread = self._unread or await follower.batch(BATCH_WAIT_S)
            if self._unread:
                await self._append(self._unread)
                self._unread = []
            elif time.monotonic() - self._progress_at > self._config.idle_s:
                self._progress_at = time.monotonic()
                await self._reconcile(follower)
            await self._tell()
        except BusError as e:
            log.warning("results_wait_for_the_bus", job=self._record.job, error=str(e))
            await asyncio.sleep(0.5)

    async def _start(self) -> int:
        """The stream sequence to read from: behind the last line, where the stream still holds that very result."""
        anchor = self.ledger.anchor
        while anchor is not None:
            try:
                found = await self._bus.streams.at(subjects.RESULTS, anchor.sequence)
            except BusError as e:
                log.warning("results_wait_for_the_bus", job=self._record.job, error=str(e))
                await asyncio.sleep(0.5)
                continue
            if found and found.message_id.split("#", 1)[0] == str(anchor.rollout):
                return anchor.sequence + 1
            break
        return 1

    async def _append(self, deliveries: list[Delivery]) -> None:
        results = [(delivery.sequence, await self._result(delivery)) for delivery in deliveries]
        fresh = await self._write(results)
        self._read_to = deliveries[-1].sequence
        if fresh:
            self._took(fresh)
        # They may not keep the places of the newer attempts' results on the stream.
        late = [sequence for sequence, result in results if self._is_late(result, sequence)]
        await asyncio.gather(*(self._bus.streams.delete(subjects.RESULTS, sequence) for sequence in late))

    def _is_late(self, result: Result, sequence: int) -> bool:
        """Whether this is of an older attempt than the one that is waited for, and not the failure that it follows."""
        if result.number >= self._retrying.get(result.rollout, 0):
            return False
        failed = self.ledger.failure(result.rollout)
        return failed is None or failed.sequence != sequence

    def _took(self, fresh: list[Result]) -> None:
        self._progress_at, self._rescanned = time.monotonic(), False
        for result in fresh:
            wanted = self._retrying.get(result.rollout)
            if wanted is not None and (isinstance(result, Scored) or result.number >= wanted):
                del self._retrying[result.rollout]
        if self._on_results:
            self._on_results(fresh, self.ledger)

    async def _write(self, results: list[tuple[int, Result]]) -> list[Result]:
        writing = asyncio.ensure_future(asyncio.to_thread(self._writer.append, results))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing})  # the thread goes on: its files may not be closed under it
            raise

    async def _result(self, delivery: Delivery) -> Result:
        try:
            result = as_result(await delivery.message())
            wanted = self._retrying.get(result.rollout, 0)
            if isinstance(result, Failed) and result.failure.kind is FailureKind.CANCELLED and result.number < wanted:
                return msgspec.structs.replace(result, number=wanted)  # who cancels a job knows no attempt numbers
            return result
        except (msgspec.DecodeError, BodyLost) as e:
            job, task, index = delivery.subject.split(".")[2:5]
            rollout = RolloutId(job, int(task), int(index))
            detail = f"the result cannot be read: {e}"
            return Failed(
                rollout=rollout,
                number=number_in(delivery.message_id),
                failure=Failure(kind=FailureKind.POISON, detail=detail, stage="results"),
            )

    async def _tell(self, *, force: bool = False) -> None:
        """Put the progress where `eval status` and `eval watch` read it."""
        if not force and time.monotonic() - self._told_at < PROGRESS_S:
            return
        self._told_at = time.monotonic()
        await self._fail_if_cancelled()
        tally = self.ledger.tally
        progress = JobProgress(
            scored=tally.scored,
            failed=dict(tally.failed),
            reward_sum=tally.reward_sum,
            input_tokens=tally.input_tokens,
            output_tokens=tally.output_tokens,
            output=str(self._files.folder.resolve()),
            sequence=self._read_to,
            retrying=len(self._retrying),
        )
        if force or progress != self._told or time.monotonic() - self._put_at > BEAT_S:
            self._told, self._put_at = progress, time.monotonic()
            await self._bus.state.put(
                subjects.JOBS, f"{self._record.job}.progress", msgspec.structs.replace(progress, updated_at=time.time())
            )

    # -- when nothing moves -------------------------------------------------------------------------------------------

    async def _reconcile(self, follower: Follower) -> None:
        """Compare what is missing with what the bus holds: order again what it lost, fail what it cannot deliver."""
        job = self._record.job
        if (self._published and not await self._published()) or await follower.pending():
            return
        waiting = 0
        for stream, subject in (
            (subjects.REQUESTS, subjects.requests_of(job)),
            (subjects.ATTEMPTS, subjects.attempts_of(job)),
        ):
            for sequence in await self._bus.consumers.stuck(stream, subject):
                await self._fail_undeliverable(stream, sequence)
            waiting += await self._bus.streams.waiting(stream, subject)
        if waiting or await follower.pending():
            return  # queued, or in the hands of a worker whose lease ends by itself, or just arrived
        if not self._rescanned:  # a crash between the two files leaves one behind the other: the stream has it all
            self._rescanned = None
            return
        if self._cancelled:
            await self._fail(self._open(), FailureKind.CANCELLED, "the job was cancelled")
            return
        lost = {rollout: self._issues.get(rollout, 0) + 1 for rollout in self._open()}
        hopeless = [rollout for rollout, issue in lost.items() if issue > self._config.issue_limit]
        await self._fail(hopeless, FailureKind.LOST, f"lost by the bus {self._config.issue_limit} times")
        again = {r: (self.number_of(r), issue) for r, issue in lost.items() if issue <= self._config.issue_limit}
        if again:
            log.warning("rollouts_ordered_again", job=job, count=len(again))
            self._issues.update({rollout: issue for rollout, (_, issue) in again.items()})
            await self._reissue(again)

    def _open(self) -> list[RolloutId]:
        return [*(() if self.retries_only else self.ledger.missing()), *self._retrying]

    async def _fail_undeliverable(self, stream: str, sequence: int) -> None:
        found = await self._bus.streams.at(stream, sequence)
        if found is None:
            return
        with contextlib.suppress(ValueError):
            rollout = RolloutId.parse(found.message_id)
            if stream != subjects.REQUESTS or not await self._is_attempted(rollout):
                await self._fail([rollout], FailureKind.POISON, "its deliveries are used up")
        await self._bus.streams.delete(stream, sequence)

    async def _is_attempted(self, rollout: RolloutId) -> bool:
        """Whether the rollout has moved on to the attempts: a broker in trouble may keep what was acked."""
        ids = await self._bus.streams.ids(subjects.ATTEMPTS, subjects.attempts_of(rollout.job))
        return any(name.startswith(f"{rollout}#") for name in ids)

    async def _fail_if_cancelled(self) -> None:
        record = await self._bus.state.get(subjects.JOBS, self._record.job, JobRecord)
        if record is not None and record.state == "cancelled" and not self._cancelled:
            self._cancelled = True
            await self._fail(self._open(), FailureKind.CANCELLED, "the job was cancelled")

    async def _fail(self, rollouts: Iterable[RolloutId], kind: FailureKind, detail: str) -> None:
        """Publish failed results: like any other result they come back through the stream."""
        failures = [
            Failed(
                rollout=rollout,
                number=max(1, self.number_of(rollout)),
                failure=Failure(kind=kind, detail=detail, stage="bus"),
                agent=self._record.agent,
                verifier=self._record.verifier,
                group_size=self._record.group_size(rollout.task_index),
                policy=Policy(model=self._record.model),
            )
            for rollout in rollouts
        ]
        for start in range(0, len(failures), 1024):
            await asyncio.gather(*(self._publish(f) for f in failures[start : start + 1024]))

    async def _publish(self, failure: Failed) -> None:
        if failure.rollout in self._retrying:  # the failure before may still have the rollout's place on the stream
            await make_room(self._bus, failure.rollout, failure.number)
        await self._bus.publish(failure, f"{failure.rollout}#{failure.number}!{failure.failure.kind}")
