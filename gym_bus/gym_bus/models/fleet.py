"""How the processes of a fleet share one endpoint: one small record, and the rules by which each of them changes it.

The record holds a limit and who holds how much of it. A process takes only what is free, and gives back only what it no
longer uses, so that the parts never add up to more than the limit: whoever joins waits until others make room. Every
change is one compare-and-swap of the whole record. No clock is compared with another machine's: a member that is gone
shows by its beat, which stands still, and how long ago something changed everybody measures for itself.

The limit is on calls in flight ("places"), as most endpoints have it, or on calls begun per second ("pace"): which
way is better is found by trying (see `pacing`). Where places are given up and as many calls are refused as before, the
endpoint refuses at random, and nobody is served by waiting.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

from gym_bus.models import pacing
from gym_bus.models.pacing import Ages, Measure, Pacing, Trial
from gym_bus.models.throttle import RAMP_FLOOR, Tally, Throttle

BUDGET_PER_CALL = 0.01
"""Part of the calls that may be refused: to find out whether the endpoint takes more, or because it is like that."""
BUDGET_PER_S = 1 / 120
MOST_BUDGET, MOST_DEBT = 4.0, -4.0
CALLS_PER_FINDING = 2
"""Calls that are refused where there is a place too many: the second shows that the first was not by chance."""
QUIET_S = 3.0
"""After the limit was lowered, before it is raised."""
RAISE_S = 0.5
"""Between two raises: the first must have been used, and found good."""
EXPLAINED_S = 1.0
"""Refusals so long after a raise are its doing."""
BACK, COLLAPSED = 0.8, 0.3
"""Parts of the places that there were, up to which they come back fast, and below which it takes nothing now."""
PRESSED = 0.97
"""Part of the places that must be taken before there are more: the last raise shows what it does only then."""
MOST_RAISE = 0.05
"""Of the limit, in one raise. Raises double while they are found good."""
FAR, FAR_RAISE = 4, 0.15
"""After so many good raises in a row the limit is far: more of it then."""
SPARE_PACE = 0.1
LEAST_PART = 4.0
"""Calls per second of one member: many that call now and then do not make an even stream."""
LOOK_REFUSED, LOOK_CALLS = 8, 400
"""The share of refusals is taken over so many of them, or so many calls."""
LOOK_NONE = 7
"""Where less is tried, and nothing is refused: the refusals that were to be expected by now."""
TROUBLE = 0.02
TRIED, HELPED = 0.7, 0.95
"""Parts of the places: with so many it is tried whether less is refused, and so many are kept where it is."""
TRIES = 3
ALIKE = 0.5
"""What part of the refusals may be left then; where it is more, calls are refused at random."""
MANY_SHARE, MOST_MANY, MANY, MANY_S = 0.1, 0.6, 12, 10.0
"""The share of refusals, so many of them over so long a time, that no limit explains which is kept to."""
MORE_REFUSED, LOOK_MORE = 6, 50
"""Refusals beyond the share that there was, with which more places were too many; calls by which they were not."""
NOISE_MARGIN = 1.5
NOISE_SMOOTHING = 0.2
MOST_NOISE = 0.35
BUSY_S = 0.9
"""The time over which calls in flight are averaged."""
START_S = 0.15
"""Between two processes that begin with an endpoint of which nothing is known."""
SILENT_S, LEASE_S = 1.5, 4.0
"""A member whose beat stands still for so long may be gone, is gone."""
TURN_S = 5.0
"""Where there is too little for all members, how long some of them have it."""


class Member(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One process, as it told the others last."""

    beat: int = 0
    """Counts what it wrote: one that stands still belongs to a process that is gone."""
    places: int = 0
    """Its part of the places; where there is no limit, its calls in flight."""
    pace: float = 0.0
    """Its part of the pace."""
    wants: int = 0
    """Calls that it has, waiting ones included."""
    busy: float = 0
    """Those of them that are at the endpoint, or would be, had it not just refused them; with a pace, on average."""


