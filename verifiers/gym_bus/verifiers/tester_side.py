"""What runs the tests in their own sandbox: names of the solution are proxies, and only data comes back.

Standard library only. The report goes to the tester's own standard output, which no solution can reach.
"""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from typing import Any

from gym_bus.verifiers import wire_values

FD = 3


class SolutionRaised(Exception):
    """The solution raised; the tests see this and no class of the solution's own."""


class Handle:
    """Something of the solution's that is no data: it can be handed back, called and tested for truth, no more.

    It equals nothing, itself excepted, whatever `__eq__` the object behind it has.
    """

    _client: Client
    _frame: list[Any]

    def __init__(self, client: Client, frame: list[Any]) -> None:
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_frame", frame)

    def __bool__(self) -> bool:
        return bool(self._frame[2])

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call what the handle stands for."""
        return self._client.call("callh", self._frame, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._client.ask(["attr", self._frame, name])

    def __setattr__(self, name: str, value: Any) -> None:
        self._client.ask(["set", self._frame, name, wire_values.encode(value, _frame_of)])


class Client:
    """The tester's end of the socket."""

    def __init__(self) -> None:
        self.reason = ""
        """Why the solution could not be loaded, empty where it could."""
        self.detail = ""

    def start(self) -> bool:
        """Wait for the solution to be loaded."""
        said = wire_values.receive(FD)
        if said == ["ready"]:
            return True
        whole = isinstance(said, list) and len(said) > 1
        self.reason = "compile_error" if whole and said[0] == "compile_error" else "runtime_error"
        self.detail = shown(said[-1] if whole else "it did not say that it was loaded", 500)
        return False

    def ask(self, request: list[Any]) -> Any:
        """One exchange."""
        wire_values.send(FD, request)
        reply = wire_values.receive(FD)
        if not isinstance(reply, list) or not reply or reply[0] not in ("ok", "raised"):
            raise wire_values.ProtocolError("no such reply")
        if reply[0] == "raised":
            raise SolutionRaised(shown(reply[-1], 500))
        return wire_values.decode(reply[-1], lambda frame: Handle(self, frame))

    def call(self, kind: str, what: Any, arguments: Any, keywords: Any) -> Any:
        """Call something of the solution's."""
        packed = [wire_values.encode(part, _frame_of) for part in (tuple(arguments), dict(keywords))]
        return self.ask([kind, what, *packed])


def shown(value: Any, limit: int = 300) -> str:
    """What a solution or a test said, as text that any reader of JSON takes: no lone surrogates.

    What has no text, as an integer of ten thousand digits, is named by its type: a solution chooses what is shown.
    """
    try:
        text = str(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text[:limit].encode(errors="replace").decode()


def _frame_of(value: Any) -> Any:
    if isinstance(value, Handle):
        return value._frame
    raise TypeError(f"a test may not hand a {type(value).__name__} to a solution")


class Proxy:
    """A name of the solution's."""

    def __init__(self, client: Client, name: str) -> None:
        self._client, self._name = client, name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the solution's function of that name."""
        return self._client.call("call", self._name, arguments, keywords)


class Names(dict[str, Any]):
    """The namespace of a test: what it does not define itself is looked for in the solution."""

    def __init__(self, client: Client, asked_for: Sequence[str]) -> None:
        super().__init__()
        self._client, self._asked_for = client, frozenset(asked_for)

    def __missing__(self, name: str) -> Any:
        # Built-ins and the standard library are the tester's own: a solution's `set` must not judge itself.
        if hasattr(builtins, name) and name not in self._asked_for:
            raise KeyError(name)
        if name in sys.stdlib_module_names:
            return __import__(name)
        if not self._client.ask(["has", name]):
            raise KeyError(name)
        return Proxy(self._client, name)


def main(setup: str, tests: list[str], nonce: str, entry_point: str, asked_for: Sequence[str]) -> None:
    """Run the tests one by one until one fails, and report.

    Args:
        setup: trusted code that runs before the tests.
        tests: trusted code; raises where the solution is wrong.
        nonce: marks the report.
        entry_point: the solution's function that is `candidate` in the tests; empty where every name that the tests
            do not know means the solution's.
        asked_for: names that the task asks the solution to define, even where they are built-in ones.
    """
    client = Client()
    results: list[dict[str, Any]] = []
    try:
        code = compile(setup, "setup.py", "exec", dont_inherit=True)
        compiled = [compile(test, "test.py", "exec", dont_inherit=True) for test in tests]
        if client.start():
            results = [_run_one(code, test, client, entry_point, asked_for) for test in compiled]
    except wire_values.ProtocolError as e:
        client.reason, client.detail = "ended", shown(e)
    except (SyntaxError, ValueError) as e:
        client.reason, client.detail = "task_broken", shown(f"{type(e).__name__}: {e}")
    report = {"nonce": nonce, "reason": client.reason, "detail": client.detail, "tests": results}
    sys.stdout.write("\n" + json.dumps(report) + "\n")
    sys.stdout.flush()


def _run_one(setup: Any, test: Any, client: Client, entry_point: str, asked_for: Sequence[str]) -> dict[str, Any]:
    names: Any = {} if entry_point else Names(client, asked_for)
    names["__name__"] = "tests"
    try:
        exec(setup, names)
        if entry_point:
            names["candidate"] = names[entry_point] = Proxy(client, entry_point)
        exec(test, names)
    except AssertionError as e:
        return {"passed": False, "reason": "wrong_answer", "detail": shown(e)}
    except wire_values.ProtocolError as e:
        return {"passed": False, "reason": "ended", "detail": shown(e)}
    except SolutionRaised as e:
        return {"passed": False, "reason": "runtime_error", "detail": shown(e)}
    except BaseException as e:
        return {"passed": False, "reason": "wrong_answer", "detail": shown(f"{type(e).__name__}: {e}")}
    return {"passed": True}
