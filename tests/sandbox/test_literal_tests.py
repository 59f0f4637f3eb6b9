"""Asserts that are read and compared outside the sandbox: they judge as the tester in a sandbox of its own does."""

from __future__ import annotations

from typing import Any

import pytest

from gym_bus.sandbox.slot import Slot
from gym_bus.verifiers import literal_tests, wire_values
from gym_bus.verifiers.base import Task
from gym_bus.verifiers.function_tests import Mbpp
from gym_bus.verifiers.literal_tests import read_cases


def mbpp(*tests: str) -> tuple[tuple[literal_tests.Case, ...], ...] | None:
    return read_cases("", tests, "", ())


def check(body: str) -> tuple[tuple[literal_tests.Case, ...], ...] | None:
    return read_cases("def f():\n    pass\n", (f"def check(candidate):\n    {body}\ncheck(candidate)\n",), "f", ())


@pytest.mark.parametrize(
    "body",
    [
        "assert candidate(1) == 2",
        "assert candidate(1) == 2, 'why'",
        "assert candidate(1) == 2, 'first: ' + str(candidate(1))",
        "assert candidate(-1, x=[3 * 19, (1, 'a')]) == {'a': {1, 2}}",
        "assert candidate('a' + 'b')",
        "assert not candidate()",
        "assert candidate(1) is True",
        "'What is tested.'\n    assert candidate(1) == 1\n    assert True, 'good for debugging'",
    ],
)
def test_asserts_that_compare_a_call_with_a_literal_are_read(body: str) -> None:
    cases = check(body)
    assert cases
    assert cases[0][0].name == "f"


@pytest.mark.parametrize(
    "body",
    [
        "assert abs(candidate(1) - 2) < 1e-6",
        "assert candidate(1) != 2",
        "assert candidate(f(1)) == 2",
        "assert candidate(1) == f(1)",
        "assert f(1) == 1",
        "assert candidate(1)(2) == 2",
        "assert candidate(*[1]) == 2",
        "assert candidate(**{'a': 1}) == 2",
        "assert candidate(x) == 2",
        "for i in range(3):\n        assert candidate(i) == i",
        "import math\n    assert candidate(1) == 1",
        "assert candidate(1 / 0) == 1",
        "assert candidate(1) == [i for i in (1, 2)]",
        "assert candidate(lambda: 1) == 1",
        "pass",
    ],
)
def test_anything_else_is_left_to_the_tester(body: str) -> None:
    assert check(body) is None


@pytest.mark.parametrize(
    "text",
    [
        "def check(candidate):\n    assert candidate(1) == 1\n",
        "def check(candidate):\n    assert candidate(1) == 1\ncheck(candidate)\nprint('done')\n",
        "x = 3\ndef check(candidate):\n    assert candidate(1) == 1\ncheck(candidate)\n",
        "@twice\ndef check(candidate):\n    assert candidate(1) == 1\ncheck(candidate)\n",
        "def check(candidate:\n",
    ],
)
def test_a_text_that_does_more_than_to_define_and_call_check_is_left_to_the_tester(text: str) -> None:
    assert read_cases("", (text,), "f", ()) is None


def test_names_that_are_not_the_solutions_are_left_to_the_tester() -> None:
    assert mbpp("assert f(1) == 1")
    assert mbpp("assert sorted([1]) == [1]") is None
    assert mbpp("assert math(1) == 1") is None
    assert read_cases("", ("assert sum([1]) == 1",), "", ("sum",))
    assert read_cases("x = 3", ("assert f(1) == 1",), "", ()) is None
    assert mbpp("assert f(1) == 1", "f(2)") is None


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1.0, 0.5, 2**80, "", "a", "1", b"a", [], [1], [1.0], (1,), [[1], [2]], {1},
    frozenset([1]),
    {1: 2}, {1: 2.0}, {"1": 2}, {}, 1j, [True], [None], "\ud800", {"a": [1, (2, {3})]},
]  # fmt: skip


