"""All rollouts of a job in order: which are expected, what became of each, and the numbers of those that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.metrics import NO_ANSWER, align
from gym_bus.results.statistics import Floats, Ints

ANSWER_KEYS = ("extracted_answer", "extracted_model_code", "extracted_code", "extracted_sql")
"""Where verifiers put what they understood as the answer; the key that most rollouts have is used."""

Mask = NDArray[np.bool_]


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


@dataclass(frozen=True)
class Table:
    """Rollouts by (task, rollout). Shapes: [rollouts] are the expected ones, [rows] those with a reward."""

    task: Ints
    """Task index; shape [rollouts]."""
    rollout: Ints
    """Rollout index; shape [rollouts]."""
    agent: Ints
    """Place in `agents`; shape [rollouts]."""
    agents: Sequence[str]
    failure: Ints
    """Place in `kinds`, -1 where the newest attempt has not failed; shape [rollouts]."""
    kinds: Sequence[str]
    input_offset: Ints
    """Where the line begins in the materialized inputs; shape [rollouts]."""
    has_inputs: bool
    row_at: Ints
    """Place among the rollouts, rising; shape [rows]."""
    row_offset: Ints
    """Where the line begins in the rollouts file; shape [rows]."""
    numbers: dict[str, Floats]
    """The numeric fields by name, NaN where a rollout has none; shape [rows]."""
    whole: frozenset[str]
    """Fields that hold whole numbers only."""
    answers: Ints | None
    """Equal numbers for equal answers; shape [rows]."""
    answer_key: str | None

    @cached_property
    def tasks(self) -> Ints:
        """Task indices, rising; shape [tasks]."""
        return np.unique(self.task)

    @cached_property
    def task_first(self) -> Ints:
        """Each task's first rollout; shape [tasks]."""
        return np.searchsorted(self.task, self.tasks)

    @cached_property
    def task_at(self) -> Ints:
        """Place of each rollout's task; shape [rollouts]."""
        return np.searchsorted(self.tasks, self.task)

    @cached_property
    def row_task(self) -> Ints:
        """Place of each row's task; shape [rows]."""
        return self.task_at[self.row_at]

    @property
    def row_rollout(self) -> Ints:
        """Rollout index; shape [rows]."""
        return self.rollout[self.row_at]

    @property
    def task_expected(self) -> Ints:
        """Expected rollouts; shape [tasks]."""
        return np.bincount(self.task_at, minlength=len(self.tasks))

    @property
    def task_scored(self) -> Ints:
        """Rollouts with a reward; shape [tasks]."""
        return np.bincount(self.row_task, minlength=len(self.tasks))

    @property
    def task_failed(self) -> Ints:
        """Rollouts whose newest attempt failed; shape [tasks]."""
        return np.bincount(self.task_at[self.failure >= 0], minlength=len(self.tasks))

    def only(self, keep: Mask) -> Table:
        """The table of some rollouts, given as a mask of shape [rollouts]."""
        if keep.all():
            return self
        rows = keep[self.row_at]
        place = np.cumsum(keep) - 1
        return replace(
            self,
            task=self.task[keep],
            rollout=self.rollout[keep],
            agent=self.agent[keep],
            failure=self.failure[keep],
            input_offset=self.input_offset[keep],
            row_at=place[self.row_at[rows]],
            row_offset=self.row_offset[rows],
            numbers={name: values[rows] for name, values in self.numbers.items()},
            answers=None if self.answers is None else self.answers[rows],
        )

    def of_agent(self, name: str) -> Table:
        """The table of one agent's rollouts."""
        return self.only(self.agent == self.agents.index(name))

    def of_tasks(self, keep: Mask) -> Table:
        """The table of some tasks, given as a mask of shape [tasks]."""
        return self.only(keep[self.task_at])

    @property
    def counts(self) -> Counts:
        """The denominators."""
        kinds, count = np.unique(self.failure[self.failure >= 0], return_counts=True)
        failed = {self.kinds[kind]: int(n) for kind, n in zip(kinds.tolist(), count, strict=True)}
        expected, scored, total = len(self.task), len(self.row_at), sum(failed.values())
        return Counts(
            expected=expected,
            scored=scored,
            failed=total,
            pending=expected - scored - total,
            failed_by_class=dict(sorted(failed.items())),
        )

    def rewards(self) -> Floats:
        """Shape [tasks with a reward, rollouts of the longest], NaN behind each task's last."""
        (rewards,) = align(*self._groups(), [self.numbers["reward"]], np.nan)
        return rewards

    def votes(self) -> Ints | None:
        """The answers, shape as `rewards`; None where the rollouts have none."""
        if self.answers is None:
            return None
        (votes,) = align(*self._groups(), [self.answers.astype(float)], NO_ANSWER)
        return votes.astype(np.int64)

    def _groups(self) -> tuple[int, Ints]:
        tasks, place = np.unique(self.row_task, return_inverse=True)
        return len(tasks), place


