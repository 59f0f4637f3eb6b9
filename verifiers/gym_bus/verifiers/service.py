"""The one door to verifiers: cheap ones run in the loop, the others on a pool that starts on first need."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import sys
from collections import OrderedDict
from typing import cast

import msgspec

from gym_bus.errors import GymBusError, VerifierError
from gym_bus.logs import get_logger
from gym_bus.messages import Verdict
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.base import AnyVerifier, Level, Placement, Verifier, demanded_level
from gym_bus.verifiers.batching import BatchingPool
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.runner import Check, build, task_of

log = get_logger(__name__)

CACHED = 256


class _Known(msgspec.Struct, frozen=True):
    verifier: AnyVerifier
    digest: str


class VerifierService:
    """Verifies attempts by verifier name and options."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._known: OrderedDict[tuple[str, bytes], _Known] = OrderedDict()
        self._pool: BatchingPool | None = None
        self._starting = asyncio.Lock()

    def check(self, name: str, options: bytes) -> None:
        """Raise UsageError where there is no such verifier, or it does not take these options (a JSON object)."""
        self._look_up(name, options)

    def digest(self, name: str, options: bytes) -> str:
        """16 hex digits of SHA-256 over the verifier's source and options: equal digests judge alike."""
        return self._look_up(name, options).digest

    def _look_up(self, name: str, options: bytes) -> _Known:
        key = (name, options)
        if (known := self._known.get(key)) is None:
            verifier = build(name, options)
            known = self._known[key] = _Known(verifier, _digest(type(verifier), name, options))
            if len(self._known) > CACHED:
                self._known.popitem(last=False)
        return known

    async def verify(self, name: str, options: bytes, row: bytes, response: bytes) -> Verdict:
        """Judge one attempt.

        Args:
            name: the verifier's registered name.
            options: JSON object.
            row: the dataset row, JSON.
            response: the Responses object, JSON.

        Raises:
            TaskError: the row is broken.
            VerifierError: the verifier is, or there is none of this name or with these options.
            SandboxError: the pool lost the check more often than is retried.
        """
        try:
            verifier = self._look_up(name, options).verifier
            if verifier.placement is Placement.INLINE:
                return cast(Verifier, verifier).verify(task_of(row, response))
        except GymBusError as e:
            if e.kind is None:  # an unknown name or a bad option: no other delivery helps
                raise VerifierError(str(e)) from None
            raise
        pool = self._pool or await self._start()
        sandboxed = verifier.placement is Placement.SANDBOXED
        return await pool.verify(Check(name, options, row, response), sandboxed=sandboxed)

    async def _start(self) -> BatchingPool:
        async with self._starting:
            if self._pool is None:
                if self._config.executor == "ray":
                    from gym_bus.verifiers.pool import RayPool

                    self._pool = RayPool(self._config)
                else:
                    from gym_bus.verifiers.local_pool import LocalPool

                    self._pool = LocalPool(self._config)
            return self._pool

    async def close(self) -> None:
        """Stop the pool."""
        if self._pool is not None:
            await self._pool.close()
            self._pool = None


async def require_sandbox(config: VerifierConfig) -> str:
    """Have a sandbox come up at the level that the verifiers of `config` demand, so that nothing starts without it.

    Returns what it protects, in one line; nothing where none is needed here. On a Ray cluster programs run elsewhere:
    each of its machines refuses by itself.

    Raises:
        SandboxRefused: this machine does not give the level; the message says what would mend it.
        UsageError: `verifier.names` has an unknown name, or `verifier.preload` a module that is not installed.
    """
    levels = {
        demanded_level(made, config.sandbox_level) for made in _served(config) if made.placement is Placement.SANDBOXED
    }
    if not levels or (config.executor == "ray" and config.ray.address):
        return ""
    from gym_bus.sandbox.protections import summary
    from gym_bus.sandbox.slot import Slot
    from gym_bus.sandbox.zygote import PRELOAD

    preload = " ".join((PRELOAD, *config.preload))
    slot = await Slot.start(preload, least=min(levels, key=list(Level).index))
    await slot.close()
    return summary(slot.level, slot.protections())


def _served(config: VerifierConfig) -> list[type[AnyVerifier]]:
    if config.names:
        return [VERIFIERS.load(name) for name in config.names]
    found = []
    for name in VERIFIERS:
        try:
            found.append(VERIFIERS.load(name))
        except (ImportError, AttributeError) as e:  # of another package: who uses it will hear of it
            log.warning("verifier_not_loaded", verifier=name, why=str(e))
    return found


def _digest(made: type, name: str, options: bytes) -> str:
    sha = hashlib.sha256()
    sha.update(inspect.getsource(sys.modules[made.__module__]).encode())
    sha.update(b"\0" + name.encode() + b"\0")
    sha.update(msgspec.json.encode(msgspec.json.decode(options), order="sorted"))
    return sha.hexdigest()[:16]
