"""How many calls one process may have at an endpoint: pure rules over a clock that is passed in.

An endpoint that never refuses is never held back: calls are let in as fast as the ramp lets them, a fifth more than
the endpoint has been seen to take, every twentieth of a second. Where it refuses (429, 503, 529) what lies beyond
that, what it has taken becomes the limit. Afterwards a refusal that the next call's refusal confirms says that there
is one place too many, and takes it; a single one is chance. Places come back from the fleet, which raises the sum of
all processes with care (see `fleet`).
"""

from __future__ import annotations

import math
import random
from collections import deque
from enum import Enum, auto

import msgspec

RAMP_FLOOR = 8
"""Calls that may begin at once at an endpoint of which nothing is known."""
RAMP_GROWTH = 1.15
RIPE_S = 0.05
"""An endpoint that is full says so at once: a call that has been there for so long was taken."""
STRIKES = 3
"""Refusals at the same number of calls, while none was taken beyond it, before that counts as the limit."""
ROUNDS_TO_CLOSE, ROUNDS_TO_CLOSE_PACED = 3, 10
"""Refusals in a row, each of a call that began after the one before was known: the endpoint takes no more now."""
LEAST_REST_S, MOST_REST_S = 0.02, 0.5
SLOW_KEPT = 0.7
"""Of the calls in flight, where calls time out."""
SLOW_SHARE = 0.1
"""Of the calls, smoothed, that must time out before it counts as overload: one answer may always be too long."""
SMOOTHING = 0.05
LATE_S = 0.02
"""A start that is so late is made up for: event loops are."""


class End(Enum):
    """What became of a call, as far as the endpoint's load is concerned."""

    TAKEN = auto()
    """The endpoint worked on it: it answered, rightly or wrongly."""
    REFUSED = auto()
    """It said that it has too much to do."""
    TIMED_OUT = auto()
    UNKNOWN = auto()
    """It was not reached, or the call was given up: says nothing of its load."""


class Ticket:
    """One call that was let in."""

    __slots__ = ("counted", "ended", "level", "probe", "started_at")

    def __init__(self, started_at: float, level: int) -> None:
        self.started_at = started_at
        self.level = level
        """Calls of this process at the endpoint when it began, itself included."""
        self.counted = False
        self.ended = False
        self.probe = False
        """Whether it shows if the refusal before it was by chance."""


