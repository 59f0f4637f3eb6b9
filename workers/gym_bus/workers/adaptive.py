"""Repeats as they are needed: a job gets further rollouts, round by round, until pass@1 is known well enough.

All rounds are one job. What a round adds is written down before any of it runs: first the plan, then the rows, so that
a run that was killed at any moment goes on with the same plan.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
import numpy as np

from gym_bus import subjects
from gym_bus.benchmarks.dataset import materialized_line, with_seed
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import DataError, UsageError
from gym_bus.jobs import JobRecord, spans_of
from gym_bus.messages import RolloutId
from gym_bus.results.disk import replace_file
from gym_bus.results.inputs import InputRows
from gym_bus.results.lock import FileLock
from gym_bus.results.rounds import Rounds
from gym_bus.results.sequence import Bounds, Limits, Round, bounds, first_round, next_round, too_much_fails
from gym_bus.results.statistics import Floats
from gym_bus.workers.local import LocalStack
from gym_bus.workers.plan import Job
from gym_bus.workers.publish import input_row
from gym_bus.workers.results import open_writer, worth_retrying
from gym_bus.workers.run import Progress, RunResult, run_job, run_on

_CHUNK_BYTES = 2**20


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """How well pass@1 is to be known."""

    half_width: float
    """Of the interval, a fraction of 1."""
    most: Limits = Limits()
    """What it may cost."""
    seeds: int | None = None
    """As for the job's first rollouts: each asks the model for a seed, this number plus its index."""


Ended = Literal["reached", "limit", "cancelled", "nothing scored", "too much fails"]


