"""Kernel calls that the standard library has no name for, through ctypes. Standard library only: runs in the zygote."""

from __future__ import annotations

import ctypes
import os
import signal

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_THREAD = 0x00010000

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
PR_SET_KEEPCAPS = 8

CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 1, 3, 5, 6, 7, 21, 24
LAST_CAP = 40

MACHINE = os.uname().machine
_CLONE = {"x86_64": 56, "aarch64": 220}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1

# PyDLL keeps the interpreter's lock: a forked child must not wait for one that nobody will release.
_libc = ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0, more: int = 0) -> None:
    """Call prctl with up to two arguments."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(more), 0, 0), f"prctl({option})")


def unshare(flags: int) -> None:
    """Leave namespaces for fresh ones."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system or bind a path."""
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode() or None)
    _check(result, f"mount {source} on {target}")


def unmount(target: str) -> None:
    """Unmount lazily."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def mount_setattr(target: str, attributes: int, *, recursive: bool) -> None:
    """Add mount attributes; unlike a remount it may not drop those that are locked, and need not."""
    attr = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = _libc.syscall(_MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, ctypes.byref(attr), ctypes.c_size_t(32))
    _check(result, f"mount_setattr {target}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root; the old one goes to `old`."""
    _check(_libc.syscall(_PIVOT_ROOT[MACHINE], new.encode(), old.encode()), "pivot_root")


def set_capabilities(capabilities: tuple[int, ...]) -> None:
    """Permitted and effective: these and no others; none inheritable."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low = sum(1 << cap for cap in capabilities if cap < 32)
    high = sum(1 << (cap - 32) for cap in capabilities if cap >= 32)
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _check(_libc.syscall(_CAPSET[MACHINE], ctypes.byref(header), ctypes.byref(data)), "capset")


def drop_bounding_set() -> None:
    """No program started from here can ever gain a capability."""
    for cap in range(LAST_CAP + 1):
        try:
            prctl(PR_CAPBSET_DROP, cap)
        except OSError:
            return  # past the last that this kernel knows


def landlock_create_ruleset(attributes: bytes, flags: int) -> int:
    """A new ruleset's descriptor; without attributes and with flag 1, the version of the kernel's Landlock."""
    given = ctypes.create_string_buffer(attributes, len(attributes)) if attributes else None
    size = ctypes.c_size_t(len(attributes))
    return _check(_libc.syscall(_LANDLOCK_CREATE_RULESET, given, size, flags), "landlock_create_ruleset")


def landlock_add_rule(ruleset: int, beneath: bytes) -> None:
    """Grant access beneath a path: `struct landlock_path_beneath_attr`, packed."""
    given = ctypes.create_string_buffer(beneath, len(beneath))
    _check(_libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, given, 0), "landlock_add_rule")


def landlock_restrict_self(ruleset: int) -> None:
    """Be bound by a ruleset."""
    _check(_libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")


def clone(flags: int = 0) -> int:
    """Fork a child, with CLONE_NEWPID as pid 1 of a fresh PID namespace; 0 in the child.

    Python's own fork hooks are skipped, which saves a quarter of a millisecond and is right only in a process with one
    thread.
    """
    return _check(_libc.syscall(_CLONE[MACHINE], ctypes.c_ulong(flags | signal.SIGCHLD), 0, 0, 0, 0), "clone")
