"""The confidence sequence and where it looks next: worked by hand, and by simulation with fixed seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from gym_bus.results.sequence import Bounds, Limits, Round, bounds, first_round, next_round, too_much_fails

NAN = math.nan


class Run:
    """A job of tasks with known pass rates, one round after the other."""

    def __init__(self, rates: np.ndarray, repeats: int, target: float, seed: int, most: Limits | None = None) -> None:
        self.rates, self.target, self.most, self.seed = rates, target, most or Limits(), seed
        self.rewards = np.full((len(rates), 0), NAN)
        self.rounds: list[Round] = []
        self.looks: list[Bounds] = []
        self._rng = np.random.default_rng(seed)
        self._counts = np.zeros(len(rates), int)
        following: Round | None = first_round([repeats] * len(rates), target, self.most)
        while following is not None:
            self.play(following)
            following = next_round(self.rewards, self.rounds, target, self.most, seed=seed)

    def play(self, round: Round) -> None:
        """Draw the rewards of a round and look."""
        self.rounds.append(round)
        counts = self._counts + round.rollouts
        grown = np.full((len(self.rates), counts.max()), NAN)
        grown[:, : self.rewards.shape[1]] = self.rewards
        for task, (start, end) in enumerate(zip(self._counts, counts, strict=True)):
            grown[task, start:end] = self._rng.random(end - start) < self.rates[task]
        self.rewards, self._counts = grown, counts
        self.looks.append(bounds(self.rewards, self.rounds))

    @property
    def counts(self) -> np.ndarray:
        return self._counts

    @property
    def ever_missed(self) -> bool:
        """Whether the interval was wrong at any look."""
        return not all(look.low <= self.rates.mean() <= look.high for look in self.looks)


def middle(found: Bounds) -> float:
    return (found.low + found.high) / 2


def mixed(tasks: int, seed: int) -> np.ndarray:
    """Half of the tasks nearly sure, the others anything: what benchmarks look like."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(tasks) < 0.5, 1 - 0.02 * rng.random(tasks), rng.beta(0.7, 0.7, tasks))


def test_one_reward_worked_by_hand() -> None:
    found = bounds(np.array([[1.0], [0.0]]), [Round(weight=0.5, rollouts=[1, 1], chance=[1.0, 1.0])])

    reach = math.log(2 / 0.05) + 2 * (-math.log(0.5) - 0.5) * 0.5**2  # both were guessed to be 1/2
    assert (found.low, found.high) == (0.0, 1.0)  # +- reach / 1.0: nothing is known yet
    many = bounds(np.tile([[1.0], [0.0]], (50, 1)), [Round(weight=0.5, rollouts=[1] * 100, chance=[1.0] * 100)])
    reach += 98 * (-math.log(0.5) - 0.5) * 0.5**2
    assert many.half_width == pytest.approx(reach / 50, rel=0.001)
    assert middle(many) == pytest.approx(0.5)
    assert (many.tasks, many.rollouts, many.rounds) == (100, 100, 1)


def test_who_loses_the_draw_counts_as_guessed_and_who_wins_it_counts_for_both() -> None:
    rewards = np.tile([[1.0, NAN], [1.0, 0.5]], (200, 1))
    first = Round(weight=0.001, rollouts=[1] * 400, chance=[1.0] * 400)
    by_lot = Round(weight=0.1, rollouts=[0, 1] * 200, chance=[0.5] * 400)
    left_out = Round(weight=0.1, rollouts=[0, 1] * 200, chance=[1.0] * 400)

    drawn = bounds(rewards, [first, by_lot])

    # All are guessed to be 1; where there is a reward, twice its error is added: 1 + 2 (0.5 - 1).
    assert middle(drawn) == pytest.approx((1.0 + 0.0) / 2, abs=0.01)
    # Left out without a lot, half of the tasks may be anything.
    assert bounds(rewards, [first, left_out]).half_width > drawn.half_width + 0.2


def test_a_rollout_without_a_reward_shares_its_weight_and_a_task_without_any_is_in_no_number() -> None:
    rounds = [Round(weight=0.4, rollouts=[4] * 101, chance=[1.0] * 101)]
    whole = np.tile([1.0, 0.0, 1.0, 0.0], (101, 1))
    holes = whole.copy()
    holes[0, 1:3] = NAN
    holes[100] = NAN

    assert middle(bounds(holes, rounds)) == pytest.approx(middle(bounds(whole, rounds)), abs=0.001)
    assert (bounds(holes, rounds).tasks, bounds(whole, rounds).tasks) == (100, 101)


def test_a_task_that_has_rewards_in_some_rounds_only_is_unknown_in_the_others() -> None:
    first, second = (Round(weight=0.3, rollouts=[2] * 100, chance=[1.0] * 100) for _ in range(2))
    rewards = np.tile([1.0, 0.0, 1.0, 0.0], (100, 1))
    holes = rewards.copy()
    holes[:20, 2:] = NAN  # a fifth of the tasks in half of the weight

    widened = bounds(holes, [first, second]).high - bounds(rewards, [first, second]).high

    assert widened == pytest.approx(0.1 * 0.5, abs=0.01)  # 1 in place of the 1/2 that they had
    assert bounds(holes, [first, second]).low < bounds(rewards, [first, second]).low


def test_nothing_scored_is_anything_at_all() -> None:
    rewards, rounds = np.full((3, 2), NAN), [first_round([2, 2, 2], 0.1)]

    found = bounds(rewards, rounds)

    assert (found.low, found.high, found.tasks, found.rollouts) == (0.0, 1.0, 0, 0)
    assert next_round(rewards, rounds, 0.1) is None


