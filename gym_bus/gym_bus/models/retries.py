"""A model call over all its tries, and when it is tried again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from gym_bus.errors import ModelError, ModelTimeout, ModelUnreachable, Overloaded
from gym_bus.models.api import CallInfo
from gym_bus.settings import RetryConfig


class HttpCall:
    """One model call over all its tries."""

    def __init__(self, body: bytes, headers: Mapping[str, str], params: Mapping[str, Any], info: CallInfo) -> None:
        self.body, self.headers, self.params, self._info = body, headers, params, info
        self.started_at = time.monotonic()
        self.queued_s = 0.0
        """Seconds in which it waited for its turn: they count against the rollout's time, not against its own."""

    @property
    def left_s(self) -> float:
        """Seconds until the rollout's time is up."""
        return self._info.limit_s - (time.monotonic() - self.started_at)

    def queued(self, seconds: float) -> None:
        """It waited for its turn."""
        self.queued_s += seconds
        self._info.timings.model_queue_s += seconds

    async def sleep(self, seconds: float) -> None:
        """Wait for the next try."""
        self._info.timings.model_queue_s += seconds
        await asyncio.sleep(seconds)


def retrying(config: RetryConfig, call: HttpCall) -> AsyncRetrying:
    """The tries of one call, for `async for`; the last error is raised where the plan has no further one."""
    plan = _RetryPlan(config, call)
    return AsyncRetrying(
        retry=retry_if_exception_type(ModelError), stop=plan.stop, wait=plan.wait, sleep=call.sleep, reraise=True
    )


class _RetryPlan:
    """When to try again, by the kind of the last error."""

    def __init__(self, config: RetryConfig, call: HttpCall) -> None:
        self._config, self._call = config, call
        self._counts: dict[str, int] = {}

    def _kind(self, error: BaseException) -> tuple[str, int]:
        c = self._config
        if isinstance(error, Overloaded):
            return "rate_limited", c.rate_limited
        if isinstance(error, ModelTimeout):
            return "timeout", c.timeout
        if isinstance(error, ModelUnreachable):
            return "unreachable", c.unreachable
        return "server_error", c.server_error

    def _left_s(self) -> float:
        call = self._call
        spent_s = time.monotonic() - call.started_at - call.queued_s
        return min(call.left_s, self._config.budget_s - spent_s)

    def stop(self, state: RetryCallState) -> bool:
        """Whether the last error ends the call. Called once per failed try."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, ModelError) or not error.retryable:
            return True
        kind, most = self._kind(error)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind] > most or self._wait_s(error, kind) >= self._left_s()

    def wait(self, state: RetryCallState) -> float:
        """Seconds until the next try."""
        error = state.outcome.exception() if state.outcome else None
        if error is None:
            return 0.0
        return self._wait_s(error, self._kind(error)[0])

    def _wait_s(self, error: BaseException, kind: str) -> float:
        c = self._config
        backoff = min(c.wait_s * 2 ** min(self._counts.get(kind, 0), 16), c.max_wait_s) * random.uniform(0.5, 1.0)
        wished = getattr(error, "retry_after_s", None)
        return float(backoff if wished is None else min(max(wished, 0.0) + random.uniform(0, c.wait_s), c.max_wait_s))
