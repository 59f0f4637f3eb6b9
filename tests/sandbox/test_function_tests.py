"""The HumanEval and MBPP verifiers, with the real sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from gym_bus.errors import SandboxError, TaskError, UsageError
from gym_bus.messages import Verdict
from gym_bus.sandbox.slot import Slot
from gym_bus.verifiers.base import Task
from gym_bus.verifiers.function_tests import HumanEval, Mbpp

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = '''from typing import List

def helper(x: int) -> int:
    return x + 1

def total(xs: List[int]) -> int:
    """The sum of the successors.

    >>> total([1, 2])
    5
    """
'''
CANONICAL = "    return sum(helper(x) for x in xs)\n"
HUMANEVAL = {
    "prompt": PROMPT,
    "entry_point": "total",
    "test": "METADATA = {}\n\ndef check(candidate):\n"
    "    assert candidate([]) == 0\n    assert candidate([1, 2]) == helper(1) + helper(2)\n",
}
MBPP = {
    "test_list": [
        "assert pairs(2) == {(0, 0), (1, 1)}",
        "assert set(pairs(0)) == set()",
        "assert math.isclose(half(3), 1.5)",
    ],
    "test_setup_code": "",
}
PAIRS = "def pairs(n):\n    return {(i, i) for i in range(n)}\ndef half(x):\n    return x / 2\n"


def response(text: str) -> dict[str, Any]:
    return {"output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]}


def fenced(code: str) -> str:
    return f"So:\n```python\n{code}\n```\n"


async def humaneval(slot: Slot, text: str, options: dict[str, Any] | None = None, **row: Any) -> Verdict:
    return await HumanEval(**(options or {})).verify(Task(row={**HUMANEVAL, **row}, response=response(text)), slot)


async def mbpp(slot: Slot, text: str, options: dict[str, Any] | None = None, **row: Any) -> Verdict:
    return await Mbpp(**(options or {})).verify(Task(row={**MBPP, **row}, response=response(text)), slot)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.write(3, b'\\x01\\0\\0\\x005')", "runtime_error"),
        ("import os; os.write(3, b'\\x02\\0\\0\\0[]')", "runtime_error"),
        ("raise ValueError('\\ud800')", "runtime_error"),
        ("def total(xs): raise ValueError('\\ud800')", "runtime_error"),
    ],
)
async def test_what_a_solution_says_out_of_turn_is_its_own_fault(slot: Slot, code: str, reason: str) -> None:
    verdict = await humaneval(slot, fenced(code))

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, reason)


async def test_a_solution_may_print_as_much_as_it_likes(slot: Slot) -> None:
    code = "import sys\ndef total(xs):\n    print('x' * 2**22); print('y' * 2**22, file=sys.stderr)\n"

    assert (await humaneval(slot, fenced(code + "    return sum(xs) + len(xs)"))).reward == 1.0


@pytest.mark.parametrize(
    "text",
    [
        CANONICAL,
        fenced(CANONICAL),
        fenced(PROMPT + CANONICAL),
        fenced("def total(xs: List[int]) -> int:\n    return sum(map(helper, xs))"),
        fenced("def total(xs):\n    print('noise')\n    return sum(xs) + len(xs)"),
        f"<think>\n{fenced('no code')}</think>{fenced(CANONICAL)}",
        fenced(
            "from dataclasses import dataclass\n@dataclass\nclass Node:\n    value: int\n    next: 'Node' = None\n"
            "def total(xs):\n    return sum(Node(helper(x)).value for x in xs)"
        ),
    ],
    ids=["raw body", "body", "whole", "signature with the prompt's names", "noise", "after thinking", "a dataclass"],
)
async def test_a_right_completion_passes_humaneval(slot: Slot, text: str) -> None:
    verdict = await humaneval(slot, text)

    assert (verdict.reward, verdict.extra["failure_reason"]) == (1.0, "none")
    assert verdict.extra["tests"] == [{"passed": True}]


async def test_a_right_answer_passes_every_assert_of_mbpp(slot: Slot) -> None:
    verdict = await mbpp(slot, fenced(PAIRS))

    assert (verdict.reward, verdict.extra["failure_reason"]) == (1.0, "none")
    assert verdict.extra["tests"] == [{"passed": True}] * 3
    assert verdict.extra["extracted_model_code"].strip() == PAIRS.strip()


@pytest.mark.parametrize("text", ["", "  \n", "```python\nno end", "```python\n\n```", "<think>only this"])
async def test_an_answer_without_code_scores_0(slot: Slot, text: str) -> None:
    for verdict in (await humaneval(slot, text), await mbpp(slot, text)):
        assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, "no_code")


WRONG = "def total(xs):\n    return -1\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (WRONG, "wrong_answer"),
        ("    pass", "wrong_answer"),
        ("    return None", "wrong_answer"),
        ("def total(xs):\n    return xs[0]", "runtime_error"),
        ("def total(xs:", "compile_error"),
        ("1 / 0\n" + WRONG, "runtime_error"),
        ("def other(xs):\n    return 0", "wrong_answer"),
        # Ending early
        ("import sys\ndef total(xs):\n    sys.exit(0)", "runtime_error"),
        ("import sys\nsys.exit(0)\n" + WRONG, "runtime_error"),
        ("import os\ndef total(xs):\n    os._exit(0)", "runtime_error"),
        ("import os\nos._exit(0)\n" + WRONG, "runtime_error"),
        ("import os\ndef total(xs):\n    os.abort()", "runtime_error"),
        ("import sys\nsys.exit = sys.excepthook = print\n" + WRONG, "wrong_answer"),
        ("import os\nos.close(3)\n" + WRONG, "runtime_error"),
        # Objects that claim to be right
        ("class E:\n    __eq__ = lambda *_: True\ndef total(xs):\n    return E()", "wrong_answer"),
        (
            "class E(int):\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef total(xs):\n    return E(7)",
            "wrong_answer",
        ),
        (
            "class E:\n    __bool__ = lambda _: True\n    __ne__ = lambda *_: False\ndef total(xs):\n    return E()",
            "wrong_answer",
        ),
        # Tampering with the tests
        ("def check(candidate):\n    pass\n" + WRONG, "wrong_answer"),
        ("def helper(x):\n    return -1\n" + WRONG, "wrong_answer"),
        ("import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\n" + WRONG, "wrong_answer"),
        ("def total(xs):\n    try:\n        return -1\n    finally:\n        raise AssertionError", "runtime_error"),
        (
            "import sys\ndef total(xs):\n    frame = sys._getframe()\n    while frame:\n"
            "        frame.f_globals.update(check=lambda c: None, candidate=len)\n"
            "        frame = frame.f_back\n    return -1",
            "wrong_answer",
        ),
        (
            "from gym_bus.verifiers import tester_side\ntester_side._run_one = lambda *_: {'passed': True}\n"
            "tester_side.Handle.__eq__ = lambda *_: True\n" + WRONG,
            "wrong_answer",
        ),
        # Forged messages
        ('print(\'{"nonce": "", "reason": "", "detail": "", "tests": [{"passed": true}]}\')\n' + WRONG, "wrong_answer"),
        ("import os\nos.write(3, b'\\x08\\0\\0\\0[\"passed')\n" + WRONG, "runtime_error"),
        ("import os\nos.write(3, b'\\xff' * 99)\n" + WRONG, "runtime_error"),
        ("import os\ndef total(xs):\n    os.write(3, b'\\x01\\0\\0\\x005')", "runtime_error"),
        # Too much
        ("def total(xs):\n    return 'x' * 10**7", "runtime_error"),
        ("def total(xs):\n    return bytearray(2**40)", "runtime_error"),
    ],
)
async def test_a_wrong_or_cheating_completion_scores_0(slot: Slot, code: str, reason: str) -> None:
    verdict = await humaneval(slot, fenced(code))

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, reason)


@pytest.mark.parametrize(
    ("code", "reason", "passed"),
    [
        (PAIRS.replace("x / 2", "x"), "wrong_answer", [True, True, False]),
        (PAIRS.replace("(n)", "(n, m)"), "runtime_error", [False]),
        ("def other():\n    pass", "wrong_answer", [False]),
        ("def (", "compile_error", []),
        ("import sys\nsys.exit(0)", "runtime_error", []),
        # Names that the tests use themselves stay the tests' own.
        (
            "class set:\n    __eq__ = lambda *_: True\n    __init__ = lambda *_: None\npairs = half = set",
            "wrong_answer",
            [False],
        ),
        (
            "import math\nmath.isclose = lambda *_: True\n" + PAIRS.replace("x / 2", "x"),
            "wrong_answer",
            [True, True, False],
        ),
        ("class E:\n    __eq__ = lambda *_: True\ndef pairs(n):\n    return E()", "wrong_answer", [False]),
    ],
)
async def test_a_wrong_or_cheating_answer_to_mbpp_scores_0(
    slot: Slot, code: str, reason: str, passed: list[bool]
) -> None:
    verdict = await mbpp(slot, fenced(code))

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, reason)
    found = [test["passed"] for test in verdict.extra["tests"]]
    assert found[: len(passed)] == passed
    assert len(found) == (3 if passed else 0)


async def test_a_built_in_name_is_the_solutions_where_the_task_asks_for_it(slot: Slot) -> None:
    row: dict[str, Any] = {"test_list": ["assert sum(10, 15) == 6"], "code": "def sum(a, b):\n    return 6\r\n"}

    assert (await mbpp(slot, fenced("def sum(a, b):\n    return 6"), **row)).reward == 1.0
    assert (await mbpp(slot, fenced("def sum(a, b):\n    return 7"), **row)).reward == 0.0


async def test_setup_code_runs_before_the_asserts_and_classes_of_the_solution_can_be_used(slot: Slot) -> None:
    row: dict[str, Any] = {
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        "test_list": ["assert depth(root) == 2", "assert root.left.left == None"],
    }
    code = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def depth(node):
    return 1 + depth(node.left) if node else 0
"""

    assert (await mbpp(slot, fenced(code), **row)).reward == 1.0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = [bytearray(2**20) for _ in range(1000)]; x[0][0] = 1; return x", "memory"),
    ],
)
async def test_a_solution_beyond_its_limits_scores_0(slot: Slot, body: str, reason: str) -> None:
    options: dict[str, Any] = {"memory_bytes": 64 * 2**20} if reason == "memory" else {"cpu_s": 0.2}

    verdict = await humaneval(slot, fenced(f"def total(xs):\n    {body}"), options)

    assert verdict.reward == 0.0
    assert verdict.extra["failure_reason"] in (reason, "runtime_error" if reason == "memory" else reason)


