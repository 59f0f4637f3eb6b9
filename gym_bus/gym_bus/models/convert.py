"""Responses create params to Chat Completions and back: the rules of NeMo Gym's converter.

`instructions` become one system message, tool calls of one turn one assistant message, and a chat reply becomes the
Responses object that says the same, reasoning and incompleteness included.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from gym_bus.errors import TaskError
from gym_bus.models.body import usage_body
from gym_bus.models.wire import ChatChoice, ChatMessage, WireChat

_PASSED_ON = (
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "user",
    "metadata",
    "service_tier",
    "store",
    "top_logprobs",
    "safety_identifier",
)
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_REASONING = ("thinking", "reasoning")
"""Types of content parts."""
_THINK = re.compile(r"^\s*<think>(.*?)</think>", re.DOTALL)


def chat_request(params: Mapping[str, Any]) -> dict[str, Any]:
    """The Chat Completions request for Responses create params.

    Raises:
        TaskError: an input item that Chat Completions has no form for.
    """
    request: dict[str, Any] = {key: params[key] for key in _PASSED_ON if params.get(key) is not None}
    request["messages"] = chat_messages(params.get("input"), params.get("instructions"))
    if params.get("max_output_tokens") is not None:
        request["max_tokens"] = params["max_output_tokens"]
    if tools := params.get("tools"):
        request["tools"] = [_tool(_plain(tool)) for tool in tools]
        if (choice := params.get("tool_choice")) is not None:
            request["tool_choice"] = _tool_choice(_plain(choice))
    else:
        request.pop("parallel_tool_calls", None)  # endpoints refuse it where there are no tools
    if isinstance(reasoning := params.get("reasoning"), Mapping) and reasoning.get("effort"):
        request["reasoning_effort"] = reasoning["effort"]
    if response_format := _response_format(params.get("text")):
        request["response_format"] = response_format
    if "top_logprobs" in request:
        request["logprobs"] = True
    return request


def _plain(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise TaskError(f"tool of type {tool.get('type')!r}: Chat Completions endpoints know functions only")
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: Any) -> dict[str, Any] | None:
    shape = text.get("format") if isinstance(text, Mapping) else None
    if not isinstance(shape, Mapping) or shape.get("type") in (None, "text"):
        return None
    if shape["type"] == "json_schema":
        schema = {key: shape[key] for key in ("name", "schema", "strict", "description") if key in shape}
        return {"type": "json_schema", "json_schema": schema}
    return dict(shape)


def chat_messages(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    """The conversation as chat messages. Raises TaskError for an item that chat has no form for."""
    messages: list[dict[str, Any]] = []
    system = [instructions] if instructions else []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else list(given or [])
    turn: dict[str, Any] | None = None
    for raw in items:
        item = _plain(raw)
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            turn = None
            content = _content(item.get("content"))
            if item.get("role") in ("system", "developer") and instructions and not messages:
                system.append(content if isinstance(content, str) else "".join(p.get("text", "") for p in content))
            else:
                messages.append({"role": item.get("role", "user"), "content": content})
        elif kind == "function_call_output":
            turn = None
            output = item.get("output")
            text = output if isinstance(output, str) else msgspec.json.encode(output).decode()
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
        else:
            if turn is None:
                turn = {"role": "assistant", "content": None}
                messages.append(turn)
            _add_to_turn(turn, kind, item)
    if system:
        messages.insert(0, {"role": "system", "content": "\n".join(system)})
    return messages


def _add_to_turn(turn: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    if kind == "message":
        content = _content(item.get("content"))
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        turn["content"] = (turn["content"] or "") + text
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
    elif kind == "reasoning":
        text = "".join(str(part.get("text", "")) for part in item.get("content") or item.get("summary") or [])
        if text:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + text
    else:
        raise TaskError(f"input item of type {kind!r}: Chat Completions endpoints have no form for it")


def _content(content: Any) -> Any:
    """Text as text; several parts, or parts that are no text, as chat parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_part(_plain(part)) for part in content]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.get("text") or ""}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal") or ""}
    if kind == "input_image":
        image = {"url": part.get("image_url")}
        return {"type": "image_url", "image_url": image | ({"detail": part["detail"]} if part.get("detail") else {})}
    if kind == "input_file":
        return {"type": "file", "file": {key: value for key, value in part.items() if key != "type"}}
    raise TaskError(f"content part of type {kind!r}: Chat Completions endpoints have no form for it")


def response_object(chat: WireChat, choice: ChatChoice, params: Mapping[str, Any], *, split_think: bool) -> bytes:
    """The Responses object that says what the first choice of a chat reply says."""
    ident = str(chat.id or "chat")
    reason = _INCOMPLETE.get(choice.finish_reason or "")
    usage = chat.plain_usage()
    made = {
        "id": f"resp_{ident}",
        "object": "response",
        "created_at": _created_at(chat.created),
        "status": "incomplete" if reason else "completed",
        "model": chat.model,
        "output": _output(choice.message or ChatMessage(), ident, split_think=split_think),
        "parallel_tool_calls": params.get("parallel_tool_calls") is not False,
        "tool_choice": params.get("tool_choice") or "auto",
        "tools": params.get("tools") or [],
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "usage": msgspec.Raw(usage_body(usage)) if usage else None,
    }
    return msgspec.json.encode(made)


def _created_at(created: Any) -> int:
    """Seconds since the epoch; now where the endpoint says nothing that can be."""
    return int(created if isinstance(created, (int, float)) and 0 < created < 2**53 else time.time())


def _output(message: ChatMessage, ident: str, *, split_think: bool) -> list[dict[str, Any]]:
    text, thought = _said(message.content)
    thought = message.reasoning_content or message.reasoning or thought
    if split_think and not thought and (found := _THINK.match(text)):
        thought, text = found[1], text[found.end() :].lstrip()
    items: list[dict[str, Any]] = []
    if thought:
        summary = [{"type": "summary_text", "text": thought}]
        items.append({"id": f"rs_{ident}", "type": "reasoning", "summary": summary})
    calls = message.tool_calls or []
    if text or message.refusal or not calls:
        items.append(_message(text, message.refusal, ident))
    for number, call in enumerate(calls):
        items.append(
            {
                "id": f"fc_{ident}_{number}",
                "type": "function_call",
                "status": "completed",
                "call_id": str(call.id or f"call_{ident}_{number}"),
                "name": call.function.name,
                "arguments": _arguments(call.function.arguments),
            }
        )
    return items


def _said(content: str | list[str | dict[str, Any]] | None) -> tuple[str, str]:
    """The text and the reasoning of a message; parts that are neither are passed over."""
    if not isinstance(content, list):
        return content or "", ""
    text = thought = ""
    for part in content:
        if isinstance(part, dict) and part.get("type") in _REASONING:
            inner = part.get("thinking") or part.get("reasoning") or part.get("text")
            thought += "".join(map(_text, inner if isinstance(inner, list) else [inner]))
        else:
            text += _text(part)
    return text, thought


def _text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


def _arguments(arguments: str | dict[str, Any] | None) -> str | None:
    return msgspec.json.encode(arguments).decode() if isinstance(arguments, dict) else arguments


def _message(text: str, refusal: str | None, ident: str) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": []}
    if refusal and not text:
        part = {"type": "refusal", "refusal": refusal}
    return {"id": f"msg_{ident}", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
