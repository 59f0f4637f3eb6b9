"""Runs a command as machines and containers do that give less: another user, few capabilities, calls that are refused.

python confined.py '{"user": 65534, "refuse": ["namespaces"]}' COMMAND...
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

from gym_bus.sandbox import advice, seccomp, syscalls

CONTAINER_CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
"""What Docker leaves to root."""
X86, ARM = 0, 1
CALLS = {
    "namespaces": [(272, 97), (165, 40), (155, 41), (308, 268), (442, 442)],  # unshare, mount, ...
    "landlock": [(444, 444), (445, 445), (446, 446)],
}
NAMESPACE_FLAGS = 0x7E02_0000


def open_the_way(*wanted: str) -> None:
    """Let every user reach these folders, in a mount namespace of this process alone."""
    closed = {folder for path in wanted if (folder := advice._closed_folder(Path(path)))}
    if not closed:
        return
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    held = {path: os.open(path, os.O_PATH) for path in wanted if any(map(Path(path).is_relative_to, closed))}
    for folder in closed:
        syscalls.mount("none", str(folder), "tmpfs", 0, "mode=755")
    for path, fd in held.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        syscalls.mount(f"/proc/self/fd/{fd}", path, "", syscalls.MS_BIND | syscalls.MS_REC)
        os.close(fd)


def no_more_user_namespaces() -> None:
    """As `sysctl user.max_user_namespaces=0` does it, for a user namespace of this process alone."""
    user, group = os.getuid(), os.getgid()
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # or a change of user leaves /proc/self to root
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1\n")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1\n")
    Path("/proc/sys/user/max_user_namespaces").write_text("0")


def refuse(what: list[str]) -> None:
    """Put a filter on this process as containers have one."""
    op, at = seccomp._op, X86 if syscalls.MACHINE == "x86_64" else ARM
    no = op(seccomp._RET, seccomp._ERRNO | errno.EPERM)
    code = op(seccomp._LD, seccomp._NR)
    for calls in (CALLS[name] for name in what):
        code += b"".join(op(seccomp._JEQ, numbers[at], 0, 1) + no for numbers in calls)
    if "namespaces" in what:
        flags = op(seccomp._LD, seccomp._ARG0) + op(seccomp._JSET, NAMESPACE_FLAGS, 0, 1) + no
        code += seccomp._rule((56, 220)[at], flags + op(seccomp._RET, seccomp._ALLOW))
        code += op(seccomp._JEQ, 435, 0, 1) + op(seccomp._RET, seccomp._ERRNO | errno.ENOSYS)  # clone3
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(code + op(seccomp._RET, seccomp._ALLOW))


def main(options: dict[str, object], command: list[str]) -> None:
    if os.geteuid() == 0:
        open_the_way(sys.base_prefix, str(Path(__file__).resolve().parents[2]))
        kept = options.get("capabilities")
        for capability in range(syscalls.LAST_CAP + 1):
            if kept is not None and capability not in kept:
                syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
    if user := options.get("user"):
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if options.get("sysctl"):
        no_more_user_namespaces()
    if what := options.get("refuse"):
        refuse(what)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
