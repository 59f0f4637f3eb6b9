"""What crosses a subject: frozen structs, one tagged union, MessagePack, encoded once.

Dataset rows and model responses travel as the JSON bytes they arrived in (`bytes`, not decoded on the way); a stage
decodes only the part it needs. New fields get defaults; a new meaning gets a new tag.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import msgspec

from gym_bus.errors import FailureKind


class RolloutId(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Which rollout: stable across redeliveries, retries and resumed runs."""

    job: str
    task_index: int
    rollout_index: int

    def __str__(self) -> str:
        return f"{self.job}.{self.task_index}.{self.rollout_index}"

    @classmethod
    def parse(cls, text: str) -> RolloutId:
        """The inverse of `str()`. Raises ValueError for anything else."""
        job, task, rollout = text.split("#", 1)[0].rsplit(".", 2)
        return cls(job, int(task), int(rollout))


class Timings(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where the seconds of one rollout went. All values are seconds of wall clock."""

    request_queue_s: float = 0.0
    """From the broker's storing of the request to its start on an agent worker."""
    agent_s: float = 0.0
    """The whole run of the agent."""
    model_queue_s: float = 0.0
    """Waiting for a turn at the model's endpoint, and after errors for the next try; all calls added up."""
    model_s: float = 0.0
    """Waiting for the model, all calls of the rollout added up."""
    model_calls: int = 0
    """Number of model calls; a count, not seconds."""
    tools_s: float = 0.0
    """Running tools; parallel calls of one step count once."""
    attempt_queue_s: float = 0.0
    """From the broker's storing of the attempt to its start on a verifier worker."""
    verify_s: float = 0.0
    """The verification, waiting for a place in the pool included."""
    publish_s: float = 0.0
    """From the end of the agent's run to the broker's storing of the attempt; a full stream shows here."""


class Usage(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Tokens of one rollout, all model calls added up."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    reasoning_tokens: int | None = None
    """None where the endpoint does not say."""
    cached_tokens: int | None = None
    """None where the endpoint does not say."""


class Call(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """The tokens of one model call, as a trainer needs them."""

    prompt_token_ids: bytes = b""
    """Little-endian u32; shape [prompt tokens]."""
    token_ids: bytes = b""
    """Sampled tokens, little-endian u32; shape [tokens]."""
    logprobs: bytes = b""
    """Natural log per sampled token, little-endian f32; shape [tokens]."""

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{len(self.logprobs) // 4} log-probabilities for {len(self.token_ids) // 4} tokens")


class Policy(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Which weights sampled the rollout."""

    model: str
    """The model's key in the workers' configuration; never an address or a key."""
    version_start: int = 0
    """The trainer's weight version when the rollout began."""
    version_end: int = 0
    """The weight version when it ended."""
    temperature: float | None = None


class Failure(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Why a rollout has no reward."""

    kind: FailureKind
    detail: str
    """The error in words, the endpoint's own text included; no secrets."""
    stage: str = ""
    """Where it happened: publish, agent, verifier, bus."""
    terminal: bool = False
    """True where running the job again must not try this rollout again."""


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request.v1"):
    """The order for one rollout."""

    rollout: RolloutId
    number: int = 1
    """1 for the first attempt at this rollout, 2 for its first retry, ..."""
    agent: str
    """The agent's registered name."""
    model: str
    """The model's key in the workers' configuration."""
    verifier: str
    """The verifier's registered name."""
    row: bytes
    """The materialized dataset row, one JSON object, without the two index keys."""
    agent_options: bytes = b"{}"
    """JSON object: the agent's options for this job."""
    verifier_options: bytes = b"{}"
    """JSON object: the verifier's options for this job."""
    group_size: int = 1
    """Rollouts of this task in this job."""
    policy_version: int = 0
    limit_s: float = 3600.0
    """Wall-clock limit of the agent's whole run."""
    published_at: float = msgspec.field(default_factory=time.time)
    """Seconds since the epoch, on the publisher's clock."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True, tag="attempt.v1"):
    """What an agent produced for one request, waiting to be verified."""

    rollout: RolloutId
    number: int = 1
    agent: str
    verifier: str
    row: bytes
    """As in the request."""
    response: bytes
    """The Responses object, JSON."""
    verifier_options: bytes = b"{}"
    group_size: int = 1
    policy: Policy
    usage: Usage = Usage()
    calls: tuple[Call, ...] = ()
    """One per model call that returned tokens."""
    extra: bytes = b"{}"
    """JSON object: fields the agent adds to the result row."""
    timings: Timings = msgspec.field(default_factory=Timings)
    agent_worker: str = ""
    published_at: float = msgspec.field(default_factory=time.time)


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a verifier says of one attempt."""

    reward: float
    """Dimensionless; 0 for wrong, empty or unparsable answers, 1 for right ones, unless the verifier says otherwise."""
    components: dict[str, float] = {}
    """Named parts of the reward, for verifiers that have several."""
    extra: dict[str, Any] = {}
    """Fields that join the result row, such as `extracted_answer`; JSON values only."""

    def __post_init__(self) -> None:
        if self.reward != self.reward or self.reward in (float("inf"), float("-inf")):
            raise ValueError(f"a reward must be a finite number, not {self.reward}")


class Scored(msgspec.Struct, frozen=True, kw_only=True, tag="scored.v1"):
    """The result of a rollout that was judged. A reward exists here and nowhere else."""

    rollout: RolloutId
    number: int = 1
    agent: str
    verifier: str
    verifier_digest: str = ""
    """Content hash of the verifier's code and options: equal digests judge alike."""
    reward: float
    components: dict[str, float] = {}
    extra: bytes = b"{}"
    """JSON object: the agent's and the verifier's fields for the result row."""
    row: bytes
    response: bytes
    group_size: int = 1
    policy: Policy
    usage: Usage = Usage()
    calls: tuple[Call, ...] = ()
    timings: Timings = msgspec.field(default_factory=Timings)
    agent_worker: str = ""
    verifier_worker: str = ""
    published_at: float = msgspec.field(default_factory=time.time)


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed.v1"):
    """The result of a rollout that could not be run or judged. It has no reward, by type."""

    rollout: RolloutId
    number: int = 1
    failure: Failure
    agent: str = ""
    verifier: str = ""
    row: bytes = b"{}"
    """As in the request; `{}` where the message could not be read."""
    response: bytes = b""
    """The Responses object where generation had succeeded, else empty."""
    extra: bytes = b"{}"
    """JSON object: the agent's fields for the result row, where generation had succeeded."""
    group_size: int = 1
    policy: Policy | None = None
    usage: Usage = Usage()
    calls: tuple[Call, ...] = ()
    """As in the attempt: a stored attempt can be verified again, and is then worth as much as any other."""
    timings: Timings = msgspec.field(default_factory=Timings)
    agent_worker: str = ""
    verifier_worker: str = ""
    published_at: float = msgspec.field(default_factory=time.time)


Result = Scored | Failed
Message = Request | Attempt | Scored | Failed

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One message as MessagePack bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """The message in `data`. Raises msgspec.DecodeError or ValidationError for anything that is none."""
    return _decoder.decode(data)
