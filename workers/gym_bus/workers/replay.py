"""Trying failed rollouts again, in the same job: chosen by class and task, generated anew or only checked again."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import BusError, FailureKind, UsageError, did_you_mean
from gym_bus.jobs import JobRecord, find_job
from gym_bus.logs import get_logger
from gym_bus.messages import RolloutId
from gym_bus.results.ledger import FailedRollout, Ledger
from gym_bus.workers.again import Again, Chosen
from gym_bus.workers.local import LocalStack
from gym_bus.workers.main import WorkerReport
from gym_bus.workers.plan import Job
from gym_bus.workers.results import ResultsConsumer, open_writer
from gym_bus.workers.run import Progress, RunResult, run_replay

log = get_logger(__name__)

Stage = Literal["agent", "verifier"]

TAKE_LIMIT_S = 15.0
"""Seconds within which a results worker takes an order, where there is one."""
LOOK_S = 0.5
_TASKS = re.compile(r"(\d+)(?:-(\d+)|/(\d+))?")


class Tasks(msgspec.Struct, frozen=True):
    """A range of tasks, or one rollout of one task."""

    first: int
    last: int
    rollout: int | None = None

    def __contains__(self, rollout: RolloutId) -> bool:
        inside = self.first <= rollout.task_index <= self.last
        return inside and self.rollout in (None, rollout.rollout_index)


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which failed rollouts to try again, and from where."""

    classes: tuple[FailureKind, ...] = ()
    """Of their newest failure; empty for any."""
    tasks: tuple[Tasks, ...] = ()
    """Empty for all."""
    stage: Stage | None = None
    """`agent`: generate again; `verifier`: check stored answers only; None: check where there is an answer, else
    generate."""
    up_to: int | None = None
    """Only failures up to this sequence of the result stream: what failed again later is not meant."""

    def takes(self, rollout: RolloutId, failed: FailedRollout) -> bool:
        """Whether a failed rollout is meant."""
        return (
            (not self.classes or failed.kind in self.classes)
            and (not self.tasks or any(rollout in tasks for tasks in self.tasks))
            and (self.up_to is None or failed.sequence <= self.up_to)
        )


def parse_classes(names: Iterable[str]) -> tuple[FailureKind, ...]:
    """Failure classes by name. Raises UsageError with suggestions for one that is none."""
    known = [kind.value for kind in FailureKind]
    found: list[FailureKind] = []
    for name in names:
        if name not in known:
            raise UsageError(f"--class {name!r}: {did_you_mean(name, known)}")
        found.append(FailureKind(name))
    return tuple(found)


def parse_tasks(texts: Iterable[str], record: JobRecord) -> tuple[Tasks, ...]:
    """Tasks (`17`), ranges (`10-19`) and rollouts (`17/3`), commas between them; UsageError for what is none."""
    found: list[Tasks] = []
    for text in (part.strip() for given in texts for part in given.split(",")):
        match = _TASKS.fullmatch(text)
        if not match:
            raise UsageError(f"--task {text!r}: give a task (17), a range of tasks (10-19) or a rollout (17/3)")
        first = int(match[1])
        tasks = Tasks(first, int(match[2] or first), int(match[3]) if match[3] else None)
        if not any(start <= tasks.last and tasks.first < start + count for start, count, _ in record.spans):
            last = record.spans[-1][0] + record.spans[-1][1] - 1
            raise UsageError(f"--task {text}: not in the job: its tasks are {record.spans[0][0]} to {last}")
        found.append(tasks)
    return tuple(found)


def choose(ledger: Ledger, selection: Selection) -> Chosen:
    """The failed rollouts of a job that a selection takes, with the numbers of their next attempts."""
    attempts: dict[RolloutId, int] = {}
    afresh: set[RolloutId] = set()
    from_verifier = without_answer = 0
    for rollout, failed in sorted(ledger.failures()):
        answered = failed.stored_at >= 0
        if not selection.takes(rollout, failed):
            continue
        if selection.stage == "verifier" and not answered:
            without_answer += 1
            continue
        attempts[rollout] = failed.number + 1
        if selection.stage == "agent":
            afresh.add(rollout)
        from_verifier += answered and selection.stage != "agent"
    return Chosen(attempts=attempts, afresh=afresh, from_verifier=from_verifier, without_answer=without_answer)


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """How a replay ended."""

    chosen: Chosen
    result: RunResult


async def replay_job(
    job: Job,
    config: Config,
    selection: Selection,
    *,
    workers: bool = True,
    check: Callable[[Chosen], None] = lambda _: None,
    on_start: Callable[[Progress], None] = lambda _: None,
) -> Replay:
    """Try failed rollouts of a job again until each has a new result.

    Args:
        job: written down in its folder.
        config: `bus.url` set for a running server; else one is embedded.
        selection: which, and from where.
        workers: start local workers.
        check: called with the choice before anything is started; raises what speaks against it.
        on_start: gets the progress, once the stack is up.

    Raises:
        BusError: no server, or a worker that keeps dying.
        UsageError: the folder is held by another run, or cannot be written.
    """
    with open_writer(job.record, job.files, config.results) as writer:
        chosen = choose(writer.ledger, selection)
        if not chosen.attempts:
            return Replay(chosen=chosen, result=RunResult(ledger=writer.ledger, wall_s=0.0, finished=0))
        check(chosen)
        checks_only = not chosen.from_agent
        async with LocalStack(
            config, job.files.folder, verifier=job.record.verifier, workers=workers, verifiers_only=checks_only
        ) as stack:
            if not workers:
                await _tell_who_is_missing(stack.bus, chosen)
            result = await run_replay(job, stack, writer, on_start, chosen)
            if not writer.ledger.missing_count:
                stack.complete()
            return Replay(chosen=chosen, result=result)


