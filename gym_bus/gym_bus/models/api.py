"""A model as its callers see it: Responses create params in, a Responses object out, whatever the endpoint speaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from gym_bus.messages import Call, RolloutId, Timings, Usage


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response stopped early."""

    reason: str | None = None
    """`max_output_tokens` or `content_filter`."""


class ResponseHead(msgspec.Struct, frozen=True):
    """What the agent loop needs of a Responses object; the rest stays undecoded."""

    output: list[msgspec.Raw] = []
    """The output items, each one JSON object."""
    incomplete_details: IncompleteDetails | None = None


class CallInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Which call of which rollout this is, and how long it may take."""

    rollout: RolloutId
    number: int = 1
    """The attempt number of the rollout."""
    step: int = 0
    """0 for the first model call of the rollout, 1 for the next, ..."""
    limit_s: float = 3600.0
    """Seconds left of the whole rollout; a call never outlives it, retries included."""
    timings: Timings = msgspec.field(default_factory=Timings)
    """The rollout's account, to which the model adds the seconds in which it waits instead of asking."""

    @property
    def identity(self) -> str:
        """`job/task/rollout/attempt`, as the rollout header says it."""
        r = self.rollout
        return f"{r.job}/{r.task_index}/{r.rollout_index}/{self.number}"


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One answered model call."""

    body: bytes
    """The Responses object, one JSON object, without token arrays (they are in `call`)."""
    head: ResponseHead
    usage: Usage = Usage()
    call: Call | None = None
    """Token ids and log-probabilities, where the endpoint gave them."""
    tries: int = 1
    """HTTP requests that this answer took."""


class Model(Protocol):
    """One named model of the configuration."""

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        """Ask the model once, retries by kind of error included.

        Args:
            params: Responses create params; values may be `msgspec.Raw` JSON. The model's own name, the sampling
                overrides of the configuration and what `metadata.extra_body` holds are filled in here.
            info: identity and deadline.

        Raises:
            ModelError: the call failed for good; the class says how, the message carries the endpoint's own words.
        """
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
