"""Which rollouts the report shows in full: as many as a page can hold, and the most telling ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np

from gym_bus.results.report.jobs import Entry
from gym_bus.results.report.tasks import Family, TaskRow
from gym_bus.results.statistics import Ints

SLOWEST = 20
"""Rollouts per job in the list of the slowest; all of them are shown in full."""

REASONS = {
    "failed": "failed, without a reward",
    "differ": "of tasks on which the jobs differ",
    "sometimes": "of sometimes-pass tasks",
    "slow": "among the slowest",
    "sample": "of a random sample",
}
"""Why a rollout is shown, in the order in which places are given; the last takes what is left."""
SHARES = {"failed": 0.2, "differ": 0.25, "sometimes": 0.3}
"""Of a job's places, at most."""


@dataclass(frozen=True)
class Pick:
    """One rollout to show."""

    entry: int
    """Place of its job in the report."""
    at: int
    """Place in the job's frame."""
    reasons: tuple[str, ...]


def choose(
    entries: Sequence[Entry], families: Sequence[Family], rows: Sequence[Sequence[TaskRow]], most: int
) -> list[Pick]:
    """At most `most` rollouts of all jobs, the most telling first, the jobs in turn.

    The same tasks are taken in every job of a family, so that answers can be compared.

    Args:
        entries: the jobs.
        families: each job is in one.
        rows: of every family, its tasks.
        most: transcripts in all.
    """
    quota = max(1, most // len(entries))
    picked = []
    for family, tasks in zip(families, rows, strict=True):
        for member, place in enumerate(family.members):
            picked.append(list(_of_entry(entries[place], place, member, tasks, quota)))
    return list(islice(_in_turn(picked), most))


def _of_entry(entry: Entry, place: int, member: int, tasks: Sequence[TaskRow], quota: int) -> Iterator[Pick]:
    wanted = _candidates(entry, member, tasks)
    reasons: dict[int, list[str]] = {}
    for reason, places in wanted.items():
        for at in places:
            reasons.setdefault(at, []).append(reason)
    chosen: dict[int, None] = {}
    for reason, places in wanted.items():
        room = quota - len(chosen)
        share = min(room, max(1, int(SHARES[reason] * quota))) if reason in SHARES else room
        chosen.update(dict.fromkeys(islice((at for at in places if at not in chosen), share)))
    for at in chosen:
        yield Pick(place, at, tuple(r for r in reasons[at] if r != "sample") or ("sample",))


def _candidates(entry: Entry, member: int, tasks: Sequence[TaskRow]) -> dict[str, list[int]]:
    """By reason, the rollouts it speaks for, the most telling first."""
    frame = entry.frame
    task, reward = frame["task_index"].to_numpy(), frame["reward"].to_numpy(float)
    first = {index: at for at, index in reversed(list(enumerate(task.tolist())))}
    end = dict(zip(task.tolist(), range(1, len(task) + 1), strict=True))

    def contrast(row: TaskRow) -> list[int]:
        """The first rollout of the task with each of its highest and lowest rewards."""
        own = np.arange(first[row.task], end[row.task])
        scored = own[~np.isnan(reward[own])]
        if not len(scored):
            return []
        return list(dict.fromkeys([int(scored[reward[scored].argmax()]), int(scored[reward[scored].argmin()])]))

    own = [row for row in tasks if row.task in first]
    return {
        "failed": _failed(frame),
        "differ": [places[0] for row in own if row.spread > 0 and (places := contrast(row))],
        "sometimes": list(chain(*(contrast(row) for row in own if len(set(row.known(member))) > 1))),
        "slow": slowest(entry),
        "sample": _shuffled(task, frame["rollout_index"].to_numpy()),
    }


def _failed(frame: Any) -> list[int]:
    """The failed rollouts, their classes in turn."""
    kinds = frame["failure_class"]
    by_kind = [np.flatnonzero((kinds == kind).to_numpy()).tolist() for kind in kinds.cat.categories]
    return list(_in_turn(by_kind))


def slowest(entry: Entry) -> list[int]:
    """The rollouts that agent and verifier worked on for the longest, slowest first; none where nothing was timed."""
    if not entry.timed:
        return []
    order = np.argsort(-np.nan_to_num(entry.work_s), kind="stable")[:SLOWEST]
    return [int(at) for at in order if entry.work_s[at] > 0]


def _shuffled(task: Ints, rollout: Ints) -> list[int]:
    """All rollouts in an order that depends on task and rollout only: the same in every job and every report."""
    keys = [
        blake2b(b"%d.%d" % pair, digest_size=8).digest() for pair in zip(task.tolist(), rollout.tolist(), strict=True)
    ]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _in_turn(lists: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """The first of each, the second of each, ..."""
    nothing = object()
    return (one for turn in zip_longest(*lists, fillvalue=nothing) for one in turn if one is not nothing)
