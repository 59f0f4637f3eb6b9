"""Where the model calls of a process wait for their turn at an endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import deque
from collections.abc import Callable
from urllib.parse import urlsplit

from gym_bus import activity
from gym_bus.errors import RateLimited
from gym_bus.masking import redact
from gym_bus.models.fleet import Fleet, Partner
from gym_bus.models.throttle import Backoff, End, Throttle, Ticket
from gym_bus.settings import ModelConfig

REFUSALS = (429, 503, 529)
"""HTTP statuses by which an endpoint says that it has too much to do."""
SOON_S = 0.05
"""In which a refusal is told to the fleet."""
SETTLE_S = 0.5
"""Between two settlements of an endpoint that is in use."""
USED_S = 2.0
"""Without a call, an endpoint is no longer in use."""
CROWD = 64
"""Calls that may wait, however few the endpoint takes, before its worker begins no further rollouts."""
LONGEST_PAUSE_S = 5.0
"""Of an endpoint that takes nothing, unless it asks for longer."""


def endpoint_key(config: ModelConfig) -> str:
    """Names what a limit is of: one model at one address. Letters, digits and `_-.` only; no secrets."""
    base_url = redact(config.base_url)
    address = urlsplit(base_url)
    name = re.sub(r"[^A-Za-z0-9-]+", "_", f"{address.hostname}_{address.port or ''}_{config.model}")[:80].strip("_")
    digest = hashlib.blake2b(f"{base_url}|{config.model}".encode(), digest_size=6).hexdigest()
    return f"{name}.{digest}"


class NoTurn(RateLimited):
    """A call waited as long as it may, or longer than there is hope."""

    retryable = False


class Gate:
    """Lets calls in as its throttle allows; the others wait here, urgent rollouts' calls in front.

    Somebody has to settle with the fleet: `need` is called with the seconds within which it should be done.
    """

    def __init__(self, key: str, config: ModelConfig, need: Callable[[Gate, float], None]) -> None:
        retry = config.retry
        pauses = Backoff(retry.wait_s, min(retry.max_wait_s, LONGEST_PAUSE_S), retry.max_wait_s)
        self.key, self.address = key, redact(config.base_url)
        self.throttle = Throttle(pauses, places=0)  # nobody is let in before it has been settled
        self._need = need
        self._waiting: deque[asyncio.Future[Ticket]] = deque()
        self._urgent: deque[asyncio.Future[Ticket]] = deque()
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._needed_at = float("inf")
        self._used_at = time.monotonic()
        self._closed = False
        self.on_room: Callable[[], None] = lambda: None
        """Called where calls that waited were let in."""

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return self._count

    @property
    def in_use(self) -> bool:
        """Whether it had a call of late."""
        return bool(self.throttle.in_flight or self.waiting) or time.monotonic() - self._used_at < USED_S

    @property
    def crowded(self) -> bool:
        """Whether so many calls wait that further rollouts would only wait, too, with their time running."""
        throttle = self.throttle
        return throttle.places is not None and self.waiting > max(CROWD, 2 * throttle.places)

    def pass_through(self) -> Ticket | None:
        """A turn at once, where nobody waits and there is room; as `enter`, but it cannot wait."""
        now = time.monotonic()
        return None if self._count or not self.throttle.room(now) else self.throttle.start(now)

    async def enter(self, limit_s: float, patience_s: float, *, again: bool = False) -> Ticket:
        """Wait for a turn. Whoever gets the ticket must `leave` with it.

        Args:
            limit_s: seconds to wait at most.
            patience_s: seconds to wait at an endpoint that takes nothing at all.
            again: the call was refused before, and goes to the front.

        Raises:
            NoTurn: it did not come in time.
        """
        if ticket := self.pass_through():
            return ticket
        now = self._used_at = time.monotonic()
        turn: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        queue = self._urgent if activity.is_urgent() else self._waiting
        queue.insert(0 if again else len(queue), turn)
        self._count += 1
        activity.note(f"waiting for its turn at {self.address}")
        try:
            self.kick()
            ticket = await self._turn(turn, now, limit_s, patience_s)
            activity.note("model call")
            return ticket
        except BaseException:
            if turn.done():  # it came at the same moment
                self.leave(turn.result(), End.UNKNOWN)
            else:
                turn.cancel()
                self._count -= 1
            raise

    async def _turn(self, turn: asyncio.Future[Ticket], since: float, limit_s: float, patience_s: float) -> Ticket:
        deadline = since + limit_s
        while not turn.done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise NoTurn(f"{self.address}: no turn within {limit_s:g} s: more calls wait than it takes", 0)
            await asyncio.wait((turn,), timeout=min(left_s, patience_s))
            if not turn.done() and time.monotonic() - max(self.throttle.taken_at, since) >= patience_s:
                raise NoTurn(f"{self.address}: it has taken no call for {patience_s:g} s", 0)
        return turn.result()

    def leave(self, ticket: Ticket, end: End, retry_after_s: float | None = None) -> None:
        """The call is over."""
        now = self._used_at = time.monotonic()
        self.throttle.end(ticket, now, end, retry_after_s)
        if self.waiting:
            self.kick()
        else:
            self._tell(now)

    def kick(self) -> None:
        """Let in whoever can be, and come back when time alone makes room."""
        now = time.monotonic()
        let_in = False
        while (turn := self._first()) is not None and self.throttle.room(now):
            (self._urgent or self._waiting).popleft()
            self._count -= 1
            turn.set_result(self.throttle.start(now))
            let_in = True
        self._set_timer(now)
        self._tell(now)
        if let_in:
            self.on_room()

    def _first(self) -> asyncio.Future[Ticket] | None:
        for queue in (self._urgent, self._waiting):
            while queue:
                if not queue[0].done():
                    return queue[0]
                queue.popleft()  # given up
        return None

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.waiting and (at := self.throttle.room_at(now)) is not None:
            self._timer = asyncio.get_running_loop().call_later(max(at - now, 0.001), self.kick)

    def _tell(self, now: float) -> None:
        stuck = self.waiting and (self.throttle.places == 0 or self.throttle.pace == 0)
        within_s = SOON_S if stuck or self.throttle.dirty else SETTLE_S
        if not self._closed and now + within_s < self._needed_at:
            self._needed_at = now + within_s
            self._need(self, within_s)

    def settled(self) -> None:
        """What `need` asked for was done."""
        self._needed_at = float("inf")
        if self.in_use:
            self.kick()

    def close(self) -> None:
        """Nobody is let in any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()


class Alone:
    """Settles gates within their own process, which is all of the fleet."""

    def __init__(self) -> None:
        self._fleets: dict[str, tuple[Partner, Fleet]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def open(self, key: str, config: ModelConfig) -> Gate:
        """The gate of an endpoint."""
        gate = Gate(key, config, self._need)
        self._fleets[key] = Partner("alone", gate.throttle), Fleet()
        self._settle(gate)
        return gate

    def _need(self, gate: Gate, within_s: float) -> None:
        if timer := self._timers.get(gate.key):
            timer.cancel()
        self._timers[gate.key] = asyncio.get_running_loop().call_later(within_s, self._settle, gate)

    def _settle(self, gate: Gate) -> None:
        now = time.monotonic()
        partner, known = self._fleets[gate.key]
        fleet = partner.settle(known, gate.waiting, now)
        self._fleets[gate.key] = partner, fleet
        partner.stored(fleet, now)
        gate.settled()
