"""One program's process, from the fork to its end. Standard library only: runs in the zygote's child.

The program's text, arguments and files come through a descriptor that only this process reads.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import traceback
from typing import Any, NoReturn

from gym_bus.sandbox import syscalls

COMPILE_FAILED, SETUP_FAILED = 65, 66
"""Exit codes before the program's own text runs; the zygote believes them only then."""
MAX_PROGRAM_BYTES = 256 * 2**20


def run(fds: list[int], ready: int, limits: dict[str, Any], ids: bool) -> NoReturn:
    """Become the program. Never returns.

    Args:
        fds: stdin, stdout, stderr, the packed program, and for a pair the socket.
        ready: pipe to the zygote: a byte goes in just before the program's own text runs.
        limits: as the zygote got them.
        ids: switch to a user of the program's own.
    """
    pipe = [ready]
    try:
        _limit(limits)
        _become_nobody(ids)
        source, arguments = _set_up(fds, pipe)
    except BaseException as e:  # whatever fails here is the sandbox's fault, and is said on the way out
        os.write(pipe[0], b"E" + f"{type(e).__name__}: {e}".encode(errors="replace")[:500])
        os._exit(SETUP_FAILED)
    try:
        code = compile(source, "main.py", "exec", dont_inherit=True)
    except BaseException as e:  # null bytes, bad encodings, recursion: all the program's own doing
        os.write(2, "".join(traceback.format_exception_only(type(e), e)).encode(errors="replace")[:4000])
        os._exit(COMPILE_FAILED)
    os.write(READY, b"R")
    os.close(READY)
    sys.argv = ["main.py", *arguments]
    _execute(code)


READY = 9
"""Where the pipe lies while the program is being set up."""


def _limit(limits: dict[str, Any]) -> None:
    cpu = max(1, -int(-limits["cpu_s"] // 1))
    for kind, value in (
        (resource.RLIMIT_AS, limits["address_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    # First a signal that says what it is for, then, to a program that ignores it, the one that none can ignore.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))


def _become_nobody(ids: bool) -> None:
    if ids:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    syscalls.set_capabilities(())
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def _set_up(fds: list[int], pipe: list[int]) -> tuple[bytes, list[str]]:
    # Out of the way of the low numbers first, then into place: no dup2 overwrites one that is still needed.
    high = [os.dup2(fd, 20 + i, inheritable=False) for i, fd in enumerate([*fds, *pipe])]
    for target in range(3):
        os.dup2(high[target], target)
    if len(fds) > 4:
        os.dup2(high[4], 3)
    else:
        os.closerange(3, 4)
    os.dup2(high[-1], READY, inheritable=False)
    pipe[0] = READY
    program = os.dup2(high[3], 10, inheritable=False)
    os.closerange(4, READY)
    os.closerange(11, 4096)
    packed = _read(program)
    os.close(program)
    size = int.from_bytes(packed[:4], "little")
    header = json.loads(packed[4 : 4 + size])
    os.chdir("/tmp")
    for name, (start, end) in header["files"].items():
        os.makedirs(os.path.dirname(os.path.join("/tmp", name)), exist_ok=True)
        with open(os.path.join("/tmp", name), "wb") as file:
            file.write(packed[start:end])
    random.seed()
    return packed[header["source"] :], header["arguments"]


def _read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    return os.read(fd, MAX_PROGRAM_BYTES)


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


def _execute(code: Any) -> NoReturn:
    import builtins
    import types

    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Stderr()), errors="backslashreplace", line_buffering=True)
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__="main.py")
    sys.modules["__main__"] = main
    status = 0
    try:
        exec(code, main.__dict__)
    except SystemExit as e:
        status = _exit_status(e)
    except BaseException as e:
        status = 1
        _print_error(e)
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


def _print_error(e: BaseException) -> None:
    try:
        frames = e.__traceback__.tb_next if e.__traceback__ else None
        text = "".join(traceback.format_exception(type(e), e, frames))
        os.write(2, text.encode(errors="replace")[-16_000:])
    except BaseException:
        pass


def _finish(status: int) -> NoReturn:
    """What the interpreter does at its end: other threads, exit hooks, open buffers."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        pass
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            status = status or 120  # as the interpreter exits when its output is lost
    os._exit(status)
