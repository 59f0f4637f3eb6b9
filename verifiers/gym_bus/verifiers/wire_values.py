"""Values as they cross between two sandboxes: exact plain data, or a handle. Standard library only: runs in both.

Built-in types and what derives from them cross by their content alone, so an `__eq__` of a solution's own is left
behind; everything else is a handle, which equals nothing. Frames are a length and JSON; nothing is ever evaluated.
"""

from __future__ import annotations

import binascii
import collections
import json
import os
from collections.abc import Callable
from typing import Any

MAX_FRAME_BYTES = 8 * 2**20
MAX_LISTS = MAX_FRAME_BYTES // 4
"""In one frame: `encode` takes more bytes for each."""
MAX_DEPTH = 60
MAX_ITEMS = 1_000_000
MAX_DIGITS = 100_000


class NotData(Exception):
    """The value is no plain data."""


class ProtocolError(Exception):
    """The other side does not keep to the protocol, or is gone."""


def encode(value: Any, handle: Callable[[Any], Any], depth: int = 0) -> Any:
    """`value` as JSON values with tags; what is no plain data becomes what `handle` makes of it."""
    if depth > MAX_DEPTH:
        raise NotData("nested too deeply")
    if value is None or value is True or value is False:
        return value
    for kind, pack in _PACK:
        if isinstance(value, kind):
            return pack(value, lambda item: encode(item, handle, depth + 1))
    return handle(value)


def _pack_int(value: int, _: Any) -> Any:
    plain = int.__index__(value)
    return ["i", hex(plain)] if abs(plain) > 2**53 else plain


def _packer(tag: str, kind: type) -> Callable[[Any, Callable[[Any], Any]], Any]:
    def pack(value: Any, inner: Callable[[Any], Any]) -> Any:
        items = list(kind.__iter__(value))  # type: ignore[attr-defined]
        if len(items) > MAX_ITEMS:
            raise NotData("too many items")
        return [tag, [inner(item) for item in items]]

    return pack


def _pack_dict(value: dict[Any, Any], inner: Callable[[Any], Any]) -> Any:
    return ["d", [[inner(k), inner(v)] for k, v in list(dict.items(value))]]


def _pack_float(value: float, _: Any) -> Any:
    return ["f", float.hex(value)]


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _pack_bytes(tag: str) -> Callable[[Any, Any], Any]:
    return lambda value, _: [tag, _base64(bytes(value))]


# Read through the base class, whatever a subclass overrides: a named tuple crosses as the tuple that it is.
_PACK: tuple[tuple[type, Callable[[Any, Any], Any]], ...] = (
    (int, _pack_int),
    (str, lambda value, _: _text(str.__str__(value))),
    (float, _pack_float),
    (list, _packer("l", list)),
    (tuple, _packer("t", tuple)),
    (dict, _pack_dict),
    (set, _packer("s", set)),
    (frozenset, _packer("S", frozenset)),
    (collections.deque, _packer("q", collections.deque)),
    (complex, lambda value, _: ["c", value.real.hex(), value.imag.hex()]),
    (bytes, _pack_bytes("y")),
    (bytearray, _pack_bytes("Y")),
    (range, lambda value, _: ["r", hex(value.start), hex(value.stop), hex(value.step)]),
)
_BUILD: dict[str, Callable[[list[Any]], Any]] = {
    "l": list,
    "t": tuple,
    "s": set,
    "S": frozenset,
    "q": collections.deque,
}
CONTAINERS = frozenset((*_BUILD, "d"))
"""Tags of values that hold others."""
HANDLE = "h"
"""Tag of what is no data: its number and its truth follow."""
NO_KEYWORDS: list[Any] = ["d", []]
"""The keyword arguments of a call without any."""


def _text(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates have no place in JSON
        return ["u", _base64(value.encode("utf-8", "surrogatepass"))]
    return value


def no_handle(value: Any) -> Any:
    """For `encode` and `decode` where everything must be data. Raises NotData."""
    raise NotData(type(value).__name__)


def decode(value: Any, handle: Callable[[Any], Any], depth: int = 0) -> Any:
    """The inverse of `encode`. Raises ProtocolError for anything that `encode` does not make."""
    if depth > MAX_DEPTH + 1:
        raise ProtocolError("nested too deeply")
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], str):
        raise ProtocolError("no such value")
    tag, body = value[0], value[1]
    try:
        if tag in _BUILD:
            return _BUILD[tag]([decode(item, handle, depth + 1) for item in body])
        if tag == "d":
            return {decode(k, handle, depth + 1): decode(v, handle, depth + 1) for k, v in body}
        if tag == HANDLE:
            return handle(value)
        return _scalar(tag, value[1:])
    except (TypeError, ValueError, IndexError, OverflowError, RecursionError) as e:
        raise ProtocolError(f"no such value: {e}") from None


def _scalar(tag: str, body: list[Any]) -> Any:
    if tag == "i":
        if len(body[0]) > MAX_DIGITS:
            raise ProtocolError("the number is too long")
        return int(body[0], 16)
    if tag == "f":
        return float.fromhex(body[0])
    if tag == "c":
        return complex(float.fromhex(body[0]), float.fromhex(body[1]))
    if tag == "y":
        return binascii.a2b_base64(body[0])
    if tag == "Y":
        return bytearray(binascii.a2b_base64(body[0]))
    if tag == "u":
        return binascii.a2b_base64(body[0]).decode("utf-8", "surrogatepass")
    if tag == "r":
        return range(int(body[0], 16), int(body[1], 16), int(body[2], 16))
    raise ProtocolError(f"no such tag: {tag}")


def frame(value: Any) -> bytes:
    """One frame. Raises NotData where it is too large."""
    data = json.dumps(value, allow_nan=False).encode()
    if len(data) > MAX_FRAME_BYTES:
        raise NotData("too large")
    return len(data).to_bytes(4, "little") + data


def send(fd: int, value: Any) -> None:
    """Write one frame. Raises NotData where it is too large, ProtocolError where the other side is gone."""
    view = memoryview(frame(value))
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as e:
        raise ProtocolError(str(e)) from None


def receive(fd: int) -> Any:
    """Read one frame. Raises ProtocolError where there is none."""
    size = int.from_bytes(_exactly(fd, 4), "little")
    if size > MAX_FRAME_BYTES:
        raise ProtocolError("the frame is too large")
    return parse(_exactly(fd, size))


def parse(body: bytes) -> Any:
    """The value of a frame's body. Raises ProtocolError where it is none.

    A list takes twenty times the memory of its brackets, so one made of brackets alone is not built.
    """
    if body.count(b"[") + body.count(b"{") > MAX_LISTS:
        raise ProtocolError("too many lists")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"no JSON: {e}") from None


def _exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            chunk = os.read(fd, size - len(data))
        except OSError as e:
            raise ProtocolError(str(e)) from None
        if not chunk:
            raise ProtocolError("the other side is gone")
        data += chunk
    return data
