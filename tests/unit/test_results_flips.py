"""What another verifier changed, task by task."""

from __future__ import annotations

import pytest

from gym_bus.results.flips import Change, Flips


def change(rollout: int, before: float | None, after: float | None, digest: str = "old") -> Change:
    return Change(rollout_index=rollout, reward_before=before, reward_after=after, verifier_digest_before=digest)


def test_flips_are_counted_by_task_and_in_all() -> None:
    flips = Flips("new")
    for task, one in [
        (7, change(1, 0.0, 1.0)),
        (7, change(0, 1.0, 0.98, digest="older")),
        (7, change(2, 1.0, 1.0)),
        (3, change(0, None, 0.5, digest="")),
        (3, change(1, 0.5, None)),
        (5, change(0, 1.0, 1.0)),
    ]:
        flips.add(task, one)

    third, seventh = flips.tasks()  # by index; nothing has changed in task 5

    assert (third.task_index, third.newly_scored, third.unscored, third.compared) == (3, 1, 1, 0)
    assert (third.mean_before, third.mean_after) == (None, None)
    assert (seventh.rollouts, seventh.up, seventh.down) == (3, 1, 1)
    assert (seventh.mean_before, seventh.mean_after) == pytest.approx((2 / 3, 2.98 / 3))
    assert (seventh.verifier_digests_before, seventh.verifier_digest_after) == (["old", "older"], "new")
    assert [c.rollout_index for c in seventh.changes] == [0, 1]
    totals = flips.totals()
    assert (totals.tasks, totals.tasks_changed, totals.rollouts, totals.compared) == (3, 2, 6, 4)
    assert (totals.up, totals.down, totals.newly_scored, totals.unscored) == (1, 1, 1, 1)


def test_without_rollouts_there_is_nothing_to_tell() -> None:
    flips = Flips("new")

    assert list(flips.tasks()) == []
    assert (flips.totals().rollouts, flips.totals().mean_before) == (0, None)
