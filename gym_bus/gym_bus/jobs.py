"""What the bus remembers of a job: small records in the `gym_jobs` bucket that every role can read."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import UsageError, did_you_mean


class JobRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One job, under the key of its id."""

    job: str
    state: Literal["running", "done", "cancelled"] = "running"
    benchmark: str = ""
    agent: str = ""
    model: str = ""
    verifier: str = ""
    tasks: int
    repeats: int
    """Rollouts per task."""
    total: int
    """Rollouts of the job."""
    lane: str = "batch"
    created_at: float = msgspec.field(default_factory=time.time)
    """Seconds since the epoch."""
    manifest: dict[str, Any] = {}
    """As in `job.json`."""
    shared: bool = False
    """True where a `gym-bus worker results` process writes the files, not the command that published."""

    @property
    def over(self) -> bool:
        """Whether no further result will come."""
        return self.state != "running"


class JobProgress(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How far a job is, under `<job>.progress`; written by the results consumer about once a second."""

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

    @property
    def recorded(self) -> int:
        """Rollouts with a result."""
        return self.scored + sum(self.failed.values())


class Issued(msgspec.Struct):
    """How many of a job's requests, in the order of its inputs, the broker has taken; under `<job>.issued`."""

    count: int


async def find_job(bus: Bus, job: str) -> JobRecord:
    """The record of a job. Raises UsageError with suggestions where there is none."""
    subjects.token(job, "job")
    record: JobRecord | None = await bus.get(subjects.JOBS, job, JobRecord)
    if record is None:
        known = [key for key in await bus.keys(subjects.JOBS) if "." not in key]
        raise UsageError(f"no job {job!r} on this server: {did_you_mean(job, known)}")
    return record


async def list_jobs(bus: Bus) -> list[JobRecord]:
    """Every job the server knows, newest first."""
    names = [key for key in await bus.keys(subjects.JOBS) if "." not in key]
    records = [await bus.get(subjects.JOBS, name, JobRecord) for name in names]
    return sorted((r for r in records if r is not None), key=lambda r: -r.created_at)