class Fleet(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the processes know together of one endpoint."""

    limit: int | None = None
    """Places: calls in flight. None before the first refusal."""
    pacing: Pacing = msgspec.field(default_factory=Pacing)
    members: dict[str, Member] = {}
    begun: int = 0
    """Counts processes that began while there was no limit."""
    budget: float = 0.0
    """Refusals that may still be."""
    raised: int = 0
    """Counts raises."""
    streak: int = 0
    """Raises in a row that were found good."""
    raise_places: int = 0
    """Places that the last raise added."""
    raise_refused: int = 0
    """Calls refused since."""
    raise_explained: int = 0
    """Those of them that it explains: as many of its places were too many."""
    since_raise: int = 0
    """Calls taken since."""
    refused: int = 0
    """Counts refusals."""
    lowered: int = 0
    """Counts places that were given up."""
    high: int = 0
    """Places with which the limit was raised last."""
    look_taken: int = 0
    look_refused: int = 0
    """Calls since the last look."""
    trial: tuple[int, float, int] | None = None
    """While it is tried whether less is refused with fewer places: places and share of refusals before, and how often
    they were made fewer since."""
    limits: int = 0
    """Counts trials of more places that found a limit."""
    background: float = 0.0
    """Share of calls refused of late, those apart that raises explain."""
    noise: float = 0.0
    """Share of calls that is refused whatever the load."""
    turn: int = 0

    @property
    def wanted(self) -> int:
        """Calls that there are, waiting ones included."""
        return sum(member.wants for member in self.members.values())

    @property
    def busy(self) -> float:
        """Calls at the endpoint."""
        return sum(member.busy for member in self.members.values())

    @property
    def pace(self) -> float:
        """Calls begun per second; 0 for any number."""
        return self.pacing.pace

    def has_to_spare(self, giver: str) -> bool:
        """Whether there is something free that another member than `giver` waits for."""
        if self.limit is None:
            return False
        others = [member for name, member in self.members.items() if name != giver]
        free = self.limit - sum(member.places for member in self.members.values())
        pace = self.pace - sum(member.pace for member in self.members.values())
        if not self.pace and free >= 1 and any(member.wants > member.places for member in others):
            return True
        return pace > SPARE_PACE * self.pace and any(member.wants for member in others)


_WATCHED = ("begun", "raised", "refused", "lowered", "turn")


class _Watch:
    """Since when a value has been what it is, by our own clock."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, float]] = {}

    def age_s(self, name: Any, value: Any, now: float) -> float:
        known = self._seen.get(name)
        if known is None or known[0] != value:
            self._seen[name] = known = (value, now)
        return now - known[1]

    def forget(self, names: Iterable[Any]) -> None:
        for name in names:
            self._seen.pop(name, None)


class Partner:
    """One process's part in the fleet: settles its throttle's account with the shared record.

    The order of things: `settle` a record that was read, store what it returns, tell `stored`. Where the store failed,
    because another process was faster or the bus away, settle the next record; nothing is counted twice.
    """

    def __init__(self, name: str, throttle: Throttle) -> None:
        self._name, self._throttle = name, throttle
        self._watch = _Watch()
        self._due = Tally()
        self._flown: deque[tuple[float, float]] = deque()
        self._stored_at: float | None = None
        self._first = 0
        self._due_to_raise = 0
        self._paced = False
        self._places: int | None = None
        self._joined = False
        self.begun = False

    def settle(self, known: Fleet, waiting: int, now: float, *, staying: bool = True) -> Fleet:
        """The record as this process would have it.

        Args:
            known: the record as it is stored.
            waiting: calls of this process that wait to begin.
            now: seconds, on this process's clock.
            staying: whether it has any use for the endpoint now.
        """
        self._collect(now)
        for field in _WATCHED:
            self._watch.age_s(field, getattr(known, field), now)
        ages = Ages(
            change_s=self._watch.age_s("changes", known.pacing.changes, now),
            turn_s=self._watch.age_s("turns", known.pacing.turns, now),
        )
        fleet = msgspec.structs.replace(known, members=self._living(known, now), pacing=copy.deepcopy(known.pacing))
        me = fleet.members.pop(self._name, None) or Member()
        self._joined = self._joined and me.beat > 0
        wants = self._throttle.in_flight + (0 if self._throttle.closed(now) else waiting)
        busy = self._in_flight(now) if known.pace else self._throttle.busy
        me = msgspec.structs.replace(me, beat=me.beat + 1, wants=wants, busy=busy)
        self._first = 0
        if fleet.limit is None:
            self._without_limit(fleet, me, now)
        else:
            self._with_limit(fleet, me)
        fleet.members[self._name] = me
        self._account(fleet, me, now)
        raised = 0
        if fleet.limit is not None:
            self._choose(fleet, ages, bool(waiting), now)
        if not fleet.pace:
            if fleet.pacing.trial is None and not self._seek_more(fleet):
                self._look(fleet)
            if waiting and fleet.limit is not None and fleet.trial is None:
                raised = self._raise(fleet, now)
        self._share(fleet, me, raised, now)
        if not staying:
            del fleet.members[self._name]
        return fleet

    def stored(self, fleet: Fleet, now: float) -> None:
        """The record is what `settle` returned last: act on it."""
        self._due, self._stored_at = Tally(), now
        throttle, me = self._throttle, fleet.members.get(self._name)
        self._joined = me is not None
        if me is None:
            if fleet.limit is not None:
                throttle.places = 0
            return
        self._paced = fleet.pace > 0
        throttle.pace = me.pace if fleet.pace else None
        throttle.excess = me.places - self._places if self._places is not None and not fleet.pace else 0
        if self._places is not None:
            throttle.places = max(0, self._places - throttle.tally.lost)
        elif self._first:
            throttle.begin(self._first)
        elif self.begun and not throttle.tally.limited:
            throttle.begin()
        self.begun = self.begun or self._first > 0 or fleet.limit is not None

    def go_alone(self) -> None:
        """The record is out of reach: go on with what there is, but with something."""
        if not self.begun:
            self.begun = True
            self._throttle.begin(RAMP_FLOOR)
        elif self._throttle.places == 0:
            self._throttle.places = 1
        if self._throttle.pace == 0:
            self._throttle.pace = pacing.LEAST_PACE

    def _age_s(self, fleet: Fleet, field: str, now: float) -> float:
        return self._watch.age_s(field, getattr(fleet, field), now)

    def _collect(self, now: float) -> None:
        throttle = self._throttle
        self._due += throttle.tally
        throttle.tally = Tally()

    def _in_flight(self, now: float) -> float:
        """Of the calls of this process, on average over some time."""
        flown = self._flown
        flown.append((now, self._throttle.flown(now)))
        while len(flown) > 2 and flown[1][0] < now - BUSY_S:
            flown.popleft()
        over_s = now - flown[0][0]
        return round((flown[-1][1] - flown[0][1]) / over_s, 3) if over_s > 0 else self._throttle.in_flight

    def _living(self, fleet: Fleet, now: float) -> dict[str, Member]:
        living = {
            name: member
            for name, member in fleet.members.items()
            if name == self._name or self._watch.age_s(name, member.beat, now) < LEASE_S
        }
        self._watch.forget(fleet.members.keys() - living.keys())
        return living

    def _all_there(self, fleet: Fleet, now: float) -> bool:
        """Whether what the members told of their calls is still true."""
        return all(self._watch.age_s(name, member.beat, now) < SILENT_S for name, member in fleet.members.items())

    # -- what happened -------------------------------------------------------------------------------------------------

    def _without_limit(self, fleet: Fleet, me: Member, now: float) -> None:
        throttle = self._throttle
        me.places = throttle.taken_now
        if not self.begun:
            self._first = self._first_calls(fleet, now)
            fleet.begun += self._first > 0
        elif throttle.places is not None and self._due.limited:
            me.places = throttle.places
            taken = me.places + sum(member.places for member in fleet.members.values())
            if not taken:  # it takes nothing now, which says nothing of its limit
                return
            self._found(fleet, taken)

    def _found(self, fleet: Fleet, limit: int) -> None:
        """There is a limit from now on; what is refused now is the doing of the ramp."""
        fleet.limit, fleet.budget = limit, CALLS_PER_FINDING
        self._raised(fleet, limit)
        fleet.streak = fleet.look_taken = fleet.look_refused = 0
        fleet.pacing.found()

    def _first_calls(self, fleet: Fleet, now: float) -> int:
        """Calls that may be made at an endpoint of which nothing is known; one process begins after the other."""
        if not fleet.members:
            return RAMP_FLOOR
        return int(min(self._age_s(fleet, "begun", now), self._age_s(fleet, "refused", now)) >= START_S)

    def _with_limit(self, fleet: Fleet, me: Member) -> None:
        throttle, limit = self._throttle, fleet.limit or 0
        if not self._joined:
            me.places = throttle.in_flight
        elif throttle.places is None or self._due.limited:  # the others met the limit first: what we have is our part
            part = throttle.taken_now if throttle.places is None else throttle.places
            limit += part - me.places
            me.places = part
        else:
            lost = 0 if fleet.pace else min(self._due.lost, me.places)
            limit -= lost
            me.places -= lost
        fleet.limit = max(1, limit)

    def _account(self, fleet: Fleet, me: Member, now: float) -> None:
        due = self._due
        idle_s = now - self._stored_at if self._stored_at is not None else 0.0
        earned = BUDGET_PER_CALL + NOISE_MARGIN * fleet.noise
        earned = earned * due.taken + BUDGET_PER_S * idle_s / len(fleet.members)
        fleet.budget = min(MOST_BUDGET, fleet.budget + earned)
        fleet.since_raise += due.taken
        fleet.refused += due.refused
        explained = self._due_to_raise = self._explained(fleet, now) if due.odd else 0
        fleet.look_taken += due.taken
        fleet.look_refused += due.odd - explained
        noisy = fleet.noise >= TROUBLE  # single refusals say nothing then
        covered = due.odd - explained if noisy else min(due.odd - explained, max(0, int(fleet.budget)))
        least = MOST_DEBT if fleet.pace else min(0.0, fleet.budget)
        if not self._just_found(fleet, now):
            fleet.budget = max(least, fleet.budget - CALLS_PER_FINDING * due.odd)
        settling = self._watch.age_s("turns", fleet.pacing.turns, now) < pacing.DEAF_S and not fleet.pacing.fresh
        if settling and fleet.pacing.turns:  # what is refused may be due to the way before
            fleet.look_taken = fleet.look_refused = 0
        elif fleet.limit is not None and not fleet.pace and fleet.trial is None:
            self._lower(fleet, me, due.odd - covered)

    def _just_found(self, fleet: Fleet, now: float) -> bool:
        """Whether calls are refused because there was no limit until now."""
        return fleet.pacing.fresh and self._watch.age_s("turns", fleet.pacing.turns, now) < pacing.FOUND_S

    def _lower(self, fleet: Fleet, me: Member, places: int) -> None:
        lost = max(0, min(places - self._due.lost, (fleet.limit or 1) - 1, me.places))
        fleet.limit = (fleet.limit or 1) - lost
        me.places -= lost
        fleet.lowered += places
        if places:
            fleet.streak = 0

    def _explained(self, fleet: Fleet, now: float) -> int:
        """How many refusals are the doing of the last raise, and not noise."""
        fleet.raise_refused += self._due.odd
        background = fleet.background if fleet.background >= BUDGET_PER_CALL else 0.0
        usual = 2 * max(fleet.noise, background) * fleet.since_raise
        beyond = min(int(fleet.raise_refused - usual) - fleet.raise_explained, self._due.odd)
        if beyond <= 0:
            return 0
        if self._age_s(fleet, "raised", now) >= EXPLAINED_S:
            return 0
        explained = min(beyond, fleet.raise_places - fleet.raise_explained)
        fleet.raise_explained += explained
        if fleet.since_raise > explained:  # else it takes nothing at all now
            fleet.high = max(1, (fleet.limit or 1) - explained)
        return explained

    # -- the two ways --------------------------------------------------------------------------------------------------

    def _choose(self, fleet: Fleet, ages: Ages, waiting: bool, now: float) -> None:
        """Try the other way from time to time, and keep the better one; keep the pace, where that is the way."""
        known, due = fleet.pacing, self._due
        if self._throttle.closed(now) and known.trial is None:  # it takes nothing, which says nothing of either way
            return
        if fleet.wanted <= fleet.busy < PRESSED * (fleet.limit or 1):  # nor does what it takes where little is asked
            return
        since_s = now - self._stored_at if self._stored_at is not None else 0.0
        crew = len(fleet.members)
        refused = due.refused if known.pace else max(0, due.refused - CALLS_PER_FINDING * self._due_to_raise)
        pacing.account(known, Measure(since_s / crew, due.taken, refused), ages, crew)
        kept = pacing.verdict(known, self._throttle.mean_s)
        if kept is not None:
            self._end_trial(fleet, kept)
        elif waiting and known.trial is None and pacing.is_time(known, ages):
            self._try_other(fleet, now)
        if known.pace:
            pacing.adjust(known, ages, may_raise=waiting, may_fail=fleet.budget >= pacing.FINDING)

    def _try_other(self, fleet: Fleet, now: float) -> None:
        known, limit = fleet.pacing, fleet.limit or 1
        troubled = known.troubled
        few = not known.pace and ((limit < len(fleet.members) and not troubled) or limit < COLLAPSED * fleet.high)
        if few or fleet.noise >= TROUBLE or fleet.trial is not None or not self._all_there(fleet, now):
            return
        in_flight = fleet.busy
        if known.pace:
            if self._age_s(fleet, "refused", now) >= QUIET_S:
                known.trial = Trial(known.way, pace=known.pace)
                self._use_places(fleet, max(1, int(pacing.PLACES_FROM * in_flight)))
        elif not fleet.streak and in_flight >= PRESSED * limit and (troubled or fleet.budget >= pacing.FINDING):
            known.trial = Trial(known.way, places=limit)
            known.turn(pacing.PACE_FROM * known.way.rate)

    def _end_trial(self, fleet: Fleet, kept: bool) -> None:
        known, trial = fleet.pacing, fleet.pacing.trial
        assert trial is not None
        known.trial = None
        if kept:
            known.trials, known.other = 0, trial.before.rate
            known.turns += 1
            return
        known.trials += 1
        if trial.pace:
            known.turn(trial.pace)
            known.bound = trial.pace
        else:
            self._use_places(fleet, trial.places)
        known.way, known.other = trial.before, 0.0

    def _use_places(self, fleet: Fleet, places: int) -> None:
        fleet.pacing.turn(0.0)
        fleet.limit = fleet.high = places
        fleet.look_taken = fleet.look_refused = 0
        self._raised(fleet, 0)
        fleet.streak = 0

    def _look(self, fleet: Fleet) -> None:
        """Find out why calls are refused, where they are more than raises explain."""
        taken, refused = fleet.look_taken, fleet.look_refused
        if fleet.trial is None:
            enough = float(LOOK_CALLS)
        else:
            enough = min(LOOK_CALLS, (2 * LOOK_REFUSED if refused else LOOK_NONE) / fleet.trial[1])
        if refused < LOOK_REFUSED and taken + refused < enough:
            return
        share = refused / (taken + refused)
        fleet.look_taken = fleet.look_refused = 0
        if fleet.trial is not None:
            self._judge(fleet, share)
            return
        if share <= TROUBLE:
            fleet.background += (share - fleet.background) * NOISE_SMOOTHING
        if share < fleet.noise:
            fleet.noise += (share - fleet.noise) * NOISE_SMOOTHING
        elif TROUBLE + NOISE_MARGIN * fleet.noise < share < pacing.CLOSED and fleet.pacing.way.share < MANY_SHARE:
            self._try_less(fleet, share)

    def _seek_more(self, fleet: Fleet) -> bool:
        """Where far more calls are refused than a limit explains, see whether it is one: have twice the places."""
        way, places = fleet.pacing.way, fleet.trial[0] if fleet.trial else fleet.limit or 0
        if fleet.trial is None or fleet.trial[2]:
            many = MANY_SHARE <= way.share < MOST_MANY and way.refused >= MANY * (1 + fleet.limits)
            if not many or way.seconds < MANY_S or not places:
                return False
            fleet.trial, fleet.limit = (places, way.share, 0), 2 * places
        else:
            _, before, _ = fleet.trial
            enough = way.seconds >= 1 and way.calls >= LOOK_MORE and way.taken >= (fleet.limit or 0)
            too_many = way.refused > MORE_REFUSED + NOISE_MARGIN * before * way.calls
            if too_many or (enough and way.share < ALIKE * before):
                fleet.trial, fleet.limit, fleet.limits = None, places, fleet.limits + 1
            elif enough:
                fleet.trial, fleet.limit, fleet.limits = None, None, 0  # nobody is served by waiting
                fleet.noise = max(TROUBLE, before**2)
            else:
                return True
        fleet.look_taken = fleet.look_refused = fleet.streak = 0
        fleet.pacing.way = Measure()
        return True

    def _try_less(self, fleet: Fleet, share: float) -> None:
        places = fleet.limit or max(1, sum(member.places for member in fleet.members.values()))
        if fleet.limit is None:  # as many as there are, first: they are what it takes, found by several at a time
            self._found(fleet, places)
        elif places > 1:
            fleet.trial = (places, share, 1)
            fleet.limit = max(1, int(TRIED * places))

    def _judge(self, fleet: Fleet, share: float) -> None:
        assert fleet.trial is not None
        places, before, tries = fleet.trial
        fleet.trial, fleet.streak, now = None, 0, fleet.limit or 1
        if not ALIKE * before < share < MOST_NOISE:
            fleet.limit = max(1, int(now / TRIED * HELPED))
        elif tries < TRIES and now > 1:
            fleet.trial, fleet.limit = (places, before, tries + 1), max(1, int(TRIED * now))
        else:  # nobody is served by waiting
            fleet.limit, fleet.noise = None, min(share, before)

    # -- raising the limit, sharing it ---------------------------------------------------------------------------------

    def _raise(self, fleet: Fleet, now: float) -> int:
        """Raise the limit where it is time to; returns the number of further places."""
        calm = self._age_s(fleet, "lowered", now) >= QUIET_S and self._age_s(fleet, "raised", now) >= RAISE_S
        if not calm or fleet.limit is None or not self._all_there(fleet, now):
            return 0
        back = fleet.limit < BACK * fleet.high  # it had more before it took nothing for a while
        if not (back or fleet.streak or fleet.budget >= CALLS_PER_FINDING):
            return 0
        if fleet.busy >= PRESSED * fleet.limit:
            if not back:
                fleet.high = fleet.limit
            most = MOST_RAISE if fleet.streak < FAR else FAR_RAISE
            step = max(1, fleet.limit // 2) if back else min(2**fleet.streak, max(1, int(most * fleet.limit)))
            fleet.limit += step
            self._raised(fleet, step)
            return step
        return 0

    @staticmethod
    def _raised(fleet: Fleet, places: int) -> None:
        fleet.raised += 1
        fleet.streak += 1
        fleet.raise_places, fleet.raise_refused, fleet.raise_explained = places, 0, 0
        fleet.since_raise = 0

    def _share(self, fleet: Fleet, me: Member, raised: int, now: float) -> None:
        self._places = None
        if fleet.limit is None:
            return
        wants = {name: member.wants for name, member in fleet.members.items() if member.wants}
        scarce = len(wants) > fleet.limit or (fleet.pace and len(wants) * LEAST_PART > fleet.pace)
        if scarce and self._watch.age_s("turn", fleet.turn, now) >= TURN_S:
            fleet.turn += 1
        me.pace = self._pace_of(fleet, me, wants)
        if fleet.pace:
            self._places, me.places = me.wants + RAMP_FLOOR, self._throttle.in_flight + 1
            return
        if self._paced:  # others have what is beyond our part
            me.places = min(me.places, self._throttle.in_flight)
        free = fleet.limit - sum(member.places for member in fleet.members.values())
        fair = fair_places(fleet.limit, wants, fleet.turn).get(self._name, 0)
        if raised:  # whoever raises is short of places, and tries them at once
            me.places += free
        elif fair < me.places:
            me.places = max(fair, self._throttle.in_flight)
        else:
            me.places += max(0, min(fair - me.places, free))
        self._places = me.places if raised else min(fair, me.places)

    def _pace_of(self, fleet: Fleet, me: Member, wants: dict[str, int]) -> float:
        if not fleet.pace:
            return 0.0
        free = max(0.0, fleet.pace - sum(member.pace for member in fleet.members.values()))
        return me.pace + min(fair_rates(fleet.pace, wants, fleet.turn).get(self._name, 0.0) - me.pace, free)


def fair_rates(limit: float, wants: dict[str, int], turn: int) -> dict[str, float]:
    """`limit` calls per second shared out in proportion to what is wanted, where that is enough for an even stream.

    Else some members have it all in equal parts, others after the next `turn`.
    """
    names = sorted(wants)
    some = max(1, int(limit / LEAST_PART))
    if some >= len(names):
        total = sum(wants.values())
        return {name: limit * wanted / total for name, wanted in wants.items()}
    return {names[(turn * some + i) % len(names)]: limit / some for i in range(some)}


def fair_places(limit: int, wants: dict[str, int], turn: int) -> dict[str, int]:
    """`limit` places shared out: nobody gets more than it wants while another wants more than it gets.

    What cannot be divided goes to members in the order of their names, from another one on with every `turn`. What
    nobody wants is spread evenly.
    """
    left, shares, short = limit, {}, dict(wants)
    while short:
        level = left // len(short)
        content = [name for name, wanted in short.items() if wanted <= level]
        if not content:
            break
        for name in content:
            shares[name] = short.pop(name)
            left -= shares[name]
    names = sorted(short or shares)
    if not names:
        return {}
    level, rest = divmod(left, len(names))
    for place, name in enumerate(names):
        lucky = (place - turn * rest) % len(names) < rest
        shares[name] = shares.get(name, 0) + level + lucky
    return shares
