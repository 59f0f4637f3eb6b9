"""The `code_gen` verifier and the runner that holds it, with the real sandbox."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import pytest

from gym_bus.errors import SandboxError, TaskError, UsageError, VerifierError
from gym_bus.messages import Verdict
from gym_bus.sandbox.api import Program
from gym_bus.sandbox.slot import Slot
from gym_bus.verifiers import runner as runner_module
from gym_bus.verifiers.base import Task
from gym_bus.verifiers.code_gen import CodeGen, same_output, same_value
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.runner import Answer, Broken, Check, Judged, VerifierRunner, build, decode_answers, encode_checks

session_loop = pytest.mark.asyncio(loop_scope="session")


def response(text: str, *before: dict[str, Any]) -> dict[str, Any]:
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    return {"output": [*before, message]}


def fenced(code: str) -> dict[str, Any]:
    return response(f"Here it is.\n```python\n{code}\n```\nDone.")


def row(inputs: list[str], outputs: list[str], fn_name: str | None = None) -> dict[str, Any]:
    return {"verifier_metadata": {"unit_tests": {"inputs": inputs, "outputs": outputs, "fn_name": fn_name}}}


async def judge(
    slot: Slot,
    answer: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
    fn_name: str | None = None,
    **options: Any,
) -> Verdict:
    options.setdefault("unit_test_timeout_secs", 30.0)
    return await CodeGen(**options).verify(Task(row=row(inputs, outputs, fn_name), response=answer), slot)


def said(verdict: Verdict) -> tuple[float, str, list[Any]]:
    return verdict.reward, verdict.extra["failure_reason"], verdict.extra["results"]


PASSED, WRONG, FAILED = (1.0, "none", [True]), (0.0, "wrong_answer", [-2]), (0.0, "runtime_error", [-4])


@session_loop
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(int(input()) * 2)", PASSED),
        ("print(' 42.0 ')", PASSED),
        ("if __name__ == '__main__':\n    print(42)", PASSED),
        ("print(reduce(mul, [gcd(12, 6), len(deque([1, 2, 3]))], 2) + 6)", PASSED),
        ("print(len(str(10**41_999)) // 1000)", PASSED),
        ("print(42)\nexit(0)", PASSED),
        ("print(42)\nexit(1)", PASSED),
        ("print(42)\nquit()", PASSED),
        ("print(42)\nraise ValueError", FAILED),
        ("print(43)", WRONG),
        ("print(42)\nprint(42)", WRONG),
        ("pass", WRONG),
        ("exit(0)", WRONG),
        ("import os\nos._exit(0)", WRONG),
        ("import sys\nsys.exit = lambda *a: None\nprint('no')", WRONG),
        ("import os\nos.write(1, b'\\xff')", WRONG),
        ("print({'results': [True], 'reward': 1.0})", WRONG),
        ("import gc\nprint([o for o in gc.get_objects() if isinstance(o, str) and o == '4' + '2'])", WRONG),
        ("raise ValueError(42)", FAILED),
        ("print(42)\n1 / 0", FAILED),
        ("import os\nos.abort()", FAILED),
        ("def (", (0.0, "compile_error", [-4])),
        ("while True:\n    print('x' * 10**6)", (0.0, "output_limit", [-4])),
        ("x = bytearray(2**40)", (0.0, "memory", [-4])),
    ],
)
async def test_a_program_is_judged_by_what_it_prints(
    slot: Slot, code: str, expected: tuple[float, str, list[Any]]
) -> None:
    assert said(await judge(slot, fenced(code), ["21\n"], ["42\n"])) == expected


@session_loop
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(a, b):\n    return a + b", PASSED),
        ("class Solution:\n    def f(self, a: List[int], b: List[int]) -> List[int]:\n        return a + b", PASSED),
        ("def f(a, b):\n    return (*a, *b)", PASSED),
        ("def f(a, b):\n    print('noise')\n    return a + b", PASSED),
        ("def f(a, b):\n    return a", WRONG),
        ("def f(a, b):\n    print([1, 2])", WRONG),
        (
            "@__import__('dataclasses').dataclass\nclass P:\n    a: list\n    next: 'P | None' = None\n"
            "def f(a, b):\n    return P(a).a + b",
            PASSED,
        ),
        ("def f(a, b):\n    class E(list):\n        pass\n    return E(a + b)", PASSED),
        ("def f(a, b):\n    class E(list):\n        __eq__ = lambda *_: True\n    return E()", WRONG),
        (
            "def f(a, b):\n    class E:\n        def __eq__(self, other):\n            return True\n    return E()",
            FAILED,
        ),
        ("def f(a, b):\n    return {1, 2}", FAILED),
        (
            "def f(a, b):\n    while True:\n        a = [a]\n        if len(repr(a)) > 200:\n            return a",
            FAILED,
        ),
        ("def f(a):\n    return a", FAILED),
        ("def g(a, b):\n    return a + b", FAILED),
        ("def f(a, b):\n    exit(0)", FAILED),
        ("import os\ndef f(a, b):\n    os.write(1, b'[1, 2]')\n    os._exit(0)", FAILED),
        ("import sys\nsys.exit = print\ndef f(a, b):\n    raise SystemExit(0)", FAILED),
        (
            "import os\nfor fd in range(3, 30):\n    try:\n        os.write(fd, b'[1]')\n"
            "    except OSError:\n        pass",
            FAILED,
        ),
        ("import json\njson.dumps = lambda _: 'no JSON'\ndef f(a, b):\n    return 1", WRONG),
        ("import json\njson.dumps = lambda _: '[' * 10**5\ndef f(a, b):\n    return 1", WRONG),
        ("def f(:", (0.0, "compile_error", [-4])),
        ("x = '\\ud800'\0", (0.0, "compile_error", [-4])),
        ("def f(a, b):\n    compile('1 +', 'x', 'exec')", FAILED),
    ],
)
async def test_a_function_is_judged_by_what_it_returns(
    slot: Slot, code: str, expected: tuple[float, str, list[Any]]
) -> None:
    assert said(await judge(slot, fenced(code), ["[1]\n[2]"], ["[1, 2]"], "f")) == expected


@session_loop
async def test_there_is_room_for_the_output_that_is_expected_and_no_length_is_to_be_seen(slot: Slot) -> None:
    expected = "7" * 1_500_000
    look = "import os\nprint(os.fstat(1).st_size, end='')"

    assert said(await judge(slot, fenced(f"print({expected[0]!r} * {len(expected)})"), [""], [expected])) == PASSED
    assert (
        said(await judge(slot, fenced(f"def f():\n    return '7' * {len(expected)}"), [""], [f'"{expected}"'], "f"))
        == PASSED
    )
    assert said(await judge(slot, fenced(look), ["", ""], [str(2**22 + 4096), expected]))[2] == [True, -2]


@session_loop
@pytest.mark.parametrize("inputs", [["1"], ["1", "2"]])
async def test_a_program_that_crashes_the_compiler_has_failed(inputs: list[str]) -> None:
    own = await Slot.start(names=CodeGen.names)  # whose recursion limit is what lets the compiler crash
    try:
        assert said(await judge(own, fenced("x = a" + ".a" * 200_000), inputs, inputs)) == FAILED
    finally:
        await own.close()


@session_loop
@pytest.mark.parametrize(
    ("value", "wanted", "passes"),
    [
        ("0.1 + 0.2", "0.3", True),
        ("[0.1 + 0.2]", "[0.3]", False),
        ("{1: None, 'b': True}", '{"1": null, "b": true}', True),
        ("float('nan')", "NaN", True),
        ("[float('nan')]", "[NaN]", True),
        ("float('nan')", "1", False),
        ("__import__('decimal').Decimal('0.1')", "0.1", True),
        ("[__import__('fractions').Fraction(4, 2)]", "[2]", True),
        ("__import__('decimal').Decimal('sNaN')", "NaN", False),
        ("[1j]", "[1]", False),
        ("1", "true", True),
        ("'1'", "1", False),
        ("1", "no JSON", False),
    ],
)
async def test_results_are_compared_as_json_values(slot: Slot, value: str, wanted: str, passes: bool) -> None:
    verdict = await judge(slot, fenced(f"def f():\n    return {value}"), ["\n"], [wanted], "f")

    assert (verdict.reward == 1.0) is passes


SEARCH = """
import ctypes, gc, os, sys
mark = "-".join(["expected", "output", ""])
found = [o for o in gc.get_objects() if type(o) is str and o.startswith(mark)]
frame = sys._getframe()
while frame:
    found += [v for v in frame.f_locals.values() if type(v) is str and v.startswith(mark) and v is not mark]
    frame = frame.f_back
