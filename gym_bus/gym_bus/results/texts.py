"""The texts in a line: what the model was told and what it said, read from raw JSON without complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec

NOTHING = msgspec.Raw(b"null")


class _Item(msgspec.Struct, frozen=True):
    type: str = "message"
    role: str = ""
    content: msgspec.Raw = NOTHING


class _Part(msgspec.Struct, frozen=True):
    text: msgspec.Raw = NOTHING


_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_items: msgspec.json.Decoder[list[_Item]] = msgspec.json.Decoder(list[_Item])
_parts: msgspec.json.Decoder[list[_Part]] = msgspec.json.Decoder(list[_Part])


def text_of(raw: msgspec.Raw | bytes) -> str:
    """A JSON string as text that can be written anywhere; what is no valid Unicode in it is replaced."""
    try:
        return _text.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return encodable(str(json.loads(bytes(raw).decode(errors="replace"))))


def encodable(text: str) -> str:
    """The text, half characters (lone surrogates, which JSON can hold) replaced."""
    return text.encode("utf-8", "replace").decode()


def told(input: msgspec.Raw) -> str:
    """The text of a request's input: a string, or the messages in it, empty lines in between."""
    if bytes(input)[:1] == b'"':
        return text_of(input)
    return "\n\n".join(text for item in _messages(input) for text in _texts(item))


def said(output: msgspec.Raw) -> list[str]:
    """The texts of the model's own messages in a response's output."""
    return [text for item in _messages(output) if item.role in ("", "assistant") for text in _texts(item)]


def _messages(items: msgspec.Raw) -> list[_Item]:
    try:
        return [item for item in _items.decode(items) if item.type == "message"]
    except msgspec.DecodeError:
        return []


def _texts(message: _Item) -> Iterator[str]:
    if bytes(message.content)[:1] == b'"':
        yield text_of(message.content)
        return
    try:
        parts = _parts.decode(message.content)
    except msgspec.DecodeError:
        return
    yield from (text_of(part.text) for part in parts if bytes(part.text)[:1] == b'"')
