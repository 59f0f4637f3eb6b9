"""Landlock: what a process may open, and whom it may signal, where there are no namespaces to hide the rest.

A ruleset can only take away, for this process and all that it starts. Standard library only: runs in the zygote.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterable

from gym_bus.sandbox import syscalls

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_REFER, _TRUNCATE = 1 << 13, 1 << 14
READ = EXECUTE | READ_FILE | READ_DIR
CHANGE = WRITE_FILE | READ_FILE | READ_DIR | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
DEVICE = READ_FILE | WRITE_FILE
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE
"""What can be granted on something that is no folder."""

SCOPES = 6
"""The first version that keeps signals and abstract sockets in."""
_FILE_SYSTEM_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_BITS = 16
_ALL_NETWORK = _ALL_SCOPES = 3


def version() -> int:
    """Of the kernel's Landlock; 0 where it has none, or a container's filter forbids it."""
    try:
        return syscalls.landlock_create_ruleset(b"", 1)
    except OSError:
        return 0


def refusal() -> int:
    """The error number that asking for Landlock gives; 0 where there is Landlock."""
    try:
        syscalls.landlock_create_ruleset(b"", 1)
    except OSError as e:
        return e.errno or 0
    return 0


def ruleset(abi: int, grants: Iterable[tuple[str, int]]) -> int:
    """A descriptor for `enter`: everything is denied but the `grants`, (path, access), as far as the paths exist.

    No TCP port, no signal to a process outside, no abstract socket from outside, as far as this version knows them.
    """
    files = (1 << _FILE_SYSTEM_BITS.get(abi, _ALL_BITS)) - 1
    fields = [files, *([_ALL_NETWORK] if abi >= 4 else []), *([_ALL_SCOPES] if abi >= SCOPES else [])]
    made = syscalls.landlock_create_ruleset(struct.pack(f"<{len(fields)}Q", *fields), 0)
    for path, access in grants:
        with contextlib.suppress(FileNotFoundError):
            _grant(made, path, access & files)
    return made


def _grant(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _OF_FILES
        syscalls.landlock_add_rule(ruleset, struct.pack("<Qi", access, fd))
    finally:
        os.close(fd)


def enter(ruleset: int) -> None:
    """Be bound by it, on top of what binds this process already. no_new_privs must be set."""
    syscalls.landlock_restrict_self(ruleset)
