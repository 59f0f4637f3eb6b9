"""Estimates with their uncertainty. Rewards come as one matrix, shape [tasks, rollouts], NaN where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_DRAWS = 256
"""Of each task at a time."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over tasks and its 95 % confidence interval."""

    mean: float | None
    """None where no task has what it takes."""
    low: float | None
    """None where one task says nothing about the spread between tasks."""
    high: float | None
    tasks: int
    """Tasks that the mean is over."""
    skipped: int
    """Tasks left out, for having too few rewards."""
    rollouts: int
    """Rewards that the estimate is made of."""
    method: Literal["wilson", "t", "none"]
    """Wilson's score interval for tasks that are all right or all wrong, or all the same; else Student's t on their
    values."""


def reward_matrix(tasks: Sequence[Sequence[float]]) -> Floats:
    """Reward vectors of different lengths as one matrix, padded with NaN."""
    matrix = np.full((len(tasks), max(map(len, tasks), default=0)), np.nan)
    for row, rewards in zip(matrix, tasks, strict=True):
        row[: len(rewards)] = rewards
    return matrix


def pass_at_1(rewards: Floats) -> Estimate:
    """The expected reward of one rollout: the mean over tasks of each task's mean reward.

    Rollouts of one task resemble each other, so tasks and not rollouts are the independent units of the interval.
    """
    present = ~np.isnan(rewards)
    count = present.sum(axis=1)
    total = np.where(present, rewards, 0.0).sum(axis=1)
    return _estimate(total[count > 0] / count[count > 0], rewards, count, least=1)


def pass_at_k(rewards: Floats, k: int) -> Estimate:
    """The expected best of `k` rollouts of a task, over the tasks that have at least `k` rewards."""
    count = (~np.isnan(rewards)).sum(axis=1)
    return _estimate(task_pass_at_k(rewards, k)[count >= k], rewards, count, least=k)


def pass_all_k(rewards: Floats, k: int) -> Estimate:
    """The expected worst of `k` rollouts of a task (pass^k), over the tasks that have at least `k` rewards."""
    count = (~np.isnan(rewards)).sum(axis=1)
    return _estimate(task_pass_all_k(rewards, k)[count >= k], rewards, count, least=k)


def task_pass_at_k(rewards: Floats, k: int) -> Floats:
    """Pass@k of each task, shape [tasks]; NaN for a task with fewer than `k` rewards.

    Tasks whose rewards are all 0 or 1: the unbiased estimator 1 - C(wrong, k) / C(n, k), which is the share of right
    ones among all ways to draw k of the n rollouts. Others: the largest of the first k.
    """
    packed, present = _packed(rewards, k)
    count = present.sum(axis=1)
    best = np.where(present, packed, -np.inf)[:, :k].max(axis=1, initial=-np.inf)
    values = np.where(_binary(packed), 1.0 - _share_of_draws((packed == 0).sum(axis=1), count, k), best)
    return np.where(count < k, np.nan, values)


def task_pass_all_k(rewards: Floats, k: int) -> Floats:
    """Pass^k of each task: whether all of k rollouts succeed; shape [tasks], NaN for a task with fewer rewards.

    Tasks whose rewards are all 0 or 1: the unbiased estimator C(right, k) / C(n, k) (Yao et al. 2024, tau-bench).
    Others: the smallest of the first k.
    """
    packed, present = _packed(rewards, k)
    count = present.sum(axis=1)
    worst = np.where(present, packed, np.inf)[:, :k].min(axis=1, initial=np.inf)
    values = np.where(_binary(packed), _share_of_draws((packed == 1).sum(axis=1), count, k), worst)
    return np.where(count < k, np.nan, values)


def _packed(rewards: Floats, k: int) -> tuple[Floats, NDArray[np.bool_]]:
    if k < 1:
        raise ValueError(f"k must be 1 or more, not {k}")
    packed = pack_left(rewards)
    return packed, ~np.isnan(packed)


def _binary(packed: Floats) -> NDArray[np.bool_]:
    binary: NDArray[np.bool_] = (np.isnan(packed) | (packed == 0) | (packed == 1)).all(axis=1)
    return binary


def _share_of_draws(of_kind: NDArray[Any], count: NDArray[Any], k: int) -> Floats:
    """C(of_kind, k) / C(count, k), factor by factor: no overflow for any number."""
    share: Floats = np.ones(len(count))
    for first in range(0, k, _DRAWS):
        drawn = np.arange(first, min(first + _DRAWS, k))[:, None]
        factors = np.maximum(of_kind - drawn, 0) / np.maximum(count - drawn, 1)
        share = np.multiply.reduce(np.vstack((share, factors)), axis=0)  # row by row, in this order
    return share


def pack_left(rewards: Floats) -> Floats:
    """Each task's rewards in their order, the missing ones behind them."""
    order = np.argsort(np.isnan(rewards), axis=1, kind="stable")
    return np.take_along_axis(rewards, order, axis=1)


def _estimate(values: Floats, rewards: Floats, count: NDArray[Any], least: int) -> Estimate:
    taken = count >= least
    low, high, method = _interval(values)
    known = rewards[~np.isnan(rewards)]
    if low is not None and high is not None and known.min() >= 0.0 and known.max() <= 1.0:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(
        mean=float(values.mean()) if len(values) else None,
        low=low,
        high=high,
        tasks=int(taken.sum()),
        skipped=int((~taken).sum()),
        rollouts=int(count[taken].sum()),
        method=method,
    )


def _interval(values: Floats) -> tuple[float | None, float | None, Literal["wilson", "t", "none"]]:
    # scipy.stats takes half a second to import, and whoever only writes results never needs it.
    from scipy import stats

    n = len(values)
    if n and np.isin(values, (0.0, 1.0)).all():
        # t would call twenty right ones of twenty certain: no spread, so no width.
        interval = stats.binomtest(int(values.sum()), n).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high), "wilson"
    if n < 2:
        return None, None, "none"
    if np.ptp(values) == 0.0 and 0.0 <= values[0] <= 1.0:
        low, high = _wilson(float(values[0]), n, float(stats.norm.ppf(0.975)))
        return low, high, "wilson"
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half), "t"


def _wilson(share: float, n: int, z: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share that need not be a whole number of `n`; `z` normal quantile.

    Values between 0 and 1 spread at most as widely as ones and zeros of the same mean, so it is wide enough.
    """
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float(middle - half), float(middle + half)
