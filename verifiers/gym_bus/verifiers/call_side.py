"""Calls one function of a solution with arguments from standard input; the result leaves by a descriptor of its own.

Standard library only: runs in the sandbox, in reach of the solution. What it writes is data to be compared elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

NOT_COMPILED = "not compiled"
"""In place of a result, which it cannot be taken for: it is no JSON."""


def main(source: str, function: str, nonce: str, found: dict[str, Any]) -> None:
    """Read JSON arguments, one per line, call, write the JSON result; what the solution prints goes nowhere.

    `found` holds the names that the solution finds.
    """
    result_fd = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    arguments = [json.loads(line) for line in sys.stdin.read().split("\n") if line.strip()]
    names = solution_names()
    names.update((name, value) for name, value in found.items() if name not in ("main", "__name__"))
    try:
        code = compile(source, "solution.py", "exec", dont_inherit=True)
    except Exception as e:
        os.write(result_fd, (nonce + NOT_COMPILED).encode())
        sys.exit(f"{type(e).__name__}: {e}")
    exec(code, names)
    owner = names["Solution"]() if "class Solution" in source else None
    called = getattr(owner, function) if owner is not None else names[function]
    value = called(*arguments)
    os.write(result_fd, f"{nonce}{json.dumps(plain(value))}".encode())


def solution_names() -> dict[str, Any]:
    """The names of a new module `solution`; `dataclasses` and others look for the module of a class."""
    made = sys.modules["solution"] = types.ModuleType("solution")
    return vars(made)


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON values, tuples as lists; raises TypeError for anything that is no plain data.

    What derives from a built-in type is its content: a `Counter` a dict, whatever it overrides. Other numbers, as a
    `Decimal`, are the integer or float that they say they are.
    """
    if depth > 60:
        raise TypeError("nested too deeply")
    if value is None or value is True or value is False:
        return value
    for kind, content in _SCALARS:
        if isinstance(value, kind):
            return content(value)
    for kind, items in _SEQUENCES:
        if isinstance(value, kind):
            return [plain(item, depth + 1) for item in items(value)]
    if isinstance(value, dict):
        return {_key(key): plain(item, depth + 1) for key, item in dict.items(value)}
    return _other_number(value)


def _other_number(value: Any) -> Any:
    for method, convert in (("__index__", operator.index), ("__float__", float)):
        if hasattr(type(value), method):  # `float` also reads text
            with contextlib.suppress(TypeError):
                return convert(value)
    raise TypeError(f"a {type(value).__name__} is no plain data")


_Content = Callable[[Any], Any]
_SCALARS: tuple[tuple[type, _Content], ...] = ((int, int.__index__), (float, float.__float__), (str, str.__str__))
_SEQUENCES: tuple[tuple[type, _Content], ...] = ((list, list.__iter__), (tuple, tuple.__iter__))


def _key(key: Any) -> str:
    return str.__str__(key) if isinstance(key, str) else json.dumps(key)
