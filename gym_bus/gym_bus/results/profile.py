"""Reward profiling: NeMo Gym's statistics of a job per task and per agent, from the files alone.

Memory holds the numeric columns (8 bytes per number) and one line of text at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from gym_bus.errors import DataError
from gym_bus.results.columns import (
    Columns,
    FailedLines,
    Keys,
    read_failed,
    read_inputs,
    read_scored,
    refuse_repeats,
    refuse_strangers,
)
from gym_bus.results.disk import replace_file
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.metrics import (
    NO_ANSWER,
    Metrics,
    align,
    compute_pass_majority_metrics,
    describe,
    key_metrics,
    powers_of_two,
)
from gym_bus.results.reader import read_row
from gym_bus.results.statistics import Estimate, Floats, Ints, pass_at_1, pass_at_k

ANSWER_KEY = "extracted_answer"


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The denominators: `expected = scored + failed + pending`."""

    expected: int
    scored: int
    """Rollouts with a reward; all statistics are over these and no others."""
    failed: int
    """Rollouts whose newest attempt failed."""
    pending: int
    """Rollouts of which nothing is recorded."""
    failed_by_class: dict[str, int] = {}


class AgentProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of one agent's rollouts."""

    agent: str
    counts: Counts
    agent_metrics: Metrics
    """NeMo Gym's metrics; those with an @ are in per cent."""
    key_metrics: Metrics
    estimates: dict[str, Estimate]
    """pass@1, pass@2, pass@4, ... as fractions, with their intervals."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a job; those per task are in the files only."""

    counts: Counts
    agents: list[AgentProfile]


def profile_job(files: JobFiles, *, answer_key: str = ANSWER_KEY) -> Profile:
    """Profile a job, finished or not, and write the profile and the aggregate file beside its rollouts.

    The expected rollouts are those of the materialized inputs; without that file those of the manifest; without
    either, those that have a result. Failed and pending rollouts are counted and enter no other number.

    Args:
        files: the job's; also those of a NeMo Gym run.
        answer_key: the row field that majority votes are held over; no rollout has it, no majority metrics.

    Raises:
        DataError: names file and line: not a result, a rollout recorded twice, or one that is not expected.
        UsageError: the two files cannot be written.
    """
    job = _Job(files, answer_key)
    agents = [job.agent_profile(name, number) for name, number in job.expected.agents.items()]
    agents = [agent for agent in agents if agent.counts.expected]
    replace_file(files.profile, job.profile_lines())
    replace_file(files.aggregate, _array_chunks(job, agents))
    return Profile(counts=job.counts(np.ones(len(job.tasks), bool)), agents=agents)


