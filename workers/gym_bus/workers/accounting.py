"""The books of a job, read from the bus alone: every rollout that was accepted lies in exactly one place."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from enum import IntEnum
from itertools import accumulate

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import FailureKind
from gym_bus.jobs import JobProgress, JobRecord
from gym_bus.messages import RolloutId
from gym_bus.workers.publish import issued_count, number_in

SECOND_LOOK_S = 0.5


class Place(IntEnum):
    """Where the bus has a rollout; the furthest place where it was seen counts."""

    NOWHERE = 0
    REQUESTS = 1
    ATTEMPTS = 2
    FAILED = 3
    CANCELLED = 4
    SCORED = 5


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """`accepted = scored + failed + cancelled + in flight`, each side counted by itself."""

    job: str
    total: int
    """Rollouts of the job."""
    accepted: int
    """Rollouts whose request the broker has taken."""
    requests: int
    """Waiting for an agent worker, or in the hands of one."""
    attempts: int
    """Waiting for a verifier worker, or in the hands of one."""
    retrying: int
    """Failed before, and on their way back into a queue: in the hands of whoever publishes further attempts."""
    scored: int
    failed: dict[str, int]
    """By class; cancelled ones apart."""
    cancelled: int

    @property
    def in_flight(self) -> int:
        """Accepted, and no result yet."""
        return self.requests + self.attempts + self.retrying

    @property
    def unaccounted(self) -> int:
        """Accepted rollouts that the bus has nowhere; anything but 0 means that it lost some."""
        return self.accepted - self.scored - sum(self.failed.values()) - self.cancelled - self.in_flight


class Books:
    """Where each rollout of a job was seen, in a byte and a bit per rollout."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self.places = bytearray(record.total)
        """A `Place` per rollout, in the order of `JobRecord.rollouts`."""
        self.failed: dict[str, int] = {}
        """Results by failure class; cancelled ones apart."""
        self._numbers: dict[int, int] = {}
        """Attempt numbers of requests and attempts, where they are not 1."""
        sizes = [tasks * rollouts for _, tasks, rollouts in record.spans]
        self._firsts = [first for first, _, _ in record.spans]
        self._offsets = [0, *accumulate(sizes)]

    def _at(self, task_index: int, rollout_index: int) -> int | None:
        span = bisect_right(self._firsts, task_index) - 1
        if span < 0:
            return None
        first, tasks, rollouts = self.record.spans[span]
        if task_index >= first + tasks or not 0 <= rollout_index < rollouts:
            return None
        return self._offsets[span] + (task_index - first) * rollouts + rollout_index

    def queued(self, message_id: str, place: Place) -> None:
        """A request or an attempt was seen."""
        try:
            rollout = RolloutId.parse(message_id)
        except ValueError:  # somebody else's message: of no rollout
            return
        at = self._at(rollout.task_index, rollout.rollout_index)
        if at is not None:
            self.places[at] = max(self.places[at], place)
            if (number := number_in(message_id)) > 1:
                self._numbers[at] = max(number, self._numbers.get(at, 1))

    def ended(self, task_index: int, rollout_index: int, message_id: str, failure: str | None) -> None:
        """A result was seen. A failure that is being tried again is none: the rollout is in flight."""
        at = self._at(task_index, rollout_index)
        if at is None:
            return
        if failure is None:
            self.places[at] = Place.SCORED
        elif failure == FailureKind.CANCELLED:
            self.places[at] = Place.CANCELLED
        elif not self.places[at] or self._numbers.get(at, 1) <= number_in(message_id):
            self.places[at] = Place.FAILED
            self.failed[failure] = self.failed.get(failure, 0) + 1

    def account(self, issued: int, retrying: int) -> Account:
        """The counts.

        Args:
            issued: how many requests the publisher knows to be taken.
            retrying: how many failed rollouts the results consumer has ordered again.
        """
        seen = len(self.places) - self.places.count(Place.NOWHERE)
        return Account(
            job=self.record.job,
            total=self.record.total,
            accepted=max(issued, seen),
            requests=self.places.count(Place.REQUESTS),
            attempts=self.places.count(Place.ATTEMPTS),
            retrying=min(retrying, max(0, issued - seen)),
            scored=self.places.count(Place.SCORED),
            failed=dict(sorted(self.failed.items())),
            cancelled=self.places.count(Place.CANCELLED),
        )


async def read_books(bus: Bus, record: JobRecord) -> tuple[Books, Account]:
    """The books of a job that was published on this server and whose results are not older than the stream keeps.

    The streams are read in the order of the flow. A stage publishes before it acks, so a rollout that moves on
    meanwhile is seen once at least, and where it is seen twice the later place is the right one.

    Raises:
        BusError: the broker did not answer.
    """
    job, books = record.job, Books(record)
    issued = await issued_count(bus, job)
    for message_id in await bus.streams.ids(subjects.REQUESTS, subjects.requests_of(job)):
        books.queued(message_id, Place.REQUESTS)
    for message_id in await bus.streams.ids(subjects.ATTEMPTS, subjects.attempts_of(job)):
        books.queued(message_id, Place.ATTEMPTS)
    async for outcome in bus.streams.outcomes(subjects.RESULTS, subjects.results_of(job)):
        books.ended(*outcome)
    progress: JobProgress | None = await bus.state.get(subjects.JOBS, f"{job}.progress", JobProgress)
    return books, books.account(issued, progress.retrying if progress else 0)


async def read_account(bus: Bus, record: JobRecord) -> Account:
    """The account of a job; see `read_books`.

    Where something is unaccounted for, the call takes half a second more for a second look: a rollout that is tried
    again can be on its way from its old place to its new one.
    """
    _, account = await read_books(bus, record)
    if account.unaccounted:
        await asyncio.sleep(SECOND_LOOK_S)
        _, account = await read_books(bus, record)
    return account
