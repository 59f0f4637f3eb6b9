"""Responses objects made here, for models that have no endpoint: the same shape that an endpoint sends."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import msgspec

from gym_bus.messages import Call, Usage

_encode = msgspec.json.Encoder().encode

_BEFORE_TEXT = (
    b'{"id":"resp_%b","object":"response","created_at":%d,"status":"%b","model":%b,"output":[{"id":"msg_%b",'
    b'"type":"message","role":"assistant","status":"completed","content":[{"type":"output_text","annotations":[],"text":'
)
_AFTER_TEXT = (
    b'}]%b}],"parallel_tool_calls":true,"tool_choice":"auto","tools":[],"error":null,"incomplete_details":%b,'
    b'"usage":%b}'
)


class Tokens(NamedTuple):
    """Token ids and log-probabilities of one answer, each a JSON list."""

    prompt: bytes
    sampled: bytes
    logprobs: bytes
    """One number per sampled token, natural logarithm."""
    chat_logprobs: bytes
    """The same as `logprobs.content` of a chat completion."""


def tokens_of(call: Call) -> Tokens:
    """What a call's packed arrays are in JSON."""
    ids, logprobs = array("I", call.token_ids), [round(p, 4) for p in array("f", call.logprobs)]
    content = [{"token": f"token_id:{token}", "logprob": p} for token, p in zip(ids, logprobs, strict=True)]
    prompt = list(array("I", call.prompt_token_ids))
    return Tokens(_encode(prompt), _encode(list(ids)), _encode(logprobs), _encode(content))


def count_tokens(text: str) -> int:
    """Words at white space: an approximation, there is no tokenizer where there is no model."""
    return len(text.split())


def usage_body(usage: Usage) -> bytes:
    """The `usage` object of a response; details that are unknown count 0, as its schema demands numbers."""
    return (
        b'{"input_tokens":%d,"input_tokens_details":{"cached_tokens":%d,"cache_write_tokens":0},"output_tokens":%d,'
        b'"output_tokens_details":{"reasoning_tokens":%d},"total_tokens":%d}'
        % (
            usage.input_tokens,
            usage.cached_tokens or 0,
            usage.output_tokens,
            usage.reasoning_tokens or 0,
            usage.total_tokens,
        )
    )


def response_body(
    *,
    name: str,
    model: str,
    text: str,
    usage: Usage,
    created_at: int,
    truncated: bool = False,
    tokens: Tokens | None = None,
) -> bytes:
    """One assistant message as a Responses object.

    Args:
        name: unique part of the ids; letters, digits, `_` and `-`.
        model: what the endpoint calls itself.
        text: of the message.
        usage: tokens.
        created_at: seconds since the epoch.
        truncated: the output limit was reached.
        tokens: to be sent along, where NeMo Gym's model servers put them.
    """
    sampled = (
        b',"prompt_token_ids":%b,"generation_token_ids":%b,"generation_log_probs":%b' % tokens[:3] if tokens else b""
    )
    ident = name.encode()
    details = b'{"reason":"max_output_tokens"}' if truncated else b"null"
    status = b"incomplete" if truncated else b"completed"
    return (
        _BEFORE_TEXT % (ident, created_at, status, _encode(model), ident)
        + _encode(text)
        + _AFTER_TEXT % (sampled, details, usage_body(usage))
    )


def chat_body(
    *,
    name: str,
    model: str,
    text: str,
    usage: Usage,
    created_at: int,
    truncated: bool = False,
    tokens: Tokens | None = None,
) -> bytes:
    """The same message as a Chat Completions object; tokens are where vLLM puts them."""
    logprobs = b'{"content":%b},"token_ids":%b' % (tokens.chat_logprobs, tokens.sampled) if tokens else b"null"
    prompt = b',"prompt_token_ids":%b' % tokens.prompt if tokens else b""
    return (
        b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,"message":'
        b'{"role":"assistant","content":%b,"refusal":null},"logprobs":%b,"finish_reason":"%b"}]%b,"usage":'
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}'
        % (
            name.encode(),
            created_at,
            _encode(model),
            _encode(text),
            logprobs,
            b"length" if truncated else b"stop",
            prompt,
            usage.input_tokens,
            usage.output_tokens,
            usage.total_tokens,
        )
    )


def error_body(message: str, kind: str, code: str | None = None) -> bytes:
    """An OpenAI-style error."""
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
