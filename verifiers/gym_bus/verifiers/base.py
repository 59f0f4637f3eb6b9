"""What a verifier is: a pure function from a dataset row and a model response to a verdict."""

from __future__ import annotations

import enum
from typing import Any, ClassVar, Protocol, runtime_checkable

import msgspec

from gym_bus.messages import Verdict
from gym_bus.sandbox.api import Sandbox
from gym_bus.sandbox.protections import Level

__all__ = ["AnyVerifier", "Level", "Placement", "SandboxedVerifier", "Task", "Verdict", "Verifier"]


class Placement(enum.StrEnum):
    """Where a verifier runs."""

    INLINE = "inline"
    """In the worker's event loop: microseconds, no I/O."""
    CPU = "cpu"
    """Pure, but more than a millisecond of CPU or unbounded time: on a pool, killed at its limit."""
    SANDBOXED = "sandboxed"
    """Runs code that a model wrote: on a pool, inside the sandbox."""


class Task(msgspec.Struct, frozen=True):
    """One dataset row, decoded, as a verifier sees it."""

    row: dict[str, Any]
    """All keys of the materialized row, `responses_create_params` included."""
    response: dict[str, Any]
    """The Responses object. `gym_bus.verifiers.text` has the ways to read text out of it."""


@runtime_checkable
class Verifier(Protocol):
    """An inline or CPU verifier. The constructor takes the job's options as keyword arguments and checks them."""

    placement: ClassVar[Placement]
    required: ClassVar[tuple[str, ...]]
    """Row keys without which the row cannot be judged, `a|b` where either will do; used to check data before a job
    starts."""

    def verify(self, task: Task) -> Verdict:
        """Score one attempt. Pure: no bus, no clock, no network, so it can run anywhere, twice.

        Raises:
            TaskError: the row is broken (no or unusable reference), so there is no reward.
        """
        ...


@runtime_checkable
class SandboxedVerifier(Protocol):
    """A verifier that runs model-written code. Expected outputs never enter the sandbox.

    One that needs more isolation than its workers may settle for (`verifier.sandbox_level`) says so:

        sandbox_level: ClassVar[Level] = Level.NAMESPACES

    One whose programs may import packages, as far as they are installed in the workers' environment:

        packages: ClassVar[str] = "numpy"

    One whose programs import further modules in any case, those of packages included, may have them imported before:

        preload: ClassVar[str] = "datetime random"

    One whose programs all begin with the same text (`Program.names`) has it run but once:

        names: ClassVar[str] = "from math import *"

    One whose programs together may take longer than `verifier.limit_s` says how long, by their own limits:

        def longest_s(self, task: Task) -> float: ...

    One that judges by what a reference solution does computes that once, when rows are prepared; of the pair, the
    second is how many tests had to be left out:

        @staticmethod
        def incomplete(row: dict[str, Any]) -> bool: ...
        @classmethod
        async def complete(cls, row: dict[str, Any], sandbox: Sandbox) -> tuple[dict[str, Any], int]: ...
    """

    placement: ClassVar[Placement]
    required: ClassVar[tuple[str, ...]]

    async def verify(self, task: Task, sandbox: Sandbox) -> Verdict:
        """Score one attempt with the help of a sandbox.

        Raises:
            TaskError: the row is broken.
            SandboxError: the sandbox failed; the check is repeated elsewhere.
        """
        ...


AnyVerifier = Verifier | SandboxedVerifier


def demanded_level(verifier: AnyVerifier | type[AnyVerifier], setting: str) -> Level:
    """The lowest level that will do for a sandboxed verifier: its own demand or the worker's, whichever is higher."""
    floor, own = Level(setting), getattr(verifier, "sandbox_level", None)
    return floor if own is None or floor.reaches(own) else Level(own)
