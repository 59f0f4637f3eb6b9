"""The failures that gym_bus raises on purpose, named after the boundary that was crossed.

Errors take positional arguments only, so that they pickle across process and Ray boundaries.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from typing import ClassVar, NamedTuple


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
    TOOL_ERROR_BUDGET = "tool_error_budget"
    """The rollout's tools broke down more often than its agent's `tool_error_budget` allows."""
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


class Repeat(NamedTuple):
    """What gym_bus repeats by itself, within one attempt at a rollout."""

    what: str
    """The thing that is done again; all else of the rollout stands."""
    limit: str
    """The setting that says how often, as a dotted path."""
    delay: str
    """In between; `{path}` stands for the value of a setting."""


class Treatment(NamedTuple):
    """How one kind of failure is treated."""

    repeats: tuple[Repeat, ...]
    """What is done before the rollout counts as failed; empty where no repetition can help."""
    again: bool
    """Whether the next run of the same command makes another attempt, `results.max_attempts` in all. `eval replay`
    makes one whatever this says."""
    advice: str
    """What the user should do."""


_WAITS = "{models.NAME.retry.wait_s} s, doubled every time up to {models.NAME.retry.max_wait_s} s, jittered"
_DELIVERIES = Repeat(
    "the delivery to a worker", "bus.max_deliver", "{bus.ack_wait_s} s after the worker was last heard"
)


def _call(kind: str, delay: str = _WAITS) -> tuple[Repeat, ...]:
    return (Repeat("the model call", f"models.NAME.retry.{kind}", delay),)


TREATMENTS: dict[FailureKind, Treatment] = {
    FailureKind.MODEL_UNREACHABLE: Treatment(
        _call("unreachable"), True, "start the endpoint, check `base_url`, then run the command again"
    ),
    FailureKind.RATE_LIMITED: Treatment(
        _call("rate_limited", f"as its `Retry-After` says, else {_WAITS}"),
        True,
        "lower `agent.concurrency`, or raise `retry.rate_limited` and `retry.budget_s`; then run again",
    ),
    FailureKind.MODEL_TIMEOUT: Treatment(
        _call("timeout"), True, "raise `read_limit_s` or `call_limit_s`, or lower the concurrency; then run again"
    ),
    FailureKind.MODEL_ERROR: Treatment(
        _call("server_error"), True, "look at the endpoint's log, its own words are in the failure; then run again"
    ),
    FailureKind.REQUEST_REFUSED: Treatment(
        (), False, "correct the request (sampling parameters, model name, tools) or the endpoint; then `eval replay`"
    ),
    FailureKind.CONTEXT_TOO_LONG: Treatment(
        (), False, "shorten the prompt, which makes another job, or serve a longer context and `eval replay`"
    ),
    FailureKind.AGENT_ERROR: Treatment(
        (), True, "mend the agent, the traceback's end is in the failure; then run again"
    ),
    FailureKind.TOOL_ERROR_BUDGET: Treatment((), True, "mend what the tools stand on; then run again"),
    FailureKind.VERIFIER_ERROR: Treatment(
        (), True, "mend the verifier, then `eval replay --class verifier_error`: no model is asked again"
    ),
    FailureKind.SANDBOX_LOST: Treatment(
        (
            Repeat("the check", "verifier.tries", "none"),
            Repeat("the delivery to a worker", "bus.max_deliver", "1 s, doubled every time up to 30 s, jittered"),
        ),
        True,
        "look for memory pressure on the verifier's machine; then run again",
    ),
    FailureKind.JUDGE_FAILED: Treatment((), True, "start the judge's endpoint; then run again"),
    FailureKind.TASK_BROKEN: Treatment((), False, "correct the row of the data set, which makes another job"),
    FailureKind.DEADLINE: Treatment(
        (), True, "`eval replay --class deadline --limit-s SECONDS`, or a job with a larger `job.limit_s`"
    ),
    FailureKind.CANCELLED: Treatment((), True, "run the command again to go on, as often as you like"),
    FailureKind.POISON: Treatment((_DELIVERIES,), True, "look at the worker's log; then run again"),
    FailureKind.LOST: Treatment(
        (Repeat("the order on the bus", "results.issue_limit", "{results.idle_s} s without progress of the job"),),
        True,
        "look at the server's limits and disk; then run again",
    ),
}
"""What happens to every kind of failure, in one place; docs/reference/failures.md is made from it."""

RETRYABLE = frozenset(kind for kind, treatment in TREATMENTS.items() if treatment.again)
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


class Overloaded(ModelError):
    """The endpoint said that it has too much to do: 503 or 529.

    `retry_after_s` is its own wish, seconds, None where it gave none.
    """

    def __init__(self, message: str, status: int = 503, retry_after_s: float | None = None) -> None:
        super().__init__(message, status)
        self.args = (message, status, retry_after_s)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """The endpoint answered 429, or takes nothing."""

    kind = FailureKind.RATE_LIMITED

    def __init__(self, message: str, status: int = 429, retry_after_s: float | None = None) -> None:
        super().__init__(message, status, retry_after_s)


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


class ToolBudgetExceeded(GymBusError):
    """The tools of a rollout broke down more often than its agent allows."""

    kind = FailureKind.TOOL_ERROR_BUDGET


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


class SandboxRefused(SandboxError):
    """This machine's sandbox does not run it: a level, a language or a tool is not to be had here."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence part with close matches and the choices, for an error message about an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
