"""EvalPlus: a function against the base tests of its task and many more, expected outputs outside of the sandbox.

The solution gets the arguments and gives values as data; what they are compared with was computed when the rows were
prepared (`evalplus_data`). The rules are those of EvalPlus 0.3; extraction and limits those of NeMo Gym's `evalplus`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.sandbox.api import Limits, Sandbox
from gym_bus.verifiers import literal_tests, sides, wire_values
from gym_bus.verifiers.base import Task
from gym_bus.verifiers.code_text import closed_block
from gym_bus.verifiers.evalplus_oracles import Oracle, RowError
from gym_bus.verifiers.tester_side import shown
from gym_bus.verifiers.text import output_text

SUITES = ("base", "plus")
MOST_S = 60.0
"""Seconds of all the tests of a suite together, whatever those of each test add up to."""
PASS, FAIL, TIMEOUT = "pass", "fail", "timeout"
"""EvalPlus's words for how a suite ended."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may set."""

    min_time_limit: Annotated[float, Meta(gt=0, le=60)] = 1.0
    """Seconds that one test may take at least."""
    gt_time_limit_factor: Annotated[float, Meta(gt=0, le=1000)] = 4.0
    """A test may take as many times longer than the canonical solution took."""
    memory_bytes: Annotated[int, Meta(ge=32 * 2**20)] = 512 * 2**20


class Tests(msgspec.Struct, frozen=True):
    """One suite of a row."""

    inputs: list[Any]
    """Arguments of each test, a tuple as `wire_values.encode` makes it."""
    outputs: list[Any]
    """What the canonical solution gave, likewise."""
    seconds: list[float]
    """How long that took."""

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.outputs) == len(self.seconds):
            raise ValueError(f"{len(self.inputs)} inputs, {len(self.outputs)} outputs, {len(self.seconds)} seconds")

    def limits_s(self, options: Options) -> list[float]:
        """Seconds that each test may take."""
        return [max(options.min_time_limit, options.gt_time_limit_factor * seconds) for seconds in self.seconds]


class Row(msgspec.Struct, frozen=True):
    """What is read of a row."""

    prompt: str
    entry_point: str
    base_tests: Tests
    plus_tests: Tests
    atol: float = 0.0
    """Absolute tolerance of floats; with 0, outputs that are floats get EvalPlus's 1e-6."""

    @property
    def suites(self) -> tuple[Tests, Tests]:
        """In the order of `SUITES`."""
        return self.base_tests, self.plus_tests


class _Suite(msgspec.Struct, frozen=True):
    """How one suite ended."""

    status: str
    passed: int
    of: int
    reason: str = "none"
    detail: str = ""
    first_failed: int | None = None
    """Number of the test, from 0."""


def is_extended(row: dict[str, Any]) -> bool:
    """Whether a row has EvalPlus's tests with their expected outputs."""
    return "plus_tests" in row


def longest_s(row: dict[str, Any], options: Options) -> float:
    """Wall-clock seconds that the suites of a row may take. Raises TaskError where the row is broken."""
    return sum(_limits(tests, options).wall_s for tests in _read(row).suites)


async def verify(task: Task, dataset: str, options: Options, sandbox: Sandbox) -> Verdict:
    """Score one answer: 1.0 where both suites pass.

    Args:
        task: its row has the suites.
        dataset: humaneval or mbpp; some tasks of each are judged in a way of their own.
        options: limits.
        sandbox: where the solution runs.

    Raises:
        TaskError: the row is broken.
        SandboxError: the sandbox failed.
    """
    row = _read(task.row)
    code = closed_block(output_text(task.response))
    if code is None:
        return _verdict(None, ())
    solution = code if code.startswith(row.prompt) else row.prompt + code
    oracle = Oracle(dataset, row.entry_point, row.atol)
    return _verdict(code, [await _run(solution, row, tests, oracle, options, sandbox) for tests in row.suites])


