"""The zygote: a warm interpreter, locked into namespaces of its own or by Landlock, that forks a process per program.

It passes descriptors on and never reads a program, its input or its output, so nothing of one program is in the memory
that the next is forked from. Standard library only: started by path as a plain script.
"""

from __future__ import annotations

import _socket
import array
import contextlib
import importlib.machinery
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any, NoReturn

from gym_bus.sandbox import child, landlock, root, seccomp, syscalls

PRELOAD = "array bisect collections collections.abc copy functools heapq itertools json math operator re string typing"
"""What most programs import. Each more costs every program: a fork copies its memory map, a megabyte takes 50 µs."""
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
    syscalls.CAP_SYS_RESOURCE,
)
"""Of the zygote, within its own user namespace: to make PID namespaces, to give programs another user, to clean up, to
see what limits they had."""
_KEPT_OUTSIDE = (syscalls.CAP_SETUID, syscalls.CAP_SETGID, syscalls.CAP_KILL)
"""Of a zygote without namespaces that root has started."""
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that keep packages from starting threads when they are imported: a fork would lose them, and programs have
a bound on them."""
MAX_MESSAGE = 65_536
MOST_FDS = 8
SET_UP_S = 10.0
"""Beyond its own wall time, that a program's process may take to be set up. Where the owner loses patience first, the
check is done again."""


def main() -> NoReturn:
    """Start as `python -I -S -E -c ... CONTROL_FD CONFIG`: lock in, say so, serve until the owner is gone."""
    os.dup2(int(sys.argv[1]), child.CONTROL)
    os.closerange(child.CONTROL + 1, 256)
    control = _socket.socket(fileno=child.CONTROL)
    config = json.loads(sys.argv[2])
    try:
        _load(config)
    except (OSError, ImportError) as e:
        _say(control, {"error": str(e)})
        os._exit(1)
    try:
        place = _namespaces(control, config) if config["level"] == "namespaces" else _landlock(config)
    except ImportError as e:
        _say(control, {"error": str(e)})
        os._exit(1)
    except OSError as e:
        _say(control, {"error": e.strerror or str(e), "refused": True})
        os._exit(1)
    _say(control, {"ready": True, "landlock": place.landlock})
    _serve(control, place)


def _load(config: dict[str, Any]) -> None:
    _preload(name for name in config["preload"].split() if name not in config["packages"]["modules"])
    sys.path[:0] = config["module_paths"]
    for name in config["modules"]:
        __import__(name)
    hidden = {*config["module_paths"], sys.argv[3]}
    sys.path[:] = [path for path in sys.path if path not in hidden]


def _namespaces(control: _socket.socket, config: dict[str, Any]) -> child.Place:
    """Go into namespaces and a file tree of our own. Returns in the first process of the PID namespace only."""
    links = root.host_links(tools=config["tools"])
    syscalls.unshare(_NAMESPACES)
    sources = root.open_sources(config["interpreter"], config["packages"]["folders"], tools=config["tools"])
    ids = _wait_for_ids(control)
    if ids:
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    root.build(sources, links, config["disk_bytes"])
    for fd in sources.values():
        os.close(fd)
    if zygote := os.fork():
        control.close()
        _, status = os.waitpid(zygote, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.drop_bounding_set()
    syscalls.set_capabilities(_KEPT)
    packages = config["packages"]
    sys.path += root.package_folders(packages["folders"])
    _import(packages["modules"])
    _lock_in(root.SCRATCH, config["names"], seccomp.build(forks=config["forks"]))
    return child.Place(1 if ids else None)


def _landlock(config: dict[str, Any]) -> child.Place:
    """Where there are no namespaces: another user where we are root, and a Landlock domain.

    Neither domain lets anything be written but the scratch folder, and a program's not even that.
    """
    abi, user, scratch = landlock.version(), config["user"], config["scratch"]
    if abi < (1 if user else landlock.SCOPES):
        found = f"version {abi}" if abi else "none"
        raise OSError(0, f"landlock: version {landlock.SCOPES} is needed to keep signals in, and there is {found}")
    syscalls.drop_bounding_set()
    _change_user(user)
    os.listdir(scratch)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    place = child.Place(user + 1 if user else None, scratch)
    place.landlock = abi
    seen = [(path, landlock.READ) for path in root.shared(config["interpreter"])]
    packages = config["packages"]
    readable = {folder: names for folder, names in packages["folders"].items() if os.access(folder, os.R_OK | os.X_OK)}
    for folder, names in readable.items():
        seen += [(folder, landlock.READ_DIR), *((f"{folder}/{name}", landlock.READ) for name in names)]
    seen += [(f"/dev/{name}", landlock.DEVICE) for name in root.DEVICES]
    own = landlock.ruleset(abi, [*seen, (scratch, landlock.CHANGE)])
    place.domain = landlock.ruleset(abi, [*seen, (scratch, landlock.READ)])
    place.single = seccomp.one_process()
    if not user:
        place.tasks = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
    landlock.enter(own)
    os.close(own)
    sys.meta_path.append(_Finder(readable))
    _import(packages["modules"])
    _lock_in(scratch, config["names"], seccomp.build(forks=False, apart=False))
    return place


def _change_user(user: int | None) -> None:
    """Be `user`, able to give programs another one and to kill them; None: stay who we are, able to nothing special."""
    if user is None:
        syscalls.set_capabilities(())
        return
    os.setgroups([])
    os.setresgid(user, user, user)
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    os.setresuid(user, user, user)
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 0)
    syscalls.set_capabilities(_KEPT_OUTSIDE)
    if not os.access(os.__file__, os.R_OK):
        raise OSError(0, f"the interpreter: another user cannot read {os.__file__}")


def _preload(names: Iterable[str]) -> None:
    for name in ("_ast", *names):  # the types that `compile` would make in every program
        with contextlib.suppress(ImportError):  # an interpreter built without it: programs find out themselves
            __import__(name)


class _Finder:
    """Finds packages in folders that hold others, too, which programs may not read: those do not exist."""

    def __init__(self, folders: dict[str, list[str]]) -> None:
        self._folders = {entry.split(".")[0]: [folder] for folder, names in folders.items() for entry in names}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if path is not None or name not in self._folders:
            return None
        return importlib.machinery.PathFinder.find_spec(name, self._folders[name], target)


def _import(packages: Iterable[str]) -> None:
    """From within: what cannot be imported here could not be used by programs either."""
    for name in packages:
        try:
            __import__(name)
        except Exception as e:  # foreign code
            raise ImportError(f"package {name}: {type(e).__name__}: {e}") from None


def _wait_for_ids(control: _socket.socket) -> bool:
    """Have the owner write the id maps; whether programs get a user of their own."""
    _say(control, {"unshared": os.getpid()})
    reply = json.loads(control.recv(MAX_MESSAGE) or b"{}")
    if "ids" not in reply:
        raise OSError(0, "the owner could not map user ids")
    return bool(reply["ids"])


def _lock_in(scratch: str, names: str, code: bytes) -> None:
    """What both levels share, the filter last."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    os.environ.clear()
    for name in ONE_THREAD:  # for libraries that programs load, not in what programs see of the environment
        os.putenv(name, "1")
    os.environ.update({"HOME": scratch, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": scratch})
    child.prepare(names)
    seccomp.install(code)
    import gc

    gc.collect()
    gc.freeze()


def _say(control: _socket.socket, value: dict[str, Any]) -> None:
    control.send(json.dumps(value).encode())


REPLY = struct.Struct("<iBBBddQ")
"""Wait status, timed out, scratch folder not clean, CPU limit lowered, wall_s, cpu_s, largest resident set in bytes.

What the program said before its own text ran follows."""


def _serve(control: _socket.socket, place: child.Place) -> NoReturn:
    poll = select.poll()
    poll.register(control.fileno(), select.POLLRDHUP)
    while True:
        message, ancillary, _, _ = control.recvmsg(MAX_MESSAGE, _socket.CMSG_SPACE(MOST_FDS * 4))
        if not message:
            os._exit(0)  # the owner is gone
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds.frombytes(data)
        control.send(_run(list(fds), child.Order(message), poll, place))


def _run(fds: list[int], order: child.Order, poll: select.poll, place: child.Place) -> bytes:
    ready, child_ready = os.pipe()
    started = time.monotonic()
    pid = syscalls.clone(syscalls.CLONE_NEWPID if place.domain is None else 0)
    if pid == 0:
        try:
            child.run(fds, child_ready, order, place)
        finally:
            os._exit(child.SETUP_FAILED)  # whatever happens, the program's process never goes on as a zygote
    os.close(child_ready)
    for fd in fds:  # at once: a peer must see the end when the program closes its side
        os.close(fd)
    # Of many cases each has its own deadline, which the owner watches over.
    limit_s = order.wall_s if order.kind == child.ONE else None
    timed_out = _wait(pid, ready, limit_s, poll, place)
    lowered = _lowered(pid, order, place)
    _, status, usage = os.wait4(pid, 0)
    said = os.read(ready, 4096)
    os.close(ready)
    cpu_s = usage.ru_utime + usage.ru_stime
    wall_s = time.monotonic() - started
    clean = _clean(place)
    return REPLY.pack(status, timed_out, not clean, lowered, wall_s, cpu_s, usage.ru_maxrss * 1024) + said


def _lowered(pid: int, order: child.Order, place: child.Place) -> bool:
    """Whether a program has lowered its own limit of CPU time: the kernel may have killed it as early as it wished."""
    if place.domain is not None:  # there it may kill itself as well, and nobody else takes that for a fault
        return False
    try:
        return 0 <= resource.prlimit(pid, resource.RLIMIT_CPU)[1] < child.whole_cpu_s(order)
    except OSError:  # a security module of the machine's may forbid the look
        return False


def _clean(place: child.Place) -> bool:
    # Under Landlock programs change nothing of the folder: only the files that were laid for them are to go.
    return root.clean_scratch(place.scratch, owned=place.user is None and place.domain is None)


def _wait(pid: int, ready: int, limit_s: float | None, poll: select.poll, place: child.Place) -> bool:
    """Wait for the end of the program; True where its time was up and it was killed, with all that it had started."""
    pidfd = os.pidfd_open(pid)
    poll.register(pidfd, select.POLLIN)
    try:
        events = poll.poll(_ms(limit_s))
        if not events and not _began(ready, 0.0):  # a machine that stands still is not the program's doing
            events = poll.poll(_ms(limit_s)) if _began(ready, SET_UP_S) else []
        if any(fd == pidfd for fd, _ in events):
            return False
        os.kill(pid, signal.SIGKILL)
        if events:  # the owner is gone
            os.waitpid(pid, 0)
            _clean(place)
            os._exit(0)
        return True
    finally:
        poll.unregister(pidfd)
        os.close(pidfd)


def _ms(limit_s: float | None) -> int | None:
    return None if limit_s is None else int(1000 * limit_s) + 1


def _began(ready: int, limit_s: float) -> bool:
    """Whether the program's process is set up, or has ended, within so long."""
    poll = select.poll()
    poll.register(ready, select.POLLIN)
    return bool(poll.poll(_ms(limit_s)))