def test_looks_only_ever_narrow_the_interval() -> None:
    looks = Run(mixed(60, 1), repeats=2, target=0.04, seed=3).looks

    for before, after in itertools.pairwise(looks):
        assert before.low <= after.low <= after.high <= before.high


@pytest.mark.parametrize(
    ("name", "rates", "repeats", "target"),
    [
        ("mixed", mixed(40, 7), 2, 0.06),
        ("even", np.full(20, 0.5), 1, 0.09),
        ("nearly sure, so that lots are drawn", np.full(60, 0.97), 1, 0.05),
        ("a rare hit", np.where(np.arange(50) == 0, 0.5, 0.01), 2, 0.05),
    ],
)
def test_the_interval_holds_at_every_look(name: str, rates: np.ndarray, repeats: int, target: float) -> None:
    runs = [Run(rates, repeats, target, seed) for seed in range(60)]

    assert np.mean([run.ever_missed for run in runs]) <= 0.05
    assert all(run.looks[-1].half_width <= target for run in runs)


def test_looking_again_and_again_at_a_plain_interval_would_have_failed() -> None:
    """What the sequence is for: the usual interval, looked at until it happens to be narrow, is wrong far too often."""
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        rewards = rng.random(400) < 0.5
        n = np.arange(10, 401)
        mean = rewards.cumsum()[9:] / n
        missed += bool((np.abs(mean - 0.5) > 1.96 * np.sqrt(np.maximum(mean * (1 - mean), 1e-9) / n)).any())

    assert missed / 200 > 0.2


def test_the_middle_of_the_interval_is_not_biased_by_where_one_looked() -> None:
    rates = mixed(40, 9)

    middles = [middle(Run(rates, 1, 0.07, seed).looks[-1]) for seed in range(60)]

    error = np.std(middles, ddof=1) / 60**0.5
    assert np.mean(middles) == pytest.approx(rates.mean(), abs=3 * error + 0.005)  # intersections cost a little


def test_further_repeats_go_where_rewards_spread() -> None:
    rates = np.array([1.0] * 50 + [0.5] * 50)

    counts = Run(rates, 4, 0.015, seed=1).counts

    assert counts[50:].mean() > 2 * counts[:50].mean()
    assert counts[:50].min() >= 4


def test_a_sure_benchmark_takes_fewer_rollouts_than_an_uncertain_one() -> None:
    sure, uncertain = (Run(np.full(100, rate), 2, 0.03, seed=2).counts.sum() for rate in (0.99, 0.5))

    assert sure < uncertain / 2


def test_the_number_of_rollouts_is_of_the_order_of_what_a_plain_interval_would_need() -> None:
    """Looking at any time has its price: 2 ln(2 / 0.05) / 1.96^2 = 1.9 times as many at best."""
    rates = mixed(150, 4)
    best = (np.sqrt(rates * (1 - rates)).mean() * 1.96 / 0.015) ** 2  # all at once, shared as if the rates were known

    needed = Run(rates, 4, 0.015, seed=1).counts.sum()

    assert best < needed < 4 * best


@pytest.mark.parametrize("most", [Limits(rollouts=700), Limits(per_task=9), Limits(rollouts=500, per_task=6)])
def test_limits_are_kept(most: Limits) -> None:
    run = Run(mixed(80, 3), 3, 0.001, seed=4, most=most)

    assert run.looks[-1].half_width > 0.001
    assert run.counts.sum() <= (most.rollouts or 80 * (most.per_task or 0))
    assert run.counts.max() <= (most.per_task or 10**9)
    assert run.counts.sum() > 80 * 3  # and they are used


def test_a_round_is_the_same_however_often_it_is_planned() -> None:
    run = Run(mixed(40, 1), 2, 0.1, seed=6)
    before = run.rewards[:, :2]

    assert next_round(before, run.rounds[:1], 0.1, seed=6) == run.rounds[1]
    assert next_round(before, run.rounds[:1], 0.1, seed=7) != run.rounds[1]


def test_a_target_that_is_met_needs_no_round() -> None:
    run = Run(mixed(40, 1), 2, 0.1, seed=6)

    assert next_round(run.rewards, run.rounds, run.looks[-1].half_width) is None
    assert next_round(run.rewards, run.rounds, run.looks[-1].half_width / 2) is not None


@pytest.mark.parametrize(
    ("second", "third", "hopeless"),
    [
        ([], [], False),
        (range(3), range(3), True),  # the same 3 of 10 tasks: 0.15 of the reward stays unknown
        (range(3), range(3, 6), False),
        (range(10), [], False),
        ([], range(10), True),
    ],
)
def test_it_ends_where_the_same_tasks_keep_failing_or_a_whole_round_does(
    second: Sequence[int], third: Sequence[int], hopeless: bool
) -> None:
    rewards = np.tile([1.0, 0.0, 1.0, 0.0], (10, 1))
    rewards[list(second), 2] = NAN
    rewards[list(third), 3] = NAN
    rounds = [Round(weight=0.1, rollouts=[count] * 10, chance=[1.0] * 10) for count in (2, 1, 1)]

    assert too_much_fails(rewards, rounds, 0.1) is hopeless
    assert (next_round(rewards, rounds, 0.1) is None) is hopeless


def test_a_task_without_a_reward_gets_no_further_rollouts() -> None:
    rewards = np.random.default_rng(0).integers(0, 2, (30, 3)).astype(float)
    rewards[7] = NAN

    following = next_round(rewards, [first_round([3] * 30, 0.02)], 0.02)

    assert following is not None
    assert (following.rollouts[7], following.chance[7]) == (0, 1.0)
    assert min(count for task, count in enumerate(following.rollouts) if task != 7) >= 1