def read_table(files: JobFiles, answer_keys: Sequence[str] = ANSWER_KEYS) -> Table:
    """Read a job's files, finished or not, NeMo Gym's too.

    The expected rollouts are those of the materialized inputs; without that file those of the manifest; without
    either, those that have a result. Memory: 8 bytes per number, and one line of text at a time.

    Raises:
        DataError: names file and line: not a result, a rollout recorded twice, or one that is not expected.
    """
    agents: dict[str, int] = {}
    columns = read_scored(files.rollouts, agents, answer_keys)
    refuse_repeats(columns.keys, files.rollouts)
    failed = read_failed(files.failures)
    failed.without(columns.keys)
    expected = _expected(files, columns, failed, agents)
    order = np.argsort(expected.joint(), kind="stable")
    joint = expected.joint()[order]
    failure, kinds = _failures(files, failed, joint)
    rows = np.argsort(columns.keys.joint(), kind="stable")
    answers = columns.answers()
    numbers = {name: values[rows] for name, values in columns.numbers().items()}
    return Table(
        task=expected.task[order],
        rollout=expected.rollout[order],
        agent=expected.agent[order],
        agents=list(agents),
        failure=failure,
        kinds=kinds,
        input_offset=expected.offset[order],
        has_inputs=files.inputs.exists(),
        row_at=np.searchsorted(joint, columns.keys.joint()[rows]),
        row_offset=columns.keys.offset[rows],
        numbers=numbers,
        whole=frozenset(name for name in numbers if columns.is_whole(name)),
        answers=None if answers is None else answers[rows],
        answer_key=columns.answer_key,
    )


def _expected(files: JobFiles, columns: Columns, failed: FailedLines, agents: dict[str, int]) -> Keys:
    if files.inputs.exists():
        expected = read_inputs(files.inputs, agents)
        refuse_strangers(columns.keys, expected, files.rollouts, files.inputs)
    elif files.manifest.exists():
        expected = _keys_of(Manifest.load(files.manifest), agents)
        refuse_strangers(columns.keys, expected, files.rollouts, files.manifest)
    else:
        expected = _keys_seen(columns, failed, agents)
    return expected


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


def _failures(files: JobFiles, failed: FailedLines, joint: Ints) -> tuple[Ints, list[str]]:
    failure = np.full(len(joint), -1, np.int64)
    kinds: dict[str, int] = {}
    for (task, rollout), line in failed.newest.items():
        at = int(np.searchsorted(joint, key := (task << 31) | rollout))
        if at == len(joint) or joint[at] != key:
            where = f"{files.failures}:{line.number}: task {task}, rollout {rollout}"
            raise DataError(f"{where} is not one of this job; the files are of different jobs")
        failure[at] = kinds.setdefault(line.kind, len(kinds))
    return failure, list(kinds)
