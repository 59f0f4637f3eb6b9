"""The other way to use an endpoint: calls that begin evenly, so many per second.

A limit on calls in flight fits an endpoint that counts calls per second badly, and the other way round, and single
refusals do not tell one kind from the other. So both ways are tried, and the better one is kept: the one by which more
calls are taken, or as many with fewer refused. Trials are far apart, and further with each that changed nothing; one
that goes badly is over at once.
"""

from __future__ import annotations

import math

import msgspec

LEAST_PACE = 1.0
FINDING, FINDING_SHARE = 2, 0.01
"""Calls that must be refused, and of how many, for a pace to be too high."""
KNOWN_CALLS = 30
"""The share of refused calls is known from so many."""
KEPT, LEAST_KEPT, LEAST_KEPT_UNKNOWN = 0.98, 0.5, 0.85
"""Parts of a pace that are left when it was too high: at most, at least, and at least while the share is not known."""
DEAF_S = 1.0
"""Members hear of a change so late, or tell of what was before."""
CLIMB, CLIMB_S = 1.06, 0.3
"""A pace of which no bound is known grows by so much at a time,"""
RAISE, MOST_RAISES, RAISE_S, RAISE_CALLS = 0.01, 3, 2.0, 3.0
"""one that is near its bound by this, then by twice and three times as much, when it was held for so long and so many
calls went beyond the pace before."""
NEAR = 0.93
FAR, FAR_RAISES = 1.3, 4
"""A bound is forgotten when the pace is so far beyond it, by so many raises in a row."""
LONG_S, QUIET_CALLS, QUIET_RAISE = 5.0, 10, 1.1
"""A pace that was not refused for so long is raised in any case; after twice that, so many calls are enough, and it
grows by so much: few calls a second would take minutes to show that a small raise is good."""
CLOSED, FEW_CALLS = 0.9, 8
"""The share of refusals, of so many calls, at which an endpoint takes nothing, whatever is asked of it."""

MEMORY_S = 30.0
"""What came of a way is forgotten by and by."""
FOUND_S = 3.0
"""After the limit was found, before what comes of it counts."""
TRIAL_FROM_S = 5.0, 60.0
"""After a choice, before the other way is tried: that of pace, and that of places."""
TRIALS_APART, MOST_TRIALS, MOST_APART_S = 2.5, 8, 300.0
"""Each that changed nothing puts the next one off by so much."""
TRIAL_EVERY = 800, 200
"""Calls between trials, times the number of those that changed nothing: usually, and where many are refused."""
PACE_FROM, PLACES_FROM = 0.9, 1.1
"""Of the rate, and of the calls in flight, with which the other way begins."""
OPENING_S = 0.4
"""The beginning of a trial, in which what is refused may be due to the way before."""
PATIENT_S, PATIENCE = 3.2, 4
"""The time, at the beginning of a trial, in which more may be refused where much was refused before; how much more."""
SETTLE_S = 2.0
"""After a pace on trial was found to be too high, before what comes of it counts."""
TRIAL_S, PLACES_TRIAL_S, TRIAL_CALLS, LONGEST_TRIAL_S = 6.0, 15.0, 60, 40.0
BAD_CALLS, BAD_SHARE, BAD_FROM_S = 4, 0.25, 1.5
"""Calls refused, and of those taken, with which a trial is over."""
HOPEFUL = 1.1
"""A pace that is too high must be so much above the rate before to promise anything."""
BETTER, SURE, MOST_DOUBT = 0.05, 2.0, 0.5
"""By how much the rate must be better, and by how many standard deviations."""
TROUBLED_SHARE, TROUBLED = 0.02, 8
"""Of calls refused, from which on fewer refusals are worth a change, and so many of them."""
AS_GOOD = 0.95


class Measure(msgspec.Struct, omit_defaults=True):
    """What became of calls over some time."""

    seconds: float = 0.0
    taken: int = 0
    refused: int = 0

    @property
    def rate(self) -> float:
        """Calls taken per second."""
        return self.taken / self.seconds if self.seconds > 0 else 0.0

    @property
    def calls(self) -> int:
        """Taken and refused ones."""
        return self.taken + self.refused

    @property
    def share(self) -> float:
        """Of the calls, those that were refused."""
        return self.refused / max(1, self.calls)

    def add(self, other: Measure) -> None:
        """And what became of others."""
        self.seconds += other.seconds
        self.taken += other.taken
        self.refused += other.refused

    def fade(self) -> None:
        """Forget half of it, where it is long."""
        if self.seconds > MEMORY_S:
            self.seconds, self.taken, self.refused = self.seconds / 2, self.taken // 2, self.refused // 2