class _Job:
    """All numbers of a job, in order: rows by (task, rollout), tasks by index."""

    def __init__(self, files: JobFiles, answer_key: str) -> None:
        self.files = files
        agents: dict[str, int] = {}
        columns = read_scored(files.rollouts, agents, answer_key)
        refuse_repeats(columns.keys, files.rollouts)
        self.failed = read_failed(files.failures)
        self.failed.without(columns.keys)
        self.expected = self._expected(columns, agents)
        self._place_tasks()
        self._place_rows(columns)

    def _expected(self, columns: Columns, agents: dict[str, int]) -> Keys:
        files = self.files
        self.has_inputs = files.inputs.exists()
        if self.has_inputs:
            expected = read_inputs(files.inputs, agents)
            refuse_strangers(columns.keys, expected, files.rollouts, files.inputs)
        elif files.manifest.exists():
            expected = _keys_of(Manifest.load(files.manifest), agents)
            refuse_strangers(columns.keys, expected, files.rollouts, files.manifest)
        else:
            return _keys_seen(columns, self.failed, agents)
        known = set(expected.joint().tolist())
        for (task, rollout), line in self.failed.newest.items():
            if ((task << 31) | rollout) not in known:
                where = f"{files.failures}:{line.number}: task {task}, rollout {rollout}"
                raise DataError(f"{where} is not one of this job; the files are of different jobs")
        return expected

    def _place_tasks(self) -> None:
        task = self.expected.task
        self.tasks, first, count = np.unique(task, return_index=True, return_counts=True)
        self.task_expected = count
        self.task_offset = self.expected.offset[first]
        self.task_agent = self.expected.agent[first]
        self.task_failed: list[Counter[str]] = [Counter() for _ in self.tasks]
        place = {index: at for at, index in enumerate(self.tasks.tolist())}
        for (failed_task, _), line in self.failed.newest.items():
            self.task_failed[place[failed_task]][line.kind] += 1

    def _place_rows(self, columns: Columns) -> None:
        keys = columns.keys
        order = np.argsort(keys.joint(), kind="stable")
        self.row_task = np.searchsorted(self.tasks, keys.task[order])
        self.row_rollout = keys.rollout[order]
        self.numbers = {name: values[order] for name, values in columns.numbers().items()}
        self.whole = {name for name in self.numbers if columns.is_whole(name)}
        self.answers = columns.answers()[order] if columns.answered else None
        self.task_scored = np.bincount(self.row_task, minlength=len(self.tasks))

    def counts(self, tasks: Any) -> Counts:
        """The denominators of some tasks, given as a mask of shape [tasks]."""
        failed: Counter[str] = Counter()
        for at in np.flatnonzero(tasks):
            failed += self.task_failed[at]
        expected, scored = int(self.task_expected[tasks].sum()), int(self.task_scored[tasks].sum())
        return Counts(
            expected=expected,
            scored=scored,
            failed=failed.total(),
            pending=expected - scored - failed.total(),
            failed_by_class=dict(sorted(failed.items())),
        )

    def agent_profile(self, name: str, number: int) -> AgentProfile:
        """The statistics over all rollouts of an agent's tasks."""
        tasks = self.task_agent == number
        rows = tasks[self.row_task]
        metrics: Metrics = {}
        rewards = np.empty((0, 0))
        if rows.any():
            numbers = {name: values[rows] for name, values in self.numbers.items()}
            described = describe(1, np.zeros(int(rows.sum()), np.int64), numbers)
            metrics = self._shown({metric: float(values[0]) for metric, values in described.items()})
            task = np.unique(self.row_task[rows], return_inverse=True)[1]
            (rewards,) = align(int(task.max()) + 1, task, [numbers["reward"]], np.nan)
            metrics |= compute_pass_majority_metrics({"accuracy": rewards}, self._votes(rows, task, len(rewards)))
        return AgentProfile(
            agent=name,
            counts=self.counts(tasks),
            agent_metrics=metrics,
            key_metrics=key_metrics(metrics),
            estimates=_estimates(rewards),
        )

    def _votes(self, rows: Any, task: Ints, tasks: int) -> Ints | None:
        if self.answers is None:
            return None
        (votes,) = align(tasks, task, [self.answers[rows]], NO_ANSWER)
        return votes.astype(np.int64)

    def _shown(self, values: dict[str, float]) -> Metrics:
        """Metrics as the files show them: without those that say nothing, extremes of whole numbers as such."""
        shown: Metrics = {}
        for metric, value in values.items():
            kind, _, name = metric.partition("/")
            if value == value:
                shown[metric] = int(value) if kind in ("max", "min") and name in self.whole else value
        return shown

    def task_rows(self, agent: str | None = None) -> Iterator[tuple[int, Metrics]]:
        """Place and statistics of every task, or of every task of one agent; `sample` left out."""
        number = self.expected.agents[agent] if agent is not None else None
        described = describe(len(self.tasks), self.row_task, self.numbers)
        end = np.cumsum(self.task_scored)
        for at, index in enumerate(self.tasks.tolist()):
            if number is not None and self.task_agent[at] != number:
                continue
            scored, expected = int(self.task_scored[at]), int(self.task_expected[at])
            yield (
                at,
                {
                    "_ng_task_index": index,
                    **self._shown({metric: float(values[at]) for metric, values in described.items()}),
                    "num_rollouts": scored,
                    "expected_num_rollouts": expected,
                    "missing_num_rollouts": expected - scored,
                    "failed_num_rollouts": self.task_failed[at].total(),
                    "reward_profile_completion_pct": 100.0 * scored / expected,
                    "rollout_infos": self._infos(index, int(end[at]) - scored, int(end[at])),
                },
            )

    def _infos(self, index: int, start: int, end: int) -> list[Metrics]:
        infos: list[Metrics] = [
            {"rollout_id": f"{index}:{rollout}", "_ng_task_index": index, "_ng_rollout_index": rollout}
            for rollout in self.row_rollout[start:end].tolist()
        ]
        for name, values in self.numbers.items():
            for info, value in zip(infos, values[start:end].tolist(), strict=True):
                if value == value:
                    info[name] = int(value) if name in self.whole else value
        return infos

    def profile_lines(self) -> Iterator[bytes]:
        """The lines of the profile file, one per task, those without any reward included."""
        if not self.has_inputs:
            for _, row in self.task_rows():
                yield msgspec.json.encode(row) + b"\n"
            return
        with self.files.inputs.open("rb") as inputs:
            for at, row in self.task_rows():
                sample = read_row(inputs, int(self.task_offset[at]))
                row["sample"] = {
                    key: sample[key] for key in sample if key not in ("_ng_task_index", "_ng_rollout_index")
                }
                yield msgspec.json.encode(row) + b"\n"


def _keys_of(manifest: Manifest, agents: dict[str, int]) -> Keys:
    keys = Keys(agents)
    for task in range(manifest.rows):
        for rollout in range(manifest.num_repeats):
            keys.add(task, rollout, manifest.agent, 0)
    return keys


def _keys_seen(columns: Columns, failed: FailedLines, agents: dict[str, int]) -> Keys:
    names = list(agents)
    scored = columns.keys
    keys = Keys(agents)
    for task, rollout, agent in zip(scored.task.tolist(), scored.rollout.tolist(), scored.agent.tolist(), strict=True):
        keys.add(task, rollout, names[agent], 0)
    for (task, rollout), line in failed.newest.items():
        keys.add(task, rollout, line.agent, 0)
    return keys


def _estimates(rewards: Floats) -> dict[str, Estimate]:
    return {
        f"pass@{k}": pass_at_1(rewards) if k == 1 else pass_at_k(rewards, k) for k in powers_of_two(rewards.shape[1])
    }


def _array_chunks(job: _Job, agents: list[AgentProfile]) -> Iterator[bytes]:
    """The aggregate file: a JSON array, indented by 2, written piece by piece as its task rows may be many."""
    opening = b"["
    for agent in agents:
        head = {
            "agent_ref": {"name": agent.agent},
            "agent_metrics": agent.agent_metrics,
            "key_metrics": agent.key_metrics,
            "gym_bus": {"counts": agent.counts, "estimates": agent.estimates},
        }
        yield opening + b"\n  " + _indented(head, 2).removesuffix(b"\n  }") + b',\n    "group_level_metrics": ['
        before = b"\n      "
        for _, row in job.task_rows(agent.agent):
            yield before + _indented(row | {"sample": {"agent_ref": {"name": agent.agent}}}, 6)
            before = b",\n      "
        yield b"\n    ]\n  }"
        opening = b","
    yield b"\n]\n" if agents else b"[]\n"


def _indented(value: Any, by: int) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).replace(b"\n", b"\n" + b" " * by)
