from __future__ import annotations

import collections
import json
import math
import os
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from gym_bus.verifiers import wire_values
from gym_bus.verifiers.wire_values import NotData, ProtocolError, decode, encode, receive, send


def no_handle(value: Any) -> NoReturn:
    raise AssertionError(f"{value!r} is no handle")


def crossed(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, no_handle), allow_nan=False)), no_handle)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -7,
        2**53,
        -(2**53) - 1,
        10**5000,
        0.1,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        1 + 2j,
        complex(math.inf, -0.0),
        "",
        "ä\0𝄞",
        "\ud800",
        ["h", 0, True],
        ["i", "0x1"],
        [],
        [1, [2.5, ["x", None]]],
        (),
        (1, ("a",)),
        {},
        {"a": 1, (1, 2): {3: None}, None: True, 1.5: frozenset({1})},
        set(),
        {1, "a", (2, 3)},
        frozenset({frozenset()}),
        collections.deque([1, 2]),
        b"\xff\0",
        bytearray(b"x"),
        range(5, -(10**30), -2),
        nested(wire_values.MAX_DEPTH),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_data_crosses_with_its_exact_type_and_value(value: Any) -> None:
    found = crossed(value)

    assert found == value
    assert type(found) is type(value)
    if value != 10**5000:
        assert repr(found) == repr(value) or isinstance(value, set | frozenset)


def test_nan_crosses() -> None:
    assert math.isnan(crossed(math.nan))
    assert math.isnan(crossed([math.nan])[0])


class Count(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __index__(self) -> int:
        return 99


class Text(str):
    def __str__(self) -> str:
        return "other"


class Items(list[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([99])


class Mapping(dict[str, int]):
    def items(self) -> Any:
        return [("other", 99)]


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Count(1), 1),
        (Count(2**60), 2**60),
        (Text("mine"), "mine"),
        (Items([1, 2]), [1, 2]),
        (Mapping(a=1), {"a": 1}),
        (Point(1, 2), (1, 2)),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    ],
)
def test_what_derives_from_a_built_in_type_crosses_by_its_content_alone(value: Any, plain: Any) -> None:
    found = crossed(value)

    assert type(found) is type(plain)
    assert plain == found


@pytest.mark.parametrize("value", [object(), len, int, Ellipsis, NotImplemented, memoryview(b""), iter([])])
def test_what_is_no_plain_data_is_a_handle_wherever_it_lies(value: Any) -> None:
    frames = encode([value, {"a": (value,)}], lambda found: ["h", 7, found is value])

    found = decode(frames, lambda frame: tuple(frame))

    assert found == [("h", 7, True), {"a": (("h", 7, True),)}]


def test_what_is_too_deep_or_too_long_is_no_data() -> None:
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(NotData, match="nested too deeply"):
        encode(endless, no_handle)
    with pytest.raises(NotData, match="nested too deeply"):
        encode(nested(wire_values.MAX_DEPTH + 1), no_handle)
    with pytest.raises(NotData, match="too many items"):
        encode([0] * (wire_values.MAX_ITEMS + 1), no_handle)


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        {},
        [],
        ["i"],
        [1, 2],
        [["l"], []],
        ["?", 1],
        ["l", 5],
        ["l", None],
        ["l", [[]]],
        ["s", [["l", []]]],
        ["d", [[1]]],
        ["d", [[["d", []], 1]]],
        ["i", 5],
        ["i", "nine"],
        ["i", "f" * (wire_values.MAX_DIGITS + 1)],
        ["f", "x"],
        ["f", None],
        ["c", "x", "y"],
        ["y", "a"],
        ["Y", 5],
        ["u", "/w=="],
        ["r", "0x0", "0x1", "0x0"],
        json.loads('["l", [' * 100 + "]]" * 100),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_no_encoder_makes_is_a_breach_of_the_protocol(value: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(value, no_handle)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            assert fd in (reader, writer)  # the test has closed it


def test_frames_cross_one_by_one_whatever_their_size(pipe: tuple[int, int]) -> None:
    values = [None, ["ok", "ä"], "x" * 2**20, [1]]

    def send_all() -> None:
        for value in values:
            send(pipe[1], value)

    sender = threading.Thread(target=send_all)

    sender.start()
    found = [receive(pipe[0]) for _ in values]
    sender.join()

    assert found == values


def test_a_frame_that_is_too_large_is_not_sent(pipe: tuple[int, int]) -> None:
    with pytest.raises(NotData, match="too large"):
        send(pipe[1], "x" * wire_values.MAX_FRAME_BYTES)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"", "the other side is gone"),
        (b"\x02\0", "the other side is gone"),
        (b"\x05\0\0\0[1]", "the other side is gone"),
        (b"\x00\0\0\0", "no JSON"),
        (b"\x03\0\0\0[1,", "no JSON"),
        (b"\x02\0\0\0\xff\xfe", "no JSON"),
        (b"\xff\xff\xff\xff", "the frame is too large"),
        (len("[" * 50_000).to_bytes(4, "little") + b"[" * 50_000, "no JSON"),
    ],
    ids=["nothing", "half a length", "half a frame", "empty", "cut", "no text", "too large", "too deep"],
)
def test_what_is_no_frame_is_a_breach_of_the_protocol(pipe: tuple[int, int], sent: bytes, why: str) -> None:
    os.write(pipe[1], sent)
    os.close(pipe[1])

    with pytest.raises(ProtocolError, match=why):
        receive(pipe[0])


def test_a_side_that_is_gone_is_a_breach_of_the_protocol(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])

    with pytest.raises(ProtocolError, match="Broken pipe"):
        send(pipe[1], 1)
    with pytest.raises(ProtocolError, match="Bad file descriptor"):
        receive(pipe[0])


@pytest.mark.parametrize("frame", [["c", "0x1p0"], ["r", "0x1"], ["f", "0x1p99999"]])
def test_a_frame_that_lacks_or_overflows_is_against_the_protocol(frame: list[str]) -> None:
    with pytest.raises(ProtocolError):
        decode(frame, lambda _: None)
