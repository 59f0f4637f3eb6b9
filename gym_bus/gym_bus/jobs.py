"""What the bus remembers of a job: small records in the `gym_jobs` bucket that every role can read."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any, Literal

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import UsageError, did_you_mean
from gym_bus.messages import RolloutId


class JobRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One job, under the key of its id."""

    job: str
    state: Literal["running", "done", "cancelled"] = "running"
    benchmark: str = ""
    agent: str = ""
    model: str = ""
    verifier: str = ""
    spans: list[tuple[int, int, int]]
    """(first task index, number of tasks, rollouts of each): every rollout of the job, in order."""
    lane: str = "batch"
    limit_s: float = 3600.0
    """Wall-clock limit of one rollout's generation, seconds."""
    created_at: float = msgspec.field(default_factory=time.time)
    """Seconds since the epoch."""
    manifest: dict[str, Any] = {}
    """As in `job.json`."""
    shared: bool = False
    """True where a `gym-bus worker results` process writes the files, not the command that published."""

    @property
    def total(self) -> int:
        """Rollouts of the job."""
        return sum(tasks * rollouts for _, tasks, rollouts in self.spans)

    @property
    def tasks(self) -> int:
        """Tasks of the job."""
        return sum(tasks for _, tasks, _ in self.spans)

    def rollouts(self) -> Iterator[RolloutId]:
        """Every rollout, in order."""
        for first, tasks, rollouts in self.spans:
            for task in range(first, first + tasks):
                for rollout in range(rollouts):
                    yield RolloutId(self.job, task, rollout)

    def group_size(self, task_index: int) -> int:
        """Rollouts of a task; 0 for a task that the job does not have."""
        at = bisect_right(self.spans, task_index, key=itemgetter(0)) - 1
        if at < 0:
            return 0
        first, tasks, rollouts = self.spans[at]
        return rollouts if task_index < first + tasks else 0

    @property
    def over(self) -> bool:
        """Whether no further result will come."""
        return self.state != "running"


class JobProgress(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How far a job is, under `<job>.progress`.

    Written by the results consumer about once a second where something has changed, else every few seconds.
    """

    scored: int = 0
    failed: dict[str, int] = {}
    """Count by failure class."""
    reward_sum: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    updated_at: float = 0.0
    """Seconds since the epoch."""
    output: str = ""
    """Where the files are, on the machine of the results consumer."""
    sequence: int = 0
    """Up to where the results consumer has recorded the result stream."""
    retrying: int = 0
    """Failed rollouts that are being tried again; they still count as failed."""

    @property
    def recorded(self) -> int:
        """Rollouts with a result."""
        return self.scored + sum(self.failed.values())


class Issued(msgspec.Struct):
    """How many of a job's requests, in the order of its inputs, the broker has taken; under `<job>.issued`."""

    count: int


def spans_of(counts: Iterable[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """The spans of (task index, rollouts) pairs in rising order of task."""
    spans: list[tuple[int, int, int]] = []
    for task, rollouts in counts:
        if spans and spans[-1][0] + spans[-1][1] == task and spans[-1][2] == rollouts:
            first, tasks, _ = spans[-1]
            spans[-1] = (first, tasks + 1, rollouts)
        else:
            spans.append((task, 1, rollouts))
    return spans


class Counts:
    """How many rollouts each task has, in four bytes a task."""

    def __init__(self) -> None:
        self._of = array("I")

    def add(self, task_index: int, rollout_index: int) -> None:
        """There is this rollout, and so all of its task before it."""
        if (more := task_index + 1 - len(self._of)) > 0:
            self._of.frombytes(bytes(more * self._of.itemsize))
        self._of[task_index] = max(self._of[task_index], rollout_index + 1)

    def __len__(self) -> int:
        """Tasks."""
        return len(self._of) - self._of.count(0)

    def spans(self) -> list[tuple[int, int, int]]:
        """See `JobRecord.spans`."""
        return spans_of((task, count) for task, count in enumerate(self._of) if count)


async def find_job(bus: Bus, job: str) -> JobRecord:
    """The record of a job. Raises UsageError with suggestions where there is none."""
    subjects.token(job, "job")
    record: JobRecord | None = await bus.state.get(subjects.JOBS, job, JobRecord)
    if record is None:
        known = await bus.state.keys(subjects.JOBS, "*")
        raise UsageError(f"no job {job!r} on this server: {did_you_mean(job, known)}")
    return record


async def list_jobs(bus: Bus) -> list[JobRecord]:
    """Every job the server knows, newest first."""
    names = await bus.state.keys(subjects.JOBS, "*")
    records = [await bus.state.get(subjects.JOBS, name, JobRecord) for name in names]
    return sorted((r for r in records if r is not None), key=lambda r: -r.created_at)