class Trial(msgspec.Struct, omit_defaults=True):
    """The other way is tried."""

    before: Measure
    """What came of the way that is left for it,"""
    places: int = 0
    """with so many places,"""
    pace: float = 0.0
    """or with this pace."""
    seen: Measure = msgspec.field(default_factory=Measure)
    """All that happened since, late reports included."""
    settling_s: float = 0.0
    """Since the pace was first found to be too high,"""
    too_high: float = 0.0
    """when it was so much."""

    @property
    def patient(self) -> bool:
        """Whether refusals were so many before that at first some more may be due to that."""
        return self.before.share >= TROUBLED_SHARE


class Pacing(msgspec.Struct, omit_defaults=True):
    """What the processes know together of an endpoint's pace."""

    pace: float = 0.0
    """Calls begun per second; 0 where calls in flight are limited instead."""
    changes: int = 0
    """Counts what changed the pace."""
    lately: Measure = msgspec.field(default_factory=Measure)
    """Since it changed."""
    good: float = 0.0
    """The pace before its last raise; 0 where there was none."""
    bound: float = 0.0
    """The pace that was left when it was last too high; 0 where none is known."""
    raises: int = 0
    """In a row."""
    way: Measure = msgspec.field(default_factory=Measure)
    """What came of the present way."""
    trial: Trial | None = None
    other: float = 0.0
    """Calls per second that the other way took, when it was left."""
    trials: int = 0
    """Counts those in a row that changed nothing."""
    untried: int = 0
    """Calls since the last one."""
    crew: int = 0
    """Processes that share the endpoint."""
    turns: int = 0
    """Counts turns from one way to the other."""
    fresh: bool = False
    """Whether the limit was only found since the last turn."""

    @property
    def troubled(self) -> bool:
        """Whether so many calls are refused that fewer would be worth another way."""
        return self.way.share >= TROUBLED_SHARE and self.way.refused >= TROUBLED

    def change(self, pace: float) -> None:
        """Have another pace."""
        self.pace = max(LEAST_PACE, pace)
        self.changes += 1
        self.lately = Measure()

    def turn(self, pace: float) -> None:
        """Go the other way: with that pace, or with places where it is 0."""
        self.change(pace)
        self.pace = pace
        self.turns += 1
        self.untried = self.raises = 0
        self.good = self.bound = 0.0
        self.way = Measure()
        self.fresh = False

    def found(self) -> None:
        """There is a limit from now on: places, to begin with."""
        self.turn(0.0)
        self.trial, self.fresh = None, True


class Ages(msgspec.Struct, frozen=True):
    """How long ago something happened, in seconds on the own clock."""

    change_s: float
    turn_s: float


def account(known: Pacing, news: Measure, ages: Ages, crew: int) -> None:
    """Count what happened since the last time; `crew` is how many processes share the endpoint now."""
    if abs(crew - known.crew) > known.crew / 5:  # what was before, and what it took to share anew, says nothing now
        known.crew, known.way, known.untried = crew, Measure(), 0
    if known.trial is not None:
        known.trial.seen.add(news)
        known.trial.settling_s += news.seconds
        opening_s = OPENING_S if known.trial.patient else 0.0
    else:
        opening_s = FOUND_S if known.fresh else 0.0
    if ages.turn_s < opening_s or (ages.change_s < DEAF_S and not known.good):
        return
    known.untried += news.calls
    known.lately.add(news)
    known.way.add(news)
    if known.trial is None:
        known.way.fade()


def is_time(known: Pacing, ages: Ages) -> bool:
    """Whether it is time to try the other way."""
    doubtful = known.way.rate < AS_GOOD * known.other
    wait_s = TRIAL_FROM_S[known.pace > 0 and not doubtful] * TRIALS_APART ** min(known.trials, MOST_TRIALS)
    return (
        ages.turn_s >= min(wait_s, MOST_APART_S)
        and known.untried >= TRIAL_EVERY[known.troubled] * (1 + min(known.trials, MOST_TRIALS))
        and (known.pace > 0 or known.way.rate >= LEAST_PACE)
    )