libc, (r, w) = ctypes.CDLL(None), os.pipe()
libc.sbrk.restype = ctypes.c_void_p
objects, heap = id(mark) & ~0xFFF, libc.sbrk(0) & ~0xFFF
for start in (*range(objects - 2**25, objects + 2**25, 4096), *range(heap - 2**23, heap, 4096)):
    if libc.write(w, ctypes.c_void_p(start), 4096) == 4096:  # what is no memory is refused
        text = os.read(r, 4096).replace(mark.encode() + b"\\0", b"")
        at = text.find(mark.encode())
        if at >= 0:
            found.append(text[at : at + 32].decode(errors="replace"))
print(*found or ["nothing"])
"""
"""Looks for the expected output in every object, in every frame, in the interpreter's arenas and in the heap."""


@session_loop
async def test_the_expected_output_is_nowhere_in_the_programs_memory(slot: Slot) -> None:
    expected = "expected-output-" + secrets.token_hex(8)

    verdict = await judge(slot, fenced(SEARCH), ["input-1\n", "input-2\n"], [expected, expected])
    outcome = await slot.run(Program(source=f"held = {expected!r}\n{SEARCH}".encode()))

    assert said(verdict) == WRONG
    assert expected.encode() in outcome.stdout  # where it is in memory, it is found


