"""What a job waits for: stage, rollouts, worker, last event; read from the bus, nobody is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.bus.consumers import ConsumerState
from gym_bus.bus.streams import Stored, StreamState
from gym_bus.jobs import Issued, JobProgress, JobRecord
from gym_bus.messages import RolloutId
from gym_bus.models.fleet import Fleet
from gym_bus.timing import since
from gym_bus.workers.accounting import read_account
from gym_bus.workers.audit import audit_files
from gym_bus.workers.loop import Doing
from gym_bus.workers.main import REPORT_S, WorkerReport
from gym_bus.workers.replay import ReplayOrder, replay_key
from gym_bus.workers.results import BEAT_S

SILENT_S = 3 * max(BEAT_S, REPORT_S)
"""Without a sign of life for so long, somebody is taken for gone."""
MOST_NAMED = 5
"""Rollouts that are named of each stage."""


class Wait(msgspec.Struct, kw_only=True):
    """One thing that a job waits for."""

    stage: str
    """publisher, requests, agent, endpoint, attempts, verifier, results or job."""
    what: str
    """In a sentence."""
    blocked: bool = False
    """True where nothing moves until somebody does something about it."""
    count: int = 0
    rollouts: list[str] = []
    """A few of those concerned, `task/rollout`."""
    worker: str = ""
    since_s: float | None = None
    """Age of what is waited for, seconds."""


class Event(msgspec.Struct, frozen=True):
    """The newest thing that happened to a job."""

    what: str
    rollout: str
    age_s: float


class Why(msgspec.Struct, kw_only=True):
    """What a job waits for, what is blocked first."""

    job: str
    state: str
    total: int
    accepted: int
    """Requests that the broker has taken, as far as the publisher knows."""
    results: int
    """Results on the stream, or recorded where the stream has let go of them."""
    recorded: int
    """Rollouts with a line in the files."""
    waits: list[Wait]
    last: Event | None = None


class _Seen(msgspec.Struct, kw_only=True):
    """Everything that the bus says, read once."""

    record: JobRecord
    issued: int
    progress: JobProgress | None
    order: ReplayOrder | None
    reports: list[WorkerReport]
    streams: dict[str, StreamState]
    queued: dict[str, dict[str, int]]
    """By stream: messages of the job by subject."""
    consumers: dict[str, list[ConsumerState]]
    results: int
    newest_result: Stored | None

    def waiting(self, stream: str) -> int:
        """Messages of the job in a work queue, those in hand included."""
        return sum(self.queued[stream].values())

    def role(self, role: str) -> list[WorkerReport]:
        """The reports of one kind of worker."""
        return [report for report in self.reports if report.role == role]


async def why(bus: Bus, record: JobRecord) -> Why:
    """Tell what a job waits for.

    Raises:
        BusError: the broker did not answer.
    """
    seen = await _look(bus, record)
    waits = [wait async for wait in _waits(bus, seen)]
    progress = seen.progress or JobProgress()
    return Why(
        job=record.job,
        state=record.state,
        total=record.total,
        accepted=max(seen.issued, seen.results),
        results=max(seen.results, progress.recorded) if record.over else seen.results,
        recorded=progress.recorded,
        waits=sorted(waits, key=lambda wait: not wait.blocked),
        last=await _last_event(bus, seen),
    )


def why_by_files(folder: Path) -> Why:
    """What a job waits for of which no server is known: its files tell whether it is complete.

    Raises:
        DataError: there is no job in the folder, or a file cannot be read.
    """
    audit = audit_files(folder)
    failed = sum(audit.failed.values()) + audit.cancelled
    recorded = audit.scored + failed
    missing = audit.expected - recorded
    what = f"for nothing, it is complete: {audit.scored:,} scored, {failed:,} failed"
    if missing:
        what = f"no run is going on, and {missing:,} rollouts have no result; the same command again goes on"
    return Why(
        job=audit.job,
        state=audit.state,
        total=audit.expected,
        accepted=audit.expected,
        results=recorded,
        recorded=recorded,
        waits=[Wait(stage="job", what=what, blocked=missing > 0, count=missing)],
    )


async def _look(bus: Bus, record: JobRecord) -> _Seen:
    job = record.job
    issued: Issued | None = await bus.state.get(subjects.JOBS, f"{job}.issued", Issued)
    reports = [
        await bus.state.get(subjects.WORKERS, key, WorkerReport) for key in await bus.state.keys(subjects.WORKERS)
    ]
    work = {subjects.REQUESTS: subjects.requests_of(job), subjects.ATTEMPTS: subjects.attempts_of(job)}
    return _Seen(
        record=record,
        issued=issued.count if issued else 0,
        progress=await bus.state.get(subjects.JOBS, f"{job}.progress", JobProgress),
        order=await bus.state.get(subjects.JOBS, replay_key(job), ReplayOrder),
        reports=[report for report in reports if report is not None],
        queued={stream: await bus.streams.counts(stream, names) for stream, names in work.items()},
        consumers={stream: await bus.consumers.states(stream) for stream in work},
        streams={name: await bus.streams.state(name) for name in (*work, subjects.RESULTS)},
        results=await bus.streams.count(subjects.RESULTS, subjects.results_of(job)),
        newest_result=await bus.streams.last(subjects.RESULTS, subjects.results_of(job)),
    )


async def _waits(bus: Bus, seen: _Seen) -> AsyncIterator[Wait]:
    if seen.order is not None and not seen.order.ended and seen.order.taken is None:
        yield Wait(stage="results", what="a replay is ordered, and no results worker has taken it", blocked=True)
    if seen.record.over:
        yield _over(seen)
    if seen.record.state == "done":
        return
    for wait in _publisher(seen):
        yield wait
    async for wait in _queue(bus, seen, subjects.REQUESTS, "requests", "agent"):
        yield wait
    async for wait in _queue(bus, seen, subjects.ATTEMPTS, "attempts", "verifier"):
        yield wait
    for wait in await _endpoints(bus, seen):
        yield wait
    for wait in await _results(bus, seen):
        yield wait
    for wait in await _lost(bus, seen):
        yield wait


def _over(seen: _Seen) -> Wait:
    progress = seen.progress or JobProgress()
    failed = ", ".join(f"{kind} {count:,}" for kind, count in sorted(progress.failed.items()))
    counts = f"{progress.scored:,} scored, {sum(progress.failed.values()):,} failed"
    counts += f" ({failed})" if failed else ""
    if seen.record.state == "cancelled":
        return Wait(stage="job", what=f"it was cancelled; recorded: {counts}")
    return Wait(stage="job", what=f"for nothing, it is complete: {counts}")


# -- the publisher -----------------------------------------------------------------------------------------------------


def _publisher(seen: _Seen) -> Iterator[Wait]:
    left = seen.record.total - seen.issued
    if seen.record.over or left <= 0 or seen.results >= seen.record.total:
        return
    what = f"{left:,} of {seen.record.total:,} requests are not published yet"
    if full := seen.streams[subjects.REQUESTS].full:
        yield Wait(stage="publisher", what=f"{what}: the request stream is full ({full})", count=left)
    else:
        yield Wait(stage="publisher", what=f"{what}; is the command that publishes still running?", count=left)


# -- the two work queues -----------------------------------------------------------------------------------------------


async def _queue(bus: Bus, seen: _Seen, stream: str, stage: str, role: str) -> AsyncIterator[Wait]:
    if full := seen.streams[stream].full:
        upstream = "the publisher waits" if stage == "requests" else "agent workers wait with their answers"
        yield Wait(stage=stage, what=f"the stream of {stage} is full ({full}): {upstream}", blocked=not seen.role(role))
    if not seen.waiting(stream):
        return
    stuck = await bus.consumers.stuck(stream, _subjects(seen, stream))
    if stuck:
        yield await _stuck(bus, stream, stage, stuck)
    if len(stuck) >= seen.waiting(stream):
        return
    for subject, count in sorted(seen.queued[stream].items()):
        wait = _of_subject(seen, stream, subject, count, stage, role)
        if oldest := await bus.streams.first(stream, subject):
            wait.since_s = since(oldest.stored_at)
            wait.what += f"; the oldest since {_s(wait.since_s)}"
        yield wait
    for doing, report in _in_hand(seen, role):
        yield _at_work(doing, report, role)
    for report in seen.role(role):
        if (silent_s := since(report.reported_at)) > SILENT_S:
            what = f"worker {report.worker} has not been heard of for {_s(silent_s)}; others get what it holds"
            yield Wait(stage=role, what=what, worker=report.worker, since_s=silent_s)


def _subjects(seen: _Seen, stream: str) -> str:
    job = seen.record.job
    return subjects.requests_of(job) if stream == subjects.REQUESTS else subjects.attempts_of(job)


async def _stuck(bus: Bus, stream: str, stage: str, stuck: Sequence[int]) -> Wait:
    names = []
    for sequence in stuck[:MOST_NAMED]:
        if found := await bus.streams.at(stream, sequence):
            names.append(_name(found.message_id))
    what = (
        f"{len(stuck):,} {stage} will not be delivered again, their deliveries are used up "
        f"({', '.join(names)}); the results consumer fails them when the job stands still"
    )
    return Wait(stage=stage, what=what, count=len(stuck), rollouts=names)


def _of_subject(seen: _Seen, stream: str, subject: str, count: int, stage: str, role: str) -> Wait:
    kind = subject.split(".")[2:-1]  # lane and agent, or verifier
    consumer_name = "-".join([role, *kind])
    consumer = next((c for c in seen.consumers[stream] if c.name == consumer_name), None)
    serving = [report for report in seen.role(role) if consumer_name in report.serves]
    wait = Wait(stage=stage, what="", count=count)
    what = f"{count:,} {stage} of {role} {kind[-1]!r}" + (f", lane {kind[0]}," if len(kind) > 1 else "") + " wait"
    if not seen.role(role):
        wait.what, wait.blocked = f"{what}: no {role} worker is joined", True
        if consumer is not None and consumer.leased:
            wait.what += f"; {consumer.leased:,} are still leased to workers that are gone"
    elif not serving:
        names = ", ".join(report.worker for report in seen.role(role)[:MOST_NAMED])
        wait.what, wait.blocked = f"{what}: no worker that is joined serves {consumer_name!r} ({names})", True
    else:
        wait.what = f"{what} or are in hand: {_crew(serving, role)}"
        others = (consumer.undelivered + consumer.leased - count) if consumer else 0
        if others > 0:
            wait.what += f", with {others:,} of other jobs in the same queue"
    return wait


def _crew(serving: Sequence[WorkerReport], role: str) -> str:
    in_flight = sum(report.in_flight for report in serving)
    buffered = sum(report.buffered for report in serving)
    return f"{len(serving)} {role} worker{'s' * (len(serving) > 1)}, {in_flight:,} in flight, {buffered:,} next"


def _in_hand(seen: _Seen, role: str) -> list[tuple[Doing, WorkerReport]]:
    """What has been in the hands of workers longest, of this job."""
    mine = f"{seen.record.job}."
    found = [(d, report) for report in seen.role(role) for d in report.oldest if d.rollout.startswith(mine)]
    return sorted(found, key=lambda pair: pair[0].started_at)[:MOST_NAMED]


def _at_work(doing: Doing, report: WorkerReport, role: str) -> Wait:
    name, age_s = _name(doing.rollout), since(doing.started_at)
    step = "" if doing.what == role else f": {doing.what}, for {_s(since(doing.since))}"
    verb = "verified" if role == "verifier" else "generated"
    delivery = f" (delivery {doing.delivery})" if doing.delivery > 1 else ""
    what = f"rollout {name} is being {verb} by worker {report.worker} for {_s(age_s)}{delivery}{step}"
    return Wait(stage=role, what=what, count=1, rollouts=[name], worker=report.worker, since_s=age_s)


# -- the endpoint ------------------------------------------------------------------------------------------------------


async def _endpoints(bus: Bus, seen: _Seen) -> list[Wait]:
    if not seen.waiting(subjects.REQUESTS):
        return []
    found, there = [], {report.worker for report in seen.reports}
    for key in await bus.state.keys(subjects.LIMITS):
        try:
            fleet = await bus.state.get(subjects.LIMITS, key, Fleet)
        except msgspec.DecodeError:  # another version's
            continue
        if fleet is None or fleet.limit is None or not there & fleet.members.keys() or fleet.wanted <= fleet.busy:
            continue
        takes = f"{fleet.pace:,.1f} calls per second" if fleet.pace else f"{fleet.limit:,} calls at a time"
        wanted = fleet.wanted
        what = f"the endpoint of model {key!r} refuses more than {takes}: {wanted:,} are wanted, the others wait here"
        found.append(Wait(stage="endpoint", what=what, count=wanted))
    return found


# -- the results consumer ----------------------------------------------------------------------------------------------


async def _results(bus: Bus, seen: _Seen) -> list[Wait]:
    found = []
    if full := seen.streams[subjects.RESULTS].full:
        what = f"the result stream is full ({full}): verifier workers wait; old jobs' results must go, or its limits up"
        found.append(Wait(stage="results", what=what, blocked=True))
    progress, newest = seen.progress, seen.newest_result
    if progress is None:
        what = "no results consumer has recorded anything of the job"
        if seen.record.shared and not seen.role("results"):
            what += ", no results worker is joined"
        blocked = seen.record.shared and not seen.role("results")
        found.append(Wait(stage="results", what=what, blocked=blocked, count=seen.results))
        return found
    names = subjects.results_of(seen.record.job)
    behind = await bus.streams.count(subjects.RESULTS, names, progress.sequence + 1) if newest else 0
    silent_s = since(progress.updated_at)
    if silent_s > SILENT_S:
        what = (
            f"the results consumer is not running: not heard of for {_s(silent_s)}; it holds at sequence "
            f"{progress.sequence}, {behind:,} results wait"
        )
        found.append(Wait(stage="results", what=what, blocked=True, count=behind, since_s=silent_s))
    elif behind:
        what = f"the results consumer holds at sequence {progress.sequence}, {behind:,} results wait"
        found.append(Wait(stage="results", what=what, count=behind, since_s=silent_s))
    if progress.retrying:
        what = f"{progress.retrying:,} failed rollouts are being tried again"
        found.append(Wait(stage="job", what=what, count=progress.retrying))
    return found


async def _lost(bus: Bus, seen: _Seen) -> list[Wait]:
    """Rollouts of which the bus has nothing, though their requests were taken."""
    if seen.waiting(subjects.REQUESTS) or seen.waiting(subjects.ATTEMPTS) or seen.results >= seen.issued:
        return []
    account = await read_account(bus, seen.record)
    if account.unaccounted <= 0:
        return []
    what = (
        f"{account.unaccounted:,} accepted rollouts are in no queue and have no result; the results consumer orders "
        "them again when the job has stood still for a while (results.idle_s)"
    )
    return [Wait(stage="job", what=what, count=account.unaccounted)]


# -- the last event ----------------------------------------------------------------------------------------------------


async def _last_event(bus: Bus, seen: _Seen) -> Event | None:
    job = seen.record.job
    events = {
        "result": seen.newest_result,
        "attempt": await bus.streams.last(subjects.ATTEMPTS, subjects.attempts_of(job)),
        "request": await bus.streams.last(subjects.REQUESTS, subjects.requests_of(job)),
    }
    there = [(stored.stored_at, what, stored) for what, stored in events.items() if stored]
    if not there:
        return None
    at, what, stored = max(there, key=lambda event: event[0])
    return Event(what, _name(stored.message_id), since(at))


def _name(text: str) -> str:
    """`task/rollout` of a message id or a rollout's name."""
    try:
        rollout = RolloutId.parse(text)
    except ValueError:
        return text
    return f"{rollout.task_index}/{rollout.rollout_index}"


def _s(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