def verdict(known: Pacing, mean_s: float) -> bool | None:
    """Whether the way on trial is to be kept; None while that is open. `mean_s` is what a call takes."""
    trial, way = known.trial, known.way
    if trial is None:
        return None
    if _is_bad(known, trial) or trial.seen.seconds > 2 * LONGEST_TRIAL_S:
        return False
    settling = known.pace > 0 and (not known.bound or trial.settling_s < SETTLE_S)
    if settling and known.bound:
        known.way = Measure()
    trial_s = TRIAL_S if known.pace else PLACES_TRIAL_S
    enough = way.seconds >= max(trial_s, 2 * mean_s) and way.taken >= TRIAL_CALLS
    if (enough and not settling) or way.seconds > LONGEST_TRIAL_S:
        return _is_better(way, trial.before, paced=known.pace > 0)
    return None


def _is_bad(known: Pacing, trial: Trial) -> bool:
    way, seen, before = known.way, trial.seen, trial.before
    if trial.too_high and not trial.patient and trial.too_high < HOPEFUL * before.rate:
        return True
    times = PATIENCE if trial.patient and seen.seconds < PATIENT_S else 1
    if seen.refused > times * max(BAD_CALLS, BAD_SHARE * seen.taken):
        return True
    if way.seconds < BAD_FROM_S or way.taken < TRIAL_CALLS / 2:
        return False
    doubt = math.sqrt(1 / way.taken + 1 / max(1, before.taken))
    return way.rate * (1 + doubt) < _as_good_as(before)


def _as_good_as(before: Measure) -> float:
    """The rate that is as good; where many were refused, a lower one is."""
    return (AS_GOOD - before.share / 2) * before.rate


def _is_better(way: Measure, before: Measure, *, paced: bool) -> bool:
    if not way.taken or not before.taken:
        return way.taken > before.taken
    as_good = way.rate >= _as_good_as(before)
    if not paced and as_good and way.share <= before.share + FINDING_SHARE / 2:
        return True  # places follow an endpoint that gets faster or slower, a pace does not
    doubt = min(SURE * math.sqrt(1 / way.taken + 1 / before.taken), MOST_DOUBT)
    if way.share < before.share + TROUBLED_SHARE and way.rate > (1 + max(BETTER, doubt)) * before.rate:
        return True
    troubled = before.share >= TROUBLED_SHARE and before.refused >= TROUBLED
    return troubled and as_good and way.share < before.share / 2


def adjust(known: Pacing, ages: Ages, *, may_raise: bool, may_fail: bool) -> None:
    """Raise the pace while calls are taken, and lower it where they are refused.

    Args:
        known: what is known of it.
        ages: of its last change.
        may_raise: whether calls wait for it.
        may_fail: whether a raise may cost refusals.
    """
    seen = known.lately
    if seen.refused >= max(FINDING, FINDING_SHARE * seen.taken):
        if seen.share < CLOSED or seen.calls < FEW_CALLS:  # else it takes nothing now, at whatever pace
            _lower(known)
    elif not may_raise or ages.change_s < CLIMB_S:
        return
    elif not known.bound or known.pace < NEAR * known.bound:
        _raise(known, CLIMB)
    elif ages.change_s >= RAISE_S and (known.raises or may_fail or ages.change_s >= LONG_S):
        by = RAISE * min(1 + known.raises, MOST_RAISES)
        if seen.taken >= RAISE_CALLS / by:
            _raise(known, 1 + by)
        elif ages.change_s >= 2 * LONG_S and seen.taken >= QUIET_CALLS and not seen.refused:
            _raise(known, QUIET_RAISE)


def _raise(known: Pacing, factor: float) -> None:
    known.good = known.pace
    known.raises += 1
    known.change(factor * known.pace)
    if known.raises >= FAR_RAISES and known.pace > FAR * known.bound:
        known.bound = 0.0  # it was another endpoint's, so to speak


def _lower(known: Pacing) -> None:
    seen = known.lately
    is_known = seen.calls >= KNOWN_CALLS
    if known.good and (seen.share < 2 * (1 - KEPT) or not is_known):
        kept = KEPT * known.good
    else:
        kept = known.pace * max(LEAST_KEPT if is_known else LEAST_KEPT_UNKNOWN, min(KEPT, 1 - seen.share))
    if known.trial is not None and not known.bound:
        known.trial.settling_s, known.trial.too_high = 0.0, known.pace
    known.good, known.raises = 0.0, 0
    known.change(kept)
    known.bound = known.pace
