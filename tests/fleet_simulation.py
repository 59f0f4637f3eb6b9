"""Workers that share an endpoint, on a clock of their own: minutes of load in a second, the same every time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from gym_bus.models.fleet import Fleet, Partner
from gym_bus.models.throttle import Backoff, End, Throttle, Ticket

WIRE_S = (0.0005, 0.002)
"""Between worker and endpoint, one way."""
STORE_S = 0.002
"""Between reading the shared record and storing it."""

Latency = Callable[[random.Random], float]


def constant(mean_s: float) -> Latency:
    return lambda _: mean_s


def exponential(mean_s: float) -> Latency:
    return lambda drawn: drawn.expovariate(1 / mean_s)


class Endpoint:
    """Takes so many calls at a time and refuses the others at once."""

    retry_after_s: float | None = None
    """What it tells those that it refuses."""

    def __init__(self, most: int, latency: Latency, *, noise: float = 0.0) -> None:
        self.most, self.latency, self.noise = most, latency, noise
        self.closed = False
        self.busy = self.peak = 0

    def takes(self, drawn: random.Random, now: float) -> bool:
        if self.closed or drawn.random() < self.noise or not self._has_room(now):
            return False
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        return True

    def _has_room(self, now: float) -> bool:
        return self.busy < self.most


class Window(Endpoint):
    """Lets `most` calls begin within any one second."""

    def __init__(self, most: int, latency: Latency, *, noise: float = 0.0) -> None:
        super().__init__(most, latency, noise=noise)
        self._begun: deque[float] = deque()

    def _has_room(self, now: float) -> bool:
        while self._begun and self._begun[0] <= now - 1:
            self._begun.popleft()
        if len(self._begun) >= self.most:
            return False
        self._begun.append(now)
        return True


class Bucket(Endpoint):
    """Lets a call begin for a token; `most` come per second, and so many are kept."""

    def __init__(self, most: int, latency: Latency, *, noise: float = 0.0) -> None:
        super().__init__(most, latency, noise=noise)
        self._tokens, self._at = float(most), 0.0

    def _has_room(self, now: float) -> bool:
        self._tokens, self._at = min(self.most, self._tokens + (now - self._at) * self.most), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Load(msgspec.Struct, frozen=True):
    """What happened at the endpoint over some time."""

    taken_per_s: float
    refused: int
    refused_share: float


class Simulation:
    """A fleet of workers with more calls than the endpoint takes."""

    def __init__(self, endpoint: Endpoint, workers: int, calls: int, *, seed: int = 0) -> None:
        random.seed(seed)  # of the pauses' jitter
        self.endpoint, self.drawn = endpoint, random.Random(seed)
        self.now = 0.0
        self.fleet, self.revision = Fleet(), 0
        self.log: list[tuple[float, bool]] = []
        """When a call came to the endpoint, and whether it was taken."""
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._calls = calls
        self.workers: list[SimulatedWorker] = []
        for _ in range(workers):
            self.join()

    def join(self) -> SimulatedWorker:
        worker = SimulatedWorker(self, f"w{len(self.workers):02d}", self._calls)
        self.workers.append(worker)
        worker.settle()
        return worker

    def at(self, when: float, do: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), do, arguments))

    def run(self, until: float) -> Load:
        """Go on until then; returns what happened since the last time."""
        before, begun = len(self.log), self.now
        while self._events and self._events[0][0] <= until:
            self.now, _, do, arguments = heapq.heappop(self._events)
            do(*arguments)
        self.now = until
        calls = self.log[before:]
        taken = sum(was_taken for _, was_taken in calls)
        refused = len(calls) - taken
        return Load(taken / (until - begun), refused, refused / max(1, len(calls)))


class SimulatedWorker:
    """What a gate and a worker's shared limits do, with as many calls as it is given at any time."""

    def __init__(self, world: Simulation, name: str, calls: int) -> None:
        self.name, self._world = name, world
        self.throttle = Throttle(Backoff(), places=0)
        self._partner = Partner(name, self.throttle)
        self.waiting = calls
        self.alive = True
        self._due = self._woken = float("inf")
        self._settling = False

    def _within(self, seconds: float) -> None:
        due = self._world.now + seconds
        if due < self._due:
            self._due = due
            self._world.at(due, self._come_due, due)

    def _come_due(self, due: float) -> None:
        if due == self._due:
            self._due = float("inf")
            self.settle()

    def settle(self) -> None:
        world = self._world
        if self.alive and not self._settling:
            self._settling = True
            wanted = self._partner.settle(_copy(world.fleet), self.waiting, world.now)
            world.at(world.now + STORE_S, self._store, wanted, world.revision)

    def _store(self, wanted: Fleet, read: int) -> None:
        world, self._settling = self._world, False
        if not self.alive:
            return
        if read != world.revision:
            world.at(world.now + world.drawn.uniform(0.002, 0.02), self.settle)
            return
        world.fleet, world.revision = _copy(wanted), read + 1
        self._partner.stored(wanted, world.now)
        self._within(world.drawn.uniform(0.4, 0.5) if self._partner.begun else 0.15)
        if wanted.has_to_spare(self.name):
            for other in world.workers:
                if other is not self and other.alive and other.waiting:
                    other._within(world.drawn.uniform(0, 0.05))
        self.kick()

    def kick(self) -> None:
        world, now = self._world, self._world.now
        while self.alive and self.waiting and self.throttle.room(now):
            self.waiting -= 1
            world.at(now + world.drawn.uniform(*WIRE_S), self._arrive, self.throttle.start(now))
        if self.throttle.dirty:
            self._within(0.05)
        at = self.throttle.room_at(now) if self.waiting else None
        if self.alive and at is not None and not now < self._woken <= at:
            self._woken = max(at, now + 1e-4)
            world.at(self._woken, self._wake)

    def _wake(self) -> None:
        self._woken = float("inf")
        self.kick()

    def _arrive(self, ticket: Ticket) -> None:
        world = self._world
        taken = world.endpoint.takes(world.drawn, world.now)
        world.log.append((world.now, taken))
        if taken:
            world.at(world.now + world.endpoint.latency(world.drawn), self._done, ticket)
        else:
            world.at(world.now + world.drawn.uniform(*WIRE_S), self._over, ticket, End.REFUSED)

    def _done(self, ticket: Ticket) -> None:
        world = self._world
        world.endpoint.busy -= 1
        world.at(world.now + world.drawn.uniform(*WIRE_S), self._over, ticket, End.TAKEN)

    def _over(self, ticket: Ticket, end: End) -> None:
        if self.alive:
            retry_after_s = self._world.endpoint.retry_after_s if end is End.REFUSED else None
            self.throttle.end(ticket, self._world.now, end, retry_after_s)
            self.waiting += 1
            self.kick()


def _copy(fleet: Fleet) -> Fleet:
    """As it comes back from the bus."""
    return msgspec.json.decode(msgspec.json.encode(fleet), type=Fleet)