@pytest.mark.parametrize("expected", VALUES, ids=repr)
def test_equality_and_truth_are_those_of_python(expected: Any) -> None:
    for value in VALUES:
        frame = wire_values.encode(value, lambda _: None)
        assert literal_tests.equal(frame, expected) == (value == expected), (value, expected)
        assert literal_tests.true(frame) == bool(value)


COLLIDING = ["s", [["i", hex(i * (2**61 - 1) * 2**60)] for i in range(20_000)]]
NESTED: Any = ["l", [1]]
for _ in range(500):
    NESTED = ["l", [NESTED]]


@pytest.mark.parametrize(
    "frame",
    [
        COLLIDING,
        ["d", [[COLLIDING, 1]]],
        NESTED,
        ["h", 0, True],
        ["d", [1]],
        ["l", 3],
        ["l", "ab"],
        [["l"], []],
        [],
        {},
    ],
    ids=range(10),
)
def test_what_is_no_such_value_equals_nothing(frame: Any) -> None:
    for expected in ({1}, [1], {1: 1}, "ab", 1):
        assert not literal_tests.equal(frame, expected)


@pytest.mark.parametrize("written", [b"", b"\x01", b"\x09\0\0\0[1]", b"\x03\0\0\0[1,", b"\xff\xff\xff\xff[1]"])
def test_what_is_no_frame_is_no_reply(written: bytes) -> None:
    assert list(literal_tests.replies(written)) == []


TESTS = ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == {9}"]
SOLUTIONS = {
    "right": "def f(x):\n    return x * x if x < 3 else {9}",
    "wrong once": "def f(x):\n    return x * x",
    "raises": "def f(x):\n    raise ValueError('no')",
    "equals everything": "class A(int):\n    __eq__ = lambda *_: True\ndef f(x):\n    return A(7)",
    "an object": "def f(x):\n    return object()",
    "no such name": "def g(x):\n    return 1",
    "no program": "def f(x:",
    "fails at once": "1 / 0",
    "endless": "def f(x):\n    while True: pass",
    "ends with 0": "import os\ndef f(x):\n    os._exit(0)",
    "sys.exit": "import sys\ndef f(x):\n    sys.exit(0)",
    "huge": "def f(x):\n    return 'x' * 9_000_000",
    "memory": "def f(x):\n    return [0] * 10**10",
}  # fmt: skip


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("code", SOLUTIONS.values(), ids=SOLUTIONS)
async def test_the_verdict_is_that_of_the_tester(slot: Slot, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = Mbpp(**({"cpu_s": 0.2} if code == SOLUTIONS["endless"] else {}))
    text = {"type": "output_text", "text": f"```python\n{code}\n```"}
    response = {"output": [{"type": "message", "role": "assistant", "content": [text]}]}
    task = Task(row={"test_list": TESTS, "code": "def f(x): ..."}, response=response)
    quick = await verifier.verify(task, slot)
    monkeypatch.setattr(literal_tests, "read_cases", lambda *_: None)
    slow = await verifier.verify(task, slot)
    assert (quick.reward, quick.extra["failure_reason"]) == (slow.reward, slow.extra["failure_reason"])


@pytest.mark.asyncio(loop_scope="session")
async def test_replies_that_a_solution_writes_itself_are_compared_like_any_other(slot: Slot) -> None:
    forged = b"".join(map(wire_values.frame, [["ok", True]] * 3))
    code = (
        f"import os\nfor fd in range(3, 64):\n    try: os.write(fd, {forged!r})\n    except OSError: pass\nos._exit(0)"
    )
    text = {"type": "output_text", "text": f"```python\n{code}\n```"}
    response = {"output": [{"type": "message", "role": "assistant", "content": [text]}]}
    verdict = await Mbpp().verify(Task(row={"test_list": TESTS, "code": ""}, response=response), slot)
    assert verdict.reward == 0.0
