"""Makes replies of what an endpoint sent, a Responses or a Chat Completions object."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from gym_bus.errors import ModelError
from gym_bus.messages import Call, Usage
from gym_bus.models.api import Reply, ResponseHead
from gym_bus.models.convert import response_object
from gym_bus.models.refusals import UNREADABLE, Refusals
from gym_bus.models.wire import WireChat, chat_decoder, response_decoder, token_item_decoder
from gym_bus.settings import ModelConfig

SPARE_DEPTH = 200
"""Levels that a reply must leave to those who read it later, perhaps on a fuller stack, of about 1,000 there are."""

MOST_VALUES = 4_000_000
"""In one reply: so many take half a second to read, and half a gigabyte."""

_ENDED = (None, "completed", "incomplete")
_BROKEN_OFF = ("abort", "error")
"""Reasons to finish that are the endpoint's, not the model's: what there is of the answer must not be scored."""

_encode = msgspec.json.Encoder().encode
_any = msgspec.json.Decoder()
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Replies:
    """Makes the replies of one model. Both ways raise ModelError for what is no answer."""

    def __init__(self, config: ModelConfig, refusals: Refusals) -> None:
        self._tokens, self._split_think, self._refusals = config.return_tokens, config.split_think, refusals

    def from_responses(self, data: bytes) -> Reply:
        """Of a Responses object, which becomes the reply's body as it is."""
        no_answer = self._refusals.no_answer
        try:
            wire = response_decoder.decode(data)
        except UNREADABLE as e:
            raise no_answer(f"the reply is no Responses object ({e})", data) from None
        if wire.error is not None or wire.status == "failed":
            raise self._refusals.error_in_200(wire.error, "status failed")
        if wire.status not in _ENDED:
            raise no_answer(f"the reply is not the end of an answer (status {wire.status!r})", data)
        if wire.output is None:
            raise no_answer("the reply has no output", data)
        if any(memoryview(item)[:1].tobytes() != b"{" for item in wire.output):
            raise no_answer("the reply has an output item that is no object", data)
        call: Call | None = None
        output = wire.output
        if self._tokens:
            try:
                data, output, call = _cut_tokens(data, output)
            except (ValueError, OverflowError, RecursionError, msgspec.DecodeError) as e:
                raise no_answer(f"its token ids do not fit their log-probabilities ({e})", data) from None
        try:
            _check_to_the_end(data)
        except UNREADABLE as e:
            raise no_answer(f"the reply cannot be read to its end ({e})", data) from None
        usage = wire.plain_usage()
        if usage is None and bytes(wire.usage) != b"null":
            data = _without_usage(data)
        head = ResponseHead(output=output, incomplete_details=wire.incomplete_details)
        return Reply(body=data, head=head, usage=usage or Usage(), call=call)

    def from_chat(self, data: bytes, params: Mapping[str, Any]) -> Reply:
        """Of a Chat Completions object; the Responses object repeats some of the create params."""
        no_answer = self._refusals.no_answer
        try:
            chat = chat_decoder.decode(data)
        except UNREADABLE as e:
            raise no_answer(f"the reply is no Chat Completions object ({e})", data) from None
        if chat.error is not None:
            raise self._refusals.error_in_200(chat.error)
        if not chat.choices:
            raise no_answer("the reply has no choices", data)
        choice = chat.choices[0]
        if choice.message is None:
            raise no_answer("the reply has no message", data)
        if choice.error is not None or choice.finish_reason in _BROKEN_OFF:
            raise self._refusals.error_in_200(choice.error, f"it gave up (finish_reason {choice.finish_reason!r})")
        body = response_object(chat, choice, params, split_think=self._split_think)
        wire = response_decoder.decode(body)
        try:
            call = _chat_tokens(chat) if self._tokens else None
        except (ValueError, OverflowError) as e:
            raise no_answer(f"its token ids do not fit their log-probabilities ({e})", data) from None
        return Reply(
            body=body,
            head=ResponseHead(output=wire.output or [], incomplete_details=wire.incomplete_details),
            usage=chat.plain_usage() or Usage(),
            call=call,
        )


def _check_to_the_end(data: bytes) -> None:
    """Raise what a later reader of the whole would: much of a reply is passed over here.

    Such are numbers that no machine type holds, and levels that fit on this stack and on no fuller one.
    """
    opened = data.count(b"[") + data.count(b"{")
    if opened + data.count(b",") > MOST_VALUES:
        raise msgspec.DecodeError("it has more values than any answer")
    if opened > SPARE_DEPTH:
        data = b"[" * SPARE_DEPTH + data + b"]" * SPARE_DEPTH
    _any.decode(data)


def _without_usage(data: bytes) -> bytes:
    """For a usage that nobody can read: whoever reads the results would stumble over it."""
    return _encode({**_object.decode(data), "usage": None})


def _pack(ids: list[int] | None) -> bytes:
    return array("I", ids or []).tobytes()


def _pack_logprobs(values: Iterable[float]) -> bytes:
    packed = array("f", values)
    if not math.isfinite(sum(packed)):
        raise ValueError("a log-probability is too large for its type")
    return packed.tobytes()


def _cut_tokens(data: bytes, output: list[msgspec.Raw]) -> tuple[bytes, list[msgspec.Raw], Call | None]:
    """Take the token arrays out of the body: they travel packed, at a third of the size and a hundredth of the cost."""
    call: Call | None = None
    kept: list[msgspec.Raw] = []
    for raw in output:
        tokens = token_item_decoder.decode(raw)
        if tokens.generation_token_ids is None:
            kept.append(raw)
            continue
        call = Call(
            prompt_token_ids=_pack(tokens.prompt_token_ids),
            token_ids=_pack(tokens.generation_token_ids),
            logprobs=_pack_logprobs(tokens.generation_log_probs or []),
        )
        item = _object.decode(raw)
        for key in ("prompt_token_ids", "generation_token_ids", "generation_log_probs"):
            item.pop(key, None)
        kept.append(msgspec.Raw(_encode(item)))
    if call is not None:
        body = _object.decode(data)
        body["output"] = msgspec.Raw(_encode(kept))
        data = _encode(body)
    return data, kept, call


def _chat_tokens(chat: WireChat) -> Call | None:
    choice = (chat.choices or [])[0]
    sampled = (choice.logprobs.content if choice.logprobs else None) or []
    ids = choice.token_ids
    if ids is None:
        texts = [token.token for token in sampled]
        if not texts or not all(text.startswith("token_id:") for text in texts):
            return None
        ids = [int(text.removeprefix("token_id:")) for text in texts]
    if len(ids) != len(sampled):
        raise ModelError(f"{len(sampled)} log-probabilities for {len(ids)} tokens", 200)
    return Call(
        prompt_token_ids=_pack(chat.prompt_token_ids),
        token_ids=_pack(ids),
        logprobs=_pack_logprobs(token.logprob for token in sampled),
    )
