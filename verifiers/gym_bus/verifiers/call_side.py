"""Calls one function of a solution with arguments from standard input; the result leaves by a descriptor of its own.

Standard library only: runs in the sandbox, in reach of the solution. What it writes is data to be compared elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
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
    names: dict[str, Any] = {**found, "__name__": "solution"}
    del names["main"]
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


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON values, tuples as lists; raises TypeError for anything that is no plain data."""
    if depth > 60:
        raise TypeError("nested too deeply")
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return [plain(item, depth + 1) for item in value]
    if kind is dict:
        return {key if type(key) is str else json.dumps(key): plain(item, depth + 1) for key, item in value.items()}
    raise TypeError(f"a {kind.__name__} is no plain data")
