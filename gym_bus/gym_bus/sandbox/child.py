"""One program's process, from the fork to its end. Standard library only: runs in the zygote's child.

The program's text, arguments and files come through a descriptor that only this process reads. What a program needs of
Python is made before the fork: every page that is first written here costs a page fault.
"""

from __future__ import annotations

import _socket
import _thread
import array
import atexit
import builtins
import io
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from typing import Any, NoReturn

from gym_bus.sandbox import landlock, root, seccomp, syscalls

COMPILE_FAILED, SETUP_FAILED = 65, 66
"""Exit codes before the program's own text runs."""
BEGAN, NOT_COMPILED, NOT_SET_UP = b"R", b"RC", b"E"
"""What the pipe to the zygote holds in the end; it is closed before the program's own text runs."""
ONE, CASES = 0, 1
"""Kinds of order: one program, one run; or one program that is run once for each message on its socket."""

ORDER = struct.Struct("<BddQQIII")
"""kind, wall_s, cpu_s, address space, file size (bytes), processes, length of the source, length of the header."""
CASE = struct.Struct("<iBBddQ")
"""Of one case: wait status, timed out, scratch folder not clean, wall_s, cpu_s, largest resident set in bytes."""
CONTROL, LAST_FD = 3, 64
"""The zygote's own socket, which a program's replaces; no descriptor has a number of LAST_FD or more."""
CASE_FDS = 3


class Order:
    """What to run, unpacked."""

    __slots__ = ("address_bytes", "cpu_s", "file_bytes", "header_size", "kind", "processes", "source_size", "wall_s")

    def __init__(self, packed: bytes) -> None:
        (
            self.kind,
            self.wall_s,
            self.cpu_s,
            self.address_bytes,
            self.file_bytes,
            self.processes,
            self.source_size,
            self.header_size,
        ) = ORDER.unpack(packed)


class Place:
    """Where a zygote's programs run, and as whom."""

    __slots__ = ("domain", "landlock", "scratch", "single", "tasks", "user", "zygote")

    def __init__(self, user: int | None, scratch: str = root.SCRATCH) -> None:
        self.user = user
        """Id of the programs' user and group; None where they keep the zygote's."""
        self.scratch = scratch
        self.domain: int | None = None
        """Landlock ruleset that a program is bound by, where no namespaces hold it."""
        self.single = b""
        """With a domain: the filter that keeps a program to one process."""
        self.tasks: int | None = None
        """With a domain and no user: descriptor of /proc/loadavg, which counts the machine's tasks."""
        self.landlock = 0
        """Version of Landlock, with a domain."""
        self.zygote = os.getpid()


class _Stderr(io.RawIOBase):
    """Standard error that is cut at its limit: what is over it is dropped, and the program goes on."""

    def fileno(self) -> int:
        """2."""
        return 2

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """All of it is taken."""
        try:
            os.write(2, data)
        except OSError:
            pass
        return len(data)


_main = types.ModuleType("__main__")


