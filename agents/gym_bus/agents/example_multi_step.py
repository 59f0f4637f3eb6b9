"""The tools of the example_multi_step environment: synonyms that have a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gym_bus.agents.tools import ToolError
from gym_bus.messages import RolloutId


class ExampleMultiStep:
    """`get_synonym_value(synonym)` and `extract_synonym_values(synonym_values)`; no state."""

    def __init__(self, row: Mapping[str, msgspec.Raw], rollout: RolloutId) -> None:
        del row, rollout

    def names(self) -> tuple[str, ...]:
        """The two tools."""
        return ("get_synonym_value", "extract_synonym_values")

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """The value of a synonym is the sum of its characters' code points; extracting only records the answer."""
        if name == "extract_synonym_values":
            return {"success": True}
        synonym = arguments.get("synonym")
        if not isinstance(synonym, str):
            raise ToolError("argument 'synonym' must be a string")
        return {"synonym_value": sum(map(ord, synonym))}

    async def close(self) -> None:
        """Nothing is held."""
