"""What a slot protects, and by which mechanism of this machine, for people who decide whether that is enough."""

from __future__ import annotations

import enum

import msgspec

from gym_bus.sandbox.syscall_table import ALLOWED


class Level(enum.StrEnum):
    """How far a program is shut in, the strongest first."""

    NAMESPACES = "namespaces"
    """Namespaces of its own, a file tree of its own, a system-call filter."""
    LANDLOCK = "landlock"
    """Where the kernel or a container gives no namespaces: Landlock and a system-call filter; one process, no disk."""

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


def describe(facts: Facts) -> list[Protection]:
    """The report of one slot."""
    apart = facts.level is Level.NAMESPACES
    group = facts.memory_group
    return [
        Protection(
            "user",
            facts.own_user or apart,
            "a user of its own, no capabilities"
            if facts.own_user
            else "this worker's user in a namespace of its own, no capabilities"
            if apart
            else "this worker's own user",
        ),
        Protection(
            "files",
            True,
            "a tree of its own: the interpreter, read-only; 64 MiB of scratch"
            if apart
            else f"Landlock {facts.landlock}: the interpreter, read-only; no scratch",
        ),
        Protection("network", True, "a namespace without any, and no socket calls" if apart else "no socket calls"),
        Protection(
            "processes",
            True,
            "a PID namespace for each program; all of it is killed at the end"
            if apart
            else "one process, which cannot fork; Landlock keeps signals in",
        ),
        Protection("IPC, host name, cgroups", apart, "namespaces of its own" if apart else "no calls for them"),
        Protection("system calls", True, f"a list of {len(ALLOWED)} that are allowed; no_new_privs"),
        Protection(
            "memory",
            True,
            f"cgroup version {group}: the sum of all its processes"
            if group
            else "address space of its one process; it cannot fork or make anonymous files",
        ),
        Protection("CPU time, file size, descriptors", True, "resource limits"),
        Protection("output", True, "sealed files that cannot grow; read when the program is dead"),
        Protection("verdict", True, "expected outputs and graders are never in the program's memory"),
    ]
