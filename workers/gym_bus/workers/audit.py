"""Whether a job adds up: the identity of its account, its files by themselves, and its files against the bus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Follower, as_result
from gym_bus.errors import BodyLost, FailureKind
from gym_bus.jobs import JobProgress, JobRecord
from gym_bus.messages import Result, RolloutId, Scored
from gym_bus.results.check import MOST_EXAMPLES, FileBook, Finding, Findings, Standing, check_files
from gym_bus.results.files import JobFiles
from gym_bus.results.lock import is_locked
from gym_bus.results.manifest import Manifest
from gym_bus.workers.accounting import Account, Books, Place, read_books
from gym_bus.workers.publish import number_in

LOOKS = 4
LOOK_AGAIN_S = 0.7
"""A job that runs is not photographed: what a second look does not find any more was on its way."""


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit has found. `accepted = scored + failed + cancelled + in flight` where it adds up."""

    job: str
    state: str
    """As the bus says: running, done, cancelled; without a bus `complete` or `incomplete`, by the files."""
    folder: str | None
    """Of the files, None where they were not looked at."""
    on_bus: bool
    """Whether a bus was looked at."""
    expected: int
    """Rollouts of the job."""
    accepted: int
    """Rollouts whose request the broker has taken; without a bus, all."""
    scored: int
    failed: dict[str, int]
    """By class; cancelled ones apart."""
    cancelled: int
    in_flight: int
    unaccounted: int
    """Accepted, and neither in flight nor with a result."""
    unrecorded: int
    """Results on the bus that have no line yet, of a job that runs."""
    findings: list[Finding]
    notes: list[str]
    """What one may want to know, and is no fault."""

    @property
    def adds_up(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def audit_files(folder: Path) -> Audit:
    """Audit a job by its files alone.

    Raises:
        DataError: there is no job in the folder, or a file cannot be read.
    """
    findings, book, live = _read_files(folder)
    missing = book.count(Standing.MISSING)
    notes = []
    if live:
        notes.append(f"{missing:,} rollouts have no line yet; a run is writing the files")
    elif missing:
        some = ", ".join(
            book.name(int(place)) for place in np.flatnonzero(book.standing == Standing.MISSING)[:MOST_EXAMPLES]
        )
        findings.add("account", "no result and nobody at work; the same command again finishes the job", some, missing)
    failed = book.failed()
    cancelled = failed.pop(FailureKind.CANCELLED.value, 0)
    expected = len(book.standing) - book.count(Standing.NONE)
    return Audit(
        job=book.job,
        state="incomplete" if missing else "complete",
        folder=str(folder),
        on_bus=False,
        expected=expected,
        accepted=expected,
        scored=book.count(Standing.SCORED),
        failed=failed,
        cancelled=cancelled,
        in_flight=missing if live else 0,
        unaccounted=0 if live else missing,
        unrecorded=0,
        findings=findings.all(),
        notes=notes,
    )


def _read_files(folder: Path) -> tuple[Findings, FileBook, bool]:
    """What the files say, and whether a writer has them open."""
    files, findings = JobFiles(folder), Findings()
    live = is_locked(files.lock)
    return findings, check_files(files, Manifest.load(files.manifest), findings, being_written=live), live


async def audit_job(bus: Bus, record: JobRecord, folder: Path | None) -> Audit:
    """Audit a job on a bus, with its files where they are on this machine.

    Where something is found of a job that runs, the call looks again, a few times for seconds in all.

    Raises:
        BusError: the broker did not answer.
        DataError: a file cannot be read.
    """
    looks = 1 if record.over else LOOKS
    while True:
        audit = await _Look(bus, record).audit(folder)
        looks -= 1
        if audit.adds_up or not looks:
            return audit
        await asyncio.sleep(LOOK_AGAIN_S)


class _Look:
    """One look at everything. The files first, then the queues in the order of the flow, then the results."""

    def __init__(self, bus: Bus, record: JobRecord) -> None:
        self._bus, self._record = bus, record
        self._findings = Findings()
        self._notes: list[str] = []
        self._book: FileBook | None = None
        self._on_stream: set[int] = set()
        self._unrecorded = 0
        self._renumbered = self._bodiless = 0

    async def audit(self, folder: Path | None) -> Audit:
        if folder is not None:
            self._findings, book, _ = await asyncio.to_thread(_read_files, folder)
            self._book = book
            self._compare_job(book)
        books, account = await read_books(self._bus, self._record)
        if self._book is not None:
            await self._compare_results(self._book, books)
        counts = await self._count(books, account)
        return Audit(
            job=self._record.job,
            state=self._record.state,
            folder=None if folder is None else str(folder),
            on_bus=True,
            expected=self._record.total,
            accepted=counts.accepted,
            scored=counts.scored,
            failed=dict(sorted(counts.failed.items())),
            cancelled=counts.cancelled,
            in_flight=counts.in_flight,
            unaccounted=counts.unaccounted,
            unrecorded=self._unrecorded,
            findings=self._findings.all(),
            notes=self._notes,
        )

    def _compare_job(self, book: FileBook) -> None:
        expected = len(book.standing) - book.count(Standing.NONE)
        if expected != self._record.total:
            text = f"{expected:,} in the files, {self._record.total:,} on the bus"
            self._findings.add("inputs", "another number of rollouts than the bus knows of", text)

    # -- the files against the result stream ------------------------------------------------------------------------

    async def _compare_results(self, book: FileBook, books: Books) -> None:
        follower = Follower(self._bus, subjects.RESULTS, subjects.results_of(self._record.job), 1)
        try:
            while await follower.pending():
                for delivery in await follower.batch(1.0):
                    await self._compare_result(book, delivery)
        finally:
            await follower.close()
        first = (await self._bus.streams.state(subjects.RESULTS)).first_sequence
        self._compare_lines(book, books, first)
        if self._renumbered:
            self._notes.append(
                f"{self._renumbered:,} lines carry the sequences of before the server lost its newest messages; "
                "their contents are those of the stream"
            )
        if self._bodiless:
            self._notes.append(f"{self._bodiless:,} large results were compared without their bodies, which are gone")

    async def _compare_result(self, book: FileBook, delivery: Delivery) -> None:
        task, rollout = map(int, delivery.subject.split(".")[3:5])
        sequence = f"sequence {delivery.sequence}"
        place = book.at(task, rollout)
        if place is None:
            self._findings.add("results", "a result of no rollout of this job", f"{sequence}: {task}/{rollout}")
            return
        self._on_stream.add(place)
        name = f"{sequence}: {book.name(place)}"
        number, line = number_in(delivery.message_id), int(book.number[place])
        if book.standing[place] == Standing.MISSING or number > line:
            self._unrecorded += 1
            if self._record.over:
                self._findings.add("results", "a result without a line", f"{name}, attempt {number}")
        elif number < line and book.kinds.get(place) != FailureKind.CANCELLED:  # who cancels a job knows no attempts
            text = f"{name}, attempt {number} on the stream, {line} in line {book.line[place]}"
            self._findings.add("results", "an older attempt than the line's", text)
        elif book.kinds.get(place) != FailureKind.POISON:  # else it could not be read, or not be written as it was
            await self._compare_contents(book, place, delivery, name)

    async def _compare_contents(self, book: FileBook, place: int, delivery: Delivery, name: str) -> None:
        try:
            found = _outcome_of(as_result(await delivery.message()))
        except BodyLost:
            self._bodiless += 1
            return
        except msgspec.DecodeError as e:
            self._findings.add("results", "unreadable, and not recorded as such", f"{name}: {e}")
            return
        if (told := _outcome_in(book, place)) != found:
            text = f"{name}: {found} on the stream, {told} in line {book.line[place]}"
            self._findings.add("results", "another outcome than the line's", text)
        elif book.sequence[place] != delivery.sequence:
            self._renumbered += 1

    def _compare_lines(self, book: FileBook, books: Books, first: int) -> None:
        """The lines whose result is not on the stream: too old for it, or cleared for another attempt, or lost."""
        aged = 0
        for rollout, where in self._places(books):
            place = book.at(rollout.task_index, rollout.rollout_index)
            if place is None or book.standing[place] < Standing.FAILED or place in self._on_stream:
                continue
            again = where in (Place.REQUESTS, Place.ATTEMPTS) or not self._record.over
            if book.sequence[place] < first:
                aged += 1
            elif book.standing[place] == Standing.SCORED or not again:
                text = f"line {book.line[place]}: {book.name(place)}, sequence {book.sequence[place]}"
                self._findings.add("results", "a line whose result is not on the stream", text)
        if aged:
            self._notes.append(f"{aged:,} results are no longer on the stream, which keeps them for a limited time")

    def _places(self, books: Books) -> Iterator[tuple[RolloutId, Place]]:
        return zip(self._record.rollouts(), map(Place, books.places), strict=True)

    # -- the identity -----------------------------------------------------------------------------------------------

    async def _count(self, books: Books, account: Account) -> _Counts:
        counts = self._settle(books)
        counts.accepted = max(account.accepted, counts.known)
        if self._book is None:
            counts.in_flight += account.retrying
            await self._trust_the_consumer(counts)
        if self._record.over:
            await self._note_leftovers()
        if counts.unaccounted:
            some = ", ".join(counts.nowhere[: min(counts.unaccounted, MOST_EXAMPLES)])
            self._findings.add(
                "account", "accepted, and in no queue, on no stream, in no file", some, counts.unaccounted
            )
        if counts.in_flight and self._record.state == "done":
            self._findings.add("account", "in flight, though the job is done", "", counts.in_flight)
        return counts

    def _settle(self, books: Books) -> _Counts:
        """Where every rollout is; of one that the stream has let go of, the files have the last word."""
        counts = _Counts(failed=dict(books.failed))
        for rollout, where in self._places(books):
            if where is Place.SCORED:
                counts.scored += 1
            elif where is Place.CANCELLED:
                counts.cancelled += 1
            elif where is Place.FAILED:
                pass  # the books have counted it by class
            elif not self._recorded(rollout, where, counts):
                if where is Place.NOWHERE:
                    counts.nowhere.append(f"{rollout.task_index}/{rollout.rollout_index}")
                else:
                    counts.in_flight += 1
        return counts

    def _recorded(self, rollout: RolloutId, where: Place, counts: _Counts) -> bool:
        """Count a rollout by its line, where it has one that still holds."""
        book = self._book
        place = book.at(rollout.task_index, rollout.rollout_index) if book else None
        if book is None or place is None or book.standing[place] < Standing.FAILED:
            return False
        if where is not Place.NOWHERE and not self._record.over:
            return False  # it failed, and is being tried again
        kind = book.kinds.get(place)
        if kind is None:
            counts.scored += 1
        elif kind == FailureKind.CANCELLED:
            counts.cancelled += 1
        else:
            counts.failed[kind] = counts.failed.get(kind, 0) + 1
        return True

    async def _trust_the_consumer(self, counts: _Counts) -> None:
        """Without its files, a job that is over and older than the stream is what its results consumer last said."""
        progress: JobProgress | None = await self._bus.state.get(
            subjects.JOBS, f"{self._record.job}.progress", JobProgress
        )
        if not (self._record.over and counts.unaccounted and progress and progress.recorded == counts.accepted):
            return
        self._notes.append(
            f"{counts.unaccounted:,} results are no longer on the stream; the counts are those of the results consumer"
        )
        counts.failed = dict(progress.failed)
        counts.scored, counts.cancelled = progress.scored, counts.failed.pop(FailureKind.CANCELLED.value, 0)
        counts.in_flight = 0

    async def _note_leftovers(self) -> None:
        job = self._record.job
        left = await self._bus.streams.waiting(subjects.REQUESTS, subjects.requests_of(job))
        left += await self._bus.streams.waiting(subjects.ATTEMPTS, subjects.attempts_of(job))
        if left:
            self._notes.append(f"{left:,} messages of the job are still queued; they cannot make a second result")


class _Counts(msgspec.Struct, kw_only=True):
    """The account, being counted."""

    accepted: int = 0
    scored: int = 0
    failed: dict[str, int] = {}
    cancelled: int = 0
    in_flight: int = 0
    nowhere: list[str] = []
    """Rollouts of which there is nothing, accepted or not; in the order in which they are published."""

    @property
    def known(self) -> int:
        return self.scored + sum(self.failed.values()) + self.cancelled + self.in_flight

    @property
    def unaccounted(self) -> int:
        return self.accepted - self.known


def _outcome_in(book: FileBook, place: int) -> str:
    if book.standing[place] == Standing.SCORED:
        return f"reward {float(book.reward[place])}"
    return f"failed ({book.kinds[place]})"


def _outcome_of(result: Result) -> str:
    return f"reward {float(result.reward)}" if isinstance(result, Scored) else f"failed ({result.failure.kind})"
