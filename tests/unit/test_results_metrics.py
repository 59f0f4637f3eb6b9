"""NeMo Gym's metrics, against hand-made numbers and a slow, literal reading of their definitions."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest

from gym_bus.results.metrics import (
    NO_ANSWER,
    align,
    compute_pass_majority_metrics,
    describe,
    key_metrics,
    powers_of_two,
)

NAN = math.nan
Task = list[tuple[float, str | None]]
"""Score and answer of each rollout."""


def measured(tasks: list[Task], with_answers: bool) -> dict[str, Any]:
    """The package's metrics of some tasks."""
    longest = max(map(len, tasks))
    ids: dict[str, int] = {}
    scores = np.full((len(tasks), longest), NAN)
    answers = np.full((len(tasks), longest), NO_ANSWER)
    for i, task in enumerate(tasks):
        for j, (score, answer) in enumerate(task):
            scores[i, j] = score
            answers[i, j] = NO_ANSWER if answer is None else ids.setdefault(answer, len(ids))
    return compute_pass_majority_metrics({"accuracy": scores}, answers if with_answers else None)


def by_definition(tasks: list[Task], with_answers: bool) -> dict[str, Any]:
    """The same by the definitions' own words: every draw listed, every vote counted."""
    named: dict[str, list[list[float]]] = {"accuracy": [[score for score, _ in task] for task in tasks]}
    if with_answers:
        named["no_answer"] = [[float(answer is None) for _, answer in task] for task in tasks]
    longest = max(map(len, tasks))
    found: dict[str, Any] = {"per_sample_aggregate": {}}
    for name, scores in named.items():
        runs = [100 * statistics.mean(task[i] for task in scores if i < len(task)) for i in range(longest)]
        found["per_sample_aggregate"][name] = runs
        for k in range(1, longest + 1):
            for metric, one_of in (("pass@", max), ("pass^", min)):
                values = []
                for task in (task for task in scores if len(task) >= k):
                    draws = list(itertools.combinations(task, k))
                    binary = set(task) <= {0.0, 1.0}
                    values.append(statistics.mean(one_of(draw) for draw in draws) if binary else one_of(task[:k]))
                found[f"{metric}{k}/{name}"] = 100 * statistics.mean(values)
            found[f"pass@1[avg-of-{k}]/{name}"] = 100 * statistics.mean(statistics.mean(task[:k]) for task in scores)
            if k > 1:
                spread = statistics.stdev(runs[:k])
                found[f"pass@1[avg-of-{k}]/{name}/std_dev_across_runs"] = spread
                found[f"pass@1[avg-of-{k}]/{name}/std_err_across_runs"] = spread / math.sqrt(k)
                found[f"pass@1[avg-of-{k}]/{name}/avg_sample_std_dev"] = statistics.mean(
                    statistics.stdev(task[:k]) for task in scores if len(task) > 1
                )
            if with_answers:
                found[f"majority@{k}/{name}"] = 100 * statistics.mean(
                    majority([(task[i][1], own[i]) for i in range(min(k, len(task)))])
                    for task, own in zip(tasks, scores, strict=True)
                )
    return found


def majority(votes: list[tuple[str | None, float]]) -> float:
    counted = Counter(vote for vote in votes if vote[0] is not None)
    tied = [score for (_, score), count in counted.items() if count == max(counted.values())]
    return statistics.mean(tied) if tied else 0.0


def flat(metrics: dict[str, Any]) -> dict[str, Any]:
    aggregate = metrics["per_sample_aggregate"]
    runs = {f"{name}[{i}]": value for name, values in aggregate.items() for i, value in enumerate(values)}
    return {**{key: value for key, value in metrics.items() if key != "per_sample_aggregate"}, **runs}


@pytest.mark.parametrize("with_answers", [False, True])
@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.5, 1.0), (-1.0, 0.25, 3.0)])
@pytest.mark.parametrize("seed", range(10))
def test_the_metrics_are_what_their_definitions_say(seed: int, values: tuple[float, ...], with_answers: bool) -> None:
    rng = random.Random(seed)
    tasks: list[Task] = [
        [(rng.choice(values), rng.choice(["2", "3", "x", None])) for _ in range(rng.randint(1, 6))]
        for _ in range(rng.randint(1, 8))
    ]

    assert flat(measured(tasks, with_answers)) == pytest.approx(flat(by_definition(tasks, with_answers)))


