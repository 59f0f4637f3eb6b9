"""For tests of agents: a model that says what the test wants, and one rollout without bus or workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from gym_bus.agents.base import Agent, Context, Produced, Task
from gym_bus.errors import RequestRefused
from gym_bus.messages import RolloutId, Usage
from gym_bus.models.api import CallInfo, Model, Reply, ResponseHead
from gym_bus.models.body import count_tokens, response_body


class ScriptedModel:
    """Answers its first call with the first text, the second with the second, ..."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts
        self.asked: list[dict[str, Any]] = []
        """The create params of each call."""

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        """The next text. Raises RequestRefused where there is none left."""
        if len(self.asked) >= len(self._texts):
            raise RequestRefused(f"the test has {len(self._texts)} answers, the agent makes another call", 404)
        text = self._texts[len(self.asked)]
        self.asked.append(dict(params))
        usage = Usage(output_tokens=count_tokens(text), total_tokens=count_tokens(text))
        body = response_body(name=f"test_{info.step}", model="scripted", text=text, usage=usage, created_at=0)
        return Reply(body=body, head=msgspec.json.decode(body, type=ResponseHead), usage=usage)

    async def close(self) -> None:
        """Nothing is held."""


async def play(agent: Agent, row: bytes, model: Model, *, task_index: int = 0, limit_s: float = 30.0) -> Produced:
    """One rollout of `agent` for a materialized row (JSON).

    Raises:
        GymBusError: as the agent raises it.
    """
    rollout = RolloutId("test", task_index, 0)
    decoded = msgspec.json.decode(row, type=dict[str, msgspec.Raw])
    params = msgspec.json.decode(decoded["responses_create_params"], type=dict[str, Any])
    context = Context(model, rollout, 1, limit_s, _no_client)
    return await agent.run(Task(rollout=rollout, row=decoded, params=params), context)


def _no_client(*_: object) -> NoReturn:
    raise RequestRefused("a test's model has no endpoint for the openai package: give the library context.respond")
