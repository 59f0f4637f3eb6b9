"""The two sides of a function check and the caller of functions, in this process, over a socket pair."""

from __future__ import annotations

import collections
import contextlib
import enum
import io
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gym_bus.verifiers import call_side, solution_side, tester_side, wire_values

Report = dict[str, Any]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The tester's end and the solution's."""
    first, second = socket.socketpair()
    monkeypatch.setattr(tester_side, "FD", first.fileno())
    monkeypatch.setattr(solution_side, "FD", second.fileno())
    yield first, second
    first.close()
    second.close()


@pytest.fixture
def against(ends: tuple[socket.socket, socket.socket], capsys: pytest.CaptureFixture[str]) -> Callable[..., Report]:
    """Runs a solution against tests and returns the tester's report."""

    def run(solution: str, *tests: str, setup: str = "", entry_point: str = "", names: tuple[str, ...] = ()) -> Report:
        def solve() -> None:
            with contextlib.suppress(wire_values.ProtocolError):  # the tester may be gone before it is ready
                solution_side.main(solution)
            ends[1].shutdown(socket.SHUT_RDWR)

        serving = threading.Thread(target=solve)
        serving.start()
        tester_side.main(setup, list(tests), "nonce", entry_point, names)
        ends[0].shutdown(socket.SHUT_RDWR)
        serving.join()
        report: Report = json.loads(capsys.readouterr().out.splitlines()[-1])
        return report

    return run


PASSED = {"passed": True}


def test_tests_pass_one_by_one(against: Callable[..., Report]) -> None:
    report = against("def add(a, b=1): return a + b", "assert add(1) == 2", "assert add(1, b=2) == 3")

    assert report == {"nonce": "nonce", "reason": "", "detail": "", "tests": [PASSED, PASSED]}


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("assert f([1]) == [1, 9]", None),
        ("assert f == 5", "wrong_answer"),
        ("assert f([1]) == 5, 'why'", "wrong_answer"),
        ("assert f(1) == 5", "runtime_error"),
        ("assert missing(1) == 5", "wrong_answer"),
        ("assert leave() == 5", "runtime_error"),
        ("assert thing() == thing()", "wrong_answer"),
        ("assert thing() == 5", "wrong_answer"),
        ("assert not empty()", None),
        ("assert bool(thing())", None),
        ("x = thing(); assert x.n == 3; x.n = [4]; assert x.n == [4]; assert x.double(2) == 4", None),
        ("assert thing()._secret == 1", "wrong_answer"),
        ("assert thing().missing == 1", "runtime_error"),
        ("x = thing(); assert same(x) and same(x, x) is True", None),
        ("assert call(lambda: 1) == 1", "wrong_answer"),
        ("assert make_call()(4) == 5", None),
        ("assert deep() == 1", "wrong_answer"),
        ("assert huge() == 1", "runtime_error"),
        ("assert math.isclose(f([1])[0], 1)", None),
        ("assert len(sorted(f([1]))) == 2", None),
        ("assert hides_itself() == 1", "runtime_error"),
        ("assert untrue() == 1", "wrong_answer"),
    ],
)
def test_each_test_sees_the_solutions_names_through_data(
    against: Callable[..., Report], test: str, reason: str | None
) -> None:
    solution = """
import sys
class Thing:
    n, _secret = 3, 1
    def double(self, x): return 2 * x
    def __eq__(self, other): return True
    def __hash__(self): return 1
class Empty:
    def __len__(self): return 0
class Untrue:
    def __bool__(self): raise ValueError
class Hidden(Exception):
    def __init_subclass__(cls): pass
    @property
    def __notes__(self): raise SystemExit
    def __str__(self): raise SystemExit
def f(x): return x + [9]
def leave(): sys.exit(0)
def thing(): return Thing()
def empty(): return Empty()
def untrue(): return Untrue()
def same(x, y=None): return type(x) is Thing
def call(g): return g()
def make_call(): return lambda x: x + 1
def huge(): return "x" * 10**7
def hides_itself(): raise Hidden
def deep():
    x = []
    for _ in range(100): x = [x]
    return x
def math(): return 1
def sorted(x): return []
def len(x): return 2
"""
    result = against(solution, test)["tests"][0]

    assert result == PASSED if reason is None else result["reason"] == reason


def test_names_that_the_task_asks_for_are_the_solutions_even_where_they_are_built_in(
    against: Callable[..., Report],
) -> None:
    assert against("def sum(a, b): return a * b", "assert sum(3, 4) == 12", names=("sum",))["tests"] == [PASSED]


def test_an_entry_point_is_the_candidate_and_nothing_else_of_the_solution_is_seen(
    against: Callable[..., Report],
) -> None:
    solution = "def twice(x): return 2 * x\ndef helper(x): return x\ndef check(c): pass"
    setup = "def twice(x): return None\ndef check(c): assert c(2) == 4"

    assert against(solution, "check(candidate)", setup=setup, entry_point="twice")["tests"] == [PASSED]


