"""The agent worker: a rollout request in, an attempt out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any

import msgspec

from gym_bus import subjects
from gym_bus.agents.base import Agent, Context, Produced, Task
from gym_bus.agents.registry import AGENTS
from gym_bus.config import AgentConfig
from gym_bus.errors import DeadlineExceeded, FailureKind, GymBusError, TaskError
from gym_bus.messages import Attempt, Failed, Failure, Message, Policy, Request
from gym_bus.models.registry import Models
from gym_bus.timing import since
from gym_bus.workers.loop import Cancellations, Source

_row_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_params_decoder = msgspec.json.Decoder(dict[str, Any])

MOST_CACHED_AGENTS = 64


class AgentWorker:
    """Runs agents; one instance per process serves every registered agent."""

    stage = "agent"

    def __init__(self, config: AgentConfig, models: Models, worker: str) -> None:
        self._config, self._models, self._worker = config, models, worker
        self._agents: dict[tuple[str, bytes], Agent] = {}
        self.cancellations = Cancellations()

    def sources(self, lanes: tuple[str, ...]) -> list[Source]:
        """One consumer per lane and agent; every lane but the last is urgent."""
        return [
            Source(
                stream=subjects.REQUESTS,
                consumer=f"agent-{lane}-{name}",
                subject=subjects.request(lane, name, "*"),
                urgent=lane != lanes[-1],
            )
            for name in (self._config.names or tuple(AGENTS))
            for lane in lanes
        ]

    async def handle(self, message: Message, stored_at: float) -> Attempt | Failed:
        """Generate one rollout. Never raises for what a model or a row does: that is a failed result."""
        if not isinstance(message, Request):
            raise TypeError(f"a {type(message).__name__} on the request stream")
        queued_s = since(stored_at)
        started = time.monotonic()
        limit_s = min(message.limit_s, self._config.limit_s)
        context: Context | None = None
        try:
            agent = self._agent(message.agent, message.agent_options)
            model = self._models.get(message.model)
            context = Context(
                model, message.rollout, message.number, limit_s, partial(self._models.client, message.model)
            )
            task = _task(message)
            produced = await _within(agent.run(task, context), limit_s)
        except GymBusError as e:
            return self._failed(message, context, e.kind or FailureKind.AGENT_ERROR, str(e), queued_s, started)
        context.timings.request_queue_s = queued_s
        context.timings.agent_s = time.monotonic() - started
        return self._attempt(message, task, produced, context)

    def _agent(self, name: str, options: bytes) -> Agent:
        key = (name, options)
        if key not in self._agents:
            if len(self._agents) >= MOST_CACHED_AGENTS:
                self._agents.pop(next(iter(self._agents)))
            self._agents[key] = AGENTS.load(name)(**msgspec.json.decode(options))
        return self._agents[key]

    def _attempt(self, request: Request, task: Task, produced: Produced, context: Context) -> Attempt:
        temperature = task.params.get("temperature")
        return Attempt(
            rollout=request.rollout,
            number=request.number,
            agent=request.agent,
            verifier=request.verifier,
            row=request.row,
            response=produced.response,
            verifier_options=request.verifier_options,
            group_size=request.group_size,
            policy=Policy(
                model=request.model,
                version_start=request.policy_version,
                version_end=request.policy_version,
                temperature=temperature if isinstance(temperature, int | float) else None,
            ),
            usage=context.usage if produced.usage is None else produced.usage,
            calls=tuple(context.calls),
            extra=msgspec.json.encode(produced.extra) if produced.extra else b"{}",
            timings=context.timings,
            agent_worker=self._worker,
        )

    def _failed(
        self,
        request: Request,
        context: Context | None,
        kind: FailureKind,
        detail: str,
        queued_s: float,
        started: float,
    ) -> Failed:
        from_context: dict[str, Any] = {"usage": context.usage, "timings": context.timings} if context else {}
        outcome = Failed(
            rollout=request.rollout,
            number=request.number,
            failure=Failure(kind=kind, detail=detail[:4000], stage=self.stage),
            agent=request.agent,
            verifier=request.verifier,
            row=request.row,
            group_size=request.group_size,
            policy=Policy(
                model=request.model, version_start=request.policy_version, version_end=request.policy_version
            ),
            agent_worker=self._worker,
            **from_context,
        )
        outcome.timings.request_queue_s = queued_s
        outcome.timings.agent_s = time.monotonic() - started
        return outcome


def _task(request: Request) -> Task:
    try:
        row: Mapping[str, msgspec.Raw] = _row_decoder.decode(request.row)
        params = _params_decoder.decode(row["responses_create_params"])
    except KeyError:
        raise TaskError("the row has no responses_create_params") from None
    except msgspec.MsgspecError as e:
        raise TaskError(f"the row cannot be read: {e}") from None
    return Task(rollout=request.rollout, number=request.number, row=row, params=params)


async def _within(run: Coroutine[Any, Any, Produced], limit_s: float) -> Produced:
    try:
        async with asyncio.timeout(limit_s):
            return await run
    except TimeoutError:
        raise DeadlineExceeded(f"the rollout ran past its {limit_s:g} s") from None
