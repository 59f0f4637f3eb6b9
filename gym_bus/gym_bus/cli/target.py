"""Which job a command means, given as its id or as the folder of its files."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import DataError, UsageError
from gym_bus.jobs import JobProgress, JobRecord, find_job
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.server import running_at
from gym_bus.workers.local import STORE

RUNS = Path("runs")
"""Where `eval run` and results workers put jobs when they are not told otherwise."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A job, and the folder of its files where they are on this machine."""

    job: str
    folder: Path | None


def find_target(given: str) -> Target:
    """The job meant by a folder or an id; an id is looked for among the jobs in `runs`.

    Raises:
        UsageError: a folder without a job in it.
        DataError: the folder's manifest is broken.
    """
    folder = Path(given)
    if folder.is_dir():
        if not JobFiles(folder).manifest.exists():
            raise UsageError(f"{folder}: no job in it (no job.json)")
        return Target(job=Manifest.load(JobFiles(folder).manifest).job, folder=folder)
    if "/" in given:
        raise UsageError(f"{given}: no such folder")
    folders = [*sorted(RUNS.glob("*")), *sorted(RUNS.glob("*/*/*"))]  # jobs, and those of suites
    return Target(job=given, folder=next(filter(lambda at: holds(at, given), folders), None))


def nowhere(given: str) -> UsageError:
    """What is wrong where neither a folder nor a bus is known to look for the job in."""
    return UsageError(f"{given}: no such folder, and no job of this id in runs/; give its folder, or --nats URL")


def holds(folder: Path, job: str) -> bool:
    """Whether a folder has the files of this very job."""
    try:
        return Manifest.load(JobFiles(folder).manifest).job == job
    except DataError:
        return False


def with_bus_of(config: Config, target: Target) -> Config:
    """`config`, its server that of the job's own local run where that runs now and no server is configured."""
    if config.bus.url is not None or target.folder is None:
        return config
    own = config.bus.embedded.store_dir
    suite = target.folder.absolute().parent.parent
    stores = [Path(own)] if own else [target.folder / STORE, suite / STORE]
    url = next(filter(None, map(running_at, stores)), None)
    return msgspec.structs.replace(config, bus=msgspec.structs.replace(config.bus, url=url)) if url else config


async def locate(bus: Bus, target: Target) -> tuple[JobRecord, Path | None]:
    """The job's record on a server, and the folder of its results where that is on this machine.

    Of a submitted job that is its results worker's, not the folder from which it was submitted.

    Raises:
        UsageError: the server knows no such job; with suggestions.
        BusError: it did not answer.
    """
    record = await find_job(bus, target.job)
    if target.folder is not None and not record.shared:
        return record, target.folder
    progress: JobProgress | None = await bus.state.get(subjects.JOBS, f"{target.job}.progress", JobProgress)
    folder = Path(progress.output) if progress and progress.output else None
    if folder is not None and holds(folder, target.job):
        return record, folder
    given = target.folder
    return record, given if given is not None and JobFiles(given).rollouts.exists() else None
