"""What every check of a solution's functions shares: its programs, whether it loaded, what to call its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gym_bus.sandbox.api import Ended, Outcome, Program
from gym_bus.verifiers.tester_side import shown

REASONS = {
    Ended.WALL_LIMIT: "timeout",
    Ended.CPU_LIMIT: "timeout",
    Ended.MEMORY: "memory",
    Ended.OUTPUT_LIMIT: "output_limit",
    Ended.COMPILE_ERROR: "compile_error",
    Ended.SIGNALLED: "runtime_error",
    Ended.FINISHED: "runtime_error",
}
"""What to call the end of a solution that the tests did not see through."""


def program(module: str, function: str, arguments: str) -> Program:
    """One side of a check: `function(arguments)` of a module of this package."""
    text = f"from gym_bus.verifiers.{module} import {function}\n{function}({arguments})\n"
    return Program(source=text.encode("utf-8", "surrogatepass" if "\\ud" not in text else "strict"))


def not_loaded(replies: Iterator[Any], solution: Outcome) -> tuple[str, str] | None:
    """Why the solution's text did not run, and what it said; None where it did, by its first reply."""
    match next(replies, None):
        case ["ready"]:
            return None
        case ["compile_error" | "raised" as what, *_, str() as said]:
            return ("compile_error" if what == "compile_error" else "runtime_error"), shown(said, 500)
        case _:
            return REASONS[solution.ended], ""