async def _tell_who_is_missing(bus: Bus, chosen: Chosen) -> None:
    reports = [
        await bus.state.get(subjects.WORKERS, key, WorkerReport) for key in await bus.state.keys(subjects.WORKERS)
    ]
    joined = {report.role for report in reports if report}
    for role in (*(["agent"] if chosen.from_agent else []), "verifier"):
        if role not in joined:
            log.warning("no_worker_has_joined", role=role, remedy=f"gym-bus worker {role} --nats {bus.config.url}")


# -- jobs that a results worker records -------------------------------------------------------------------------------


class ReplayOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A replay that was asked for of a submitted job, under `<job>.replay`."""

    selection: Selection
    limit_s: float | None = None
    """Wall-clock limit of a rollout's generation; None for the job's own."""
    taken: int | None = None
    """Rollouts that the results worker has chosen; None until it has."""
    from_verifier: int = 0
    without_answer: int = 0
    ended: bool = False
    """Every one of them has a new result."""


def replay_key(job: str) -> str:
    """Where a job's order lies in the bucket `gym_jobs`."""
    return f"{job}.replay"


async def order_replay(bus: Bus, job: str, selection: Selection, limit_s: float | None) -> ReplayOrder | None:
    """Ask the results worker of a submitted job for a replay; the order as taken, None where nobody took it yet.

    Raises:
        UsageError: no such job, or a replay of it is under way.
        BusError: the broker did not answer.
    """
    key = replay_key(job)
    present: ReplayOrder | None = await bus.state.get(subjects.JOBS, key, ReplayOrder)
    if present is not None and not present.ended:
        raise UsageError(f"a replay of job {job} is under way: `gym-bus why {job}` tells what it waits for")
    up_to = (await bus.streams.state(subjects.RESULTS)).last_sequence
    selection = msgspec.structs.replace(selection, up_to=up_to)
    await bus.state.put(subjects.JOBS, key, ReplayOrder(selection=selection, limit_s=limit_s))
    deadline = time.monotonic() + TAKE_LIMIT_S
    while time.monotonic() < deadline:
        order: ReplayOrder | None = await bus.state.get(subjects.JOBS, key, ReplayOrder)
        if order is not None and order.taken is not None:
            return order
        await _reopen(bus, job)  # every time: whoever records the job may just be marking it as done
        await asyncio.sleep(LOOK_S)
    return None


async def _reopen(bus: Bus, job: str) -> None:
    """Have the results workers look at the job: one that is over is nobody's."""
    record = await find_job(bus, job)
    if record.state != "running":
        await bus.state.put(subjects.JOBS, job, msgspec.structs.replace(record, state="running"))


class OrderedReplays:
    """Serves the replay orders of one job, for the results worker that records it."""

    def __init__(self, bus: Bus, job: str, again: Again) -> None:
        self._bus, self._job, self._again = bus, job, again
        self._order: ReplayOrder | None = None
        self._saved = True
        self._rollouts: frozenset[RolloutId] = frozenset()
        self._publishing: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()

    async def published(self) -> bool:
        """Whether everything that was ordered is out; before that, nothing is missing."""
        return self._publishing is None or self._publishing.done()

    async def serve(self, consumer: ResultsConsumer) -> None:
        """Take orders as they come, for ever; raises what went wrong with publishing them."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._publishing is not None and self._publishing.done():
                self._publishing.result()
            with contextlib.suppress(BusError):
                await self.look(consumer)

    async def look(self, consumer: ResultsConsumer) -> None:
        """Tell the end of an order, and take on the next, also one that a worker before us had not ended.

        Raises:
            BusError: the broker did not answer; look again.
        """
        async with self._looking:
            if self._order is not None:
                await self._save()
                if await self.published() and not consumer.waits_for(self._rollouts):
                    await self._put(msgspec.structs.replace(self._order, ended=True))
                    self._order = None
            if self._order is None:
                await self._take(consumer)

    async def _take(self, consumer: ResultsConsumer) -> None:
        order: ReplayOrder | None = await self._bus.state.get(subjects.JOBS, replay_key(self._job), ReplayOrder)
        if order is None or order.ended or await consumer.is_behind(order.selection.up_to):
            return
        chosen = choose(consumer.ledger, order.selection)
        log.info("replaying", job=self._job, rollouts=len(chosen.attempts))
        self._rollouts = frozenset(chosen.attempts)
        self._again.afresh |= chosen.afresh
        self._again.use_limit(order.limit_s)
        consumer.retry(chosen.attempts.items())
        wanted = {rollout: (number, 0) for rollout, number in chosen.attempts.items()}
        self._publishing = asyncio.create_task(self._again.order(wanted), name=f"{self._job} replay")
        if order.taken is None:
            counts = {"from_verifier": chosen.from_verifier, "without_answer": chosen.without_answer}
            order, self._saved = msgspec.structs.replace(order, taken=len(chosen.attempts), **counts), False
        self._order = order
        await self._save()

    async def _save(self) -> None:
        if not self._saved and self._order is not None:
            await self._put(self._order)
            self._saved = True

    async def _put(self, order: ReplayOrder) -> None:
        await self._bus.state.put(subjects.JOBS, replay_key(self._job), order)

    async def close(self) -> None:
        """Stop publishing; whoever records the job next goes on."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
