"""Pass@1 over a fixed set of tasks, with an interval that stays valid however often one looks, and where to look next.

The interval is about these tasks and no others: it says how far the mean of the tasks' true pass rates may be from what
was seen, and further rollouts make it as narrow as one likes. (The intervals of `statistics` are about the population
that the tasks were drawn from; no number of rollouts makes those narrow.)

Rollouts come in rounds. Before a round begins it is settled how many rollouts each task gets, from all rewards seen so
far; a task of which little is to be learned takes part by lot, and counts accordingly more where the lot falls on it.
So every round by itself is an unbiased look at the mean of all tasks, and the weighted sum of the rounds is a
martingale around it.

The bound is the predictable plug-in empirical-Bernstein confidence sequence (Waudby-Smith and Ramdas, "Estimating means
of bounded random variables by betting", JRSS B 86, 2024, theorem 2; after Howard, Ramdas, McAuliffe and Sekhon,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49, 2021), which takes bounded
values with any predictable weights, not only equal ones. For rewards x in [0, 1], a guess g made before and a weight w
below 1,

    exp(w (x - E x) - psi(w) (x - g)^2),  psi(w) = -log(1 - w) - w

has an expectation of at most 1, so that by Ville's inequality its running product passes 2/alpha in either direction
with a probability of alpha/2 at most, at any time at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gym_bus.results.statistics import Floats, Ints

ALPHA = 0.05
MOST_WEIGHT = 0.6
"""Of one reward, of 1: psi grows without bound there."""
PRIOR_VARIANCE = 1 / 4
"""Of one reward, before any is seen: the largest that a reward between 0 and 1 can have."""
PRIOR_REWARDS = 1.0
"""How many rewards the mean of all tasks counts as, where a task's own mean is guessed."""
LEAST_SHARE = 0.2
"""Of the rollouts of a round that each task would get were they shared evenly: what even a certain task gets."""
GROWTH = 1.0
"""A round is at most as large as all before it together: the more is known, the better the next is shared."""
SURPLUS = 1.05
"""A round is planned so much larger than needed, so that it is the last more often than not."""
LEAST_ROUND = 0.05
LEAST_ROLLOUTS = 16
"""A round has at least this part of all rollouts before it, and one rollout of so many tasks, or of each where they are
fewer. A budget that leaves less is used up."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Rollouts that were settled on before any of them was seen. Lists are by task, shape [tasks]."""

    weight: float
    """Of each task in the sum: alike for all of them."""
    rollouts: list[int]
    chance: list[float]
    """Of taking part; 1 for those that do in any case. Who loses the draw has 0 rollouts, and so has a task that had no
    reward when the round was planned."""

    @property
    def total(self) -> int:
        """Rollouts of the round."""
        return sum(self.rollouts)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may cost; None for no limit."""

    rollouts: int | None = None
    """Of all tasks, in all rounds."""
    per_task: int | None = None
    """Of one task, in all rounds."""

    def of(self, tasks: int) -> float:
        """Rollouts of so many tasks."""
        by_task = np.inf if self.per_task is None else float(self.per_task * tasks)
        return by_task if self.rollouts is None else min(by_task, float(self.rollouts))


UNLIMITED = Limits()


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Where pass@1 over the tasks lies, at every look at once with a confidence of 95 %."""

    low: float
    high: float
    tasks: int
    """Those with a reward at all: of the others nothing can be said, and they are in no number."""
    rollouts: int
    """Rewards seen."""
    rounds: int

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


class _Sums(NamedTuple):
    """After one round: the interval is (centre - reach, centre + unknown + reach) / mass."""

    mass: float
    centre: float
    unknown: float
    """Weight of tasks that have no reward in a round in which they take part: anything between 0 and this."""
    reach: float

    @property
    def half_width(self) -> float:
        return (self.reach + self.unknown / 2) / self.mass


def first_round(rollouts: Sequence[int], target: float, most: Limits = UNLIMITED) -> Round:
    """The round before which nothing is known.

    Args:
        rollouts: of each task, one at least.
        target: the half-width that is aimed at; it only makes the interval better or worse, never wrong. So do the
            limits.
        most: as in `next_round`.
    """
    share = np.array(rollouts, float)
    spread = np.full(len(share), PRIOR_VARIANCE**0.5)
    weight = _weight(share, spread, _within_reach(target, spread, most, ALPHA))
    return Round(weight=weight, rollouts=list(rollouts), chance=[1.0] * len(share))


