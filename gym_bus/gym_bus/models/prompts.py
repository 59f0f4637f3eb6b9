"""The prompt of a request, as far as recorded answers are found by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


def prompt_text(given: Any) -> str:
    """The text of the last user message of a request's `input` (or Chat `messages`); empty where there is none."""
    if isinstance(given, str):
        return given.strip()
    for item in reversed(given if isinstance(given, list) else []):
        if isinstance(item, msgspec.Raw):
            item = msgspec.json.decode(item)
        if isinstance(item, Mapping) and item.get("role") == "user":
            return _content(item.get("content")).strip()
    return ""


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(p.get("text", "")) for p in parts if isinstance(p, Mapping))


def prompt_of(row: bytes) -> str:
    """The prompt of a materialized dataset row."""
    params = msgspec.json.decode(row)["responses_create_params"]
    return prompt_text(params.get("input"))
