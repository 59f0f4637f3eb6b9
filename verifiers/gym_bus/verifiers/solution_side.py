"""What runs around a solution in its sandbox: defines its names, then serves calls until the tester is done.

Standard library only. Everything here is in reach of the solution; the tester therefore believes nothing but data.
"""

from __future__ import annotations

import os
import traceback
from typing import Any

from gym_bus.verifiers import wire_values

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
        return ["h", len(self._objects) - 1, truth]

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
            try:
                wire_values.send(FD, self.answer(request))
            except wire_values.NotData:
                wire_values.send(FD, ["raised", "ValueError", "the result is too large"])


def _said(e: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(e), e))[-500:]
    except BaseException:
        return "an exception that cannot be shown"


def main(source: str) -> None:
    """Run the solution's text, say whether that worked, serve."""
    nowhere = os.open("/dev/null", os.O_WRONLY)
    for fd in (1, 2):  # what it prints is not judged, and must not fill anything
        os.dup2(nowhere, fd)
    names: dict[str, Any] = {"__name__": "solution", "__builtins__": __builtins__}
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), names)
    except SyntaxError as e:
        wire_values.send(FD, ["compile_error", _said(e)])
        return
    except BaseException as e:
        wire_values.send(FD, ["raised", type(e).__name__, _said(e)])
        return
    wire_values.send(FD, ["ready"])
    Server(names).serve()