@session_loop
@pytest.mark.parametrize("fn_name", [None, "f"])
@pytest.mark.parametrize("text", ["", " \n", "print(1)", "```python\nprint(1)", "```\n\n```", "```python\n```"])
async def test_an_answer_without_code_scores_0(slot: Slot, text: str, fn_name: str | None) -> None:
    assert said(await judge(slot, response(text), ["1"], ["1"], fn_name)) == (0.0, "no_code", [])


@session_loop
async def test_the_last_block_counts(slot: Slot) -> None:
    verdict = await judge(slot, response("```\nprint(1)\n```\nBetter:\n```py\nprint(2)\n```"), [""], ["2"])

    assert verdict.reward == 1.0
    assert verdict.extra["extracted_model_code"] == "print(2)"


@session_loop
@pytest.mark.parametrize("fn_name", [None, "f"])
async def test_the_first_failing_test_ends_the_check(slot: Slot, fn_name: str | None) -> None:
    code = "f = lambda x: 1" if fn_name else "print(1)"

    verdict = await judge(slot, fenced(code), ["1", "2", "3"], ["1", "2", "3"], fn_name)

    assert said(verdict) == (0.0, "wrong_answer", [True, -2])
    assert [test["ended"] for test in verdict.extra["tests"]] == ["finished", "finished"]


@session_loop
@pytest.mark.parametrize("code", ["while True:\n    pass", "import time\ntime.sleep(60)"])
async def test_a_program_that_takes_too_long_is_a_timeout(slot: Slot, code: str) -> None:
    assert said(await judge(slot, fenced(code), ["1"], ["1"], unit_test_timeout_secs=0.2)) == (0.0, "timeout", [-3])


@session_loop
async def test_a_function_that_takes_too_long_is_a_timeout(slot: Slot) -> None:
    code = "def f(a):\n    while True:\n        pass"

    verdict = await judge(slot, fenced(code), ["1"], ["1"], "f", unit_test_timeout_secs=0.2)

    assert said(verdict) == (0.0, "timeout", [-3])


@session_loop
async def test_the_memory_limit_is_an_option(slot: Slot) -> None:
    code = "x = b''.join(bytes([i % 256]) * 2**20 for i in range(150))\nprint(1)"

    assert (await judge(slot, fenced(code), ["1"], ["1"])).reward == 1.0
    verdict = await judge(slot, fenced(code), ["1"], ["1"], memory_bytes=64 * 2**20)
    assert said(verdict) == (0.0, "memory", [-4])


@session_loop
async def test_a_failure_is_shown_with_the_end_of_its_traceback(slot: Slot) -> None:
    verdict = await judge(slot, fenced("raise KeyError('x' * 600)"), ["1"], ["1"])

    assert verdict.extra["failure_detail"].endswith("xxx'\n")
    assert len(verdict.extra["failure_detail"]) == 500


