"""EvalPlus's rows as they are published, and what must be computed before they can be judged: the expected outputs.

They are what the canonical solution gives, run in the sandbox once, when rows are prepared. Inputs are JSON as they are
published; some tasks of MBPP want tuples, sets or complex numbers, which are made of it by the number of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gym_bus.errors import TaskError
from gym_bus.sandbox.api import Limits, Sandbox
from gym_bus.verifiers import literal_tests, sides, wire_values
from gym_bus.verifiers.evalplus_oracles import NOT_NONE

MAX_TESTS_BYTES = 2 * 2**20
"""Of the tests of one row, as JSON: a row travels with each of its rollouts. What does not fit is left out."""
CALL_LIMIT_S = 30.0
"""Seconds that the canonical solution may take for one input."""
CALLS_BYTES = 2**20
"""Of the calls that one program is given, about."""

_LIMITS = Limits(wall_s=600, cpu_s=300, memory_bytes=2 * 2**30, output_bytes=8 * wire_values.MAX_FRAME_BYTES)
Values = list[Any]


class _Published(msgspec.Struct, frozen=True):
    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: list[Values]
    plus_input: list[Values]


def is_published(row: dict[str, Any]) -> bool:
    """Whether a row has EvalPlus's inputs, and no expected outputs yet."""
    return "plus_input" in row and "plus_tests" not in row


async def complete(row: dict[str, Any], dataset: str, sandbox: Sandbox) -> tuple[dict[str, Any], int]:
    """A published row with its inputs and their expected outputs in place of its inputs.

    Returns:
        The row, and how many inputs were left out: the canonical solution raises for them or takes too long, its output
        is no data, or there is no room for them.

    Raises:
        TaskError: the row is not as published, or its canonical solution does not run.
        SandboxError: the sandbox failed.
    """
    published = _read(row)
    suites = {"base_tests": published.base_input, "plus_tests": published.plus_input}
    room, left_out = MAX_TESTS_BYTES, 0
    made: dict[str, Any] = {}
    for name, inputs in suites.items():
        kept: list[tuple[Any, Any, float]] = []
        for test in await _computed(published, dataset, inputs, sandbox):
            size = len(msgspec.json.encode(test))
            if test is None or size > room:
                left_out += 1
            else:
                room -= size
                kept.append(test)
        made[name] = {key: [test[part] for test in kept] for part, key in enumerate(("inputs", "outputs", "seconds"))}
    if not any(suite["inputs"] for suite in made.values()):
        raise TaskError(f"{published.task_id}: none of its inputs has an expected output")
    return {key: value for key, value in row.items() if key not in ("base_input", "plus_input")} | made, left_out


def _read(row: dict[str, Any]) -> _Published:
    try:
        return msgspec.convert(row, _Published)
    except msgspec.ValidationError as e:
        raise TaskError(f"{row.get('task_id')}: not a row of EvalPlus: {e}") from None


async def _computed(
    row: _Published, dataset: str, inputs: Sequence[Values], sandbox: Sandbox
) -> list[tuple[Any, Any, float] | None]:
    """Arguments, output and seconds of each input; None for one that has no output."""
    calls = [
        _encoded(arguments_of(row.task_id, given) if dataset == "mbpp" else given, row.task_id) for given in inputs
    ]
    replies: list[Any] = []
    while len(replies) < len(calls):
        part = _some(calls[len(replies) :])
        given = await _run(row, part, sandbox)
        replies += given if len(given) == len(part) else [*given, None]  # it ended with the next one
    only_whether = dataset == "mbpp" and row.entry_point in NOT_NONE
    return [_test(arguments, reply, only_whether=only_whether) for arguments, reply in zip(calls, replies, strict=True)]


def _encoded(arguments: Values, task_id: str) -> Any:
    try:
        return wire_values.encode(tuple(arguments), wire_values.no_handle)
    except wire_values.NotData as e:
        raise TaskError(f"{task_id}: an input is {e}") from None