def bounds(rewards: Floats, rounds: Sequence[Round], alpha: float = ALPHA) -> Bounds:
    """The interval after these rounds: the intersection of those after each of them.

    Args:
        rewards: in [0, 1]; shape [tasks, rollouts], the rollouts in the order of the rounds, NaN where one has none.
            What failed counts as if it had not been ordered, so failing may have nothing to do with the reward.
        rounds: all of them, as they were planned.
        alpha: the chance that the interval ever fails.
    """
    low, high = 0.0, 1.0
    some = _has_reward(rewards)
    for sums in _sums(rewards, rounds, alpha):
        low = max(low, (sums.centre - sums.reach) / sums.mass)
        high = min(high, (sums.centre + sums.unknown + sums.reach) / sums.mass)
    if low > high:  # a failure of the sequence, which has a chance below alpha: show where it is, and no width
        low = high = (low + high) / 2
    seen = int((~np.isnan(rewards)).sum())
    return Bounds(low=low, high=high, tasks=int(some.sum()), rollouts=seen, rounds=len(rounds))


def _has_reward(rewards: Floats) -> NDArray[np.bool_]:
    return np.asarray((~np.isnan(rewards)).any(axis=1), np.bool_)


def _sums(rewards: Floats, rounds: Sequence[Round], alpha: float) -> list[_Sums]:
    """After each round, over the tasks with a reward; empty where there are none."""
    some = _has_reward(rewards)
    rewards = rewards[some]
    tasks = len(rewards)
    seen, start = _Seen(tasks), np.zeros(tasks, np.int64)
    mass = centre = unknown = 0.0
    reach = float(np.log(2 / alpha))
    found: list[_Sums] = []
    for round in rounds if tasks else ():
        count, chance = np.array(round.rollouts)[some], np.array(round.chance)[some]
        own = _own_rewards(rewards, start, count)
        scored = (~np.isnan(own)).sum(axis=1)
        by_lot = chance < 1.0
        missing = (scored == 0) & ~(by_lot & (count == 0))
        weight = np.minimum(round.weight / (np.maximum(scored, 1) * chance), MOST_WEIGHT)
        # What a task weighs is shared among its rewards; what they are too few to carry stands for an unknown reward.
        # Of tasks that take part by lot it is put on the guess, which the one reward then corrects.
        carried = np.where(by_lot, round.weight, weight * scored)
        unknown += float((round.weight - np.where(missing, 0.0, carried)).sum())
        centre += round.weight * float(seen.guess()[by_lot & ~missing].sum())
        for column in own.T:
            there = ~np.isnan(column)
            guess, x, w = seen.guess()[there], column[there], weight[there]
            centre += float((w * (x - np.where(by_lot[there], guess, 0.0))).sum())
            reach += float((_psi(w) * (x - guess) ** 2).sum())
            seen.add(there, x)
        start += count
        mass += round.weight * tasks
        found.append(_Sums(mass, centre, unknown, reach))
    return found


def _psi(weight: Floats) -> Floats:
    return -np.log1p(-weight) - weight


def _own_rewards(rewards: Floats, start: Ints, count: Ints) -> Floats:
    """The rewards of one round; shape [tasks, most rollouts of it], NaN behind each task's last."""
    own = np.full((len(rewards), int(count.max(initial=0))), np.nan)
    for at in range(own.shape[1]):
        has = (at < count) & (start + at < rewards.shape[1])
        own[has, at] = rewards[has, start[has] + at]
    return own


class _Seen:
    """What the rewards so far let one guess of the next one of each task."""

    def __init__(self, tasks: int) -> None:
        self._count, self._sum, self._squares = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)

    def add(self, there: NDArray[np.bool_], rewards: Floats) -> None:
        self._count[there] += 1
        self._sum[there] += rewards
        self._squares[there] += rewards**2

    def guess(self) -> Floats:
        """The expected reward of each task: its own mean and a little of that of all."""
        overall = (self._sum.sum() + 0.5) / (self._count.sum() + 1.0)
        return self._towards(self._sum, float(overall))

    def spread(self) -> Floats:
        """The standard deviation of each task's rewards, never quite 0."""
        guess = self.guess()
        overall = (self._squares.sum() + PRIOR_VARIANCE + 0.25) / (self._count.sum() + 1.0)
        squares = self._towards(self._squares, float(overall))
        spread: Floats = np.sqrt(np.maximum(squares - guess**2, 1e-4))
        return spread

    def _towards(self, sums: Floats, overall: float) -> Floats:
        return (sums + PRIOR_REWARDS * overall) / (self._count + PRIOR_REWARDS)


def too_much_fails(rewards: Floats, rounds: Sequence[Round], target: float) -> bool:
    """Whether further rounds like the last ones never bring the interval to the target.

    So it is where a whole round has no reward, and where the tasks that took part in each of the last two rounds and
    got none weigh too much: they may deserve any, however many rounds there are.
    """
    failed, tried = _failed(rewards, rounds)
    if len(failed) < 2:
        return False
    stuck = failed[-1] & failed[-2]
    return bool(failed[-1][tried[-1]].all()) or float(stuck.mean()) / 2 >= target


