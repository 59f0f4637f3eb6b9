"""Reading text out of a Responses object, the ways that scoring rules name. Whatever is malformed reads as no text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_THINK = re.compile(r"<(think|thinking)>.*?</\1>", re.DOTALL)
_OPEN = re.compile(r"<(?:think|thinking)>")
_CLOSE = re.compile(r"</(?:think|thinking)>")


def _items(response: dict[str, Any]) -> list[dict[str, Any]]:
    output = response.get("output")
    return [item for item in output if isinstance(item, dict)] if isinstance(output, list) else []


def _parts(item: dict[str, Any], kind: str | None = None) -> Iterator[str]:
    content = item.get("content")
    if isinstance(content, str):
        yield content
        return
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and (kind is None or part.get("type", kind) == kind):
            text = part.get("text")
            if isinstance(text, str):
                yield text


def _messages(response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in _items(response):
        if item.get("type", "message") == "message" and item.get("role", "assistant") == "assistant":
            yield item


def output_text(response: dict[str, Any]) -> str:
    """All `output_text` parts of all message items, joined with nothing between them."""
    return "".join(text for item in _messages(response) for text in _parts(item, "output_text"))


def joined_messages(response: dict[str, Any]) -> str:
    """All parts of all assistant messages, a newline between them, stripped."""
    return "\n".join(text for item in _messages(response) for text in _parts(item)).strip()


def last_item_text(response: dict[str, Any]) -> str:
    """The first content part of the very last output item; empty where that item has none."""
    items = _items(response)
    return next(_parts(items[-1]), "") if items else ""


def last_message(response: dict[str, Any]) -> str:
    """All parts of the last assistant message, a newline between them, stripped."""
    messages = list(_messages(response))
    return "\n".join(_parts(messages[-1])).strip() if messages else ""


def function_calls(response: dict[str, Any]) -> list[dict[str, Any]]:
    """The function-call items, in order."""
    return [item for item in _items(response) if item.get("type") == "function_call"]


def without_think(text: str) -> str:
    """`text` without its thinking: whole blocks, all after an opening tag that never closes, all before a lone end.

    A chat template may put the opening tag into the prompt, so a lone closing tag ends a block that began before.
    """
    text = _THINK.sub("", text)
    closes = list(_CLOSE.finditer(text))
    if closes:
        text = text[closes[-1].end() :]
    opened = _OPEN.search(text)
    return text[: opened.start()] if opened else text


def boxed(text: str) -> list[str]:
    r"""The contents of every `\boxed{...}` with balanced braces, in order of their beginnings."""
    return [content for _, content in boxed_spans(text) if content is not None]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{`; None where there is none, or its braces do not balance."""
    start = text.rfind("\\boxed{")
    return _balanced(text, start + len("\\boxed{")) if start >= 0 else None


def boxed_spans(text: str) -> Iterator[tuple[int, str | None]]:
    r"""Where each `\boxed{` begins, and its content; None where its braces do not balance."""
    start = text.find("\\boxed{")
    while start >= 0:
        yield start, _balanced(text, start + len("\\boxed{"))
        start = text.find("\\boxed{", start + 1)


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for at in range(start, len(text)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return text[start:at]
    return None


_TEXT_WRAPPER = re.compile(r"\\text\s*\{")


def peel_text(content: str) -> str:
    r"""`content` without the `\text{...}` wrappers that hold all of it."""
    content = content.strip()
    while found := _TEXT_WRAPPER.match(content):
        inner = _balanced(content, found.end())
        if inner is None or found.end() + len(inner) + 1 != len(content):
            break
        content = inner.strip()
    return content
