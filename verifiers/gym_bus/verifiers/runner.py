"""What a pool's worker process does: build verifiers, run checks, hand back plain data."""

from __future__ import annotations

import asyncio
import mmap
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from gym_bus.errors import GymBusError, SandboxError, SandboxRefused, TaskError, UsageError, VerifierError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import AnyVerifier, Placement, SandboxedVerifier, Task, Verifier, demanded_level
from gym_bus.verifiers.registry import VERIFIERS

CACHED = 64
SANDBOX_MODULES = ("gym_bus.verifiers.solution_side", "gym_bus.verifiers.tester_side", "gym_bus.verifiers.call_side")
"""What the harnesses of code verifiers are made of; loaded before the first program, so they cost nothing per check."""

_object = msgspec.json.Decoder(dict[str, Any])
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Check(msgspec.Struct, frozen=True):
    """One verification to do; everything in it is JSON."""

    verifier: str
    options: bytes
    row: bytes
    response: bytes


class Judged(msgspec.Struct, frozen=True, tag="judged"):
    """It was judged."""

    verdict: Verdict
    seconds: float


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """There is no verdict: the task, the verifier or the sandbox is at fault."""

    kind: str
    """task, verifier or sandbox."""
    detail: str

    def error(self) -> GymBusError:
        """The error that says so."""
        return {"task": TaskError, "sandbox": SandboxError}.get(self.kind, VerifierError)(self.detail)


Answer = Judged | Broken

_encode = msgspec.msgpack.Encoder().encode
_checks = msgspec.msgpack.Decoder(list[Check])


class Batch(msgspec.Struct, frozen=True):
    """What a worker process answers to a batch."""

    answers: list[Answer]
    """In the order of its checks."""
    rss_bytes: int
    """Resident memory of the worker process."""


_answers = msgspec.msgpack.Decoder(Batch)


def encode_checks(checks: list[Check]) -> bytes:
    """A batch on its way to a worker process."""
    return _encode(checks)


def decode_answers(data: bytes) -> Batch:
    """A worker's answer."""
    return _answers.decode(data)


def build(name: str, options: bytes) -> AnyVerifier:
    """A verifier by name with its options. Raises UsageError for an unknown name or options that do not fit."""
    made = VERIFIERS.load(name)
    try:
        return made(**_object.decode(options))
    except (TypeError, msgspec.DecodeError) as e:
        raise UsageError(f"options of verifier {name!r}: {e}") from None


def task_of(row: bytes, response: bytes) -> Task:
    """Row and response, decoded. Raises TaskError where the row is no JSON object."""
    try:
        decoded = _object.decode(row)
    except _UNREADABLE as e:
        raise TaskError(f"the row cannot be read: {e}") from None
    try:
        answered = _object.decode(response)
    except _UNREADABLE:  # whatever the endpoint sent, it is no answer
        answered = {}
    return Task(row=decoded, response=answered)


def longest_s(check: Check) -> float:
    """Wall-clock seconds that the programs of a sandboxed check may take by their own limits, as its verifier says."""
    try:
        said = getattr(build(check.verifier, check.options), "longest_s", None)
        return float(said(task_of(check.row, check.response))) if said else 0.0
    except GymBusError:  # it cannot be judged, which whoever judges it will say
        return 0.0


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class VerifierRunner:
    """Verifiers kept warm, and a sandbox slot for those that need one."""

    def __init__(self, sandbox_level: str = "namespaces", preload: Sequence[str] = ()) -> None:
        self._level, self._preload = sandbox_level, tuple(preload)
        self._verifiers: OrderedDict[tuple[str, bytes], AnyVerifier] = OrderedDict()
        self._slots: dict[tuple[str, str, str], Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def batch(self, checks: bytes) -> bytes:
        """Judge an encoded batch; one broken check does not touch the others."""
        return _encode(Batch([self.judge(check) for check in _checks.decode(checks)], _rss_bytes()))

    def judge(self, check: Check) -> Answer:
        """Judge one attempt. Never raises: what goes wrong is data."""
        started = time.monotonic()
        try:
            verdict = self._judge(check)
        except TaskError as e:
            return Broken("task", str(e))
        except SandboxError as e:
            return Broken("sandbox", str(e))
        except Exception as e:  # a verifier is foreign code; its fault is recorded with a class, never as a reward
            return Broken("verifier", f"{type(e).__name__}: {e}")
        return Judged(verdict, time.monotonic() - started)

    def _judge(self, check: Check) -> Verdict:
        verifier = self._verifier(check.verifier, check.options)
        task = task_of(check.row, check.response)
        if verifier.placement is Placement.SANDBOXED:
            verdict: Verdict = self._run(self._judge_sandboxed(cast(SandboxedVerifier, verifier), task))
            return verdict
        return cast(Verifier, verifier).verify(task)

    async def _judge_sandboxed(self, verifier: SandboxedVerifier, task: Task) -> Verdict:
        slot = await self._slot(*(getattr(verifier, name, "") for name in ("preload", "packages", "names")))
        if not slot.level.reaches(least := demanded_level(verifier, self._level)):
            raise SandboxRefused(
                f"{type(verifier).__name__} demands level {least}, this machine gives {slot.level}: {slot.lowered}"
            )
        return await verifier.verify(task, slot)

    async def _slot(self, preload: str, packages: str, names: str) -> Any:
        """The slot whose programs find these modules, packages and names: others' programs pay nothing for them."""
        key = (preload, packages, names)
        if key not in self._slots:
            from gym_bus.sandbox import zygote
            from gym_bus.sandbox.protections import Level
            from gym_bus.sandbox.slot import Slot

            self._slots[key] = await Slot.start(
                " ".join((zygote.PRELOAD, preload, *self._preload)),
                modules=SANDBOX_MODULES,
                names=names,
                packages=packages,
                least=Level(self._level),
            )
        return self._slots[key]

    def _run(self, work: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(work)

    def _verifier(self, name: str, options: bytes) -> AnyVerifier:
        key = (name, options)
        if key not in self._verifiers:
            self._verifiers[key] = build(name, options)
            if len(self._verifiers) > CACHED:
                self._verifiers.popitem(last=False)
        self._verifiers.move_to_end(key)
        return self._verifiers[key]

    def close(self) -> None:
        """Give up the sandbox."""
        while self._slots:
            self._run(self._slots.popitem()[1].close())
        if self._loop is not None:
            self._loop.close()
            self._loop = None
