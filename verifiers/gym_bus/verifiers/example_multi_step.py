"""The example_multi_step environment: the model must look up several synonyms' values and hand in all of them."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import function_calls


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """There are none."""


class ExampleMultiStep:
    """Reward 1.0 when the last `extract_synonym_values` call hands in the expected values."""

    placement: ClassVar[Placement] = Placement.INLINE
    required: ClassVar[tuple[str, ...]] = ("expected_synonym_values",)

    def __init__(self, **options: Any) -> None:
        read_options(Options, "example_multi_step", options)

    def verify(self, task: Task) -> Verdict:
        """Score one conversation. Arguments that are no JSON are a wrong answer.

        Raises:
            TaskError: the expected values are no list.
        """
        expected = task.row.get("expected_synonym_values")
        if not isinstance(expected, list):
            raise TaskError("expected_synonym_values must be a list")
        calls = [c for c in function_calls(task.response) if c.get("name") == "extract_synonym_values"]
        got = _values(calls[-1].get("arguments")) if calls else []
        reward = float(got == expected)
        return Verdict(reward=reward, extra={"parsed_synonym_values": got, "accuracy": reward == 1.0})


def _values(arguments: Any) -> Any:
    try:
        decoded = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, TypeError, RecursionError, UnicodeError):
        return []
    return decoded.get("synonym_values", [])
