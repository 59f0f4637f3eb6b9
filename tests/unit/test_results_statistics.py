"""Estimates against brute force and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gym_bus.results.statistics import pack_left, pass_at_1, pass_at_k, reward_matrix, task_pass_at_k

NAN = math.nan


def chance_that_one_of_k_is_right(rewards: tuple[float, ...], k: int) -> float:
    draws = list(itertools.combinations(rewards, k))
    return sum(max(draw) for draw in draws) / len(draws)


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(n: int) -> None:
    tasks = list(itertools.product((0.0, 1.0), repeat=n))
    matrix = reward_matrix(tasks)

    for k in range(1, n + 1):
        expected = [chance_that_one_of_k_is_right(task, k) for task in tasks]
        np.testing.assert_allclose(task_pass_at_k(matrix, k), expected, atol=1e-12)


def test_pass_at_k_of_rewards_between_zero_and_one_is_the_best_of_the_first_k() -> None:
    matrix = reward_matrix([[0.2, 0.9, 0.5], [1.0, 0.5, 0.0]])

    assert task_pass_at_k(matrix, 1).tolist() == [0.2, 1.0]
    assert task_pass_at_k(matrix, 2).tolist() == [0.9, 1.0]


def test_a_task_with_fewer_than_k_rewards_has_no_pass_at_k_and_is_counted() -> None:
    matrix = reward_matrix([[1.0, 0.0, 0.0], [1.0], []])

    values = task_pass_at_k(matrix, 2)
    estimate = pass_at_k(matrix, 2)

    assert values[0] == pytest.approx(2 / 3)
    assert np.isnan(values[1:]).all()
    assert estimate.mean == pytest.approx(2 / 3)
    assert (estimate.tasks, estimate.skipped, estimate.rollouts) == (1, 2, 3)


def test_missing_rewards_between_others_do_not_count() -> None:
    holes = np.array([[NAN, 1.0, NAN, 0.0], [0.0, NAN, NAN, NAN]])

    assert pack_left(holes)[0, :2].tolist() == [1.0, 0.0]
    assert task_pass_at_k(holes, 2)[0] == 1.0
    assert pass_at_1(holes).mean == pytest.approx(0.25)
    assert pass_at_1(holes).rollouts == 3


def test_k_may_exceed_every_task_but_not_fall_below_one() -> None:
    assert np.isnan(task_pass_at_k(reward_matrix([[1.0]]), 5)).all()
    assert pass_at_k(reward_matrix([[1.0]]), 5).mean is None
    with pytest.raises(ValueError, match="k must be 1 or more"):
        task_pass_at_k(reward_matrix([[1.0]]), 0)


def test_pass_at_k_of_a_large_group_neither_overflows_nor_loses_precision() -> None:
    matrix = reward_matrix([[1.0] * 3 + [0.0] * 997])

    assert task_pass_at_k(matrix, 500)[0] == pytest.approx(1 - math.comb(997, 500) / math.comb(1000, 500), rel=1e-12)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (13, 50), (286, 1319)])
def test_one_right_or_wrong_answer_per_task_gets_wilsons_interval(right: int, n: int) -> None:
    p, z = right / n, stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))

    estimate = pass_at_1(reward_matrix([[1.0]] * right + [[0.0]] * (n - right)))

    assert estimate.method == "wilson"
    assert estimate.mean == pytest.approx(p)
    assert estimate.low == pytest.approx(centre - half, abs=1e-9)
    assert estimate.high == pytest.approx(centre + half)


def test_repeats_of_a_task_do_not_pass_for_independent_evidence() -> None:
    rng = np.random.default_rng(1)
    ability = rng.random(40)
    rewards = (rng.random((40, 16)) < ability[:, None]).astype(float)

    estimate = pass_at_1(rewards)

    means = rewards.mean(axis=1)
    low, high = stats.t.interval(0.95, 39, loc=means.mean(), scale=stats.sem(means))
    assert estimate.method == "t"
    assert estimate.low == pytest.approx(low)
    assert estimate.high == pytest.approx(high)
    naive = stats.binomtest(int(rewards.sum()), rewards.size).proportion_ci(method="wilson")
    assert high - low > 2 * (naive.high - naive.low)


def test_tasks_of_unequal_length_weigh_the_same() -> None:
    estimate = pass_at_1(reward_matrix([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0], [0.0]]))

    assert estimate.mean == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert estimate.rollouts == 7


def test_the_interval_stays_where_rewards_can_lie() -> None:
    bounded = pass_at_1(reward_matrix([[0.1, 0.0], [1.0, 0.9]]))
    unbounded = pass_at_1(reward_matrix([[10.0, 0.0], [-1.0, 0.9]]))

    assert (bounded.low, bounded.high) == (0.0, 1.0)
    assert unbounded.low is not None
    assert unbounded.low < 0.0


def test_repeats_that_all_agree_are_as_uncertain_as_their_tasks() -> None:
    estimate = pass_at_1(np.ones((20, 8)))

    assert estimate.method == "wilson"
    assert estimate.low == pytest.approx(stats.binomtest(20, 20).proportion_ci(method="wilson").low)


def test_one_task_of_mixed_rewards_has_a_mean_and_no_interval() -> None:
    estimate = pass_at_1(reward_matrix([[1.0, 0.0]]))

    assert (estimate.mean, estimate.low, estimate.high, estimate.method) == (0.5, None, None, "none")


@pytest.mark.parametrize("matrix", [np.empty((0, 0)), np.full((3, 2), NAN)])
def test_no_rewards_give_no_estimate(matrix: np.ndarray) -> None:
    estimate = pass_at_1(matrix)

    assert (estimate.mean, estimate.low, estimate.tasks, estimate.skipped) == (None, None, 0, len(matrix))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        ability = rng.beta(2, 2, 60)  # mean 0.5
        estimate = pass_at_1((rng.random((60, 4)) < ability[:, None]).astype(float))
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.99


def test_tasks_that_are_all_the_same_still_leave_doubt() -> None:
    estimate = pass_at_1(reward_matrix([[1.0, 0.0]] * 20))

    wilson = stats.binomtest(10, 20).proportion_ci(0.95, method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx((wilson.low, wilson.high))
    assert estimate.method == "wilson"
