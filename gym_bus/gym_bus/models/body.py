"""Responses objects made here, for models that have no endpoint: the same shape that an endpoint sends."""

from __future__ import annotations

import msgspec

from gym_bus.messages import Usage

_encode = msgspec.json.Encoder().encode

_BEFORE_TEXT = (
    b'{"id":"resp_%b","object":"response","created_at":%d,"status":"%b","model":%b,"output":[{"id":"msg_%b",'
    b'"type":"message","role":"assistant","status":"completed","content":[{"type":"output_text","annotations":[],"text":'
)
_AFTER_TEXT = (
    b'}]}],"parallel_tool_calls":true,"tool_choice":"auto","tools":[],"error":null,"incomplete_details":%b,"usage":%b}'
)


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


def response_body(*, name: str, model: str, text: str, usage: Usage, created_at: int, truncated: bool = False) -> bytes:
    """One assistant message as a Responses object.

    Args:
        name: unique part of the ids; letters, digits, `_` and `-`.
        model: what the endpoint calls itself.
        text: of the message.
        usage: tokens.
        created_at: seconds since the epoch.
        truncated: the output limit was reached.
    """
    ident = name.encode()
    details = b'{"reason":"max_output_tokens"}' if truncated else b"null"
    status = b"incomplete" if truncated else b"completed"
    return (
        _BEFORE_TEXT % (ident, created_at, status, _encode(model), ident)
        + _encode(text)
        + _AFTER_TEXT % (details, usage_body(usage))
    )


def chat_body(*, name: str, model: str, text: str, usage: Usage, created_at: int, truncated: bool = False) -> bytes:
    """The same message as a Chat Completions object."""
    return (
        b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,"message":'
        b'{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":"%b"}],"usage":'
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}'
        % (
            name.encode(),
            created_at,
            _encode(model),
            _encode(text),
            b"length" if truncated else b"stop",
            usage.input_tokens,
            usage.output_tokens,
            usage.total_tokens,
        )
    )


def error_body(message: str, kind: str, code: str | None = None) -> bytes:
    """An OpenAI-style error."""
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
