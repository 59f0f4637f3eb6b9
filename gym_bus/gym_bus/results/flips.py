"""What another verifier changed: rewards before and after, task by task, with the digests of both verifiers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout's reward before and after."""

    rollout_index: int = msgspec.field(name="_ng_rollout_index")
    reward_before: float | None
    """None where the rollout had no reward."""
    reward_after: float | None
    """None where it could not be judged now."""
    verifier_digest_before: str
    """Empty where the row does not say who judged it, as NeMo Gym's do not."""


class _Counts(msgspec.Struct, frozen=True, kw_only=True):
    rollouts: int
    """That were judged again."""
    up: int
    down: int
    newly_scored: int
    """Had no reward, and have one now."""
    unscored: int
    """Had a reward, and could not be judged now."""
    compared: int
    """With a reward both before and after; the means are over these, None where there is none."""
    mean_before: float | None
    mean_after: float | None
    verifier_digests_before: list[str]
    verifier_digest_after: str


class TaskFlips(_Counts, frozen=True, kw_only=True):
    """One task with a reward that is another one now; a line of the flips file."""

    task_index: int = msgspec.field(name="_ng_task_index")
    changes: list[Change]


class Totals(_Counts, frozen=True, kw_only=True):
    """All tasks together."""

    tasks: int
    tasks_changed: int


class _Tally:
    """The counts of one task, or of all."""

    __slots__ = ("after", "before", "compared", "digests", "down", "newly_scored", "rollouts", "unscored", "up")

    def __init__(self) -> None:
        self.rollouts = self.compared = 0
        self.up = self.down = self.newly_scored = self.unscored = 0
        self.before = self.after = 0.0
        self.digests: set[str] = set()

    def add(self, change: Change) -> None:
        before, after = change.reward_before, change.reward_after
        self.rollouts += 1
        if change.verifier_digest_before:
            self.digests.add(change.verifier_digest_before)
        if before is not None and after is not None:
            self.compared += 1
            self.before += before
            self.after += after
            self.up += after > before
            self.down += after < before
        else:
            self.newly_scored += after is not None
            self.unscored += before is not None

    def counts(self, digest: str) -> dict[str, Any]:
        """The fields of `_Counts`."""
        return {
            "rollouts": self.rollouts,
            "up": self.up,
            "down": self.down,
            "newly_scored": self.newly_scored,
            "unscored": self.unscored,
            "compared": self.compared,
            "mean_before": self.before / self.compared if self.compared else None,
            "mean_after": self.after / self.compared if self.compared else None,
            "verifier_digests_before": sorted(self.digests),
            "verifier_digest_after": digest,
        }


class Flips:
    """Collects what became of each rollout. Memory: a tally per task, and every change."""

    def __init__(self, verifier_digest: str) -> None:
        self._digest = verifier_digest
        self._all = _Tally()
        self._tallies: dict[int, _Tally] = {}
        self._changes: dict[int, list[Change]] = {}

    def add(self, task: int, change: Change) -> None:
        """One more rollout, changed or not."""
        self._all.add(change)
        self._tallies.setdefault(task, _Tally()).add(change)
        if change.reward_before != change.reward_after:
            self._changes.setdefault(task, []).append(change)

    def tasks(self) -> Iterator[TaskFlips]:
        """The tasks in which anything changed, by index."""
        for task, changes in sorted(self._changes.items()):
            changes.sort(key=lambda change: change.rollout_index)
            yield TaskFlips(task_index=task, changes=changes, **self._tallies[task].counts(self._digest))

    def totals(self) -> Totals:
        """All tasks together."""
        return Totals(tasks=len(self._tallies), tasks_changed=len(self._changes), **self._all.counts(self._digest))