def _read(row: dict[str, Any]) -> Row:
    try:
        read = msgspec.convert(row, Row)
    except msgspec.ValidationError as e:
        raise TaskError(f"the row's tests cannot be read: {e}") from None
    if not any(tests.inputs for tests in read.suites):
        raise TaskError("base_tests and plus_tests are both empty")
    return read


def _limits(tests: Tests, options: Options) -> Limits:
    """Of a whole suite: EvalPlus's sum, and a second to start in."""
    together_s = min(MOST_S, sum(tests.limits_s(options))) + 1
    return Limits(
        wall_s=2 * together_s,
        cpu_s=together_s,
        memory_bytes=options.memory_bytes,
        output_bytes=2 * wire_values.MAX_FRAME_BYTES,
    )


async def _run(solution: str, row: Row, tests: Tests, oracle: Oracle, options: Options, sandbox: Sandbox) -> _Suite:
    calls = zip(tests.inputs, tests.limits_s(options), strict=True)
    try:
        stdin = wire_values.frame([[row.entry_point, arguments, limit_s] for arguments, limit_s in calls])
    except wire_values.NotData as e:
        raise TaskError(f"the row's inputs are {e}") from None
    program = sides.program("solution_side", "answer_within", repr(solution))
    outcome = await sandbox.run(program, stdin, _limits(tests, options))
    replies = literal_tests.replies(outcome.stdout)
    if fault := sides.not_loaded(replies, outcome):
        return _ended(0, len(tests.inputs), 0, *fault)
    return _judge(tests, oracle, replies, sides.REASONS[outcome.ended])


def _judge(tests: Tests, oracle: Oracle, replies: Iterator[Any], end: str) -> _Suite:
    """Compare every reply; a test behind the last one was not seen through, for the reason `end`."""
    passed, first = 0, None
    for number, (arguments, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True)):
        reply = next(replies, None)
        fault = _fault(reply, arguments, expected, oracle, end)
        if fault is None:
            passed += 1
        elif first is None:
            first = (number, *fault)
        if not isinstance(reply, list) or reply[:1] not in (["ok"], ["raised"]):
            break
    if first is None:
        return _Suite(PASS, passed, len(tests.inputs))
    return _ended(passed, len(tests.inputs), *first)


def _fault(reply: Any, arguments: Any, expected: Any, oracle: Oracle, end: str) -> tuple[str, str] | None:
    match reply:
        case ["ok", frame, _]:
            try:
                return None if oracle.accepts(arguments, frame, expected) else ("wrong_answer", "")
            except RowError as e:
                raise TaskError(f"the row's tests are broken: {e}") from None
        case ["raised", _, said, *_]:
            return "runtime_error", shown(said, 500)
        case ["slow"]:
            return "timeout", ""
        case _:
            return end, ""


def _ended(passed: int, of: int, first: int, reason: str, detail: str) -> _Suite:
    return _Suite(TIMEOUT if reason == "timeout" else FAIL, passed, of, reason, detail, first)


def _verdict(code: str | None, suites: Sequence[_Suite]) -> Verdict:
    base, plus = (suite.status for suite in suites) if suites else (None, None)
    reached = {"base": base == PASS, "plus": base == plus == PASS}
    failed = next((suite for suite in suites if suite.status != PASS), None)
    reason = "no_code" if not suites else failed.reason if failed else "none"
    extra: dict[str, Any] = {
        "extracted_model_code": code,
        "failure_reason": reason,
        "base_status": base,
        "plus_status": plus,
        "is_correct": reached["base"],
        "is_correct_plus": reached["plus"],
        "tests": [
            {"suite": name, "passed": suite.passed, "of": suite.of, "first_failed": suite.first_failed}
            for name, suite in zip(SUITES, suites, strict=False)
        ],
    }
    if failed and failed.detail:
        extra["failure_detail"] = failed.detail
    components = {f"passing_{name}_tests": float(reached[name]) for name in SUITES}
    return Verdict(reward=components["passing_plus_tests"], components=components, extra=extra)
