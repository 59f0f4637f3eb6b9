"""A memory bound for a whole tree of processes, where this process may make cgroups (version 2 or 1)."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count()
_OOM_KILLS = re.compile(rb"^oom_kill (\d+)", re.MULTILINE)
_PEAK = "memory.max_usage_in_bytes"
_CHARGE_BYTES = 2**21
"""The most that the kernel charges at once: so far below its limit a group may be when the kernel finds it full."""
_LIMIT_HITS = re.compile(rb"^max (\d+)", re.MULTILINE)

HEADROOM_BYTES = 48 * 2**20
"""For the zygote itself, which lives in the same group as its programs."""


class MemoryGroup:
    """One cgroup with a memory limit."""

    def __init__(self, folder: Path, version: int) -> None:
        self._folder, self.version = folder, version
        self._limit = 0
        self._events: int | None = None
        self._kills = self._hits = 0

    @classmethod
    def create(cls) -> MemoryGroup | None:
        """A new group; None where the kernel or the container does not let us have one."""
        for parent, version in ((_own_v2(), 2), (_ROOT / "memory", 1)):
            if parent is None or not parent.is_dir():
                continue
            _sweep(parent)
            folder = parent / f"gym-bus-{os.getpid()}-{next(_numbers)}"
            try:
                folder.mkdir()
            except OSError:
                continue
            made = cls(folder, version)
            try:
                made.limit(2**30)
                return made
            except OSError:
                made.remove()
        return None

    def _write(self, name: str, value: int) -> None:
        (self._folder / name).write_text(str(value))

    def add(self, pid: int) -> None:
        """Put a process into the group; what it starts is born there."""
        self._write("cgroup.procs", pid)

    def limit(self, size_bytes: int) -> None:
        """Bound the group's memory, swap included where the kernel counts it."""
        if size_bytes == self._limit:
            return
        if self.version == 2:
            self._write("memory.max", size_bytes)
            with contextlib.suppress(OSError):
                self._write("memory.swap.max", 0)
        else:
            with contextlib.suppress(OSError):  # the sum with swap may not be below the limit: raise it first
                self._write("memory.memsw.limit_in_bytes", max(size_bytes, self._limit))
            self._write("memory.limit_in_bytes", size_bytes)
            with contextlib.suppress(OSError):
                self._write("memory.memsw.limit_in_bytes", size_bytes)
        self._limit = size_bytes

    def used_bytes(self) -> int:
        """What the group takes now, cached files included; 0 where the kernel does not say."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        with contextlib.suppress(OSError):
            return int((self._folder / name).read_bytes())
        return 0

    def starved(self) -> bool:
        """Whether the kernel has killed one of the group since this was asked last because it was at its limit.

        Where the whole machine is out of memory the kernel kills too, which says nothing of the group.
        """
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        try:
            if self._events is None:
                self._events = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            text = os.pread(self._events, 4096, 0)
            before, self._kills = self._kills, _found(_OOM_KILLS, text)
            return self._kills > before and self._was_full(text)
        except OSError:
            return False

    def _was_full(self, events: bytes) -> bool:
        if self.version == 2:
            before, self._hits = self._hits, _found(_LIMIT_HITS, events)
            return self._hits > before
        peak = int((self._folder / _PEAK).read_bytes())
        self._write(_PEAK, 0)  # it starts anew
        return peak > self._limit - _CHARGE_BYTES

    def remove(self) -> bool:
        """Delete the group, which must be empty; False where it is not yet."""
        if self._events is not None:
            os.close(self._events)
            self._events = None
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        return not self._folder.exists()


def _found(pattern: re.Pattern[bytes], text: bytes) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 0


def _sweep(parent: Path) -> None:
    """Remove the empty groups of owners that were killed."""
    for folder in parent.glob("gym-bus-*"):
        owner = folder.name.split("-")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _own_v2() -> Path | None:
    """The version 2 group that this process may make groups in: its own, where the memory controller is handed down."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                folder = _ROOT / line[3:].strip().lstrip("/")
                controllers = (folder / "cgroup.subtree_control").read_text().split()
                return folder if "memory" in controllers else None
    return None
