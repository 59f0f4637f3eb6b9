"""Asserts that only compare a call with a literal: read here, called in one sandbox, compared outside of it.

Most tests of HumanEval and MBPP are like that. They need no sandbox of their own, which halves the cost of a check.
Anything else that a test does is left to the tester's sandbox.
"""

from __future__ import annotations

import ast
import builtins
import enum
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from gym_bus.verifiers import wire_values

CACHED = 1024


class How(enum.Enum):
    """What is asserted of a call's value."""

    EQUAL = "=="
    SAME = "is"
    """True, False or None."""
    TRUE = "bool"


class Case(msgspec.Struct, frozen=True):
    """One assert: a call of the solution's, and the value that it must give."""

    name: str
    arguments: Any
    """As `wire_values.encode` makes them, like `keywords`."""
    keywords: Any
    how: How
    expected: Any
    message: str = ""

    def holds(self, frame: Any) -> bool:
        """Whether the assert holds for what the solution gave."""
        if self.how is How.EQUAL:
            return equal(frame, self.expected)
        return (frame if self.how is How.SAME else true(frame)) is self.expected


@lru_cache(CACHED)
def read_cases(
    setup: str, tests: tuple[str, ...], entry_point: str, names: tuple[str, ...]
) -> tuple[tuple[Case, ...], ...] | None:
    """The cases of each test; None where a test does more than to compare calls with literals.

    Args:
        setup: what runs before each test; with names that are the solution's, only an empty one can be left out.
        tests: the tests' texts.
        entry_point: the function that the tests call `candidate`; empty where they call the solution's names.
        names: names that the task asks for, even where they are built-in ones.
    """
    if setup.strip() and not entry_point:
        return None
    try:
        read = tuple(tuple(_cases(test, entry_point, names)) for test in tests)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError, wire_values.NotData):
        return None
    return read if all(read) else None


def _cases(test: str, entry_point: str, names: Sequence[str]) -> Iterator[Case]:
    body = ast.parse(test).body
    statements = _checked(body) if entry_point else body
    for statement in statements:
        match statement:
            case ast.Expr(value=ast.Constant()) | ast.Assert(test=ast.Constant(value=True)):
                pass
            case ast.Assert(test=asserted, msg=message):
                call, how, expected = _asserted(asserted)
                name = call.func.id if isinstance(call.func, ast.Name) else ""
                if not _of_the_solution(name, entry_point, names):
                    raise ValueError(name)
                said = str(message.value) if isinstance(message, ast.Constant) else ""
                yield Case(entry_point or name, *_passed(call), how, expected, said)
            case _:
                raise ValueError(type(statement).__name__)


def _asserted(test: ast.expr) -> tuple[ast.Call, How, Any]:
    match test:
        case ast.Call() as call:
            return call, How.TRUE, True
        case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call):
            return call, How.TRUE, False
        case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[expected]):
            return call, How.EQUAL, _value(expected)
        case ast.Compare(
            left=ast.Call() as call, ops=[ast.Is()], comparators=[ast.Constant(value=None | bool() as value)]
        ):
            return call, How.SAME, value
    raise ValueError(type(test).__name__)


def _value(written: ast.expr) -> Any:
    """The value of constants, containers and operators. The text is the dataset's, and nothing in it has a name."""
    if not all(isinstance(node, _PLAIN) for node in ast.walk(written)):
        raise ValueError("no literal")
    return eval(compile(ast.Expression(written), "test.py", "eval"), {"__builtins__": {}})


_PLAIN = (
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.UnaryOp,
    ast.BinOp,
    ast.unaryop,
    ast.operator,
    ast.expr_context,
)


def _checked(body: list[ast.stmt]) -> list[ast.stmt]:
    """What `check` does, in a text that defines it, calls it, and does nothing else but to set constants."""
    found: list[ast.stmt] = []
    called = False
    for statement in body:
        match statement:
            case ast.FunctionDef(name="check", args=ast.arguments(args=[ast.arg(arg="candidate")]), decorator_list=[]):
                found, called = statement.body, False
            case ast.Assign(targets=[ast.Name(id="METADATA")]) | ast.Expr(value=ast.Constant()):
                pass
            case ast.Expr(value=ast.Call(func=ast.Name(id="check"), args=[ast.Name(id="candidate")], keywords=[])):
                called = True
            case _:
                raise ValueError(type(statement).__name__)
    if not called:
        raise ValueError("nothing is checked")
    return found


def _of_the_solution(name: str, entry_point: str, names: Sequence[str]) -> bool:
    if entry_point:
        return name == "candidate"
    return name in names or not (hasattr(builtins, name) or name in sys.stdlib_module_names)


def _passed(call: ast.Call) -> tuple[Any, Any]:
    if any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("**")
    arguments = tuple(map(_value, call.args))
    keywords = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    return wire_values.encode(arguments, wire_values.no_handle), wire_values.encode(keywords, wire_values.no_handle)


def calls(cases: Sequence[Sequence[Case]]) -> bytes:
    """What the solution's side reads: every call, in order."""
    return wire_values.frame([[case.name, case.arguments, case.keywords] for test in cases for case in test])


def replies(written: bytes) -> Iterator[Any]:
    """The frames that a solution's side has written; the end where what follows is none."""
    start = 0
    while len(written) - start >= 4:
        size = int.from_bytes(written[start : start + 4], "little")
        body = written[start + 4 : start + 4 + size]
        if len(body) < size or size > wire_values.MAX_FRAME_BYTES:
            return
        try:
            yield wire_values.parse(body)
        except wire_values.ProtocolError:
            return
        start += 4 + size


def equal(frame: Any, expected: Any) -> bool:
    """Whether a value that came from a solution equals a literal, as `==` in Python says.

    What cannot be equal for its size is never built: a solution chooses the frame, and hash collisions cost time.
    """
    try:
        if leaves(frame) != leaves(wire_values.encode(expected, wire_values.no_handle)):
            return False
        return bool(wire_values.decode(frame, wire_values.no_handle) == expected)
    except (wire_values.ProtocolError, wire_values.NotData, ValueError, TypeError, RecursionError):
        return False


def true(frame: Any) -> bool | None:
    """Whether a value that came from a solution is true, as an `if` in Python sees it; None where there is no value."""
    try:
        if isinstance(frame, list) and frame[0] in wire_values.CONTAINERS:
            return len(frame[1]) > 0
        if isinstance(frame, list) and frame[0] == wire_values.HANDLE:
            return bool(frame[2])
        return bool(wire_values.decode(frame, wire_values.no_handle))
    except (wire_values.ProtocolError, wire_values.NotData, IndexError, TypeError, ValueError):
        return None


def leaves(frame: Any) -> int:
    """How many values that are no containers, and containers, a frame holds: as many as one that equals it."""
    if not (isinstance(frame, list) and len(frame) == 2 and frame[0] in wire_values.CONTAINERS):
        return 1
    items = frame[1] if frame[0] != "d" else [item for pair in frame[1] for item in pair]
    return 1 + sum(map(leaves, items))
