"""The tasks, side by side in all jobs that run them, and which of them a person should look at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gym_bus.results.reader import read_row
from gym_bus.results.report.items import gist
from gym_bus.results.report.jobs import Entry

EXCERPT = 240
"""Characters of a prompt."""
SHARES = {"sometimes": 0.5, "never": 0.2, "unscored": 0.1, "always": 0.2}
"""Of the places in a list of tasks, where there are more tasks of the kind; the kinds in order."""


@dataclass(frozen=True)
class Family:
    """Jobs whose task indices mean the same tasks."""

    members: tuple[int, ...]
    """Places of the jobs in the report."""
    strangers: int
    """Tasks with equal indices and different rows, at most, between the first member and another."""


def families(entries: Sequence[Entry]) -> list[Family]:
    """The jobs by the tasks they run. Jobs belong together where most of the tasks that both have are the same."""
    found: list[list[int]] = []
    strangers: list[int] = []
    for place, entry in enumerate(entries):
        for at, members in enumerate(found):
            common, different = _overlap(entries[members[0]], entry)
            if common > 2 * different:
                members.append(place)
                strangers[at] = max(strangers[at], different)
                break
        else:
            found.append([place])
            strangers.append(0)
    return [Family(tuple(members), count) for members, count in zip(found, strangers, strict=True)]


def _overlap(one: Entry, other: Entry) -> tuple[int, int]:
    """How many task indices both jobs have, and how many of these stand for different tasks."""
    if one.identities is None or other.identities is None:
        return (0, 0)
    common = one.task_rewards.keys() & other.task_rewards.keys()
    return len(common), sum(one.identities[task] != other.identities[task] for task in common)


@dataclass(frozen=True)
class TaskRow:
    """One task of a family."""

    task: int
    rewards: tuple[dict[int, float | None], ...]
    """By rollout index, None for a rollout without one; per member of the family, empty where it does not run the
    task."""

    @property
    def scored(self) -> list[float]:
        """The rewards of all members."""
        return [reward for member in range(len(self.rewards)) for reward in self.known(member)]

    def known(self, member: int) -> list[float]:
        """The rewards of one member."""
        return [reward for reward in self.rewards[member].values() if reward is not None]

    def mean(self, member: int) -> float | None:
        """The mean reward of one member, None where it has none."""
        known = self.known(member)
        return sum(known) / len(known) if known else None

    @property
    def kind(self) -> str:
        """sometimes, never, always, or unscored: how the rollouts of all members end."""
        scored = self.scored
        if not scored:
            return "unscored"
        if min(scored) != max(scored):
            return "sometimes"
        return "never" if scored[0] <= 0 else "always"

    @property
    def spread(self) -> float:
        """The largest difference between the mean rewards of two members."""
        means = [mean for member in range(len(self.rewards)) if (mean := self.mean(member)) is not None]
        return max(means) - min(means) if means else 0.0

    @property
    def unrest(self) -> float:
        """Standard deviation of the rewards: the largest where rollouts succeed half of the time."""
        return float(np.std(self.scored)) if self.scored else 0.0


def task_rows(entries: Sequence[Entry], family: Family) -> list[TaskRow]:
    """Every task of a family, the most telling first: where jobs differ, where rollouts differ, then never, always."""
    members = [entries[place].task_rewards for place in family.members]
    tasks = sorted(set().union(*members))
    rows = [TaskRow(task, tuple(own.get(task, {}) for own in members)) for task in tasks]
    order = list(SHARES)
    return sorted(rows, key=lambda row: (order.index(row.kind), -round(row.spread, 6), -round(row.unrest, 6), row.task))


def telling(rows: Sequence[TaskRow], most: int) -> list[TaskRow]:
    """At most `most` of the rows, in their order: of every kind some, of those with mixed outcomes the most."""
    if len(rows) <= most:
        return list(rows)
    of_kind = {kind: [row for row in rows if row.kind == kind] for kind in SHARES}
    taken = {kind: own[: int(SHARES[kind] * most)] for kind, own in of_kind.items()}
    for kind, own in of_kind.items():
        room = most - sum(map(len, taken.values()))
        taken[kind] = own[: len(taken[kind]) + room]
    return [row for own in taken.values() for row in own]


def excerpts(entries: Sequence[Entry], family: Family, tasks: Sequence[int]) -> Mapping[int, str]:
    """What every task is about, in a line, from the inputs of the first member that has it."""
    found: dict[int, str] = {}
    for place in family.members:
        table, files = entries[place].table, entries[place].files
        if not table.has_inputs:
            continue
        offsets = dict(zip(table.tasks.tolist(), table.input_offset[table.task_first].tolist(), strict=True))
        with files.inputs.open("rb") as inputs:
            for task in tasks:
                if task not in found and task in offsets:
                    found[task] = _excerpt(read_row(inputs, offsets[task]))
    return found


def _excerpt(row: Mapping[str, Any]) -> str:
    text = " ".join(gist(row).split())
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"
