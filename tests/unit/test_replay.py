"""Which failed rollouts a replay takes, and from where."""

from __future__ import annotations

from typing import Any

import pytest

from gym_bus.errors import FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import RolloutId
from gym_bus.results.ledger import FailedRollout, Ledger
from gym_bus.workers.replay import Selection, choose, parse_classes, parse_tasks

JOB = JobRecord(job="job", spans=[(0, 20, 2)])


@pytest.fixture
def ledger() -> Ledger:
    """Failed: 3/0 and 3/1 in the model, at sequences 5 and 6; 7/0 in the verifier, its answer is stored."""
    ledger = Ledger("job", 20, 2)
    for rollout in JOB.rollouts():
        ledger.record_scored(rollout, 1.0)
    ledger.record_failed(RolloutId("job", 3, 0), FailedRollout("model_error", 1, False, 5))
    ledger.record_failed(RolloutId("job", 3, 1), FailedRollout("rate_limited", 2, False, 6))
    ledger.record_failed(RolloutId("job", 7, 0), FailedRollout("verifier_error", 1, False, 7, 900, 900))
    return ledger


@pytest.mark.parametrize(
    ("selection", "attempts", "from_verifier", "without_answer"),
    [
        ({}, {"3/0": 2, "3/1": 3, "7/0": 2}, 1, 0),
        ({"classes": (FailureKind.MODEL_ERROR,)}, {"3/0": 2}, 0, 0),
        ({"classes": (FailureKind.POISON,)}, {}, 0, 0),
        ({"tasks": ["4-9"]}, {"7/0": 2}, 1, 0),
        ({"tasks": ["3/1", "7"]}, {"3/1": 3, "7/0": 2}, 1, 0),
        ({"stage": "agent"}, {"3/0": 2, "3/1": 3, "7/0": 2}, 0, 0),
        ({"stage": "verifier"}, {"7/0": 2}, 1, 2),
        ({"up_to": 5}, {"3/0": 2}, 0, 0),
    ],
)
def test_a_selection_takes_what_it_names(
    ledger: Ledger, selection: dict[str, Any], attempts: dict[str, int], from_verifier: int, without_answer: int
) -> None:
    tasks = parse_tasks(selection.pop("tasks", []), JOB)

    chosen = choose(ledger, Selection(tasks=tasks, **selection))

    assert {f"{r.task_index}/{r.rollout_index}": number for r, number in chosen.attempts.items()} == attempts
    assert (chosen.from_verifier, chosen.without_answer) == (from_verifier, without_answer)
    assert chosen.from_agent == len(attempts) - from_verifier


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "3/", "3/1/2", "3.0"])
def test_what_names_no_task_is_told(text: str) -> None:
    with pytest.raises(UsageError, match=r"give a task \(17\), a range of tasks \(10-19\) or a rollout \(17/3\)"):
        parse_tasks([text], JOB)


def test_a_task_that_the_job_does_not_have_is_told() -> None:
    with pytest.raises(UsageError, match="--task 20: not in the job: its tasks are 0 to 19"):
        parse_tasks(["1,20"], JOB)


def test_an_unknown_class_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'sandbox_lost'"):
        parse_classes(["sandbox_lots"])