async def test_a_solution_that_makes_the_tests_run_for_too_long_scores_0(slot: Slot) -> None:
    verdict = await mbpp(slot, fenced("def f():\n    return 1"), {"cpu_s": 0.2}, test_list=["x = f()\nwhile x: pass"])

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, "timeout")


async def test_a_failure_says_what_failed(slot: Slot) -> None:
    verdict = await humaneval(slot, fenced("def total(xs):\n    return [][5]"))

    assert verdict.extra["failure_detail"] == "IndexError: list index out of range"


@pytest.mark.parametrize(
    "row",
    [{"test": "def check("}, {"test": " "}, {"test": None}, {"prompt": ""}, {"entry_point": 5}],
    ids=str,
)
async def test_a_humaneval_row_without_usable_tests_is_broken(slot: Slot, row: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=r"the task's tests are broken: SyntaxError|must be a text, not"):
        await humaneval(slot, fenced(CANONICAL), **row)


@pytest.mark.parametrize("tests", [None, [], "assert True", [1], ["assert ("]], ids=str)
async def test_an_mbpp_row_without_usable_asserts_is_broken(slot: Slot, tests: Any) -> None:
    with pytest.raises(TaskError, match=r"test_list must be a list of asserts|the task's tests are broken"):
        await mbpp(slot, fenced(PAIRS), test_list=tests)


async def test_tests_that_vanish_without_a_report_are_no_verdict(slot: Slot) -> None:
    with pytest.raises(SandboxError, match=r"the tests ended without a report \(finished\)"):
        await mbpp(slot, fenced(PAIRS), test_list=["__import__('os')._exit(0)"])


async def test_options_that_do_not_fit_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"verifier 'humaneval': unknown option 'timeout'"):
        HumanEval(timeout=1)
    with pytest.raises(UsageError, match=r"verifier 'mbpp': .*cpu_s"):
        Mbpp(cpu_s=0)
