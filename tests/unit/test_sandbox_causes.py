"""What ended a program, from what was seen of it from outside; no sandbox is needed to tell."""

from __future__ import annotations

import os
import signal

import pytest

from gym_bus.errors import SandboxError, SandboxRefused
from gym_bus.sandbox import slot
from gym_bus.sandbox.api import Ended, Limits
from gym_bus.sandbox.owner import Ending

LIMITS = Limits(wall_s=12.0, cpu_s=10.0)
KILLED, CRASHED, EXITED = int(signal.SIGKILL), int(signal.SIGSEGV), 1 << 8


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (Ending(status=0), None),
        (Ending(status=EXITED), None),
        (Ending(status=CRASHED), None),
        (Ending(status=KILLED, starved=True), Ended.MEMORY),
        (Ending(status=KILLED, starved=True, timed_out=True, cpu_s=11.0), Ended.MEMORY),
        (Ending(status=EXITED, starved=True), Ended.MEMORY),  # one of its children was killed
        (Ending(status=KILLED, timed_out=True), Ended.WALL_LIMIT),
        (Ending(status=KILLED, timed_out=True, cpu_s=9.9), Ended.WALL_LIMIT),
        (Ending(status=KILLED, cpu_s=10.0), Ended.CPU_LIMIT),
        (Ending(status=KILLED, cpu_s=7.5), Ended.CPU_LIMIT),  # by the kernel's ticks it had used it up
        (Ending(status=0, cpu_s=10.1), Ended.CPU_LIMIT),
        (Ending(status=KILLED, cpu_s=1.0), None),  # by itself
        (Ending(status=KILLED, cpu_s=1.0, wall_s=11.0, first=True), Ended.CPU_LIMIT),
        (Ending(status=KILLED, first=True, lowered=True), Ended.CPU_LIMIT),  # as early as it wished
        (Ending(status=CRASHED, first=True), None),
        (Ending(status=EXITED, compiled=False), Ended.COMPILE_ERROR),
        (Ending(status=CRASHED, compiled=True), None),  # the compiler crashed on it
        (Ending(status=KILLED, compiled=True, cpu_s=10.0), Ended.CPU_LIMIT),
        (Ending(status=KILLED, cpu_s=1.0, wall_s=1.1, first=True), SandboxError),
        (Ending(status=EXITED, began=False, fault="OSError"), SandboxError),
        (Ending(status=KILLED, began=False, timed_out=True), SandboxError),
    ],
)
def test_what_was_seen_from_outside_has_one_cause(ending: Ending, cause: Ended | type[Exception] | None) -> None:
    status = ending.status
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None

    if cause is SandboxError:
        with pytest.raises(SandboxError):
            slot._cause(ending, LIMITS, code, killed_by)
    else:
        assert slot._cause(ending, LIMITS, code, killed_by) is cause


@pytest.mark.parametrize(
    ("error", "cause"), [(SandboxError("x"), Ended.SANDBOX_LOST), (SandboxRefused("x"), Ended.REFUSED)]
)
def test_what_the_sandbox_itself_fails_with_is_a_cause_too(error: SandboxError, cause: Ended) -> None:
    assert Ended.of(error) is cause
