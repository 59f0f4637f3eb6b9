"""What runs around a solution in its sandbox: defines its names, then serves calls until the tester is done.

Standard library only. Everything here is in reach of the solution; the tester therefore believes nothing but data.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from gym_bus.verifiers import wire_values
from gym_bus.verifiers.call_side import solution_names

FD = 3


class Server:
    """Serves the names of one solution."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names
        self._objects: list[Any] = []

    def _handle(self, value: Any) -> Any:
        self._objects.append(value)
        try:
            truth = bool(value)
        except BaseException:
            truth = True
        return [wire_values.HANDLE, len(self._objects) - 1, truth]

    def _object(self, frame: Any) -> Any:
        return self._objects[int(frame[1])]

    def answer(self, request: Any) -> Any:
        """The reply to one request."""
        kind, what = request[0], request[1]
        if kind == "has":
            return ["ok", what in self._names]
        try:
            if kind == "call":
                target = self._names[what]
            elif kind == "callh":
                target = self._object(what)
            elif kind == "attr":
                return ["ok", self._encoded(getattr(self._object(what), request[2]))]
            else:
                setattr(self._object(what), request[2], wire_values.decode(request[3], self._object))
                return ["ok", None]
            arguments = wire_values.decode(request[2], self._object)
            keywords = wire_values.decode(request[3], self._object)
            return ["ok", self._encoded(target(*arguments, **keywords))]
        except BaseException as e:  # SystemExit and KeyboardInterrupt are the solution's doing, too
            return ["raised", type(e).__name__[:200], _said(e)]

    def _encoded(self, value: Any) -> Any:
        try:
            return wire_values.encode(value, self._handle)
        except (wire_values.NotData, RecursionError):
            return self._handle(value)

    def serve(self) -> None:
        """Until the tester closes its end."""
        while True:
            try:
                request = wire_values.receive(FD)
            except wire_values.ProtocolError:
                return
            self.reply(FD, request)

    def reply(self, fd: int, request: Any) -> None:
        """Answer one request."""
        self.say(fd, self.answer(request))

    def say(self, fd: int, answer: Any) -> None:
        """Write an answer, or that it is too large."""
        try:
            wire_values.send(fd, answer)
        except wire_values.NotData:
            wire_values.send(fd, ["raised", "ValueError", "the result is too large"])


def _said(e: BaseException) -> str:
    try:
        return f"{type(e).__name__}: {e}"[:500]
    except BaseException:
        return "an exception that cannot be shown"


def main(source: str) -> None:
    """Run the solution's text, say whether that worked, serve."""
    _print_nowhere()
    if (server := _loaded(source, FD)) is not None:
        server.serve()


def answer_all(source: str) -> None:
    """Run the solution's text, then the calls that standard input holds; the replies are the standard output."""
    requests, replies = wire_values.receive(0), os.dup(1)
    _print_nowhere()
    if (server := _loaded(source, replies)) is not None:
        for request in requests:
            if server.answer(["has", request[0]]) == ["ok", True]:
                server.reply(replies, ["call", *request])
            else:
                wire_values.send(replies, ["missing", request[0]])


def answer_within(source: str) -> None:
    """As `answer_all`, for calls of a name, arguments and a limit in seconds; each reply ends with the seconds it took.

    A call past its limit is the last one, with "slow" as its reply. A solution can reach the clock and the alarm: what
    it gains is time, which the limits of the sandbox bound.
    """
    requests, replies = wire_values.receive(0), os.dup(1)
    _print_nowhere()

    def too_slow(*_: Any) -> None:
        wire_values.send(replies, ["slow"])
        os._exit(0)

    if (server := _loaded(source, replies)) is not None:
        signal.signal(signal.SIGALRM, too_slow)
        for name, arguments, limit_s in requests:
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            answer = server.answer(["call", name, arguments, wire_values.NO_KEYWORDS])
            signal.setitimer(signal.ITIMER_REAL, 0)
            server.say(replies, [*answer, time.monotonic() - started])


def _print_nowhere() -> None:
    nowhere = os.open("/dev/null", os.O_WRONLY)
    for fd in (1, 2):  # what it prints is not judged, and must not fill anything
        os.dup2(nowhere, fd)


def _loaded(source: str, fd: int) -> Server | None:
    """The solution's names, once its text has run; on `fd` it is said whether that worked."""
    names = solution_names()
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), names)
    except SyntaxError as e:
        wire_values.send(fd, ["compile_error", _said(e)])
        return None
    except BaseException as e:
        wire_values.send(fd, ["raised", type(e).__name__, _said(e)])
        return None
    wire_values.send(fd, ["ready"])
    return Server(names)