def _failed(rewards: Floats, rounds: Sequence[Round]) -> tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]]:
    """By round, of the tasks with any reward: which took part and got none, and which took part."""
    some = _has_reward(rewards)
    start = np.zeros(int(some.sum()), np.int64)
    failed, tried = [], []
    for round in rounds if some.any() else ():
        count = np.array(round.rollouts)[some]
        own = _own_rewards(rewards[some], start, count)
        tried.append(count > 0)
        failed.append((count > 0) & np.isnan(own).all(axis=1))
        start += count
    return failed, tried


def next_round(
    rewards: Floats,
    rounds: Sequence[Round],
    target: float,
    most: Limits = UNLIMITED,
    *,
    seed: int = 0,
    alpha: float = ALPHA,
) -> Round | None:
    """Where to look next; None where the target is met, or cannot be: for the limits, or as `too_much_fails`.

    Tasks get rollouts in proportion to the spread of their rewards (Neyman's allocation), and the round as many as it
    takes to bring the interval to the target, as far as is known.

    Args:
        rewards: as in `bounds`.
        rounds: all so far; at least one.
        target: half-width to get to.
        most: what the job may cost.
        seed: of the lots; the same for all rounds of a job.
        alpha: as in `bounds`.
    """
    some = _has_reward(rewards)
    if not some.any() or bounds(rewards, rounds, alpha).half_width <= target:
        return None
    if too_much_fails(rewards, rounds, target):
        return None
    done = np.sum([round.rollouts for round in rounds], axis=0)
    left = np.full(int(some.sum()), most.of(1)) - done[some]
    if left.min() < 1:  # a round without this task would say nothing of the mean of all
        return None
    spread = _seen_of(rewards[some]).spread()
    wanted = _needed(_sums(rewards, rounds, alpha)[-1], spread, target) * SURPLUS
    least = max(float(min(len(spread), LEAST_ROLLOUTS)), LEAST_ROUND * float(done.sum()))
    total = max(min(wanted, GROWTH * float(done.sum())), least)
    budget = most.of(len(done)) - float(done.sum())
    total = min(total, budget - 1.5 * len(spread) ** 0.5)  # three deviations: the lots may come out large
    if total < least:
        return None
    share = np.minimum(_shares(spread, total), left)
    lots = np.random.default_rng([seed, len(rounds)]).random(len(share))
    rollouts = np.floor(share + lots).astype(np.int64)  # neither the share nor the lot depends on what is to be seen
    made = Round(
        weight=_weight(np.where(share < 1.0, share, rollouts), spread, _within_reach(target, spread, most, alpha)),
        rollouts=_of_all(some, rollouts, 0).tolist(),
        chance=_of_all(some, np.minimum(share, 1.0), 1.0).tolist(),
    )
    return made if made.total <= budget else None


def _of_all(some: NDArray[np.bool_], values: NDArray[Any], rest: float) -> NDArray[Any]:
    """Values of some tasks as values of all of them."""
    all_of_them = np.full(len(some), rest, values.dtype)
    all_of_them[some] = values
    return all_of_them


def _seen_of(rewards: Floats) -> _Seen:
    seen = _Seen(len(rewards))
    for column in rewards.T:
        there = ~np.isnan(column)
        seen.add(there, column[there])
    return seen


def _needed(sums: _Sums, spread: Floats, target: float) -> float:
    """Rollouts of one more round that brings the half-width from where it is to the target.

    With W the weight of the rounds so far, h their half-width and v the variance of the next round's mean, the half-
    width after it is (W h + M^2 v / 2) / (W + M) for a weight M. It is least where it equals M v; that is the target
    where v = target^2 / (2 W (h - target)), and v is the square of the mean spread over the number of rollouts.
    """
    variance = target**2 / (2 * sums.mass * max(sums.half_width - target, 1e-12))
    return float(spread.mean()) ** 2 / variance


def _within_reach(target: float, spread: Floats, most: Limits, alpha: float) -> float:
    """The target, or the half-width that all rollouts together would come to at best, where that is wider."""
    return max(target, float(spread.mean() * np.sqrt(2 * np.log(2 / alpha) / most.of(len(spread)))))


def _shares(spread: Floats, total: float) -> Floats:
    """How many rollouts each task gets: as its spread, and a share that none goes below. They sum up to the total."""
    share: Floats = np.maximum(spread / spread.sum(), LEAST_SHARE / len(spread))
    share *= total / share.sum()
    return share


def _weight(share: Floats, spread: Floats, target: float) -> float:
    """The weight of a task in a round where it gets a share of rollouts; see `_needed`."""
    variance = float((spread**2 / share).sum()) / len(share) ** 2
    return min(target / variance / len(share), MOST_WEIGHT * float(share.min()))
