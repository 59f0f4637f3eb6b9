"""Tools as an agent sees them: a box per rollout, a call in, text for the model out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from gym_bus.errors import did_you_mean
from gym_bus.messages import RolloutId


class ToolError(Exception):
    """A tool could not do what the model asked; the text goes to the model as the tool's output."""


class Toolbox(Protocol):
    """The tools of one rollout, with their state. Made anew for each rollout, closed at its end."""

    def __init__(self, row: Mapping[str, msgspec.Raw], rollout: RolloutId) -> None: ...

    def names(self) -> tuple[str, ...]:
        """The tools there are."""
        ...

    async def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run one tool; text is handed to the model as it is, other JSON values as JSON.

        Calls of one step run concurrently.

        Raises:
            ToolError: told to the model.
        """
        ...

    async def close(self) -> None:
        """Release what the rollout held."""
        ...


async def call_tool(toolbox: Toolbox | None, name: str, arguments: str, limit_s: float) -> str:
    """One tool call of a model, whatever is wrong with it, as output text for the model.

    An error inside the tool is the model's to see and to mend, as NeMo Gym does it: `{"error": ...}`.
    """
    try:
        decoded = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        return _error(f"Invalid tool call arguments: {e}")
    known = toolbox.names() if toolbox else ()
    if toolbox is None or name not in known:
        return _error(f"Unknown tool {name!r}: {did_you_mean(name, known)}")
    try:
        output = await asyncio.wait_for(toolbox.call(name, decoded), limit_s)
        text = output if isinstance(output, str) else msgspec.json.encode(output).decode()
        return text.encode(errors="replace").decode()
    except TimeoutError:
        return _error(f"The tool did not answer within {limit_s:g} s")
    except ToolError as e:
        return _error(str(e))
    except Exception as e:  # a tool is foreign code: whatever it raises is its output, never the end of the rollout
        return _error(f"{type(e).__name__}: {e}")


def _error(text: str) -> str:
    return msgspec.json.encode({"error": text[:2000].encode(errors="replace").decode()}).decode()