def test_an_entry_point_does_not_uncover_the_solutions_other_names(against: Callable[..., Report]) -> None:
    result = against("def f(): return 1\ndef g(): return 1", "assert g() == 1", entry_point="f")["tests"][0]

    assert (result["passed"], result["reason"]) == (False, "wrong_answer")
    assert "NameError" in result["detail"]


@pytest.mark.parametrize(
    ("solution", "reason", "detail"),
    [
        ("def (", "compile_error", "SyntaxError"),
        ("1 / 0", "runtime_error", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "runtime_error", "SystemExit"),
    ],
)
def test_a_solution_that_does_not_load_is_reported(
    against: Callable[..., Report], solution: str, reason: str, detail: str
) -> None:
    report = against(solution, "assert True")

    assert (report["reason"], report["tests"]) == (reason, [])
    assert detail in report["detail"]


@pytest.mark.parametrize(("setup", "test"), [("def (", "assert True"), ("", "assert ("), ("", "\0")])
def test_tests_that_do_not_compile_are_the_tasks_fault(against: Callable[..., Report], setup: str, test: str) -> None:
    assert against("x = 1", test, setup=setup)["reason"] == "task_broken"


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "ended"),
        ([["compile_error", "no"]], "compile_error"),
        ([["anything"]], "runtime_error"),
    ],
)
def test_a_solution_that_says_nothing_or_something_else_is_reported(
    ends: tuple[socket.socket, socket.socket], capsys: pytest.CaptureFixture[str], frames: list[Any], reason: str
) -> None:
    for frame in frames:
        wire_values.send(ends[1].fileno(), frame)
    ends[1].shutdown(socket.SHUT_RDWR)

    tester_side.main("", ["assert f() == 1"], "nonce", "f", ())

    assert json.loads(capsys.readouterr().out)["reason"] == reason


@pytest.mark.parametrize("reply", [None, 5, [], ["no"], {"ok": 1}, ["ok", ["?", 1]], ["ok", 1.5]])
def test_a_reply_that_is_none_ends_the_test(
    ends: tuple[socket.socket, socket.socket], capsys: pytest.CaptureFixture[str], reply: Any
) -> None:
    for frame in (["ready"], reply):
        wire_values.send(ends[1].fileno(), frame)

    tester_side.main("", ["assert f() == 1"], "nonce", "f", ())

    assert [test["reason"] for test in json.loads(capsys.readouterr().out)["tests"]] == ["ended"]


@pytest.mark.parametrize(
    ("source", "stdin", "result"),
    [
        ("def f(a, b): return a + b", "1\n\n2\n", "3"),
        ("class Solution:\n    def f(self): return (1, {2: None})", "", '[1, {"2": null}]'),
    ],
)
def test_a_called_function_gives_its_result_behind_the_nonce(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], source: str, stdin: str, result: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))

    call_side.main(source, "f", "nonce", {"main": call_side.main})

    assert capfd.readouterr().out == f"nonce{result}"


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", [1j], {"a": {1}}, collections.deque([1])])
def test_a_result_that_is_no_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="is no plain data"):
        call_side.plain(value)


def test_plain_data_keeps_its_values_and_turns_tuples_into_lists() -> None:
    value = {"a": (1, [2.5, None]), True: "x", 1.5: False}

    assert call_side.plain(value) == {"a": [1, [2.5, None]], "true": "x", "1.5": False}


@pytest.mark.parametrize(
    ("value", "content"),
    [
        (type("Numbers", (list,), {"__iter__": lambda _: iter("no"), "__eq__": lambda *_: True})([1]), [1]),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.namedtuple("Pair", "a b")(1, [2]), [1, [2]]),
        (enum.IntEnum("Colour", ["RED"])(1), 1),
        (type("Text", (str,), {"__str__": lambda _: "no", "__eq__": lambda *_: True})("x"), "x"),
        (type("Real", (float,), {"__float__": lambda _: 1.0})(0.5), 0.5),
        ({type("Key", (str,), {})("k"): True}, {"k": True}),
    ],
)
def test_what_derives_from_plain_data_is_its_content(value: Any, content: Any) -> None:
    assert json.dumps(call_side.plain(value)) == json.dumps(content)


def test_what_lies_about_its_class_is_no_plain_data() -> None:
    with pytest.raises(TypeError):
        call_side.plain(type("Liar", (), {"__class__": int, "__index__": lambda _: 5})())


def test_a_value_that_has_no_text_is_shown_by_its_type(against: Callable[..., Report]) -> None:
    report = against("def f(): return 10**5000", "x = f()\nassert x == 1, x")

    assert report["tests"] == [{"passed": False, "reason": "wrong_answer", "detail": "AssertionError"}]


def test_a_frame_of_brackets_alone_is_not_built() -> None:
    lists = b"[" + b",".join([b"[]"] * wire_values.MAX_LISTS) + b"]"

    with pytest.raises(wire_values.ProtocolError, match="too many lists"):
        wire_values.parse(lists)


def test_an_endless_result_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(TypeError, match="nested too deeply"):
        call_side.plain(endless)
