"""HumanEval and MBPP: a solution's functions against asserts, solution and tests in sandboxes of their own.

Calls cross between the two as data, so the expected values and the verdict are out of the solution's reach.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from gym_bus.errors import SandboxError, TaskError
from gym_bus.messages import Verdict
from gym_bus.sandbox.api import Ended, Limits, Outcome, Sandbox
from gym_bus.verifiers import evalplus, evalplus_data, literal_tests, sides, wire_values
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.code_text import defines, last_block
from gym_bus.verifiers.literal_tests import Case
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.tester_side import shown
from gym_bus.verifiers.text import output_text, without_think

_DEFINED = re.compile(r"(?m)^def\s+(\w+)")


class Options(evalplus.Options, frozen=True, kw_only=True):
    """What a job may set."""

    cpu_s: Annotated[float, Meta(gt=0, le=600)] = 10.0
    """CPU seconds of all the tests of one solution together; EvalPlus's tests have limits of their own."""


class _Report(msgspec.Struct, frozen=True):
    nonce: str
    reason: str
    detail: str
    tests: list[dict[str, Any]]


class Tests(msgspec.Struct, frozen=True):
    """What the tester runs."""

    setup: str
    each: list[str]
    entry_point: str = ""
    """The function that the tests call `candidate`; empty where they call the solution's names."""
    names: tuple[str, ...] = ()
    """Names that the task asks for, even where they are built-in ones."""


class _FunctionTests:
    placement: ClassVar[Placement] = Placement.SANDBOXED
    name: ClassVar[str]

    def __init__(self, **options: Any) -> None:
        self._options = o = read_options(Options, self.name, options)
        wall_s = max(2 * o.cpu_s, o.cpu_s + 2)
        self._limits = Limits(
            wall_s=wall_s, cpu_s=o.cpu_s, memory_bytes=o.memory_bytes, output_bytes=wire_values.MAX_FRAME_BYTES
        )

    def longest_s(self, task: Task) -> float:
        """Wall-clock seconds of the tests, which run beside the solution."""
        if evalplus.is_extended(task.row):
            return evalplus.longest_s(task.row, self._options)
        return self._limits.wall_s

    @staticmethod
    def incomplete(row: dict[str, Any]) -> bool:
        """Whether it is a row as EvalPlus publishes it, whose expected outputs are still to be computed."""
        return evalplus_data.is_published(row)

    @classmethod
    async def complete(cls, row: dict[str, Any], sandbox: Sandbox) -> tuple[dict[str, Any], int]:
        """See `SandboxedVerifier`; runs the canonical solution on the inputs of EvalPlus."""
        return await evalplus_data.complete(row, cls.name, sandbox)

    def solution(self, row: dict[str, Any], code: str) -> str:
        """The whole solution for what the model wrote."""
        raise NotImplementedError

    def tests(self, row: dict[str, Any]) -> Tests:
        """The task's tests; trusted."""
        raise NotImplementedError

    async def verify(self, task: Task, sandbox: Sandbox) -> Verdict:
        """Score one answer; see `SandboxedVerifier.verify`."""
        if evalplus.is_extended(task.row):
            return await evalplus.verify(task, self.name, self._options, sandbox)
        if self.incomplete(task.row):
            raise TaskError(
                f"the row has EvalPlus's inputs without expected outputs: `gym-bus dataset prepare {self.name} --split "
                "plus --source DIR` computes them"
            )
        tests = self.tests(task.row)
        code = last_block(without_think(output_text(task.response)))
        if code is None or not code.strip():
            return _verdict(None, "no_code", [])
        solution = self.solution(task.row, code)
        cases = literal_tests.read_cases(tests.setup, tuple(tests.each), tests.entry_point, tests.names)
        if cases is not None:
            program = sides.program("solution_side", "answer_all", repr(solution))
            outcome = await sandbox.run(program, literal_tests.calls(cases), self._limits)
            return _compare(code, cases, outcome)
        nonce = secrets.token_hex(8)
        first, second = await sandbox.run_pair(
            sides.program("solution_side", "main", repr(solution)),
            sides.program(
                "tester_side",
                "main",
                f"{tests.setup!r}, {tests.each!r}, {nonce!r}, {tests.entry_point!r}, {tests.names!r}",
            ),
            self._limits,
        )
        report = _read_report(second, nonce)
        if report is not None and report.reason == "task_broken":
            raise TaskError(f"the task's tests are broken: {report.detail}")
        return _judge(code, report, first, second, len(tests.each))


