"""Programs against input and output: NeMo Gym's `code_gen` rules, expected outputs outside the sandbox.

Two kinds of task: programs that read standard input and print, and (with `fn_name`) functions called with JSON
arguments. The first failing test ends the check.
"""

from __future__ import annotations

import decimal
import json
import math
import secrets
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program, Sandbox
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.call_side import NOT_COMPILED
from gym_bus.verifiers.code_text import between_last_fences
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import output_text

PRELUDE = """\
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json
sys.setrecursionlimit(50000)
sys.set_int_max_str_digits(50000)
"""
"""What LiveCodeBench's harness puts before every program; many recorded answers rely on it."""

_TRACEBACK = b"Traceback (most recent call last)"
WRONG, TOO_SLOW, FAILED = -2, -3, -4
"""LiveCodeBench's result codes."""
_REASONS = {
    Ended.WALL_LIMIT: ("timeout", TOO_SLOW),
    Ended.CPU_LIMIT: ("timeout", TOO_SLOW),
    Ended.MEMORY: ("memory", FAILED),
    Ended.OUTPUT_LIMIT: ("output_limit", FAILED),
    Ended.COMPILE_ERROR: ("compile_error", FAILED),
    Ended.SIGNALLED: ("runtime_error", FAILED),
    Ended.FINISHED: ("runtime_error", FAILED),
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may set."""

    unit_test_timeout_secs: Annotated[float, Meta(gt=0, le=600)] = 10.0
    """CPU seconds of one test."""
    reasoning_format_penalty: float = 0.0
    """Reward of an answer whose thinking leaks into its final text, even where it is right."""
    memory_bytes: Annotated[int, Meta(ge=32 * 2**20)] = 2**30


class _Tests(msgspec.Struct, frozen=True):
    inputs: list[str]
    outputs: list[str]
    fn_name: str | None = None


class CodeGen:
    """Reward 1.0 when the program passes every test."""

    placement: ClassVar[Placement] = Placement.SANDBOXED
    preload: ClassVar[str] = "datetime io random statistics"
    """What else `PRELUDE` imports, which would take four times as long as the rest of a small program."""
    packages: ClassVar[str] = "numpy"
    """Which LiveCodeBench's harness has."""
    names: ClassVar[str] = PRELUDE
    required: ClassVar[tuple[str, ...]] = ("verifier_metadata",)
    nemo_gym_options: ClassVar[dict[str, Any]] = {"memory_bytes": 4 * 2**30}
    """What makes it judge as NeMo Gym's does."""

    def __init__(self, **options: Any) -> None:
        self._options = o = read_options(Options, "code_gen", options)
        cpu_s = o.unit_test_timeout_secs
        self._limits = Limits(wall_s=max(2 * cpu_s, cpu_s + 2), cpu_s=cpu_s, memory_bytes=o.memory_bytes)

    def longest_s(self, task: Task) -> float:
        """Wall-clock seconds of all tests, each at its limit."""
        return len(_tests(task.row).inputs) * self._limits.wall_s

    async def verify(self, task: Task, sandbox: Sandbox) -> Verdict:
        """Score one answer; see `SandboxedVerifier.verify`."""
        tests = _tests(task.row)
        text = output_text(task.response)
        code = between_last_fences(text) if text.strip() else None
        if code is None or not code.strip():
            return _verdict(0.0, code, "no_code", [], [])
        if tests.fn_name is None:
            results, outcomes = await self._programs(code, tests, sandbox)
        else:
            results, outcomes = await self._calls(code, tests, tests.fn_name, sandbox)
        passed = len(results) == len(tests.inputs) and all(result is True for result in results)
        reward = 1.0 if passed else 0.0
        if _thinking_leaks(text, task.response):
            reward = self._options.reasoning_format_penalty
        return _verdict(reward, code, "none" if passed else _reason(outcomes[-1], results[-1]), results, outcomes)

    def _limits_of(self, tests: _Tests) -> Limits:
        """With room for what is expected, rounded up: a program can see its limit, and is not to learn a length."""
        longest = max(len(_bytes(text)) for text in tests.outputs)
        if 2 * longest <= self._limits.output_bytes:
            return self._limits
        return msgspec.structs.replace(self._limits, output_bytes=1 << (2 * longest).bit_length())

    async def _programs(self, code: str, tests: _Tests, sandbox: Sandbox) -> tuple[list[Any], list[Outcome]]:
        source, names = _behind_prelude(code)
        program = Program(source=_bytes(source), names=names)
        results: list[Any] = []

        def go_on(case: int, outcome: Outcome) -> bool:
            results.append(_judge(outcome, tests.outputs[case]))
            return results[-1] is True

        inputs = [_bytes(text) for text in tests.inputs]
        outcomes = await sandbox.run_cases(program, inputs, self._limits_of(tests), go_on=go_on)
        return results, outcomes[: len(results)]

    async def _calls(
        self, code: str, tests: _Tests, function: str, sandbox: Sandbox
    ) -> tuple[list[Any], list[Outcome]]:
        nonce = secrets.token_hex(8)
        source, names = _behind_prelude(code)
        call = f"from gym_bus.verifiers.call_side import main\nmain({source!r}, {function!r}, {nonce!r}, globals())\n"
        program = Program(source=_bytes(call), names=names)
        results: list[Any] = []

        def go_on(case: int, outcome: Outcome) -> bool:
            results.append(_judge_call(outcome, tests.outputs[case], nonce))
            return results[-1] is True

        inputs = [_bytes(text) for text in tests.inputs]
        outcomes = await sandbox.run_cases(program, inputs, self._limits_of(tests), go_on=go_on)
        return results, [_call_outcome(outcome, nonce) for outcome in outcomes[: len(results)]]


def _behind_prelude(code: str) -> tuple[str, str]:
    """Source and names; what has to be the first line of a program does not compile, as in that harness."""
    return (PRELUDE + code, "") if "__future__" in code else (code, PRELUDE)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _tests(row: dict[str, Any]) -> _Tests:
    metadata = row.get("verifier_metadata")
    found = metadata.get("unit_tests") if isinstance(metadata, dict) else None
    try:
        tests = msgspec.convert(found, _Tests)
    except msgspec.ValidationError as e:
        raise TaskError(f"verifier_metadata.unit_tests: {e}") from None
    if not tests.inputs or len(tests.inputs) != len(tests.outputs):
        raise TaskError(
            f"verifier_metadata.unit_tests has {len(tests.inputs)} inputs and {len(tests.outputs)} outputs: "
            "expected as many, and at least one"
        )
    if tests.fn_name is not None:
        _check_arguments(tests.inputs)
    return tests


def _check_arguments(inputs: list[str]) -> None:
    for number, text in enumerate(inputs):
        try:
            for line in text.split("\n"):
                if line.strip():
                    json.loads(line)
        except (ValueError, RecursionError) as e:
            raise TaskError(f"verifier_metadata.unit_tests.inputs[{number}]: not JSON arguments: {e}") from None


def _judge(outcome: Outcome, expected: str) -> Any:
    # A program that says `exit(1)` has ended by its own will, and its output counts; one that raised has failed.
    if not outcome.ok and (outcome.ended is not Ended.FINISHED or _TRACEBACK in outcome.stderr):
        return _REASONS[outcome.ended][1]
    return True if same_output(outcome.stdout.decode(errors="replace"), expected) else WRONG


def same_output(printed: str, expected: str) -> bool:
    """Line by line, blanks around lines aside: equal, or equal as lists of decimal numbers."""
    got, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(got) == len(wanted) and all(a == b or _same_numbers(a, b) for a, b in zip(got, wanted, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [decimal.Decimal(t) for t in a.split()] == [decimal.Decimal(t) for t in b.split()]
    except decimal.InvalidOperation:
        return False


def _call_outcome(outcome: Outcome, nonce: str) -> Outcome:
    """As the solution's own: the program that calls it compiles in any case."""
    compiled = outcome.stdout != (nonce + NOT_COMPILED).encode()
    return outcome if compiled else msgspec.structs.replace(outcome, ended=Ended.COMPILE_ERROR)


def _judge_call(outcome: Outcome, expected: str, nonce: str) -> Any:
    if not outcome.ok:
        return _REASONS[outcome.ended][1]
    text = outcome.stdout.decode(errors="replace")
    if not text.startswith(nonce):  # it ended by itself before its result was written
        return FAILED
    try:
        return True if same_value(json.loads(text[len(nonce) :]), json.loads(expected)) else WRONG
    except (ValueError, RecursionError):
        return WRONG


def same_value(got: Any, wanted: Any) -> bool:
    """Equal, the same JSON (NaN is), or two numbers, a float among them, that are close: `numpy.allclose`'s tolerances.

    NeMo Gym's harness takes any two texts and integers for floats, so that 100001 passes for 100000: that is left out.
    """
    if got == wanted or json.dumps(got) == json.dumps(wanted):
        return True
    numbers = isinstance(got, int | float) and isinstance(wanted, int | float)
    if not numbers or not (isinstance(got, float) or isinstance(wanted, float)):
        return False
    try:
        return math.isfinite(wanted) and abs(got - wanted) <= 1e-8 + 1e-5 * abs(wanted)
    except OverflowError:  # an integer that no float can hold
        return False


def _thinking_leaks(text: str, response: dict[str, Any]) -> bool:
    if "<think>" in text or "</think>" in text:
        return True
    items = response.get("output")
    summaries = [
        str(part.get("text", ""))
        for item in (items if isinstance(items, list) else [])
        if isinstance(item, dict) and item.get("type") == "reasoning"
        for part in (item["summary"] if isinstance(item.get("summary"), list) else [])
        if isinstance(part, dict)
    ]
    thought = "".join(summaries)
    return thought.count("<think>") > 1 or thought.count("</think>") > 1


def _reason(outcome: Outcome, result: Any) -> str:
    return "wrong_answer" if result == WRONG else _REASONS[outcome.ended][0]


def _verdict(reward: float, code: str | None, reason: str, results: list[Any], outcomes: list[Outcome]) -> Verdict:
    timings = [{"cpu_s": round(o.cpu_s, 4), "wall_s": round(o.wall_s, 4), "ended": o.ended.value} for o in outcomes]
    extra = {"extracted_model_code": code, "failure_reason": reason, "results": results, "tests": timings}
    if outcomes and reason not in ("none", "wrong_answer"):
        extra["failure_detail"] = outcomes[-1].stderr[-500:].decode(errors="replace")
    return Verdict(reward=reward, extra=extra)
