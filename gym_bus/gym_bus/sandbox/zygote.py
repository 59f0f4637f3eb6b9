"""The zygote: a warm interpreter, locked into its own namespaces, that forks one process per program.

It passes descriptors on and never reads a program, its input or its output, so nothing of one program is in the memory
that the next is forked from. Standard library only: started by path as a plain script.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

from gym_bus.sandbox import child, root, seccomp, syscalls

PRELOAD = (
    "abc array ast atexit base64 bisect builtins cmath codecs collections collections.abc contextlib copy csv "
    "dataclasses datetime decimal enum fractions functools hashlib heapq io inspect itertools json keyword linecache "
    "locale math numbers operator queue random re reprlib secrets statistics string struct sys textwrap threading "
    "time tokenize traceback types typing unicodedata uuid weakref zlib"
)
_NAMESPACES = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
    | syscalls.CLONE_NEWPID
)
_KEPT = (
    syscalls.CAP_SYS_ADMIN,
    syscalls.CAP_SETUID,
    syscalls.CAP_SETGID,
    syscalls.CAP_KILL,
    syscalls.CAP_DAC_OVERRIDE,
    syscalls.CAP_FOWNER,
)
"""Of the zygote, within its own user namespace: to make PID namespaces, to give programs another user, to clean up."""
MAX_MESSAGE = 65_536
MOST_FDS = 8


def main() -> NoReturn:
    """Start as `python -I -S -E -c ... CONTROL_FD CONFIG`: lock in, say so, serve until the owner is gone."""
    os.dup2(int(sys.argv[1]), child.CONTROL)
    os.closerange(child.CONTROL + 1, 256)
    control = socket.socket(fileno=child.CONTROL)
    config = json.loads(sys.argv[2])
    try:
        _preload(config["preload"])
        sys.path[:0] = config["module_paths"]
        for name in config["modules"]:
            __import__(name)
        hidden = {*config["module_paths"], sys.argv[3]}
        sys.path[:] = [path for path in sys.path if path not in hidden]
        links = root.host_links(tools=config["tools"])
        syscalls.unshare(_NAMESPACES)
        sources = root.open_sources(config["interpreter"], tools=config["tools"])
        ids = _wait_for_ids(control)
        if ids:
            os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        root.build(sources, links, config["disk_bytes"])
        for fd in sources.values():
            os.close(fd)
        zygote = os.fork()
    except (OSError, ImportError) as e:
        _say(control, {"error": str(e)})
        os._exit(1)
    if zygote:
        control.close()
        _, status = os.waitpid(zygote, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    try:
        _lock_in(forks=config["forks"])
    except OSError as e:
        _say(control, {"error": str(e)})
        os._exit(1)
    _say(control, {"ready": True})
    _serve(control, ids)


def _preload(names: str) -> None:
    for name in names.split():
        with contextlib.suppress(ImportError):  # an interpreter built without it: programs find out themselves
            __import__(name)


def _wait_for_ids(control: socket.socket) -> bool:
    """Have the owner write the id maps; whether programs get a user of their own."""
    _say(control, {"unshared": os.getpid()})
    reply = json.loads(control.recv(MAX_MESSAGE) or b"{}")
    if "ids" not in reply:
        raise OSError(0, "the owner could not map user ids")
    return bool(reply["ids"])


def _lock_in(*, forks: bool) -> None:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.drop_bounding_set()
    syscalls.set_capabilities(_KEPT)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    os.environ.clear()
    os.environ.update({"HOME": "/tmp", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": "/tmp"})
    child.prepare()
    seccomp.install(seccomp.build(forks=forks))
    import gc

    gc.collect()
    gc.freeze()


def _say(control: socket.socket, value: dict[str, Any]) -> None:
    control.send(json.dumps(value).encode())


REPLY = struct.Struct("<iBBBddQ")
"""Wait status, timed out, began, scratch folder not clean, wall_s, cpu_s, largest resident set in bytes; then words."""


def _serve(control: socket.socket, ids: bool) -> NoReturn:
    poll = select.poll()
    poll.register(control.fileno(), select.POLLRDHUP)
    while True:
        message, ancillary, _, _ = control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(MOST_FDS * 4))
        if not message:
            os._exit(0)  # the owner is gone
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
        control.send(_run(list(fds), child.Order(message), poll, ids))


def _run(fds: list[int], order: child.Order, poll: select.poll, ids: bool) -> bytes:
    ready, child_ready = os.pipe()
    started = time.monotonic()
    pid = syscalls.clone(syscalls.CLONE_NEWPID)
    if pid == 0:
        try:
            child.run(fds, child_ready, order, ids)
        finally:
            os._exit(child.SETUP_FAILED)  # whatever happens, the program's process never goes on as a zygote
    os.close(child_ready)
    for fd in fds:  # at once: a peer must see the end when the program closes its side
        os.close(fd)
    # Of many cases each has its own deadline, which the owner watches over.
    deadline = started + order.wall_s if order.kind == child.ONE else None
    timed_out = _wait(pid, deadline, poll)
    _, status, usage = os.wait4(pid, 0)
    said = os.read(ready, 4096)
    os.close(ready)
    cpu_s = usage.ru_utime + usage.ru_stime
    wall_s = time.monotonic() - started
    clean = root.clean_scratch()
    began = said[:1] == b"R"
    return REPLY.pack(status, timed_out, began, not clean, wall_s, cpu_s, usage.ru_maxrss * 1024) + said[1:]


def _wait(pid: int, deadline: float | None, poll: select.poll) -> bool:
    """Wait for the end of the program; True where its time was up and it was killed, with all that it had started."""
    pidfd = os.pidfd_open(pid)
    poll.register(pidfd, select.POLLIN)
    try:
        left_ms = None if deadline is None else max(0, int(1000 * (deadline - time.monotonic())) + 1)
        events = poll.poll(left_ms)
        if any(fd == pidfd for fd, _ in events):
            return False
        os.kill(pid, signal.SIGKILL)
        if events:  # the owner is gone
            os._exit(0)
        return True
    finally:
        poll.unregister(pidfd)
        os.close(pidfd)
