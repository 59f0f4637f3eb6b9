"""Tools as an agent sees them: a box per rollout, a call in, text for the model out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

import msgspec

from gym_bus.deadline import within
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

        Calls of one step run concurrently. None is repeated, whatever comes of it; but a rollout whose worker died is
        run again from its start: a tool that changes something outside the rollout sends its `idempotency_key()`.

        Raises:
            ToolError: told to the model.
        """
        ...

    async def close(self) -> None:
        """Release what the rollout held."""
        ...


_key: ContextVar[str] = ContextVar("idempotency_key", default="")


def idempotency_key() -> str:
    """Names the tool call that is being made, for a service that must not do one thing twice.

    Made of the rollout, its attempt, the step and the call's place in it, so it is the same however often the rollout
    is delivered. A model may ask for something else at the same place the next time: a service that knows the key from
    a call with other arguments should refuse.
    """
    return _key.get()


def _ignore(fault: str) -> None:
    del fault


async def call_tool(
    toolbox: Toolbox | None,
    name: str,
    arguments: str,
    limit_s: float,
    *,
    key: str = "",
    on_fault: Callable[[str], None] = _ignore,
) -> str:
    """One tool call of a model, whatever is wrong with it, as output text for the model. It is made once.

    An error inside the tool is the model's to see and to mend, as NeMo Gym does it: `{"error": ...}`.

    Args:
        toolbox: the tools there are; None for none.
        name: which.
        arguments: a JSON object.
        limit_s: wall-clock seconds.
        key: see `idempotency_key`.
        on_fault: told where the tool broke down: it raised something else than `ToolError`, or did not answer.
    """
    try:
        decoded = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        return _error(f"Invalid tool call arguments: {e}")
    known = toolbox.names() if toolbox else ()
    if toolbox is None or name not in known:
        return _error(f"Unknown tool {name!r}: {did_you_mean(name, known)}")
    _key.set(key)
    try:
        output = await within(limit_s, toolbox.call(name, decoded))
        text = output if isinstance(output, str) else msgspec.json.encode(output).decode()
        return text.encode(errors="replace").decode()
    except ToolError as e:
        return _error(str(e))
    except TimeoutError:
        fault = f"The tool did not answer within {limit_s:g} s"
    except Exception as e:  # a tool is foreign code: whatever it raises is its output, never the end of the rollout
        fault = f"{type(e).__name__}: {e}"
    on_fault(f"{name}: {_bounded(fault)}")
    return _error(fault)


def _error(text: str) -> str:
    return msgspec.json.encode({"error": _bounded(text)}).decode()


def _bounded(text: str) -> str:
    return text[:2000].encode(errors="replace").decode()