class Adapted(msgspec.Struct, frozen=True, kw_only=True):
    """How a run with an aim ended."""

    job: Job
    result: RunResult
    bounds: Bounds
    ended: Ended


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What is known after a round, and what comes next."""

    bounds: Bounds
    next: Round | None


async def run_until(
    job: Job,
    config: Config,
    aim: Aim,
    *,
    workers: bool = True,
    on_start: Callable[[Progress], None] = lambda _: None,
    on_round: Callable[[Step], None] = lambda _: None,
) -> Adapted:
    """Run a job, and give it further rollouts until the interval of pass@1 is narrow enough or a limit is met.

    Args:
        job: written down in its folder; its rollouts are the first round. Later rounds of an earlier run go on.
        config: as for `run_job`.
        aim: when to end.
        workers: start local workers.
        on_start: gets the progress of every round.
        on_round: told after every round.

    Raises:
        BusError: no server, or a worker that keeps dying.
        UsageError: the folder is held by another run, or cannot be written; or rewards are not between 0 and 1.
        DataError: the folder's files are broken.
    """
    run = Adapting(job, config, aim, on_round)
    await asyncio.to_thread(run.open)
    if run.is_complete and not await asyncio.to_thread(run.advance):
        return run.adapted(await run_job(run.job, config, workers=workers, on_start=on_start), cancelled=False)
    cancelled, wall_s, finished = False, 0.0, 0
    async with LocalStack(config, job.files.folder, verifier=job.record.verifier, workers=workers) as stack:
        while True:
            with await asyncio.to_thread(open_writer, run.job.record, run.job.files, config.results) as writer:
                result = await run_on(run.job, stack, writer, on_start)
            wall_s, finished = wall_s + result.wall_s, finished + result.finished
            run.rewards = result.ledger.rewards()
            cancelled = await _is_cancelled(stack.bus, job)
            if cancelled or not await asyncio.to_thread(run.advance):
                break
        stack.complete()
    return run.adapted(RunResult(ledger=result.ledger, wall_s=wall_s, finished=finished), cancelled=cancelled)


async def _is_cancelled(bus: Bus, job: Job) -> bool:
    record: JobRecord | None = await bus.state.get(subjects.JOBS, job.record.job, JobRecord)
    return record is not None and record.state == "cancelled"


class Adapting:
    """The plan of a job and its progress."""

    rewards: Floats
    """Shape [tasks up to the last index, rollouts]."""

    def __init__(self, job: Job, config: Config, aim: Aim, on_round: Callable[[Step], None]) -> None:
        self.job = job
        self._config, self._aim, self._on_round = config, aim, on_round
        self._plan = Rounds(tasks=[], inputs_bytes=0, rounds=[])
        self._seed = int.from_bytes(hashlib.sha256(job.record.job.encode()).digest()[:8], "big")
        self.is_complete = False

    def open(self) -> None:
        """Read the plan, or begin one, and see that the rows of its last round are written down."""
        files, record = self.job.files, self.job.record
        plan = Rounds.load(files.adaptive)
        if plan is not None:
            self._plan = plan
            self._extend()
        else:
            tasks = [task for first, count, _ in record.spans for task in range(first, first + count)]
            first = first_round([record.group_size(task) for task in tasks], self._aim.half_width, self._aim.most)
            size = files.inputs.stat().st_size
            self._save(Rounds(tasks=tasks, inputs_bytes=size, rounds=[first]))
        with open_writer(self.job.record, files, self._config.results) as writer:
            self.rewards = writer.ledger.rewards()
            self.is_complete = not writer.ledger.missing_count and not worth_retrying(
                writer.ledger, self._config.results.max_attempts
            )

    def advance(self) -> bool:
        """Plan the next round and write it down; False where there is none to come."""
        rewards, aim = self._task_rewards(), self._aim
        following = next_round(rewards, self._plan.rounds, aim.half_width, aim.most, seed=self._seed)
        self._on_round(Step(bounds=bounds(rewards, self._plan.rounds), next=following))
        if following is None:
            return False
        self._save(msgspec.structs.replace(self._plan, rounds=[*self._plan.rounds, following]))
        self._extend()
        return True

    def _task_rewards(self) -> Floats:
        rewards = self.rewards[self._plan.tasks]
        outside = np.argwhere((rewards < 0.0) | (rewards > 1.0))
        if len(outside):
            task, rollout = outside[0]
            raise UsageError(
                f"--until-ci needs rewards from 0 to 1: rollout {rollout} of task {self._plan.tasks[task]} has "
                f"{rewards[task, rollout]:g}"
            )
        return rewards

    def _save(self, plan: Rounds) -> None:
        plan.save(self.job.files.adaptive)
        self._plan = plan

    def _extend(self) -> None:
        """Add the rows that the plan has and the materialized inputs have not."""
        record, files = self.job.record, self.job.files
        counts = self._plan.counts
        if missing := {task: count for task, count in counts.items() if record.group_size(task) < count}:
            lock = FileLock(files.lock)
            try:
                replace_file(files.inputs, self._extended(missing))
            finally:
                lock.release()
        spans = spans_of(sorted(counts.items()))
        self.job = msgspec.structs.replace(self.job, record=msgspec.structs.replace(record, spans=spans))

    def _extended(self, missing: dict[int, int]) -> Iterator[bytes]:
        record, inputs, seeds = self.job.record, self.job.files.inputs, self._aim.seeds
        with inputs.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        rows = InputRows(inputs)
        try:
            for task, count in missing.items():
                first = rows.line(RolloutId(record.job, task, 0))
                if first is None:
                    raise DataError(f"{inputs}: no row for rollout 0 of task {task}")
                row = input_row(first, inputs).row
                for rollout in range(record.group_size(task), count):
                    own = row if seeds is None else with_seed(row, seeds + rollout)
                    yield materialized_line(own, task, rollout) + b"\n"
        finally:
            rows.close()

    def adapted(self, result: RunResult, *, cancelled: bool) -> Adapted:
        """How it ended."""
        known = bounds(self._task_rewards(), self._plan.rounds)
        ended: Ended = "limit"
        if cancelled:
            ended = "cancelled"
        elif not known.tasks:
            ended = "nothing scored"
        elif known.half_width <= self._aim.half_width:
            ended = "reached"
        elif too_much_fails(self._task_rewards(), self._plan.rounds, self._aim.half_width):
            ended = "too much fails"
        return Adapted(job=self.job, result=result, bounds=known, ended=ended)