@session_loop
@pytest.mark.parametrize(
    ("text", "thought", "reward"),
    [
        ("", "<think>once</think>", 1.0),
        ("<think>leaked</think>", "", -0.5),
        ("leaked</think>", "", -0.5),
        ("", "<think><think>", -0.5),
        ("", "</think> and </think>", -0.5),
    ],
)
async def test_thinking_that_leaks_costs_the_reward(slot: Slot, text: str, thought: str, reward: float) -> None:
    reasoning = {"type": "reasoning", "summary": [{"text": thought}, "no part"]}
    answer = response(f"{text}\n```\nprint(1)\n```", reasoning, {"type": "reasoning", "summary": None})

    assert (await judge(slot, answer, [""], ["1"], reasoning_format_penalty=-0.5)).reward == reward


@session_loop
@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({}, "expected `object`, got `null`"),
        ({"verifier_metadata": [1]}, "got `null`"),
        ({"verifier_metadata": {"unit_tests": {"inputs": ["1"]}}}, "missing required field `outputs`"),
        ({"verifier_metadata": {"unit_tests": {"inputs": [1], "outputs": ["1"]}}}, "expected `str`, got `int`"),
        (row([], []), "0 inputs and 0 outputs"),
        (row(["1"], ["1", "2"]), "1 inputs and 2 outputs"),
    ],
)
async def test_a_row_without_usable_tests_is_broken(slot: Slot, broken: dict[str, Any], what: str) -> None:
    with pytest.raises(TaskError, match=f"(?i)verifier_metadata.unit_tests.*{what}"):
        await CodeGen().verify(Task(row=broken, response=fenced("print(1)")), slot)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n3", " 1 2 \r\n3\n\n", True),
        ("1.0 2", "1 2.00", True),
        ("1e2", "100", True),
        ("a", "A", False),
        ("1 2", "1", False),
        ("1", "1 a", False),
        ("0.30000000000000004", "0.3", False),
        ("1\n\n2", "1\n2", False),
        ("", "", True),
        ("", "0", False),
    ],
)
def test_output_is_compared_line_by_line_as_text_or_decimal_numbers(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


def test_values_are_equal_or_close_floats() -> None:
    assert same_value(1.000001, 1.0) and same_value(1, 1.0) and same_value({"a": [1]}, {"a": [1]})
    assert same_value(1.000001, 1) and same_value(1, 1.000001) and same_value(0, 1e-9)
    assert not same_value(1.1, 1.0) and not same_value(2, 1.0) and not same_value([1.000001], [1.0])
    assert not same_value(100001, 100000) and not same_value("1.0", "1") and not same_value("1", 1.0)
    assert not same_value(10**400, 1.0) and not same_value(1.0, math.inf) and not same_value(math.inf, 1.0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"timeout": 3}, "unknown option 'timeout'"),
        ({"unit_test_timeout_secs": 0}, "`float` > 0"),
        ({"memory_bytes": 1}, "`int`"),
    ],
)
def test_options_that_do_not_fit_are_a_usage_error(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=f"verifier 'code_gen': .*{what}"):
        CodeGen(**options)


@pytest.fixture(scope="module")
def runner() -> Iterator[VerifierRunner]:
    made = VerifierRunner()
    first = made.judge(check(row([""], ["1"]), fenced("print(1)")))
    if isinstance(first, Broken) and first.kind == "sandbox":
        pytest.skip(f"no sandbox on this machine: {first.detail}")
    yield made
    made.close()
    made.close()


def check(row: Any, answer: Any, verifier: str = "code_gen", options: bytes = b"{}") -> Check:
    return Check(verifier, options, msgspec.json.encode(row), msgspec.json.encode(answer))


def answers(runner: VerifierRunner, *checks: Check) -> list[Answer]:
    return decode_answers(runner.batch(encode_checks(list(checks)))).answers


def test_a_batch_is_judged_in_order_and_a_broken_check_touches_no_other(runner: VerifierRunner) -> None:
    mcqa = {"options": [{"A": "1"}, {"B": "2"}], "expected_answer": "B", "grading_mode": "strict_single_letter_boxed"}
    right = check(row([""], ["1"]), fenced("print(1)"))

    found = answers(
        runner,
        right,
        check({}, fenced("print(1)")),
        check(mcqa, response("\\boxed{B}"), "mcqa"),
        check(mcqa, response("\\boxed{A}"), "mcqa"),
        Check("code_gen", b"{}", b"no JSON", b"{}"),
        Check("code_gen", b"{}", right.row, b"no JSON"),
        Check("code_gen", b"{}", right.row, b"[]"),
        check({}, {}, "cod_gen"),
        right,
    )

    assert [a.verdict.reward if isinstance(a, Judged) else a.kind for a in found] == [
        1.0, "task", 1.0, 0.0, "task", 0.0, 0.0, "verifier", 1.0,
    ]  # fmt: skip
    assert all(a.seconds > 0 for a in found if isinstance(a, Judged))


