"""What an agent is: a coroutine from a dataset row to a Responses object, with everything it may use in its context."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from gym_bus import activity
from gym_bus.errors import DeadlineExceeded
from gym_bus.messages import Call, RolloutId, Timings, Usage
from gym_bus.models.api import CallInfo, Model, Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MakeClient = Callable[[CallInfo, Callable[[Usage], None]], "AsyncOpenAI"]
"""The official client for the calls of one rollout, and who is told their tokens."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout to generate."""

    rollout: RolloutId
    number: int = 1
    """The attempt at this rollout: 1 for the first."""
    row: Mapping[str, msgspec.Raw]
    """The dataset row's top-level keys, values undecoded."""
    params: dict[str, Any]
    """`responses_create_params` of the row, decoded; the agent may change it."""


class Produced(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent hands to the verifier."""

    response: bytes
    """The final Responses object, JSON: `output` holds the items of all steps, `usage` their sum."""
    usage: Usage | None = None
    """Tokens of the whole rollout, in place of those that the context has accounted; None for the context's.

    An agent says them where its library asks a model in a way that the context does not see. Nothing is counted twice:
    they are not added to the context's, and the `usage` within `response` is added to neither.
    """
    extra: dict[str, Any] = {}
    """Fields the agent adds to the result row; JSON values only."""


class _Tokens:
    """Adds up. Apart from the context: a client, which lives until its reference cycles are found, must not keep it."""

    def __init__(self) -> None:
        self.usage = Usage()

    def add(self, usage: Usage) -> None:
        """The tokens of one more call."""
        self.usage = add_usage(self.usage, usage)


class Context:
    """What one rollout may use, and the account of what it used."""

    def __init__(self, model: Model, rollout: RolloutId, number: int, limit_s: float, client: MakeClient) -> None:
        self._model, self._rollout, self._number = model, rollout, number
        self._make_client = client
        self._client: AsyncOpenAI | None = None
        self._deadline = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._step = 0
        self.timings = Timings()
        self._tokens = _Tokens()
        self.calls: list[Call] = []

    @property
    def usage(self) -> Usage:
        """Tokens of all calls so far, the client's included."""
        return self._tokens.usage

    @property
    def left_s(self) -> float:
        """Seconds until the rollout's deadline."""
        return self._deadline - time.monotonic()

    async def respond(self, params: Mapping[str, Any]) -> Reply:
        """Ask the rollout's model; time, tokens and usage are accounted.

        Raises:
            ModelError: the call failed for good.
            DeadlineExceeded: the rollout's time is up.
        """
        left = self.left_s
        if left <= 0:
            raise DeadlineExceeded(f"the rollout ran past its {self._limit_s:g} s")
        timings, info = self.timings, self._info(left)
        self._step += 1
        timings.model_calls += 1
        activity.note(f"model call {self._step}")
        started, queued_s = time.monotonic(), timings.model_queue_s
        try:
            reply = await self._model.respond(params, info)
        finally:
            timings.model_s += time.monotonic() - started - (timings.model_queue_s - queued_s)
        self._tokens.add(reply.usage)
        if reply.call is not None:
            self.calls.append(reply.call)
        activity.note(f"agent, after model call {self._step}")
        return reply

    def _info(self, left_s: float) -> CallInfo:
        return CallInfo(
            rollout=self._rollout, number=self._number, step=self._step, limit_s=left_s, timings=self.timings
        )

    def tool_call_key(self, call: int) -> str:
        """Names the `call`-th tool call (from 0) that the last reply asks for: the same at every delivery."""
        return f"{self._rollout}#{self._number}/{self._step}.{call}"

    async def use_tools(self, *calls: Any) -> list[Any]:
        """Await tool calls concurrently; their time is accounted once. Results in the same order."""
        activity.note(f"tools, after model call {self._step}")
        started = time.monotonic()
        try:
            return list(await asyncio.gather(*calls))
        finally:
            self.timings.tools_s += time.monotonic() - started

    def openai(self) -> AsyncOpenAI:
        """The official client for the rollout's model, over the worker's own connections: for external libraries.

        Its calls carry the rollout's header, and their time and tokens are accounted as those of `respond`, but for
        token ids. The same client at every call; closing it closes no connection.
        """
        if self._client is None:
            self._client = self._make_client(self._info(self.left_s), self._tokens.add)
        return self._client


class Agent(Protocol):
    """One way to produce an attempt. The constructor takes the job's options as keyword arguments and checks them."""

    async def run(self, task: Task, context: Context) -> Produced:
        """Generate one rollout.

        Raises:
            ModelError: the model did not answer; the worker records the class.
            TaskError: the row cannot be run.
            AgentError: the agent's own fault, a clear sentence.
        """
        ...


def add_usage(a: Usage, b: Usage) -> Usage:
    """Sum of two usages; a detail is unknown only where neither says it."""
    return Usage(
        input_tokens=a.input_tokens + b.input_tokens,
        output_tokens=a.output_tokens + b.output_tokens,
        total_tokens=a.total_tokens + b.total_tokens,
        reasoning_tokens=_add(a.reasoning_tokens, b.reasoning_tokens),
        cached_tokens=_add(a.cached_tokens, b.cached_tokens),
    )


def _add(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b
