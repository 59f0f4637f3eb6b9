"""The limits of model endpoints, shared by all workers through the `gym_limits` bucket: one record per endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import BusError
from gym_bus.logs import get_logger
from gym_bus.models.fleet import Fleet, Partner
from gym_bus.models.gate import Gate
from gym_bus.settings import ModelConfig

log = get_logger(__name__)

NUDGE = "gym.control.limits"
"""Said when a worker has given something back that others wait for."""
BUS_LIMIT_S = 2.0
TRIES = 8
"""Of one settlement, where other workers are faster."""


class SharedLimits:
    """Settles this worker's gates with those of the other workers. While the bus is away, each goes on as it is."""

    def __init__(self, bus: Bus, worker: str) -> None:
        self._bus, self._worker = bus, worker
        self._gates: dict[str, tuple[Gate, Partner]] = {}
        self._due: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen to the others and begin to settle."""
        await self._bus.listen(f"{NUDGE}.>", self._nudged)
        self._task = asyncio.create_task(self._run(), name="shared limits")

    def open(self, key: str, config: ModelConfig) -> Gate:
        """The gate of an endpoint. It lets nobody in before it knows what the others have."""
        gate = Gate(key, config, self._need)
        self._gates[key] = gate, Partner(self._worker, gate.throttle)
        return gate

    def _need(self, gate: Gate, within_s: float) -> None:
        at = time.monotonic() + random.uniform(0.8, 1.0) * within_s
        if at < self._due.get(gate.key, float("inf")):
            self._due[gate.key] = at
            self._changed.set()

    def _nudged(self, subject: str, body: bytes) -> None:
        found = self._gates.get(subject.removeprefix(f"{NUDGE}."))
        if found and found[0].waiting and body != self._worker.encode():
            self._need(found[0], random.uniform(0.0, 0.05))

    async def _run(self) -> None:
        alone = False
        while True:
            key = min(self._due, key=self._due.__getitem__, default=None)
            self._changed.clear()
            if key is None or (wait_s := self._due[key] - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if key is None else wait_s):
                        await self._changed.wait()
                continue
            del self._due[key]
            gate, partner = self._gates[key]
            try:
                async with asyncio.timeout(BUS_LIMIT_S):
                    await self._settle(gate, partner)
                alone = False
            except Exception as e:  # whatever it is, calls go on
                if not alone:  # said once, however long it lasts
                    log.info("limits_not_shared", endpoint=key, error=str(e) or "the bus does not answer")
                alone = True
                partner.go_alone()
            gate.settled()

    async def _settle(self, gate: Gate, partner: Partner) -> None:
        for _ in range(TRIES):
            known, revision = await self._known(gate.key)
            fleet = partner.settle(known, gate.waiting, time.monotonic(), staying=gate.in_use)
            if await self._bus.state.swap(subjects.LIMITS, gate.key, fleet, revision) is not None:
                partner.stored(fleet, time.monotonic())
                if fleet.has_to_spare(self._worker):
                    await self._bus.announce(f"{NUDGE}.{gate.key}", self._worker.encode())
                return
            await asyncio.sleep(random.uniform(0.002, 0.02))

    async def _known(self, key: str) -> tuple[Fleet, int]:
        try:
            found = await self._bus.state.get_entry(subjects.LIMITS, key, Fleet)
        except msgspec.DecodeError:  # another version's: its workers will read ours as little
            found = await self._bus.state.get_entry(subjects.LIMITS, key)
            return Fleet(), found[1] if found else 0
        return found or (Fleet(), 0)

    async def close(self) -> None:
        """Settle no more, and leave to the others what this worker had."""
        if self._task:
            self._task.cancel()
        for gate, partner in self._gates.values():
            gate.close()
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(BUS_LIMIT_S):
                    known, revision = await self._known(gate.key)
                    if revision:
                        fleet = partner.settle(known, 0, time.monotonic(), staying=False)
                        await self._bus.state.swap(subjects.LIMITS, gate.key, fleet, revision)
