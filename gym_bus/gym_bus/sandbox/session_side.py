"""A Python session inside the sandbox: runs the code of call after call in one namespace. Standard library only.

The code shares this process and can change all of it: the owner believes nothing that is sent from here, and ends the
session from outside.
"""

from __future__ import annotations

import array
import ast
import builtins
import contextlib
import io
import linecache
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

FD = 3
NONCE_BYTES = 8
RESULT_BYTES = 8192
"""Of a call's value or traceback."""
_BROKEN = 70
"""Exit code of a session whose own machinery was damaged by the code in it."""
_SUBMITTED = ("<call ", "<string>", "/tmp/")
"""Files of code that came with a call, by how their names begin."""


def main() -> NoReturn:
    """Serve calls until the owner is gone. Replaces the program: runs as the process's only code, never returns."""
    try:
        _serve(socket.socket(fileno=FD))
    finally:
        os._exit(_BROKEN)


def _serve(owner: socket.socket) -> NoReturn:
    os.set_inheritable(FD, False)
    sys.path.insert(0, "")  # as in an interactive interpreter: what was written to the scratch folder can be imported
    names = sys.modules["__main__"].__dict__
    names.pop("main", None)
    console, interpreter, me = _Console(), Interpreter(names), os.getpid()
    while True:
        nonce, source, output = _receive(owner)
        console.connect(output)
        result = interpreter.run(source)
        if os.getpid() != me:  # a child that the code forked and that came to the code's end
            _leave(result)
        _end_other_processes()
        owner.send(nonce + result)


def _receive(owner: socket.socket) -> tuple[bytes, str, int]:
    """The next call: its nonce, its code, and the file for what it prints."""
    nonce, ancillary, _, _ = owner.recvmsg(NONCE_BYTES, socket.CMSG_SPACE(2 * 4))
    if not nonce:
        os._exit(0)
    fds = array.array("i")
    for _level, _kind, received in ancillary:
        fds.frombytes(received)
    code, output = fds
    source = os.pread(code, os.fstat(code).st_size, 0)
    os.close(code)
    return nonce, source.decode(), output


def _leave(result: bytes) -> NoReturn:
    try:
        os.write(2, result)
    finally:
        os._exit(0)


def _end_other_processes() -> None:
    """End and reap what the call has left running."""
    if os.getpid() != 1:  # only as the first of a PID namespace of its own; anywhere else it would end its host
        return
    while True:
        with contextlib.suppress(OSError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class _Output(io.RawIOBase):
    """Standard output or error of the call that runs; what is over its bound is dropped, and the code goes on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """1 or 2."""
        return self._fd

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """All of it is taken."""
        with contextlib.suppress(OSError):
            os.write(self._fd, data)
        return len(data)


class _Console:
    """`sys.stdout` and `sys.stderr`. They are not buffered: in order, and whole when the call is killed."""

    def __init__(self) -> None:
        self._streams = (_stream(1), _stream(2))

    def connect(self, output: int) -> None:
        """Let both go to the file of a new call, whatever the last one did to them."""
        os.dup2(output, 1)
        os.dup2(output, 2)
        if output > 2:  # it takes the place of one that the code has closed
            os.close(output)
        if not all(map(_usable, self._streams)):
            self._streams = (_stream(1), _stream(2))
        sys.stdout, sys.stderr = self._streams


def _stream(fd: int) -> io.TextIOWrapper:
    # Over the raw file, as `python -u` does it.
    return io.TextIOWrapper(_Output(fd), "utf-8", "backslashreplace", write_through=True)  # type: ignore[arg-type]


def _usable(stream: io.TextIOWrapper) -> bool:
    try:
        return not stream.closed
    except ValueError:  # detached
        return False


class Interpreter:
    """Runs code in a namespace as an interactive interpreter does."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names, self._calls = names, 0

    def run(self, source: str) -> bytes:
        """What a call has to show besides what it printed: UTF-8, its last expression's value or its traceback."""
        self._calls += 1
        file = f"<call {self._calls}>"
        # Without a time stamp the entry is never checked against a file, so tracebacks can show the code's lines.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        try:
            return _head(self._value(source, file))
        except SystemExit as e:
            return _head(f"[The code called exit({_exit_code(e)}) and stopped there; the session goes on.]")
        except BaseException as e:
            return _tail(_traceback(e))

    def _value(self, source: str, file: str) -> str:
        tree = ast.parse(source, file)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, file, "exec", dont_inherit=True), self._names)
        if not isinstance(last, ast.Expr):
            return ""
        value = eval(compile(ast.Expression(last.value), file, "eval", dont_inherit=True), self._names)
        if value is None:
            return ""
        vars(builtins)["_"] = value
        return repr(value)


def _exit_code(e: SystemExit) -> str:
    try:
        return "" if e.code is None else repr(e.code)
    except BaseException:
        return "..."


def _traceback(error: BaseException) -> str:
    """As the interpreter prints it, without the frames of libraries and of this file."""
    try:
        shown = traceback.TracebackException.from_exception(error, compact=True)
        _keep_submitted(shown)
        return "".join(shown.format()).rstrip("\n")
    except BaseException:  # its own methods may raise anything
        return type(error).__name__


def _keep_submitted(shown: traceback.TracebackException) -> None:
    waiting: list[traceback.TracebackException | None] = [shown]
    while waiting:
        error = waiting.pop()
        if error is None:
            continue
        error.stack[:] = [
            frame for frame in error.stack if frame.filename.startswith(_SUBMITTED) and frame.filename != __file__
        ]
        waiting += [error.__cause__, error.__context__, *(getattr(error, "exceptions", None) or ())]
        if not error.stack:  # a syntax error: the interpreter shows no heading over no frames
            error.stack = None  # type: ignore[assignment]


def _head(text: str) -> bytes:
    data = text.encode(errors="backslashreplace")
    return data if len(data) <= RESULT_BYTES else data[:RESULT_BYTES] + b" [cut: it is %d bytes long]" % len(data)


def _tail(text: str) -> bytes:
    """The end of a traceback is what says most."""
    data = text.encode(errors="backslashreplace")
    return data if len(data) <= RESULT_BYTES else b"[cut: its end is shown] " + data[-RESULT_BYTES:]