def prepare(names: str) -> None:
    """Make, in the zygote, what every program needs; what `names`, a text, defines is as if built in."""
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Stderr()), errors="backslashreplace", line_buffering=True)
    _main.__dict__.update(__builtins__=builtins, __file__="main.py")
    sys.modules["__main__"] = _main
    sys.argv, sys.orig_argv = ["main.py"], ["main.py"]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as `site` has it, which an isolated interpreter leaves out
    if names:
        found: dict[str, Any] = {}
        exec(names, found)
        # Not into the module: a program's first look at a page of five hundred names would copy it.
        _main.__dict__["__builtins__"] = {**builtins.__dict__, **found, "__builtins__": builtins}
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # or a program interrupts what it cannot kill
    for kind, value in (
        (resource.RLIMIT_NOFILE, LAST_FD),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def run(fds: list[int], ready: int, order: Order, place: Place) -> NoReturn:
    """Become the program. Never returns.

    Args:
        fds: stdin, stdout, stderr, the packed program, and the program's socket where it has one; none below 4.
        ready: pipe to the zygote, which hears by it how far this came.
        order: kind and limits.
        place: where to run, and as whom.
    """
    try:
        os.setsid()  # or `kill(0)` reaches the zygote, where it is of the same user
        _limit(order, place)
        if place.domain is None:
            _become_nobody(place.user)
        source, header = _set_up(fds, order, place)
        if place.domain is not None:  # the files are laid: from here on nothing can be written
            _confine(order, place, place.domain)
        os.closerange(CONTROL + 1, ready)
        os.closerange(ready + 1, LAST_FD)
    except BaseException as e:  # whatever fails here is the sandbox's fault, and is said on the way out
        os.write(ready, NOT_SET_UP + f"{type(e).__name__}: {e}".encode(errors="replace")[:500])
        os._exit(SETUP_FAILED)
    os.write(ready, BEGAN)  # what happens from here on is the program's doing, what it does to the compiler included
    code = _compiled(source, ready) if "argv" not in header else _built(header, order, ready)
    os.close(ready)
    if order.kind == CASES:
        _serve_cases(code, order, header, place)
    _execute(code)


def whole_cpu_s(order: Order) -> int:
    """The kernel's limit of CPU time, which it counts in seconds."""
    return max(1, -int(-order.cpu_s // 1))


def _limit(order: Order, place: Place) -> None:
    cpu = whole_cpu_s(order)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    if order.address_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (order.address_bytes, order.address_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes, order.file_bytes))
    processes = order.processes
    if place.tasks is not None:  # the kernel counts all that the user runs
        processes += int(os.pread(place.tasks, 256, 0).partition(b"/")[2].partition(b" ")[0])
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def _become_nobody(user: int | None) -> None:
    if user is not None:  # from 0, the kernel takes all capabilities, and makes the process undumpable
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:
        syscalls.set_capabilities(())


def _confine(order: Order, place: Place, domain: int) -> None:
    """Without namespaces: a Landlock domain within the zygote's, and one process that ends with the zygote."""
    if order.kind != ONE:
        raise OSError(0, "without namespaces a program runs once")
    landlock.enter(domain)
    _become_nobody(place.user)
    if place.user is not None:  # from an id that is not 0, the kernel leaves capabilities
        syscalls.set_capabilities(())
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != place.zygote:
        os._exit(SETUP_FAILED)  # it ended before it could take this process with it
    seccomp.install(place.single)


def _set_up(fds: list[int], order: Order, place: Place) -> tuple[bytes, dict[str, Any]]:
    os.dup2(fds[0], 0)
    os.dup2(fds[1], 1)
    os.dup2(fds[2], 2)
    packed = _read(fds[3], order.source_size + order.header_size)
    if len(fds) > 4:
        os.dup2(fds[4], CONTROL)
    else:
        os.close(CONTROL)
    os.chdir(place.scratch)
    _reseed()
    if not order.header_size:
        return packed, {}
    return packed[: order.source_size], _unpack(packed[order.source_size :], place.scratch)


def _unpack(packed: bytes, scratch: str) -> dict[str, Any]:
    """Arguments and files: a JSON header behind its length, then the files' contents."""
    size = int.from_bytes(packed[:4], "little")
    header: dict[str, Any] = json.loads(packed[4 : 4 + size])
    start = 4 + size
    for name, length in header["files"]:
        path = os.path.join(scratch, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(packed[start : start + length])
        start += length
    sys.argv = ["main.py", *header["arguments"]]
    return header


def _reseed() -> None:
    """Where a generator is loaded already; who imports one gets a seed then."""
    for name in ("random", "numpy.random"):
        if random := sys.modules.get(name):
            random.seed()


def _read(fd: int, size: int) -> bytes:
    data = os.pread(fd, size, 0)
    if len(data) != size:
        raise OSError(0, "the program is not whole")
    return data


def _compiled(source: bytes, ready: int) -> Any:
    try:
        return compile(source, "main.py", "exec", dont_inherit=True)
    except BaseException as e:  # null bytes, bad encodings, recursion: all the program's own doing
        _print_error(e, None)
        _does_not_compile(ready)


def _does_not_compile(ready: int) -> NoReturn:
    os.write(ready, NOT_COMPILED[len(BEGAN) :])
    os._exit(COMPILE_FAILED)


def _built(header: dict[str, Any], order: Order, ready: int) -> list[str]:
    """The command of a program in another language, once what has to be built is built."""
    if build := header.get("build"):
        pid = syscalls.clone()
        if pid == 0:
            os.closerange(CONTROL, LAST_FD)
            _become(build)
        if not _ended(pid, time.monotonic() + order.wall_s):
            os.write(2, b"the build took too long\n")
        if os.waitpid(pid, 0)[1] != 0:
            _does_not_compile(ready)
    command: list[str] = header["argv"]
    return command


def _become(command: list[str]) -> NoReturn:
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, for itself
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execve(command[0], command, os.environ)
    except OSError as e:
        os.write(2, f"{command[0]}: {e.strerror}\n".encode())
    os._exit(127)


# -- one program, many cases ---------------------------------------------------------------------------------------


def _serve_cases(code: Any, order: Order, header: dict[str, Any], place: Place) -> NoReturn:
    """Run the program once for each message on the socket, each time in a fresh process; nothing here is its code."""
    owner = _socket.socket(fileno=CONTROL)
    kept = {name.split("/")[0] for name, _ in header.get("files", ())} | set(header.get("kept", ()))
    while True:
        data, ancillary, _, _ = owner.recvmsg(64, _socket.CMSG_SPACE(CASE_FDS * 4))
        if not data:
            os._exit(0)
        fds = array.array("i")
        for _level, _kind, received in ancillary:
            fds.frombytes(received)
        owner.send(_run_case(code, list(fds), order, kept, place))


def _run_case(code: Any, fds: list[int], order: Order, kept: set[str], place: Place) -> bytes:
    started = time.monotonic()
    pid = syscalls.clone()
    if pid == 0:
        for target in range(CASE_FDS):
            os.dup2(fds[target], target)
        os.closerange(CONTROL, LAST_FD)
        try:
            os.setsid()
            _reseed()
            if isinstance(code, list):
                _become(code)
            _execute(code)
        finally:
            os._exit(SETUP_FAILED)
    for fd in fds:
        os.close(fd)
    timed_out = not _ended(pid, started + order.wall_s)
    _, status, usage = os.wait4(pid, 0)
    _kill_the_rest()
    cpu_s = usage.ru_utime + usage.ru_stime
    wall_s = time.monotonic() - started
    clean = root.clean_scratch(place.scratch, kept, owned=place.user is None)
    return CASE.pack(status, timed_out, not clean, wall_s, cpu_s, usage.ru_maxrss * 1024)


def _ended(pid: int, deadline: float) -> bool:
    """Wait for a process to end; False where its time was up and it was killed."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if poll.poll(max(0, int(1000 * (deadline - time.monotonic())) + 1)):
            return True
        os.kill(pid, signal.SIGKILL)
        return False
    finally:
        os.close(pidfd)


def _kill_the_rest() -> None:
    """End and reap whatever the case has left behind; this process is the first of its PID namespace."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# -- the program itself --------------------------------------------------------------------------------------------


def _execute(code: Any) -> NoReturn:
    status = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(code, _main.__dict__)
    except SystemExit as e:
        status = _exit_status(e)
    except BaseException as e:
        status = 1
        _print_error(e, e.__traceback__.tb_next if e.__traceback__ else None)
    _finish(status)


def _exit_status(e: SystemExit) -> int:
    if e.code is None:
        return 0
    if isinstance(e.code, int):
        return e.code & 0xFF
    try:
        print(e.code, file=sys.stderr)
    except BaseException:
        pass
    return 1


def _print_error(e: BaseException, frames: types.TracebackType | None) -> None:
    try:
        sys.excepthook(type(e), e.with_traceback(frames), frames)
    except BaseException:
        pass


def _finish(status: int) -> NoReturn:
    """What the interpreter does at its end: other threads, exit hooks, open buffers."""
    try:
        if _thread._count() and (threading := sys.modules.get("threading")):
            threading._shutdown()
        if atexit._ncallbacks():
            atexit._run_exitfuncs()
    except BaseException:
        pass
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            status = status or 120  # as the interpreter exits when its output is lost
    os._exit(status)
