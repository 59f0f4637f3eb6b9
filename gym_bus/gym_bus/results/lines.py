"""One result as one JSONL line, composed from bytes: row and response are checked and copied, not built as objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from gym_bus.errors import RETRYABLE, FailureKind
from gym_bus.messages import Call, Failed, Result, Scored, Usage

COMPOSED = frozenset(
    {
        "response",
        "reward",
        "reward_components",
        "gym_bus",
        "_ng_task_index",
        "_ng_rollout_index",
        "_ng_attempt_index",
        "_ng_failure_class",
        "_ng_failure_terminal",
        "_ng_failure_detail",
        "_ng_failure_stage",
        "_ng_failure_judge_error",
        "_ng_no_persist",
    }
)
"""Keys that only the line's composer writes: in a row or among extra fields they are dropped.

Any of the last group would make NeMo Gym's tools take a scored line for a failed one, or a failed one for scored.
"""

Fields = dict[str, msgspec.Raw]

_fields: msgspec.json.Decoder[Fields] = msgspec.json.Decoder(Fields)
_value: msgspec.json.Decoder[msgspec.Raw] = msgspec.json.Decoder(msgspec.Raw)
_items: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_encoder = msgspec.json.Encoder()


class _ItemHead(msgspec.Struct, frozen=True):
    type: str = "message"
    role: str = "assistant"


_item_head: msgspec.json.Decoder[_ItemHead] = msgspec.json.Decoder(_ItemHead)

MOST_HISTORY = 100
MOST_HISTORY_CHARS = 1000
"""Of one error in a history; the line of its own attempt has it whole."""


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """A failed attempt, in the history that every later line of its rollout carries."""

    attempt: int
    stage: str = ""
    kind: str = msgspec.field(default="", name="class")
    detail: str = ""
    worker: str = ""
    """Who had it in hand; empty where the bus itself failed it."""
    at: float = 0.0
    """Seconds since the epoch."""


class _PastOurs(msgspec.Struct, frozen=True):
    attempt: int = 1
    agent_worker: str = ""
    verifier_worker: str = ""
    finished_at: float = 0.0
    history: list[Past] | None = None


class _PastLine(msgspec.Struct, frozen=True):
    kind: str = msgspec.field(name="_ng_failure_class")
    stage: str = msgspec.field(default="", name="_ng_failure_stage")
    detail: str = msgspec.field(default="", name="_ng_failure_detail")
    gym_bus: _PastOurs = _PastOurs()


_past_line: msgspec.json.Decoder[_PastLine] = msgspec.json.Decoder(_PastLine)


def history_of(line: bytes) -> list[Past]:
    """Every failed attempt up to that of a line of the failures file, oldest first."""
    past = _past_line.decode(line)
    ours = past.gym_bus
    if ours.history is not None:
        return ours.history
    worker = ours.verifier_worker or ours.agent_worker
    one = Past(
        attempt=ours.attempt,
        stage=past.stage,
        kind=past.kind,
        detail=past.detail[:MOST_HISTORY_CHARS],
        worker=worker,
        at=ours.finished_at,
    )
    return [one]


def _past(result: Failed) -> Past:
    return Past(
        attempt=result.number,
        stage=result.failure.stage,
        kind=result.failure.kind.value,
        detail=result.failure.detail[:MOST_HISTORY_CHARS],
        worker=result.verifier_worker or result.agent_worker,
        at=result.published_at,
    )


def scored_line(result: Scored, sequence: int, *, tokens: bool = False, before: Sequence[Past] = ()) -> bytes:
    """The line of a scored rollout, newline included.

    Keys stand in this order and once each: the row's, `response`, `reward`, `reward_components` where there are any,
    the extra fields (they win over the row's, in the row's place), the `_ng_` indices, `gym_bus`.

    Args:
        result: what was scored.
        sequence: the result's sequence number in its stream; the file is the stream's checkpoint.
        tokens: write token ids and log-probabilities, as NeMo Gym does, onto the last output item of each model call.
        before: the attempts that failed before.

    Raises:
        ValueError: the row or the extra fields are no JSON object, or the response is no JSON.
    """
    line: dict[str, Any] = _object(result.row, "row")
    response = _json(result.response, "response")
    ours = _provenance(result, sequence, finished_at=result.published_at)
    ours |= {"verifier_digest": result.verifier_digest}
    if before:
        ours["history"] = before
    if tokens and result.calls:
        placed = _with_tokens(response, result.calls)
        if placed is None:
            ours["calls"] = [_token_lists(call) for call in result.calls]
        else:
            response = placed
    line["response"] = response
    line["reward"] = result.reward
    if result.components:
        line["reward_components"] = result.components
    line.update(_object(result.extra, "extra"))
    return _finish(line, result, ours)


def failed_line(result: Failed, sequence: int, *, before: Sequence[Past] = ()) -> bytes:
    """The line of a failed attempt, newline included. It never holds a `reward`.

    Raises:
        ValueError: the row or the extra fields are no JSON object, or the response is no JSON.
    """
    line: dict[str, Any] = _object(result.row, "row")
    if result.response:
        line["response"] = _json(result.response, "response")
    failure = result.failure
    line["_ng_failure_class"] = failure.kind.value
    line["_ng_failure_terminal"] = failure.terminal or failure.kind not in RETRYABLE
    line["_ng_failure_stage"] = failure.stage
    line["_ng_failure_detail"] = failure.detail
    if failure.kind is FailureKind.JUDGE_FAILED:
        line["_ng_failure_judge_error"] = failure.detail  # where NeMo Gym looks for it
    ours = _provenance(result, sequence, finished_at=result.published_at)
    if stored := _stored(result):
        ours["stored"] = stored
    ours["history"] = [*before, _past(result)][-MOST_HISTORY:]
    return _finish(line, result, ours)


def _stored(result: Failed) -> dict[str, Any]:
    """What the attempt has beside its response, so that it can be verified again whole; token arrays packed, base64."""
    stored: dict[str, Any] = {}
    if extra := _object(result.extra, "extra"):
        stored["extra"] = extra
    if result.calls:
        stored["calls"] = result.calls
    return stored


def _finish(line: dict[str, Any], result: Result, ours: dict[str, Any]) -> bytes:
    line["_ng_task_index"] = result.rollout.task_index
    line["_ng_rollout_index"] = result.rollout.rollout_index
    if result.number > 1:
        line["_ng_attempt_index"] = result.number - 1
    line["gym_bus"] = ours
    data = _encoder.encode(line)
    if not data.isascii():
        data.decode()  # undecoded strings were not checked; a reader in text mode would trip over them for ever
    # Inside JSON strings line breaks are escaped, so raw ones are mere layout; a text-mode reader splits at both.
    return data.replace(b"\n", b" ").replace(b"\r", b" ") + b"\n"


def _provenance(result: Result, sequence: int, finished_at: float) -> dict[str, Any]:
    policy = result.policy
    return {
        "job": result.rollout.job,
        "attempt": result.number,
        "agent": result.agent,
        "model": policy.model if policy else None,
        "policy_version_start": policy.version_start if policy else None,
        "policy_version_end": policy.version_end if policy else None,
        "temperature": policy.temperature if policy else None,
        "verifier": result.verifier,
        "agent_worker": result.agent_worker,
        "verifier_worker": result.verifier_worker,
        "timings": msgspec.structs.asdict(result.timings),  # as a struct it would leave out the stages of 0 s
        "usage": None if result.usage == _NO_USAGE else msgspec.structs.asdict(result.usage),
        "group_size": result.group_size,
        "stream_seq": sequence,
        "finished_at": finished_at,
    }


_NO_USAGE = Usage()


def _object(data: bytes, what: str) -> Fields:
    try:
        fields = _fields.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"the {what} is not a JSON object: {e}") from None
    for key in COMPOSED.intersection(fields):
        del fields[key]
    return fields


def _json(data: bytes, what: str) -> msgspec.Raw:
    try:
        return _value.decode(data)
    except msgspec.DecodeError as e:
        raise ValueError(f"the {what} is not JSON: {e}") from None


def _with_tokens(response: msgspec.Raw, calls: Sequence[Call]) -> msgspec.Raw | None:
    """The response with token lists on the last item of each call; None where calls and items do not match up.

    A wrong match would train on tokens that were never sampled in that place, so nothing is guessed.
    """
    try:
        body = _fields.decode(response)
        output = _items.decode(body["output"])
        ends = _call_ends([_item_head.decode(item) for item in output])
    except (msgspec.DecodeError, KeyError):
        return None
    if len(ends) != len(calls):
        return None
    for at, call in zip(ends, calls, strict=True):
        item: dict[str, Any] = _fields.decode(output[at])
        output[at] = msgspec.Raw(_encoder.encode(item | _token_lists(call)))
    changed: dict[str, Any] = body | {"output": output}
    return msgspec.Raw(_encoder.encode(changed))


def _call_ends(items: Sequence[_ItemHead]) -> list[int]:
    """The last item of each model call: what follows is what the model was told next (tool outputs, messages)."""
    sampled = [item.role == "assistant" and not item.type.endswith("_output") for item in items]
    return [at for at, now in enumerate(sampled) if now and not (at + 1 < len(sampled) and sampled[at + 1])]


def _token_lists(call: Call) -> dict[str, list[Any]]:
    return {
        "prompt_token_ids": np.frombuffer(call.prompt_token_ids, "<u4").tolist(),
        "generation_token_ids": np.frombuffer(call.token_ids, "<u4").tolist(),
        "generation_log_probs": np.frombuffer(call.logprobs, "<f4").tolist(),
    }
