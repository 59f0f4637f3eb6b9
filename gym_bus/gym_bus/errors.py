"""The failures that gym_bus raises on purpose, named after the boundary that was crossed.

Errors take positional arguments only, so that they pickle across process and Ray boundaries.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from typing import ClassVar


class FailureKind(enum.StrEnum):
    """The closed set of reasons why a rollout ended without a reward."""

    MODEL_UNREACHABLE = "model_unreachable"
    """No connection to the model endpoint: refused, unknown host, reset before a reply."""
    RATE_LIMITED = "rate_limited"
    """The endpoint answered 429 until the retries were used up."""
    MODEL_TIMEOUT = "model_timeout"
    """The endpoint did not answer within the call's deadline."""
    MODEL_ERROR = "model_error"
    """The endpoint answered 5xx, or a reply that is no valid response object."""
    REQUEST_REFUSED = "request_refused"
    """The endpoint refused the request (4xx): repeating it cannot help."""
    CONTEXT_TOO_LONG = "context_too_long"
    """The conversation no longer fits the model's context window."""
    AGENT_ERROR = "agent_error"
    """The agent raised: a fault in its code or its configuration."""
    VERIFIER_ERROR = "verifier_error"
    """The verifier raised: a fault in its code."""
    SANDBOX_LOST = "sandbox_lost"
    """The sandbox or its Ray actor died under the check, more often than is retried."""
    JUDGE_FAILED = "judge_failed"
    """The judge model did not answer."""
    TASK_BROKEN = "task_broken"
    """The dataset row cannot be run or judged as it stands."""
    DEADLINE = "deadline"
    """The whole rollout ran past its wall-clock limit."""
    CANCELLED = "cancelled"
    """The job was cancelled before the rollout ended."""
    POISON = "poison"
    """The message could not be decoded, or was delivered too often: it kills or hangs its workers."""
    LOST = "lost"
    """The bus no longer holds the rollout at any stage, more often than it is issued again."""


RETRYABLE = frozenset(
    {
        FailureKind.MODEL_UNREACHABLE,
        FailureKind.RATE_LIMITED,
        FailureKind.MODEL_TIMEOUT,
        FailureKind.MODEL_ERROR,
        FailureKind.SANDBOX_LOST,
        FailureKind.JUDGE_FAILED,
        FailureKind.DEADLINE,
        FailureKind.CANCELLED,
        FailureKind.POISON,
        FailureKind.LOST,
        FailureKind.AGENT_ERROR,
        FailureKind.VERIFIER_ERROR,
    }
)
"""Kinds that running the job again may mend. The others need the task, the request or the configuration to change."""


class GymBusError(Exception):
    """Root of every failure raised on purpose."""

    kind: ClassVar[FailureKind | None] = None
    """What a rollout that ends on this error is recorded as; None where no rollout is involved."""
    retryable: ClassVar[bool] = False
    """Whether another delivery of the same message can help."""


class UsageError(GymBusError):
    """What the user asked for cannot be done as written: unknown name, bad file, missing setting. Exit code 2."""


class ConfigError(UsageError):
    """A configuration key is unknown, missing, or has the wrong type. The message names the key and its file."""


class DataError(UsageError):
    """A data file is malformed. The message names the file and the line."""


class BusError(GymBusError):
    """The NATS server cannot be reached or refuses what is needed of it."""

    retryable = True


class BodyLost(BusError):
    """A message's body is no longer in the object store; asking again cannot help."""

    retryable = False


class PayloadTooLarge(BusError):
    """A message is larger than the stream accepts; sending it again cannot help."""

    retryable = False


class ModelError(GymBusError):
    """A model call failed after its own retries; `status` is the HTTP status, 0 where there was no reply."""

    kind = FailureKind.MODEL_ERROR
    retryable = True

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message, status)
        self.message, self.status = message, status

    def __str__(self) -> str:
        return f"{self.message} (HTTP {self.status})" if self.status else self.message


class ModelUnreachable(ModelError):
    """There was no connection to the endpoint."""

    kind = FailureKind.MODEL_UNREACHABLE


class RateLimited(ModelError):
    """The endpoint answered 429. `retry_after_s` is its own wish, seconds, None where it gave none."""

    kind = FailureKind.RATE_LIMITED

    def __init__(self, message: str, status: int = 429, retry_after_s: float | None = None) -> None:
        super().__init__(message, status)
        self.args = (message, status, retry_after_s)
        self.retry_after_s = retry_after_s


class ModelTimeout(ModelError):
    """The endpoint did not answer in time."""

    kind = FailureKind.MODEL_TIMEOUT


class RequestRefused(ModelError):
    """The endpoint answered 4xx: the request itself is at fault."""

    kind = FailureKind.REQUEST_REFUSED
    retryable = False


class ContextTooLong(RequestRefused):
    """The conversation does not fit the model's context window."""

    kind = FailureKind.CONTEXT_TOO_LONG


class TaskError(GymBusError):
    """The dataset row cannot be run or judged: no reward, whatever the model answered."""

    kind = FailureKind.TASK_BROKEN


class AgentError(GymBusError):
    """The agent's own code failed."""

    kind = FailureKind.AGENT_ERROR


class VerifierError(GymBusError):
    """The verifier's own code failed."""

    kind = FailureKind.VERIFIER_ERROR


class DeadlineExceeded(GymBusError):
    """The rollout ran past its wall-clock limit."""

    kind = FailureKind.DEADLINE


class SandboxError(GymBusError):
    """The sandbox failed, not the program in it; the check is worth repeating elsewhere."""

    kind = FailureKind.SANDBOX_LOST
    retryable = True


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence part with close matches and the choices, for an error message about an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
