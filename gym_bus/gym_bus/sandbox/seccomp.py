"""The system-call filter: a classic BPF program, assembled here. Standard library only: runs in the zygote.

An allow-list: whatever is not named in the table does not exist for a program. It is inherited, so it costs nothing
per program, and the kernel remembers which calls it always allows.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from gym_bus.sandbox import syscalls
from gym_bus.sandbox.syscall_table import ALLOWED, PRETENDED, REFUSED, UNSCOPED

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_NAMESPACES = (
    syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWCGROUP
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNET
)
"""CLONE_NEWPID is not among them: the zygote needs it, and a program lacks the capability for it."""

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1, _ARG2 = 0, 4, 16, 24, 32
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000
_SECCOMP_MODE_FILTER = 2
_AF_UNIX = 1
_DATAGRAM = 2
"""The bit that the types of sockets without a connection share."""


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, k)


def _answer(number: int | None, answer: int) -> bytes:
    if number is None:
        return b""
    return _op(_JEQ, number, 0, 1) + _op(_RET, answer)


def build(*, forks: bool, apart: bool = True) -> bytes:
    """The filter for this machine.

    Args:
        forks: let programs start processes and make anonymous files; False where no cgroup bounds the memory of a
            whole tree of processes, so that one process is all there is.
        apart: namespaces stand between a program and the host. Where they do not, less is allowed, and a zygote may
            clone plainly: its programs put `one_process` on top.
    """
    at = 0 if syscalls.MACHINE == "x86_64" else 1
    number = {name: numbers[at] for name, numbers in ALLOWED.items()}
    code = _op(_LD, _ARCH) + _op(_JEQ, _ARCHITECTURES[syscalls.MACHINE], 1, 0) + _op(_RET, _KILL)
    code += _op(_LD, _NR)
    if at == 0:  # the x32 numbers would walk around every rule below
        code += _op(_JGE, _X32, 0, 1) + _op(_RET, _ERRNO | errno.ENOSYS)
    special = {"clone", "ioctl", "prlimit64", "socketpair"}
    refused = {} if forks else {"memfd_create": errno.EPERM, "fork": errno.EAGAIN, "vfork": errno.EAGAIN}
    if not apart:
        refused |= dict.fromkeys(UNSCOPED, errno.EPERM)
        code += _answer(syscalls.LANDLOCK_RESTRICT_SELF, _ALLOW)
    for name, answer in refused.items():
        code += _answer(number[name], _ERRNO | answer)
    special |= refused.keys()
    for name in number.keys() - special:
        code += _answer(number[name], _ALLOW)
    code += _clone_rule(number["clone"] or 0, forks=forks or not apart)
    code += _ioctl_rule(number["ioctl"] or 0) + _prlimit_rule(number["prlimit64"] or 0, look=apart)
    code += _socketpair_rule(number["socketpair"] or 0, datagrams=apart)
    for numbers in PRETENDED.values():
        code += _answer(numbers[at], _ERRNO)
    for numbers in REFUSED.values():
        code += _answer(numbers[at], _ERRNO | errno.EPERM)
    return code + _op(_RET, _ERRNO | errno.ENOSYS)


def one_process() -> bytes:
    """The filter that a program without namespaces puts on itself, on top of its zygote's.

    It can start threads and nothing else, and it cannot outlive the zygote.
    """
    at = 0 if syscalls.MACHINE == "x86_64" else 1
    clone, prctl, kill = (ALLOWED[name][at] or 0 for name in ("clone", "prctl", "kill"))
    thread = _op(_LD, _ARG0) + _op(_JSET, syscalls.CLONE_THREAD, 1, 0) + _op(_RET, _ERRNO | errno.EAGAIN)
    stay = _op(_LD, _ARG0) + _op(_JEQ, syscalls.PR_SET_PDEATHSIG, 0, 1) + _op(_RET, _ERRNO | errno.EPERM)
    # The kernel says that it worked where it was allowed to signal nobody.
    everyone = _op(_LD, _ARG0) + _op(_JEQ, 0xFFFFFFFF, 0, 1) + _op(_RET, _ERRNO | errno.ESRCH)
    allow = _op(_RET, _ALLOW)
    rules = ((clone, thread), (prctl, stay), (kill, everyone))
    return _op(_LD, _NR) + b"".join(_rule(number, body + allow) for number, body in rules) + allow


def _rule(number: int, body: bytes) -> bytes:
    """`body`, which ends by answering, for one call."""
    return _op(_JEQ, number, 0, len(body) // 8) + body


def _ioctl_rule(number: int) -> bytes:
    body = _op(_LD, _ARG1) + _op(_JEQ, _TIOCSTI, 1, 0) + _op(_JEQ, _TIOCLINUX, 0, 1)
    return _rule(number, body + _op(_RET, _ERRNO | errno.EPERM) + _op(_RET, _ALLOW))


def _socketpair_rule(number: int, *, datagrams: bool) -> bytes:
    """Unix sockets alone: any other family would have the kernel load and run its code.

    And connected ones, unless there are `datagrams`: such a socket reaches any that has a path in the file tree.
    """
    refuse = _op(_RET, _ERRNO | errno.EPERM)
    body = _op(_LD, _ARG0) + _op(_JEQ, _AF_UNIX, 1, 0) + refuse
    if not datagrams:
        body += _op(_LD, _ARG1) + _op(_JSET, _DATAGRAM, 0, 1) + refuse
    return _rule(number, body + _op(_RET, _ALLOW))


def _prlimit_rule(number: int, *, look: bool) -> bytes:
    """One's own limits alone; with `look`, those of others can be seen, as the zygote sees its programs'."""
    allow, refuse = _op(_RET, _ALLOW), _op(_RET, _ERRNO | errno.EPERM)
    body = _op(_LD, _ARG0) + _op(_JEQ, 0, 0, 1) + allow
    if look:  # the new limits are a null pointer, in both halves
        body += _op(_LD, _ARG2) + _op(_JEQ, 0, 0, 3) + _op(_LD, _ARG2 + 4) + _op(_JEQ, 0, 0, 1) + allow
    return _rule(number, body + refuse)


def _clone_rule(number: int, *, forks: bool) -> bytes:
    body = _op(_LD, _ARG0) + _op(_JSET, _NAMESPACES, 0, 1) + _op(_RET, _ERRNO | errno.EPERM)
    if not forks:
        wanted = syscalls.CLONE_THREAD | syscalls.CLONE_NEWPID
        body += _op(_JSET, wanted, 1, 0) + _op(_RET, _ERRNO | errno.EAGAIN)
    body += _op(_RET, _ALLOW)
    return _rule(number, body)


def install(code: bytes) -> None:
    """Put the filter on this process and all that it will start. no_new_privs must be set."""
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))
    syscalls.prctl(syscalls.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(holder))