def test_two_tasks_worked_by_hand() -> None:
    tasks: list[Task] = [
        [(1.0, "4"), (0.0, "5"), (0.0, "5"), (0.0, None)],
        [(1.0, "7"), (1.0, "7"), (0.0, "8"), (1.0, "7")],
    ]

    metrics = measured(tasks, with_answers=True)

    assert metrics["pass@1/accuracy"] == pytest.approx(50.0)  # 1/4 and 3/4
    assert metrics["pass@2/accuracy"] == pytest.approx(75.0)  # 1 - 3/6 and 1
    assert metrics["pass@4/accuracy"] == pytest.approx(100.0)
    assert metrics["pass@1[avg-of-2]/accuracy"] == pytest.approx(75.0)  # 1/2 and 1
    assert metrics["majority@1/accuracy"] == pytest.approx(100.0)
    assert metrics["majority@2/accuracy"] == pytest.approx(75.0)  # 4 and 5 tie; 7 wins
    assert metrics["majority@3/accuracy"] == pytest.approx(50.0)  # 5 wins, wrongly; 7 wins
    assert metrics["pass@1/no_answer"] == pytest.approx(12.5)
    assert metrics["per_sample_aggregate"] == {"accuracy": [100, 50, 0, 50], "no_answer": [0, 0, 0, 50]}
    assert metrics["pass@1[avg-of-2]/accuracy/std_dev_across_runs"] == pytest.approx(math.sqrt(1250))
    assert metrics["pass@1[avg-of-2]/accuracy/std_err_across_runs"] == pytest.approx(25.0)


def test_the_same_answer_judged_differently_is_two_votes() -> None:
    tasks: list[Task] = [[(1.0, "4"), (0.0, "4"), (0.0, "5")]]

    assert measured(tasks, with_answers=True)["majority@3/accuracy"] == pytest.approx(100 / 3)


def test_without_answers_there_is_no_majority() -> None:
    assert not [key for key in measured([[(1.0, None)]], with_answers=False) if "majority" in key or "answer" in key]


def columns_of(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    names = sorted({name for row in rows for name in row})
    return {name: np.array([row.get(name, NAN) for row in rows]) for name in names}


@pytest.mark.parametrize("seed", range(5))
def test_each_group_is_described_by_its_own_rows(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        {name: rng.choice([0.0, 1.0, 2.5, -7.0]) for name in ("reward", "tokens") if rng.random() < 0.8}
        for _ in range(40)
    ]
    groups = np.array([rng.randrange(6) for _ in rows])

    described = describe(7, groups, columns_of(rows))

    for group, name in itertools.product(range(7), ("reward", "tokens")):
        values = [row[name] for row, at in zip(rows, groups, strict=True) if at == group and name in row]
        for metric, of in (("mean", statistics.mean), ("max", max), ("min", min), ("median", statistics.median)):
            expected = of(values) if values else NAN
            assert described[f"{metric}/{name}"][group] == pytest.approx(expected, nan_ok=True)
        if len(values) > 1:
            assert described[f"std/{name}"][group] == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"a": 1.0, "b": 2.0}], {"a": 0.0, "b": 0.0}),
        ([{"a": 1.0}], {"a": 0.0, "b": NAN}),
        ([{"a": 1.0}, {"b": 2.0}], {"a": NAN, "b": NAN}),
        ([{"a": 1.0}, {"a": 3.0, "b": 2.0}], {"a": math.sqrt(2), "b": NAN}),
        ([], {"a": NAN, "b": NAN}),
    ],
)
def test_a_group_without_any_spread_has_spread_zero_where_its_columns_are_full(
    rows: list[dict[str, float]], expected: dict[str, float]
) -> None:
    other_group = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    groups = np.array([0] * len(rows) + [1] * 2)

    described = describe(2, groups, columns_of(rows + other_group))

    assert {name: described[f"std/{name}"][0] for name in "ab"} == pytest.approx(expected, nan_ok=True)


def test_no_columns_give_no_metrics() -> None:
    assert describe(3, np.array([], np.int64), {}) == {}


def test_the_headline_is_the_means_and_the_largest_k() -> None:
    tasks: list[Task] = [[(1.0, "4"), (0.0, "5")], [(1.0, "4")]]

    chosen = key_metrics({"mean/reward": 0.5, "max/reward": 1.0, **measured(tasks, with_answers=True)})

    assert set(chosen) == {
        "mean/reward",
        "pass@2/accuracy",
        "pass@1[avg-of-2]/accuracy",
        "pass@1[avg-of-2]/no_answer",
        "majority@2/accuracy",
    }
    assert key_metrics({"mean/reward": 0.5}) == {"mean/reward": 0.5}


@pytest.mark.parametrize(("up_to", "expected"), [(0, []), (1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_the_ks_are_powers_of_two_and_the_last(up_to: int, expected: list[int]) -> None:
    assert powers_of_two(up_to) == expected


def test_rows_are_aligned_by_task() -> None:
    (matrix,) = align(3, np.array([0, 0, 2]), [[1.0, 2.0, 3.0]], NAN)

    np.testing.assert_array_equal(matrix, [[1.0, 2.0], [NAN, NAN], [3.0, NAN]])
