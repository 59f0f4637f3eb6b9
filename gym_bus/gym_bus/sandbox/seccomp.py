"""The system-call filter: a classic BPF program, assembled here. Standard library only: runs in the zygote.

It refuses what could reach the kernel's wider surface, other processes, the network or another namespace. It is
inherited, so it costs nothing per program.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from gym_bus.sandbox import syscalls

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where the architecture does not have it
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "personality": (135, 92),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "vhangup": (153, 58),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "ioprio_set": (251, 30),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_secret": (447, 447),
    "landlock_create_ruleset": (444, 444),
    "seccomp": (317, 277),
}
_MEMFD = (319, 279)
_CLONE, _CLONE3 = (56, 220), (435, 435)
_FORK, _VFORK = (57, None), (58, None)
_IOCTL = (16, 29)
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
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000
_SECCOMP_MODE_FILTER = 2


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, k)


def _refuse(number: int | None, code: int) -> bytes:
    if number is None:
        return b""
    return _op(_JEQ, number, 0, 1) + _op(_RET, _ERRNO | code)


def build(*, forks: bool) -> bytes:
    """The filter for this machine.

    Args:
        forks: let programs start processes and make anonymous files; False where no cgroup bounds the memory of a
            whole tree of processes, so that one process is all there is.
    """
    at = 0 if syscalls.MACHINE == "x86_64" else 1
    code = _op(_LD, _ARCH) + _op(_JEQ, _ARCHITECTURES[syscalls.MACHINE], 1, 0) + _op(_RET, _KILL)
    code += _op(_LD, _NR)
    if at == 0:  # the x32 numbers would walk around every rule below
        code += _op(_JGE, _X32, 0, 1) + _op(_RET, _ERRNO | errno.ENOSYS)
    for numbers in _REFUSED.values():
        code += _refuse(numbers[at], errno.EPERM)
    code += _refuse(_CLONE3[at], errno.ENOSYS)  # its flags lie in memory, out of the filter's sight
    if not forks:
        code += _refuse(_MEMFD[at], errno.EPERM) + _refuse(_FORK[at], errno.EAGAIN) + _refuse(_VFORK[at], errno.EAGAIN)
    code += _clone_rule(_CLONE[at] or 0, forks=forks)
    code += _op(_JEQ, _IOCTL[at], 0, 5) + _op(_LD, _ARG1)
    code += _op(_JEQ, _TIOCSTI, 1, 0) + _op(_JEQ, _TIOCLINUX, 0, 1) + _op(_RET, _ERRNO | errno.EPERM)
    code += _op(_RET, _ALLOW)
    return code + _op(_RET, _ALLOW)


def _clone_rule(number: int, *, forks: bool) -> bytes:
    body = _op(_LD, _ARG0) + _op(_JSET, _NAMESPACES, 0, 1) + _op(_RET, _ERRNO | errno.EPERM)
    if not forks:
        wanted = syscalls.CLONE_THREAD | syscalls.CLONE_NEWPID
        body += _op(_JSET, wanted, 1, 0) + _op(_RET, _ERRNO | errno.EAGAIN)
    body += _op(_RET, _ALLOW)
    return _op(_JEQ, number, 0, len(body) // 8) + body


def install(code: bytes) -> None:
    """Put the filter on this process and all that it will start. no_new_privs must be set."""
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.PyDLL(None, use_errno=True)
    if libc.prctl(syscalls.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(holder), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, "seccomp filter refused")
