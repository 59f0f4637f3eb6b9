"""What stands in a line, in a form of the page's own: messages, reasoning, calls and their results; bounded in size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MOST_CHARS = 12_000
"""Of one text; of a longer one, the beginning and the end."""
MOST_ITEMS = 80
"""Messages, calls and so on of one rollout; of more, the first and the last."""
LINE = 80
"""Characters of JSON that stay in one line."""

Json = dict[str, Any]


def input_of(params: Any) -> list[Any]:
    """What a request told the model, as input items; nothing where the parameters are none."""
    if not isinstance(params, dict):
        return []
    items = params.get("input")
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    told = [{"role": "instructions", "content": params["instructions"]}] if params.get("instructions") else []
    return [*told, *(items if isinstance(items, list) else [])]


def items_of(items: Any) -> list[Json]:
    """Messages, reasoning, calls and their results in a form of their own: `kind`, `text`, and for calls a `name`."""
    if not isinstance(items, list):
        return []
    if len(items) > MOST_ITEMS:
        left_out = {"kind": "note", "text": f"{len(items) - MOST_ITEMS} items are left out here"}
        half = MOST_ITEMS // 2
        return [*items_of(items[:half]), left_out, *items_of(items[-half:])]
    return [_item(item) for item in items]


def _item(item: Any) -> Json:
    if not isinstance(item, dict):
        return {"kind": "note", "text": clip(shown(item), MOST_CHARS)}
    kind = str(item.get("type") or "message")
    if kind == "message":
        return {"kind": str(item.get("role") or "assistant"), "text": clip(_text(item.get("content")), MOST_CHARS)}
    if kind == "reasoning":
        told = _text(item.get("content")) or _text(item.get("summary"))
        return {"kind": kind, "text": clip(told, MOST_CHARS)}
    if kind == "function_call":
        return {"kind": "call", "name": str(item.get("name")), "text": clip(_arguments(item), MOST_CHARS)}
    if kind.endswith("_call_output"):
        return {"kind": "result", "text": clip(_text(item.get("output")), MOST_CHARS)}
    return {"kind": "call" if kind.endswith("_call") else "note", "name": kind, "text": clip(shown(item), MOST_CHARS)}


def _arguments(item: Json) -> str:
    """The arguments of a call, set out where they are JSON."""
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        return shown(arguments)
    try:
        return shown(json.loads(arguments))
    except ValueError:
        return arguments


def _text(content: Any) -> str:
    """The text of a message's content; what is no text is named."""
    if isinstance(content, list):
        return "\n".join(_part(part) for part in content)
    return "" if content is None else shown(content)


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        return shown(part)
    text = part.get("text", part.get("refusal"))
    return text if isinstance(text, str) else f"[{part.get('type')}]"


def shown(value: Any) -> str:
    """Text as it is, anything else as JSON, set out where it is long."""
    if isinstance(value, str):
        return value
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= LINE else json.dumps(value, indent=2, ensure_ascii=False)


def clip(text: str, most: int) -> str:
    """The text, or its first two thirds and last third of `most` characters, and how much is missing in between."""
    if len(text) <= most:
        return text
    head, tail = 2 * most // 3, most // 3
    return f"{text[:head]}\n\n[… {len(text) - head - tail:,} characters are left out here …]\n\n{text[-tail:]}"


SAYING = ("question", "problem", "prompt", "query", "instruction", "title")
"""Fields of a row that say what the task is, better than a prompt that begins alike for all tasks."""


def gist(row: Mapping[str, Any]) -> str:
    """What a task is about: a telling field of its row, else what the user says last."""
    for key in SAYING:
        if isinstance(text := _decoded(row.get(key)), str) and text.strip():
            return text
    return next(_user_texts(_decoded(row.get("responses_create_params"))), "")


def _user_texts(params: Any) -> Iterator[str]:
    for item in reversed(items_of(input_of(params))):
        if item["kind"] == "user":
            yield item["text"]


def _decoded(raw: Any) -> Any:
    return json.loads(bytes(raw).decode(errors="replace")) if raw is not None else None
