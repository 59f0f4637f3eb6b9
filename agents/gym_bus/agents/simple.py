"""The simple agent: ask the model, run the tools it calls, ask again, until it answers in words or a limit is reached.

Stop rules and the final response follow NeMo Gym's simple agent: the last response with `output` holding the items of
all steps, tool outputs included, and `usage` summed. Tool calls of one step run concurrently.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gym_bus.agents.base import Context, Produced, Task
from gym_bus.agents.registry import TOOLBOXES
from gym_bus.agents.tools import Toolbox, call_tool
from gym_bus.errors import DeadlineExceeded, ModelError, TaskError, ToolBudgetExceeded, UsageError
from gym_bus.messages import Usage
from gym_bus.models.api import Reply
from gym_bus.models.body import usage_body


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job may set."""

    toolbox: str | None = None
    """Registered name of the tools; null for none."""
    max_steps: Annotated[int, Meta(ge=1)] = 64
    """Model calls of one rollout. NeMo Gym's default is no limit, which lets a reasoning-only model loop for ever."""
    max_total_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Stop once the calls of the rollout have used so many tokens, prompts included."""
    tool_limit_s: Annotated[float, Meta(gt=0)] = 60.0
    """Wall-clock seconds of one tool call."""
    tool_error_budget: Annotated[int, Meta(ge=0)] | None = None
    """Tool calls of one rollout that may break down (the tool raised, or did not answer) before the rollout fails; null
    for any number. What the model did wrong, and whatever a tool reports as a `ToolError`, does not count."""


class _Item(msgspec.Struct, frozen=True):
    type: Any = "message"
    role: Any = "assistant"


class _FunctionCall(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None


_item_decoder = msgspec.json.Decoder(_Item)
_call_decoder = msgspec.json.Decoder(_FunctionCall)


class SimpleAgent:
    """Single turn where the model calls no tool, else a loop of model and tool calls."""

    def __init__(self, **options: Any) -> None:
        try:
            self._options = msgspec.convert(options, Options)
        except msgspec.ValidationError as e:
            raise UsageError(f"options of agent 'simple': {e}") from None
        self._toolbox = TOOLBOXES.load(self._options.toolbox) if self._options.toolbox else None

    async def run(self, task: Task, context: Context) -> Produced:
        """Generate one rollout."""
        if self._toolbox is None:
            return await self._loop(task, context, None)
        toolbox = self._toolbox(task.row, task.rollout)
        try:
            return await self._loop(task, context, toolbox)
        finally:
            await toolbox.close()

    async def _loop(self, task: Task, context: Context, toolbox: Toolbox | None) -> Produced:
        given = _as_items(task.params.get("input"))
        produced: list[msgspec.Raw] = []
        faults: list[str] = []
        for step in range(1, self._options.max_steps + 1):
            params = task.params if step == 1 else {**task.params, "input": [*given, *produced]}
            reply = await context.respond(params)
            produced += reply.head.output
            calls, spoke = _calls_of(reply)
            stop = bool(reply.head.incomplete_details) or (spoke and not calls) or self._spent(context.usage)
            if not stop and calls:
                produced += await self._use_tools(calls, context, toolbox, faults)
            if stop or step == self._options.max_steps:
                return Produced(response=_final(reply, produced, context.usage, single=step == 1 and not calls))
        raise AssertionError("unreachable: max_steps is at least 1")

    def _spent(self, usage: Usage) -> bool:
        limit = self._options.max_total_tokens
        return limit is not None and usage.total_tokens >= limit

    async def _use_tools(
        self, calls: list[_FunctionCall], context: Context, toolbox: Toolbox | None, faults: list[str]
    ) -> list[msgspec.Raw]:
        limit_s = min(self._options.tool_limit_s, context.left_s)
        if limit_s <= 0:
            raise DeadlineExceeded("the rollout ran past its time before its tools could run")
        outputs = await context.use_tools(
            *(
                call_tool(
                    toolbox,
                    c.name or "",
                    c.arguments or "",
                    limit_s,
                    key=context.tool_call_key(place),
                    on_fault=faults.append,
                )
                for place, c in enumerate(calls)
            )
        )
        budget = self._options.tool_error_budget
        if budget is not None and len(faults) > budget:
            raise ToolBudgetExceeded(f"{len(faults)} tool calls broke down, {budget} may; the last: {faults[-1]}")
        return [_tool_output(call.call_id or "", output) for call, output in zip(calls, outputs, strict=True)]


def _as_items(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, list):
        return given
    raise TaskError("responses_create_params.input must be a string or a list of items")


def _calls_of(reply: Reply) -> tuple[list[_FunctionCall], bool]:
    """The function calls of one reply, and whether the assistant said anything."""
    try:
        items = [(_item_decoder.decode(raw), raw) for raw in reply.head.output]
        calls = [_call_decoder.decode(raw) for item, raw in items if item.type == "function_call"]
    except msgspec.ValidationError as e:
        raise ModelError(f"the endpoint's reply has a malformed output item: {e}", 200) from None
    return calls, any(item.type == "message" and item.role == "assistant" for item, _ in items)


def _tool_output(call_id: str, output: str) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode({"type": "function_call_output", "call_id": call_id, "output": output}))


def _final(reply: Reply, produced: list[msgspec.Raw], usage: Usage, *, single: bool) -> bytes:
    if single:  # nothing to add: the reply goes on as the bytes it came in
        return reply.body
    response = msgspec.json.decode(reply.body, type=dict[str, msgspec.Raw])
    response["output"] = msgspec.Raw(msgspec.json.encode(produced))
    response["usage"] = msgspec.Raw(usage_body(usage))
    return msgspec.json.encode(response)
