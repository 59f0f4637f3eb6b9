"""Paired tests and intervals: against scipy and statsmodels on hand cases, and by simulation with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower

from gym_bus.results.paired import adjust, detectable_difference, paired_difference

SIMULATED = 250
"""A share of 5 % has a standard deviation of 1.4 points over so many."""
CEILING, FLOOR = 0.092, 0.908
"""Three deviations from 5 % and from 95 %."""


def binary(right_in_both: int, lost: int, gained: int, wrong_in_both: int) -> tuple[np.ndarray, np.ndarray]:
    a = [1.0] * (right_in_both + lost) + [0.0] * (gained + wrong_in_both)
    b = [1.0] * right_in_both + [0.0] * lost + [1.0] * gained + [0.0] * wrong_in_both
    return np.array(a), np.array(b)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (2, 9), (12, 3), (25, 40)])
def test_single_binary_rewards_get_mcnemars_exact_test(lost: int, gained: int) -> None:
    a, b = binary(30, lost, gained, 20)

    found = paired_difference(a, b, single=True)

    assert found.p_value == pytest.approx(mcnemar([[30, lost], [gained, 20]], exact=True).pvalue)
    if lost + gained:
        assert found.p_value == pytest.approx(stats.binomtest(lost, lost + gained).pvalue)
    assert found.difference == pytest.approx((gained - lost) / len(a))
    assert found.method.startswith("mcnemar")


def test_the_interval_of_binary_rewards_is_the_published_one() -> None:
    found = paired_difference(*binary(26, 15, 7, 37), single=True)  # Altman et al. (2000), worked by hand below

    lost, gained, n = 16 / 87, 8 / 87, 87
    half = stats.norm.ppf(0.975) * math.sqrt((lost + gained - (gained - lost) ** 2) / n)
    assert (found.low, found.high) == (pytest.approx(gained - lost - half), pytest.approx(gained - lost + half))


def test_means_of_repeats_get_a_permutation_test_and_t() -> None:
    rng = np.random.default_rng(5)
    a = rng.integers(0, 9, 12) / 8
    b = np.clip(a + rng.integers(-1, 4, 12) / 8, 0, 1)

    found = paired_difference(a, b)

    t = stats.ttest_rel(b, a)
    assert found.t_p_value == pytest.approx(t.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(t.confidence_interval(0.95)))
    signs = np.array(np.meshgrid(*[[1, -1]] * 12)).reshape(12, -1).T
    means = (signs * (b - a)).mean(axis=1)
    exact = (np.abs(means) >= abs((b - a).mean()) - 1e-12).mean()
    assert found.p_value == pytest.approx(exact, abs=0.01)
    drawn = stats.bootstrap((b - a,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    assert found.bootstrap_low == pytest.approx(drawn.confidence_interval.low)
    assert found.bootstrap_high == pytest.approx(drawn.confidence_interval.high)


def test_the_same_values_give_the_same_numbers_again() -> None:
    a, b = np.random.default_rng(1).random((2, 30))

    assert paired_difference(a, b) == paired_difference(a, b)


def test_binary_rewards_that_are_means_are_not_taken_for_single_ones() -> None:
    assert paired_difference(*binary(5, 1, 4, 5)).method.startswith("paired permutation")


@pytest.mark.parametrize("count", [0, 1])
def test_one_task_says_nothing_about_others(count: int) -> None:
    found = paired_difference(np.zeros(count), np.ones(count))

    assert (found.p_value, found.low, found.detectable, found.significant) == (None, None, None, False)
    assert found.difference == (1.0 if count else None)


def test_differences_without_spread_have_no_interval() -> None:
    same = paired_difference(np.full(6, 0.3), np.full(6, 0.3))
    all_better = paired_difference(np.linspace(0, 0.5, 6), np.linspace(0, 0.5, 6) + 0.1)

    assert (same.p_value, same.low, same.detectable) == (1.0, None, None)
    assert (all_better.p_value, all_better.low) == (2 / 2**6, None)


def test_an_interval_of_rewards_between_0_and_1_stays_within_what_is_possible() -> None:
    found = paired_difference(np.array([0.0, 0.1]), np.array([1.0, 0.2]))

    assert (found.low, found.high) == (-1.0, 1.0)


def mistaken(draws: list[tuple[np.ndarray, np.ndarray]], *, single: bool) -> float:
    """How often a difference is found where there is none."""
    return float(np.mean([paired_difference(a, b, single=single, resamples=99).significant for a, b in draws]))


def test_binary_rewards_without_a_difference_are_called_different_in_one_case_of_twenty_at_most() -> None:
    rng = np.random.default_rng(11)
    rates = rng.beta(0.5, 0.5, (SIMULATED, 60))  # the rates of the tasks are alike in both

    draws = [((rng.random(60) < p).astype(float), (rng.random(60) < p).astype(float)) for p in rates]

    assert mistaken(draws, single=True) <= CEILING


def test_means_of_repeats_without_a_difference_are_called_different_in_one_case_of_twenty() -> None:
    rng = np.random.default_rng(12)
    rates = rng.beta(0.5, 0.5, (SIMULATED, 25))

    draws = [(rng.binomial(4, p) / 4, rng.binomial(8, p) / 8) for p in rates]

    assert 0.01 <= mistaken(draws, single=False) <= CEILING


@pytest.mark.parametrize(("tasks", "before", "after"), [(60, 0.5, 0.6), (60, 0.9, 0.95), (200, 0.02, 0.03)])
def test_the_interval_of_binary_rewards_covers_the_true_difference(tasks: int, before: float, after: float) -> None:
    rng = np.random.default_rng(13)
    covered = []
    for _ in range(SIMULATED):
        draw = np.where(rng.random(tasks) < 0.5, rng.random((2, tasks)), rng.random(tasks))  # half alike
        a, b = (draw[0] < before).astype(float), (draw[1] < after).astype(float)
        found = paired_difference(a, b, single=True)
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= after - before <= found.high)

    assert np.mean(covered) >= FLOOR


def test_the_interval_of_repeats_covers_the_true_difference() -> None:
    rng = np.random.default_rng(14)
    covered = []
    for _ in range(SIMULATED):
        rates = rng.beta(2, 2, 30)
        found = paired_difference(rng.binomial(4, rates) / 4, rng.binomial(4, np.minimum(rates, 0.9)) / 4, resamples=9)
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= TRUE_LOSS <= found.high)

    assert np.mean(covered) >= FLOOR


TRUE_LOSS = -(stats.beta(2, 2).expect(lambda p: p - 0.9, lb=0.9, ub=1.0))
"""What the mean of Beta(2, 2) rates loses where those above 0.9 are cut to it."""


def test_a_detectable_difference_is_found_in_four_cases_of_five() -> None:
    rng = np.random.default_rng(15)
    noise = rng.normal(0, 0.2, (SIMULATED, 50))
    size = detectable_difference(noise[0] / noise[0].std(ddof=1) * 0.2)

    assert size == pytest.approx(TTestPower().solve_power(nobs=50, alpha=0.05, power=0.8) * 0.2)
    found = [stats.ttest_1samp(size + row, 0.0).pvalue < 0.05 for row in noise]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_p_values_are_raised_as_holm_does_and_unknown_ones_stay() -> None:
    assert adjust([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert adjust([None]) == [None]
