"""What a slot protects, and by which mechanism of this machine, for people who decide whether that is enough."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

from gym_bus.sandbox.landlock import SCOPES
from gym_bus.sandbox.syscall_table import ALLOWED

USER, NAMES, SHARED = "user", "names of files", "IPC, host name"
"""Protections that some levels do not give."""


class Level(enum.StrEnum):
    """How far a program is shut in, the strongest first."""

    NAMESPACES = "namespaces"
    """Namespaces of its own, a file tree of its own, a system-call filter. For root, for an ordinary user where the
    kernel lets users make namespaces, and in a container whose filter does."""
    LANDLOCK = "landlock"
    """Where the kernel or a container gives no namespaces: Landlock and a system-call filter; one process, Python
    alone, nothing to write to. For root with another user per program (Linux 5.13), for others from Linux 6.12."""

    def reaches(self, wanted: Level) -> bool:
        """Whether this level is at least `wanted`."""
        order = list(Level)
        return order.index(self) <= order.index(wanted)


class Protection(msgspec.Struct, frozen=True):
    """One line of the report."""

    name: str
    active: bool
    how: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found when a zygote started."""

    level: Level
    own_user: bool
    """Programs run as a user that nothing else on the host is."""
    memory_group: int
    """Version of the memory cgroup, 0 where there is none."""
    landlock: int = 0
    """Version of the kernel's Landlock, where it is used."""


def summary(level: Level, protections: Iterable[Protection]) -> str:
    """One line that says all of it."""
    all_of_it = list(protections)
    held = ", ".join(one.name for one in all_of_it if one.active)
    absent = ", ".join(f"{one.name} ({one.how})" for one in all_of_it if not one.active)
    return f"sandbox level {level}: protects {held}" + (f"; does not protect {absent}" if absent else "")


def describe(facts: Facts) -> list[Protection]:
    """The report of one slot: also what it does not protect, which `active` says."""
    return [
        *(_apart(facts) if facts.level is Level.NAMESPACES else _confined(facts)),
        Protection("system calls", True, f"a list of {len(ALLOWED)} that are allowed; no_new_privs; no capabilities"),
        Protection("memory", True, _memory(facts)),
        Protection("CPU time, file size, descriptors", True, "resource limits"),
        Protection("output", True, "sealed files that cannot grow; read when the program is dead"),
        Protection("verdict", True, "expected outputs and graders are never in the program's memory"),
    ]


def _apart(facts: Facts) -> list[Protection]:
    user = "a user that nothing else is" if facts.own_user else "this worker's user, in a namespace of its own"
    return [
        Protection(USER, facts.own_user, user),
        Protection("files", True, "a tree of its own: the interpreter, read-only; scratch of 64 MiB"),
        Protection(NAMES, True, "the tree holds nothing else"),
        Protection("network", True, "a namespace without any, and no socket calls"),
        Protection("processes", True, "a PID namespace for each program; all of it is killed at the end"),
        Protection(SHARED, True, "namespaces of its own"),
    ]


def _confined(facts: Facts) -> list[Protection]:
    user = "a user that nothing else is" if facts.own_user else "this worker's own user"
    signals = "Landlock keeps signals in" if facts.landlock >= SCOPES else "its user may signal nobody else"
    return [
        Protection(USER, facts.own_user, user),
        Protection("files", True, f"Landlock version {facts.landlock}: reads the interpreter, writes nothing"),
        Protection(NAMES, False, "stat, readlink and chdir tell what exists where, of which size and owner"),
        Protection("network", True, "no socket calls"),
        Protection("processes", True, f"one process, which cannot fork; {signals}"),
        Protection(SHARED, False, "the host's; no calls that use IPC, but its name and load can be read"),
    ]


def _memory(facts: Facts) -> str:
    if facts.memory_group:
        return f"cgroup version {facts.memory_group}: the sum of all its processes"
    return "address space of its one process; it cannot fork or make anonymous files"
