"""Tests and intervals for the mean difference of two sets of values on the same tasks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import msgspec
import numpy as np

from gym_bus.results.extras import need
from gym_bus.results.statistics import Floats

RESAMPLES = 9999
LEAST_RESAMPLES, MOST_DRAWS = 1999, 2 * 10**7
"""Of thousands of tasks fewer resamples do."""
MOST_JACKKNIFED = 2000
"""Tasks. BCa leaves out one after the other, and with more tasks corrects next to nothing."""
ALPHA, POWER = 0.05, 0.8

Method = Literal["mcnemar exact, bonett-price", "paired permutation, t", "none"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What B is more than A, on the mean of the tasks that both have."""

    tasks: int
    mean_a: float | None
    """None where there is no task."""
    mean_b: float | None
    difference: float | None
    """`mean_b - mean_a`."""
    low: float | None
    """95 % interval of the difference; None where one task says nothing about the spread between tasks."""
    high: float | None
    p_value: float | None
    """Two-sided, of no difference."""
    method: Method
    """The test of `p_value`, and the interval."""
    t_p_value: float | None = None
    """Of the paired t test, beside the permutation test."""
    bootstrap_low: float | None = None
    """95 % interval of the difference by bootstrap over tasks (BCa, percentile of thousands), beside that of t."""
    bootstrap_high: float | None = None
    detectable: float | None = None
    """The smallest true difference that this number of tasks shows with a probability of 80 % at the 5 % level, given
    the spread seen; None where no task differs, which shows no spread."""

    @property
    def significant(self) -> bool:
        """Whether a difference as large has a probability below 5 % where there is none."""
        return self.p_value is not None and self.p_value < ALPHA


def paired_difference(
    a: Floats, b: Floats, *, single: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Compare paired values, one pair per task; tasks are the independent units.

    - Single rewards that are all 0 or 1: McNemar's exact test, which is the binomial test on the tasks that changed,
      and the adjusted Wald interval of Bonett and Price (2012), which keeps its coverage where few have changed.
    - Anything else, such as means of repeats: a permutation test that flips the signs of the tasks' differences, and
      Student's t interval of their mean; the paired t test and a bootstrap interval beside them.

    Args:
        a: values of A; shape [tasks].
        b: values of B; shape [tasks].
        single: each value is one reward, not a mean of several.
        resamples: of permutation and bootstrap.
        seed: of both; equal seeds give equal results.
    """
    n = len(a)
    differences = b - a
    base = {
        "tasks": n,
        "mean_a": float(a.mean()) if n else None,
        "mean_b": float(b.mean()) if n else None,
        "difference": float(differences.mean()) if n else None,
    }
    if n < 2:
        return Difference(low=None, high=None, p_value=None, method="none", **base)  # type: ignore[arg-type]
    values = np.concatenate([a, b])
    binary = single and np.isin(values, (0.0, 1.0)).all()
    rest = _binary(differences) if binary else _real(differences, resamples, seed)
    if rest["low"] is not None and values.min() >= 0.0 and values.max() <= 1.0:
        rest |= {"low": max(rest["low"], -1.0), "high": min(rest["high"], 1.0)}
    return Difference(**base, **rest, detectable=detectable_difference(differences))  # type: ignore[arg-type]


def _binary(differences: Floats) -> dict[str, Any]:
    from scipy import stats

    n, lost, gained = len(differences), int((differences < 0).sum()), int((differences > 0).sum())
    changed = [[0, lost], [gained, 0]]  # the tasks that have not changed do not matter to the test
    test = need("statsmodels.stats.contingency_tables", "analysis").mcnemar(changed, exact=True)
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = stats.norm.ppf(1 - ALPHA / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return {
        "p_value": float(test.pvalue),
        "low": float(up - down - half),
        "high": float(up - down + half),
        "method": "mcnemar exact, bonett-price",
    }


def _real(differences: Floats, resamples: int, seed: int) -> dict[str, Any]:
    from scipy import stats

    found: dict[str, Any] = {"method": "paired permutation, t"}
    if _spread(differences) == 0.0:  # there is nothing to draw from, and t would be sure
        p_value = 1.0 if np.allclose(differences, 0.0) else _all_one_way(len(differences))
        return found | {"p_value": p_value, "low": None, "high": None}
    resamples = min(resamples, max(LEAST_RESAMPLES, MOST_DRAWS // len(differences)))
    batch = max(1, 2**20 // len(differences))
    permuted = stats.permutation_test(
        (differences,),
        _mean,
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of two or three tasks: then it says NaN
        drawn = stats.bootstrap(
            (differences,),
            _mean,
            n_resamples=resamples,
            vectorized=True,
            batch=batch,
            method="BCa" if len(differences) <= MOST_JACKKNIFED else "percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    t = stats.ttest_1samp(differences, 0.0)
    interval = t.confidence_interval(1 - ALPHA)
    return found | {
        "p_value": float(permuted.pvalue),
        "t_p_value": float(t.pvalue),
        "low": float(interval.low),
        "high": float(interval.high),
        "bootstrap_low": None if np.isnan(drawn.low) else float(drawn.low),
        "bootstrap_high": None if np.isnan(drawn.high) else float(drawn.high),
    }


def _mean(sample: Floats, axis: int = -1) -> Floats:
    mean: Floats = np.mean(sample, axis=axis)
    return mean


def _all_one_way(tasks: int) -> float:
    """The two-sided p value of the permutation test where all tasks differ by the same amount."""
    return float(min(1.0, 2.0 ** (1 - tasks)))


def detectable_difference(differences: Floats) -> float | None:
    """The smallest detectable true mean difference; see `Difference.detectable`. Of [tasks] observed ones."""
    spread = _spread(differences)
    return _detectable_effect(len(differences)) * spread if spread else None


@cache
def _detectable_effect(tasks: int) -> float:
    """In standard deviations."""
    power = need("statsmodels.stats.power", "analysis").TTestPower()
    return float(np.ravel(power.solve_power(nobs=tasks, alpha=ALPHA, power=POWER))[0])  # a number, or an array of one


def adjust(p_values: Sequence[float | None]) -> list[float | None]:
    """P values of several tests, raised as Holm (1979) does: the chance that any is below 5 % by accident stays 5 %."""
    known = [value for value in p_values if value is not None]
    if not known:
        return list(p_values)
    multitest = need("statsmodels.stats.multitest", "analysis")
    adjusted = iter(multitest.multipletests(known, alpha=ALPHA, method="holm")[1])
    return [None if value is None else float(next(adjusted)) for value in p_values]


def _spread(differences: Floats) -> float:
    """Standard deviation, n - 1; 0 where it is mere rounding."""
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return spread if spread > 1e-12 * max(1.0, float(np.abs(differences).max(initial=0.0))) else 0.0