class Tally(msgspec.Struct):
    """What happened since the fleet was last told."""

    taken: int = 0
    refused: int = 0
    odd: int = 0
    """Of these, those of calls that were not the most that the endpoint ever had of us, each of them the second of two
    in a row: what is refused by chance is taken when it is tried again."""
    limited: bool = False
    """Places were counted for the first time: what the endpoint had taken."""
    lost: int = 0
    """Places given up since."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.taken + other.taken,
            self.refused + other.refused,
            self.odd + other.odd,
            self.limited or other.limited,
            self.lost + other.lost,
        )


class Backoff(msgspec.Struct, frozen=True):
    """How long to leave alone an endpoint that takes nothing: doubled with every further refusal."""

    first_s: float = 0.5
    most_s: float = 5.0
    most_asked_s: float = 30.0
    """Where the endpoint itself says how long."""

    def wait_s(self, rounds: int) -> float:
        """After so many refusals in a row, jittered."""
        doubled = self.first_s * 2.0 ** max(0, min(rounds - ROUNDS_TO_CLOSE, 16))
        return min(doubled, self.most_s) * random.uniform(0.5, 1.0)


class Throttle:
    """The calls of one process at one endpoint."""

    def __init__(self, backoff: Backoff, *, places: int | None = None) -> None:
        """Begin.

        Args:
            backoff: for an endpoint that takes nothing.
            places: calls it may have there; None for as many as the ramp lets in.
        """
        self._backoff = backoff
        self.places = places
        self.pace: float | None = None
        """Calls that may begin per second; None for any number."""
        self.excess = 0
        """Places beyond these that it still has, until the calls there are over."""
        self.in_flight = 0
        self.taken_at = float("-inf")
        """When the endpoint was last seen to take a call."""
        self.tally = Tally()
        self._ramp = float(RAMP_FLOOR)
        self._proven = 0
        self._young: deque[Ticket] = deque()
        self._resting: deque[float] = deque()
        self._suspect = 0
        self._rounds = 0
        self._refused_at = self._held_at = self._cut_at = float("-inf")
        self._closed_until: float | None = None
        self._taken_of: int | None = None
        self._ceiling: int | None = None
        self._strikes = 0
        self._paced_at = float("-inf")
        self._learned = 0
        self._mean_s = self._slow_share = 0.0
        self._flown_s = 0.0
        self._flown_at = 0.0

    # -- what the fleet asks and tells ---------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether the fleet should hear of it soon."""
        return (
            self.tally.refused > 0
            or self.tally.lost > 0
            or (self.places is not None and self.excess > 0 and self.in_flight < self.places + self.excess)
        )

    @property
    def taken_now(self) -> int:
        """Calls at the endpoint, as far as it is known by now that it took them."""
        return self.in_flight if self._taken_of is None else self._taken_of

    @property
    def busy(self) -> int:
        """Places that are taken, or not to be used again for a moment."""
        return self.in_flight + len(self._resting)

    @property
    def mean_s(self) -> float:
        """What a call takes, on average of late."""
        return self._mean_s

    def flown(self, now: float) -> float:
        """The seconds of all calls so far, one beside the other."""
        self._flown_s += self.in_flight * (now - self._flown_at)
        self._flown_at = now
        return self._flown_s

    def begin(self, calls: int | None = None) -> None:
        """There is no limit: let so many calls in, or as many as before, and more as the endpoint takes them."""
        if self.places is not None:
            self.places, self._proven = None, self.in_flight
        if calls is not None:
            self._ramp = float(calls)

    def closed(self, now: float) -> bool:
        """Whether the endpoint is left alone now."""
        return self._closed_until is not None and now < self._closed_until and self.places is not None

    # -- calls ---------------------------------------------------------------------------------------------------------

    def room(self, now: float) -> bool:
        """Whether a call may begin now."""
        self._ripen(now)
        if self._closed_until is not None:
            if now < self._closed_until:
                return False
            self._open_again(now)
        if self._full or now < self._next_start:
            return False
        return self.in_flight + len(self._resting) + 1 <= self._ramp

    @property
    def _full(self) -> bool:
        return self.places is not None and self.in_flight + len(self._resting) >= self.places

    @property
    def _next_start(self) -> float:
        if self.pace is None:
            return -math.inf
        return self._paced_at + 1 / self.pace if self.pace else math.inf

    def room_at(self, now: float) -> float | None:
        """When time alone may make room; None where something else must happen first."""
        if self._closed_until is not None and now < self._closed_until:
            return self._closed_until
        if self._full:
            return self._resting[0] if self._resting else None
        if self._next_start == math.inf:
            return None
        if self.in_flight + len(self._resting) + 1 > self._ramp:
            ripe_at = self._young[0].started_at + RIPE_S if self._young else math.inf
            at = min(ripe_at, self._resting[0] if self._resting else math.inf)
            return at if at < math.inf else None
        return max(now, self._next_start)

    def start(self, now: float) -> Ticket:
        """A call begins; `room` has been asked."""
        self.flown(now)
        self.in_flight += 1
        ticket = Ticket(now, self.in_flight)
        ticket.probe = self._suspect > 0
        self._suspect -= ticket.probe
        self._young.append(ticket)
        self._paced_at = max(now - LATE_S, self._next_start) if self.pace else now
        return ticket

    def end(self, ticket: Ticket, now: float, end: End, retry_after_s: float | None = None) -> None:
        """A call is over. `retry_after_s` is the wish of an endpoint that refused."""
        self.flown(now)
        self.in_flight -= 1
        ticket.ended = True
        if end is End.TAKEN:
            self._learn(now - ticket.started_at)
            self._take(ticket, now)
        elif end is End.REFUSED:
            self._refuse(ticket, now, retry_after_s)
        elif end is End.TIMED_OUT:
            self._time_out(ticket, now)
        ticket.counted = True
        self._ripen(now)

    def _ripen(self, now: float) -> None:
        young, resting = self._young, self._resting
        while young and (young[0].ended or young[0].started_at + RIPE_S <= now):
            ticket = young.popleft()
            if not ticket.ended:
                self._take(ticket, now)
        while resting and resting[0] <= now:
            resting.popleft()

    def _learn(self, lasted_s: float) -> None:
        self._learned += 1
        self._mean_s += (lasted_s - self._mean_s) * max(SMOOTHING, 1 / self._learned)
        self._slow_share *= 1 - SMOOTHING

    def _take(self, ticket: Ticket, now: float) -> None:
        if ticket.counted:
            return
        ticket.counted = True
        self.taken_at = now
        self.tally.taken += 1
        self._proven = max(self._proven, ticket.level)
        if self._ceiling is not None and ticket.level >= self._ceiling:
            self._ceiling, self._strikes = None, 0  # it was no ceiling
        steep = ticket.level * RAMP_GROWTH
        self._ramp = max(self._ramp, ticket.level + 1, min(steep, self._ceiling or steep))
        if ticket.started_at > self._refused_at:
            self._rounds = 0

    def _refuse(self, ticket: Ticket, now: float, retry_after_s: float | None) -> None:
        self.tally.refused += 1
        if ticket.started_at > self._refused_at + RIPE_S * (self._rounds > 0):
            self._rounds, self._refused_at = self._rounds + 1, now
        frontier = self.places is None and ticket.level > min(self._proven, (self._ceiling or math.inf) - 1)
        if frontier or ticket.probe or self.pace or self._rounds >= ROUNDS_TO_CLOSE:
            most_s = min(MOST_REST_S, self._backoff.first_s)
            self._resting.append(now + min(max(self._mean_s or most_s, LEAST_REST_S), most_s))
            self.tally.odd += not frontier
        else:  # the next call shows whether it was by chance
            self._suspect += 1
        if frontier:
            self._hold(ticket, now)
        elif self._rounds == ROUNDS_TO_CLOSE and self.in_flight and not self.pace:
            self._keep(self.in_flight)
        rounds = ROUNDS_TO_CLOSE_PACED if self.pace else ROUNDS_TO_CLOSE
        if self._rounds > rounds or (self._rounds == ROUNDS_TO_CLOSE and not self.in_flight):
            wait_s = max(self._backoff.wait_s(self._rounds), min(retry_after_s or 0.0, self._backoff.most_asked_s))
            self._close(now + wait_s)

    def _hold(self, ticket: Ticket, now: float) -> None:
        """Of the calls that are there now more may be refused: by the end of this wait they will have come back."""
        self._ceiling = min(ticket.level, self._ceiling or ticket.level)
        if self._taken_of is None:
            self._taken_of, self._held_at = self.in_flight, now
            self._strikes += 1
        elif ticket.started_at <= self._held_at:
            self._taken_of -= 1
        self._close(now + RIPE_S)
        if self._strikes >= STRIKES:
            self._keep(max(self._taken_of, self._ceiling - 1))

    def _close(self, until: float) -> None:
        self._closed_until = max(self._closed_until or until, until)

    def _open_again(self, now: float) -> None:
        self._closed_until = self._taken_of = None
        self._ramp = self.in_flight + len(self._resting) + 1.0

    def _keep(self, places: int) -> None:
        """Have no more than so many places from now on."""
        if self.places is None:
            self.places, self._taken_of, self._ceiling, self._strikes = places, None, None, 0
            self.tally.limited = True
        elif places < self.places:
            self.tally.lost += self.places - places
            self.places = places

    def _time_out(self, ticket: Ticket, now: float) -> None:
        self._slow_share += (1 - self._slow_share) * SMOOTHING
        if self._slow_share >= SLOW_SHARE and ticket.started_at > self._cut_at:
            self._cut_at = now
            self._keep(max(1, int(SLOW_KEPT * ticket.level)))