def _some(calls: Sequence[Any]) -> Sequence[Any]:
    """The first ones, as many as go into one program; at least one."""
    size = 0
    for number, arguments in enumerate(calls):
        size += len(msgspec.json.encode(arguments))
        if size > CALLS_BYTES and number:
            return calls[:number]
    return calls


async def _run(row: _Published, calls: Sequence[Any], sandbox: Sandbox) -> list[Any]:
    """The replies to as many calls as there are, up to the first that ends the program."""
    source = row.prompt + row.canonical_solution
    stdin = wire_values.frame([[row.entry_point, arguments, CALL_LIMIT_S] for arguments in calls])
    outcome = await sandbox.run(sides.program("solution_side", "answer_within", repr(source)), stdin, _LIMITS)
    replies = literal_tests.replies(outcome.stdout)
    if fault := sides.not_loaded(replies, outcome):
        raise TaskError(f"{row.task_id}: its canonical solution does not run: {': '.join(filter(None, fault))}")
    return [reply for reply in replies if reply != ["slow"]]


def _test(arguments: Any, reply: Any, *, only_whether: bool) -> tuple[Any, Any, float] | None:
    match reply:
        case ["ok", frame, seconds]:
            output = frame is not None if only_whether else frame
            return (arguments, output, round(seconds, 6)) if _is_data(output) else None
        case _:
            return None


def _is_data(frame: Any) -> bool:
    try:
        wire_values.decode(frame, wire_values.no_handle)
    except (wire_values.NotData, wire_values.ProtocolError):
        return False
    return True


def arguments_of(task_id: str, given: Values) -> Values:
    """The arguments of a task of MBPP: what JSON cannot write is made of what it can."""
    number = task_id.rpartition("/")[2]
    try:
        made = _FORMS.get(int(number), list)(given)
        return list(made)
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise TaskError(f"{task_id}: an input is not as published: {e}") from None


Form = Callable[[Values], Sequence[Any]]


def _each(make: Callable[[Any], Any]) -> Form:
    return lambda given: [make(value) for value in given]


def _first(make: Callable[[Any], Any]) -> Form:
    return lambda given: [make(given[0]), *given[1:]]


def _second(make: Callable[[Any], Any]) -> Form:
    return lambda given: [given[0], make(given[1])]


def _of_tuples(value: Any) -> list[Any]:
    return [tuple(item) for item in value]


def _tuple_of_tuples(value: Any) -> tuple[Any, ...]:
    return tuple(_of_tuples(value))


def _tuple_with_tuples(value: Any) -> tuple[Any, ...]:
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _tuples_all_through(value: Any) -> Any:
    return tuple(map(_tuples_all_through, value)) if isinstance(value, list) else value


def _sets(value: Any) -> list[Any]:
    return [set(item) if isinstance(item, list) and item else {} for item in value]


def _dict_of_tuples(value: Any) -> dict[Any, Any]:
    return {key: tuple(item) for key, item in value.items()}


_BY_FORM: tuple[tuple[Form, tuple[int, ...]], ...] = (
    (
        _each(tuple),
        (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
    ),
    (_each(_of_tuples), (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)),
    (_each(_tuple_of_tuples), (259, 401, 445)),
    (_each(_tuples_all_through), (580, 615, 791)),
    (_first(_of_tuples), (75, 413, 444, 753)),
    (_first(tuple), (250, 307, 405, 446, 617, 720, 763, 808)),
    (_first(_tuple_with_tuples), (278,)),
    (_first(_dict_of_tuples), (722,)),
    (_first(_sets), (115,)),
    (_first(complex), (252,)),
    (_second(tuple), (106, 750)),
    (lambda given: [float(given[0]), complex(given[1])], (124,)),
)
_FORMS = {number: form for form, numbers in _BY_FORM for number in numbers}
