"""Which rollouts of a job are recorded, in about ten bytes a rollout."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum
from math import nan
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gym_bus.messages import RolloutId, Usage


class State(IntEnum):
    """What is recorded of a rollout."""

    MISSING = 0
    SCORED = 1
    FAILED = 2
    ABSENT = 3
    """No rollout of the job: tasks may differ in their number of rollouts, and indices may have gaps."""


class FailedRollout(NamedTuple):
    """A rollout whose newest attempt failed."""

    kind: str
    """The failure's class."""
    number: int
    """The newest attempt's number: 1 for the first try, 2 for its first retry, ..."""
    terminal: bool
    sequence: int = 0
    """Of its result in the stream."""
    line_at: int = -1
    """Where the newest attempt's line begins in the failures file; -1 where there is no file."""
    stored_at: int = -1
    """Where the line begins that holds an attempt to verify again; -1 where generation has to be made again."""


class Anchor(NamedTuple):
    """The recorded result with the highest stream sequence: where reading the stream goes on.

    A server that lost its newest messages gives their sequence numbers out again, so the reader must find this very
    rollout at this sequence, or start over.
    """

    sequence: int
    rollout: RolloutId


class Tally(msgspec.Struct, kw_only=True):
    """Running counts of one job's output."""

    scored: int = 0
    failed: Counter[str] = msgspec.field(default_factory=Counter)
    """Rollouts by the class of their newest failure; those scored later are not among them."""
    reward_sum: float = 0.0
    input_tokens: int = 0
    """Of all recorded attempts, failed ones included."""
    output_tokens: int = 0
    repeats: int = 0
    """Results dropped because the rollout was recorded already; since this writer opened."""
    refused: int = 0
    """Results dropped because they belong to no rollout of this job; since this writer opened."""


class Ledger:
    """The state of each of `tasks` x `repeats` rollouts, and their counts."""

    def __init__(self, job: str, tasks: int, repeats: int) -> None:
        self.job, self.tasks, self.repeats = job, tasks, repeats
        self.tally = Tally()
        self.anchor: Anchor | None = None
        self._states = bytearray(tasks * repeats)
        self._rewards = array("d", [nan]) * (tasks * repeats)
        self._failures: dict[int, FailedRollout] = {}

    def limit_to(self, spans: Iterable[tuple[int, int, int]]) -> None:
        """Leave only the rollouts of these spans: (first task index, number of tasks, rollouts of each)."""
        listed = bytearray(len(self._states))
        for first, tasks, rollouts in spans:
            for task in range(first, first + tasks):
                start = task * self.repeats
                listed[start : start + rollouts] = b"\1" * rollouts
        for at, is_listed in enumerate(listed):
            if not is_listed:
                self._states[at] = State.ABSENT

    @property
    def missing_count(self) -> int:
        """Rollouts of which nothing is recorded."""
        return self._states.count(State.MISSING)

    def holds(self, rollout: RolloutId) -> bool:
        """Whether this is a rollout of the job."""
        return (
            rollout.job == self.job
            and 0 <= rollout.task_index < self.tasks
            and 0 <= rollout.rollout_index < self.repeats
            and self._states[self._at(rollout)] != State.ABSENT
        )

    def _at(self, rollout: RolloutId) -> int:
        return rollout.task_index * self.repeats + rollout.rollout_index

    def state(self, rollout: RolloutId) -> State:
        """What is recorded of a rollout of this job."""
        return State(self._states[self._at(rollout)])

    def failure(self, rollout: RolloutId) -> FailedRollout | None:
        """The newest failed attempt of a rollout; None where there is none, or where it was scored later."""
        return self._failures.get(self._at(rollout))

    def number(self, rollout: RolloutId) -> int:
        """The number of the newest failed attempt of a rollout, 0 where there is none."""
        failed = self.failure(rollout)
        return failed.number if failed else 0

    def record_scored(self, rollout: RolloutId, reward: float) -> None:
        """The rollout has its reward: final, whatever failed before."""
        at = self._at(rollout)
        self._forget_failure(at)
        self._states[at] = State.SCORED
        self._rewards[at] = reward
        self.tally.scored += 1
        self.tally.reward_sum += reward

    def record_failed(self, rollout: RolloutId, failed: FailedRollout) -> None:
        """The rollout's newest attempt failed."""
        at = self._at(rollout)
        self._forget_failure(at)
        self._states[at] = State.FAILED
        self._failures[at] = failed
        self.tally.failed[failed.kind] += 1

    def _forget_failure(self, at: int) -> None:
        if old := self._failures.pop(at, None):
            self.tally.failed[old.kind] -= 1
            self.tally.failed += Counter()  # drops the classes that fell to zero

    def record_line(self, rollout: RolloutId, sequence: int, usage: Usage) -> None:
        """A line was written: its tokens were spent and its place in the stream is known."""
        self.tally.input_tokens += usage.input_tokens
        self.tally.output_tokens += usage.output_tokens
        if self.anchor is None or sequence > self.anchor.sequence:
            self.anchor = Anchor(sequence, rollout)

    def missing(self) -> Iterator[RolloutId]:
        """The rollouts of which nothing is recorded, in order."""
        at = self._states.find(State.MISSING)
        while at >= 0:
            yield RolloutId(self.job, *divmod(at, self.repeats))
            at = self._states.find(State.MISSING, at + 1)

    def failures(self) -> Iterator[tuple[RolloutId, FailedRollout]]:
        """The rollouts whose newest attempt failed."""
        for at, failed in list(self._failures.items()):
            yield RolloutId(self.job, *divmod(at, self.repeats)), failed

    def rewards(self) -> NDArray[np.float64]:
        """A copy of all rewards, shape [tasks, repeats]; NaN where there is none."""
        return np.array(self._rewards).reshape(self.tasks, self.repeats)
