"""Reads the books of every job from the bus, over and over, and remembers where they did not add up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gym_bus.bus import Bus
from gym_bus.errors import BusError
from gym_bus.jobs import JobRecord, list_jobs
from gym_bus.workers.accounting import SECOND_LOOK_S, Account, Place, read_books

EVERY_S = 0.3
LOOK_LIMIT_S = 5.0


class Sampler:
    """One connection of its own, past the proxy; samples that a dead server spoils are not taken."""

    def __init__(self, bus: Bus, say: Callable[[str], None]) -> None:
        self._bus, self._say = bus, say
        self._seen: dict[str, bytes] = {}
        self.taken = self.spoilt = 0
        self.wrong: list[str] = []
        """Samples in which the identity did not hold."""
        self.most_in_flight = 0
        self.last: dict[str, Account] = {}

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            await self.sample()

    async def sample(self) -> None:
        """One look at every job."""
        try:
            async with asyncio.timeout(LOOK_LIMIT_S):
                for record in await list_jobs(self._bus):
                    await self._look(record)
                self.taken += 1
        except (BusError, TimeoutError):
            self.spoilt += 1

    async def _look(self, record: JobRecord) -> None:
        account, places = await self._read(record)
        if account.unaccounted or self._gone(record.job, places):
            await asyncio.sleep(SECOND_LOOK_S)  # a failure that is tried again can be between two places
            account, places = await self._read(record)
            if account.unaccounted or (gone := self._gone(record.job, places)):
                self.wrong.append(f"{time.strftime('%X')} {account} gone: {gone[:20]}")
                self._say(f"UNACCOUNTED {self.wrong[-1]}")
        self._seen[record.job] = places
        self.last[record.job] = account
        self.most_in_flight = max(self.most_in_flight, account.in_flight)

    async def _read(self, record: JobRecord) -> tuple[Account, bytes]:
        books, account = await read_books(self._bus, record)
        return account, bytes(books.places)

    def _gone(self, job: str, places: bytes) -> list[int]:
        """Rollouts that the bus had at an earlier look and has nowhere now, or that lost their reward.

        A failed one that is tried again leaves its place before it is in a queue.
        """
        before = self._seen.get(job, bytes(len(places)))
        return [
            at
            for at, (was, is_) in enumerate(zip(before, places, strict=True))
            if (was and not is_ and was != Place.FAILED) or (was == Place.SCORED != is_)
        ]