def _compare(code: str, cases: Sequence[Sequence[Case]], solution: Outcome) -> Verdict:
    """Judge by what a solution replied to the calls of its tests."""
    replies = literal_tests.replies(solution.stdout)
    if fault := sides.not_loaded(replies, solution):
        return _verdict(code, fault[0], [], fault[1])
    tests: list[dict[str, Any]] = []
    for test in cases:
        tests.append(_judge_test(test, replies))
        if tests[-1].get("reason") == "ended":
            break
    return _summed_up(code, tests, len(cases), solution)


def _judge_test(test: Sequence[Case], replies: Iterator[Any]) -> dict[str, Any]:
    """Every call was made, so every reply is taken, also those behind one that is wrong."""
    failed: dict[str, Any] | None = None
    for case in test:
        match next(replies, None):
            case ["ok", frame]:
                fault = None if case.holds(frame) else ("wrong_answer", case.message)
            case ["missing", name]:
                fault = ("wrong_answer", shown(f"NameError: name {name!r} is not defined"))
            case ["raised", _, detail]:
                fault = ("runtime_error", shown(detail, 500))
            case _:
                fault = ("ended", "")
        if fault is not None and failed is None:
            failed = {"passed": False, "reason": fault[0], "detail": fault[1]}
    return failed or {"passed": True}


def _read_report(tester: Outcome, nonce: str) -> _Report | None:
    last = tester.stdout.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        report = msgspec.json.decode(last, type=_Report)
    except msgspec.DecodeError:
        return None
    return report if tester.ok and report.nonce == nonce else None


def _judge(code: str, report: _Report | None, solution: Outcome, tester: Outcome, count: int) -> Verdict:
    if report is None:
        if tester.ended in (Ended.WALL_LIMIT, Ended.CPU_LIMIT, Ended.MEMORY, Ended.OUTPUT_LIMIT):
            return _verdict(code, sides.REASONS[tester.ended], [])
        said = (tester.stderr[-300:] or tester.stdout[-300:]).decode(errors="replace")
        raise SandboxError(f"the tests ended without a report ({tester.ended.value}): {said}")
    return _summed_up(code, report.tests, count, solution, report.reason, report.detail)


def _summed_up(
    code: str, tests: list[dict[str, Any]], count: int, solution: Outcome, reason: str = "", detail: str = ""
) -> Verdict:
    failed = next((test for test in tests if not test.get("passed")), None)
    if reason or failed is None:
        reason = reason or ("none" if len(tests) == count else "runtime_error")
    else:
        reason, detail = str(failed["reason"]), str(failed.get("detail", ""))
    if reason == "ended":
        reason = sides.REASONS.get(solution.ended, "runtime_error")
    return _verdict(code, reason, tests, detail)


def _verdict(code: str | None, reason: str, tests: list[dict[str, Any]], detail: str = "") -> Verdict:
    extra: dict[str, Any] = {"extracted_model_code": code, "failure_reason": reason, "tests": tests}
    if detail:
        extra["failure_detail"] = detail
    return Verdict(reward=1.0 if reason == "none" else 0.0, extra=extra)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{key} must be a text, not {value!r}"[:200])
    return value


class HumanEval(_FunctionTests):
    """Reward 1.0 when the completed function passes the task's `check`, or EvalPlus's tests where the row has them."""

    name = "humaneval"
    required: ClassVar[tuple[str, ...]] = ("prompt", "entry_point", "test|plus_tests")

    def solution(self, row: dict[str, Any], code: str) -> str:
        """A whole function stands behind the prompt's imports and helpers; a body completes the prompt."""
        prompt, entry_point = _text(row, "prompt"), _text(row, "entry_point")
        if code.startswith(prompt):
            return code
        if defines(code, entry_point):
            return f"{prompt}\n    pass\n\n{code}"
        return prompt + code

    def tests(self, row: dict[str, Any]) -> Tests:
        """The prompt's helpers are the tests' too."""
        setup = f"{_text(row, 'prompt')}\n    pass\n"
        return Tests(setup, [_text(row, "test") + "\ncheck(candidate)\n"], _text(row, "entry_point"))


class Mbpp(_FunctionTests):
    """Reward 1.0 when the function passes every assert of the task, or EvalPlus's tests where the row has them."""

    name = "mbpp"
    required: ClassVar[tuple[str, ...]] = ("test_list|plus_tests",)

    def solution(self, row: dict[str, Any], code: str) -> str:
        """As the model wrote it."""
        return code

    def tests(self, row: dict[str, Any]) -> Tests:
        """Each assert is a test; one task asks for a function called `sum`, as its reference shows."""
        tests = row.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise TaskError("test_list must be a list of asserts")
        names = tuple(_DEFINED.findall(str(row.get("code") or "")))
        return Tests(str(row.get("test_setup_code") or ""), [str(t) for t in tests], "", names)