def test_what_goes_wrong_is_an_error_of_its_kind(runner: VerifierRunner) -> None:
    unreadable, unknown = answers(
        runner, Check("code_gen", b"{}", b"[1]", b"{}"), check({}, {}, "code_gen", b'{"unit_test_timeout": 1}')
    )

    assert isinstance(unreadable, Broken) and isinstance(unknown, Broken)
    assert isinstance(unreadable.error(), TaskError)
    assert "the row cannot be read" in str(unreadable.error())
    assert isinstance(unknown.error(), VerifierError)
    assert "UsageError" in unknown.detail and "did you mean 'unit_test_timeout_secs'" in unknown.detail


def test_a_lost_sandbox_is_a_sandbox_fault_and_the_next_check_gets_a_new_one(runner: VerifierRunner) -> None:
    right = check(row([""], ["1"]), fenced("print(1)"))
    answers(runner, right)
    (slot,) = runner._slots.values()
    zygote, patient = psutil.Process(slot._zygote.pid), b'{"unit_test_timeout_secs":300}'

    def kill() -> None:
        while len(zygote.children(recursive=True)) < 2:  # the zygote itself, and a program
            time.sleep(0.001)
        zygote.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    sleeps = check(row([""], ["1"]), fenced("import time\ntime.sleep(600)"), options=patient)
    lost, judged = answers(runner, sleeps, right)
    killer.join(60)

    assert isinstance(lost, Broken) and isinstance(lost.error(), SandboxError)
    assert isinstance(judged, Judged) and judged.verdict.reward == 1.0


def test_verifiers_with_many_options_are_kept_up_to_a_bound(runner: VerifierRunner) -> None:
    many = [b'{"unit_test_timeout_secs":%d}' % n for n in range(1, runner_module.CACHED + 10)]

    found = answers(runner, *(check({}, {}, options=options) for options in many))

    assert {a.kind for a in found if isinstance(a, Broken)} == {"task"}
    assert len(runner._verifiers) == runner_module.CACHED


def test_an_inline_verifier_needs_no_sandbox() -> None:
    own = VerifierRunner()
    own.judge(Check("mcqa", b"{}", b"{}", b"{}"))

    assert not own._slots
    own.close()


def test_options_that_a_foreign_verifier_does_not_take_are_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERIFIERS._paths, "takes_no_options", "builtins:object")

    with pytest.raises(UsageError, match=r"options of verifier 'takes_no_options': .*takes no arguments"):
        build("takes_no_options", b'{"x": 1}')


@session_loop
async def test_a_function_may_print_as_much_as_it_likes(slot: Slot) -> None:
    verdict = await judge(slot, fenced("def f(x):\n    print('x' * 2**22)\n    return x"), ["1"], ["1"], "f")

    assert said(verdict) == PASSED


@session_loop
async def test_arguments_that_are_no_json_are_a_broken_task(slot: Slot) -> None:
    with pytest.raises(TaskError, match=r"inputs\[1\]: not JSON arguments"):
        await judge(slot, fenced("def f(x): return x"), ["1", "x"], ["1", "1"], "f")


@session_loop
async def test_reasoning_in_a_strange_form_is_passed_over(slot: Slot) -> None:
    answer = response("```python\nprint(1)\n```", {"type": "reasoning", "summary": 5})

    assert said(await judge(slot, answer, [""], ["1"])) == PASSED


@pytest.mark.parametrize("options", [b"[]", b"nope"])
def test_options_that_are_no_object_are_wrong_usage(options: bytes) -> None:
    with pytest.raises(UsageError, match="options of verifier 'code_gen'"):
        build("code_gen", options)


@pytest.mark.parametrize("data", [b'{"a":"\xff"}', b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", b"[]"])
def test_a_row_that_cannot_be_read_is_a_broken_task_and_such_a_response_says_nothing(data: bytes) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        runner_module.task_of(data, b"{}")
    assert runner_module.task_of(b"{}", data) == Task({}, {})
