"""Reading text out of a Responses object, the ways that scoring rules name. Whatever is malformed reads as no text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_TAG = re.compile(r"<(/?)(think|thinking)>")
_BRACE = re.compile(r"[{}]")


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
    """The text of the first content part of the very last output item; empty where that part has none."""
    output = response.get("output")
    last = output[-1] if isinstance(output, list) and output else None
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, str):
        return content
    first = content[0] if isinstance(content, list) and content else None
    text = first.get("text") if isinstance(first, dict) else None
    return text if isinstance(text, str) else ""


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
    text = _without_blocks(text)
    tags = list(_TAG.finditer(text))
    if closes := [tag.end() for tag in tags if tag[1]]:
        tags = [tag for tag in tags if tag.start() >= closes[-1]]
    return text[closes[-1] if closes else 0 : tags[0].start() if tags else len(text)]


def _without_blocks(text: str) -> str:
    """`text` without what stands between an opening tag and the next closing tag of the same name; in linear time."""
    closes: dict[str, list[re.Match[str]]] = {"think": [], "thinking": []}
    opens: list[re.Match[str]] = []
    for tag in _TAG.finditer(text):
        (closes[tag[2]] if tag[1] else opens).append(tag)
    for ends in closes.values():
        ends.reverse()
    kept: list[str] = []
    at = 0
    for tag in opens:
        if tag.start() < at:
            continue
        ends = closes[tag[2]]
        while ends and ends[-1].start() < tag.end():
            ends.pop()
        if ends:
            kept.append(text[at : tag.start()])
            at = ends[-1].end()
    return "".join([*kept, text[at:]])


def braces(text: str) -> dict[int, int]:
    """Index of each opening brace that is closed, to the index of the brace that closes it; in one pass."""
    pairs: dict[int, int] = {}
    stack: list[int] = []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            stack.append(found.start())
        elif stack:
            pairs[stack.pop()] = found.start()
    return pairs


_BOXED = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{`; None where there is none, or its braces do not balance."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    opening = start + len(_BOXED) - 1
    closing = braces(text[opening:]).get(0)
    return None if closing is None else text[opening + 1 : opening + closing]


def last_balanced_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance; None where there is none."""
    pairs: dict[int, int] | None = None
    start = text.rfind(_BOXED)
    while start >= 0:
        pairs = braces(text) if pairs is None else pairs
        opening = start + len(_BOXED) - 1
        if opening in pairs:
            return text[opening + 1 : pairs[opening]]
        start = text.rfind(_BOXED, 0, start)
    return None


_TEXT_WRAPPER = re.compile(r"\s*\\text\s*\{")


def peel_text(content: str) -> str:
    r"""`content` without the `\text{...}` wrappers that hold all of it."""
    pairs: dict[int, int] | None = None
    start, end = 0, len(content.rstrip())
    while found := _TEXT_WRAPPER.match(content, start, end):
        pairs = braces(content) if pairs is None else pairs
        closing = pairs.get(found.end() - 1)
        if closing != end - 1:
            break
        start, end = found.end(), closing
        while end > start and content[end - 1].isspace():
            end -= 1
    return content[start:end].strip()
