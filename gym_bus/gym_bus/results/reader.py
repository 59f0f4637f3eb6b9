"""Reading JSONL: bytes with line numbers, so that every complaint has an address."""

from __future__ import annotations

import re
from collections.abc import Container, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from gym_bus.errors import DataError
from gym_bus.results.lines import COMPOSED, Fields

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"

T = TypeVar("T")


class Line(NamedTuple):
    """One line of a file that is not blank."""

    number: int
    """1 for the first line of the file."""
    offset: int
    """Of the line's first byte in the file."""
    data: bytes
    """Without white space, line end or byte-order mark around it."""
    ended: bool
    """Whether a newline followed; a torn last line has none."""


def iter_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line number and bytes of every line that is not blank. Raises DataError for a file that cannot be read."""
    return ((line.number, line.data) for line in iter_lines(path))


def iter_lines(path: Path) -> Iterator[Line]:
    """As `iter_jsonl`, with the position of every line."""
    try:
        with path.open("rb", buffering=1 << 20) as file:
            for line in _lines_of(file):
                if line.number == 1 and line.data.startswith(GZIP):
                    raise DataError(f"{path}: is compressed; decompress it first, as with `gunzip --keep`")
                yield line
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None


def _lines_of(file: BinaryIO) -> Iterator[Line]:
    offset = 0
    for number, line in enumerate(file, start=1):
        data = (line.removeprefix(BOM) if number == 1 else line).strip()
        if data:
            yield Line(number, offset, data, line.endswith(b"\n"))
        offset += len(line)


_ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)
"""Escapes in JSON strings: a whole pair of surrogates, one alone (the group), or any other."""

_LITERALS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|(-?(?:NaN|Infinity))', re.DOTALL)
"""Strings, to step over them, and the numbers (the group) that only Python's json module writes."""


def mended(data: bytes) -> bytes:
    """A line that NeMo Gym's json module may have written, as JSON; `data` itself where there is nothing to mend.

    A surrogate alone, which no UTF-8 text can hold, becomes U+FFFD; NaN and the infinities, which JSON has not, become
    null. All other bytes stay.
    """
    data = _ESCAPES.sub(lambda found: b"\\ufffd" if found[1] else found[0], data)
    return _LITERALS.sub(lambda found: b"null" if found[1] else found[0], data)


def decode_mended(decoder: msgspec.json.Decoder[T], data: bytes) -> tuple[bytes, T]:
    """A line's bytes and what they hold, `mended` where it cannot be read otherwise. Raises what the decoder raises."""
    try:
        return data, decoder.decode(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if (better := mended(data)) == data:
            raise
        return better, decoder.decode(better)


def decode_lines(
    path: Path, decoder: msgspec.json.Decoder[T], *, unended_ok: bool
) -> Generator[tuple[Line, T], None, Line | None]:
    """Every whole line with its content; returns the last line where it is torn, which is how a crash leaves a file.

    Torn is a last line that is no JSON, or, unless `unended_ok`, one without its newline. Lines are `mended`.

    Raises:
        DataError: names file and line: a line before the last is no JSON, or any is of the wrong kind.
    """
    torn: Line | None = None
    for line in iter_lines(path):
        if torn:
            raise DataError(f"{path}:{torn.number}: not valid JSON, with further lines behind it; mend the file")
        if not (line.ended or unended_ok):
            torn = line
            continue
        try:
            data, content = decode_mended(decoder, line.data)
        except msgspec.ValidationError as e:
            raise DataError(f"{path}:{line.number}: not the expected kind of line: {e}") from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            torn = line
        else:
            yield line if data is line.data else line._replace(data=data), content
    return torn


def decode_line(decoder: msgspec.json.Decoder[T], data: bytes, path: Path, number: int) -> T:
    """One line decoded, `mended` where it must be. Raises DataError naming file and line."""
    try:
        return decode_mended(decoder, data)[1]
    except msgspec.ValidationError as e:
        raise DataError(f"{path}:{number}: not the expected kind of line: {e}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}:{number}: not valid JSON: {e}") from None


_fields: msgspec.json.Decoder[Fields] = msgspec.json.Decoder(Fields)


class _Key(msgspec.Struct, frozen=True):
    task: int | None = msgspec.field(default=None, name="_ng_task_index")
    rollout: int | None = msgspec.field(default=None, name="_ng_rollout_index")

    def or_by_order(self, order: int) -> tuple[int, int | None]:
        """A row without a task index is a task of its own, numbered by its place in the file."""
        return (order if self.task is None else self.task, self.rollout)


_key: msgspec.json.Decoder[_Key] = msgspec.json.Decoder(_Key)


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded rollout, ready to be verified again."""

    order: int
    """0 for the first rollout of the file, 1 for the next, ..."""
    number: int
    """Its line in the rollouts file."""
    task_index: int
    rollout_index: int
    row: bytes
    """One JSON object: the row that the verifier saw, without the result's keys."""
    response: bytes
    """The Responses object, JSON."""


def join_rollouts(inputs: Path | None, rollouts: Path, *, only: Container[int] | None = None) -> Iterator[Joined]:
    """Every recorded rollout with its whole row, in the order of the rollouts file.

    NeMo Gym's verifiers drop row fields that their reply does not name, and may write others under the row's names. So
    the row comes from the materialized inputs, as in its own re-verification, joined on (task, rollout), or on the task
    where they are rows of a data set; what only the rollout has is added.

    Memory: a table of the inputs' offsets (about 150 bytes a row) and one row at a time.

    Args:
        inputs: None where the rollouts carry their whole rows.
        rollouts: the file; also one of failed rollouts that have a response.
        only: numbers of the lines to join; None for all.

    Raises:
        DataError: names file and line: a line is no JSON object, has no response, or has no input; two inputs share
            their indices.
    """
    if inputs is None:
        yield from _join({}, None, rollouts, only)
        return
    places, stamped = _places(inputs)
    try:
        with inputs.open("rb") as file:
            yield from _join(places, file, rollouts, only, stamped=stamped)
    except OSError as e:
        raise DataError(f"{inputs}: cannot be read: {e.strerror or e}") from None


Places = dict[tuple[int, int | None], int]


def _places(inputs: Path) -> tuple[Places, bool]:
    """The offset of every row, by (task, rollout), and whether the rows say which they are.

    The rollout is None in rows of a data set, which stand for all rollouts of their task.
    """
    places: Places = {}
    stamped = False
    for order, line in enumerate(iter_lines(inputs)):
        found = decode_line(_key, line.data, inputs, line.number)
        stamped = stamped or found.task is not None
        key = found.or_by_order(order)
        if key in places:
            which = f"task {key[0]}" + ("" if key[1] is None else f", rollout {key[1]}")
            raise DataError(f"{inputs}:{line.number}: a second row for {which}")
        places[key] = line.offset
    return places, stamped


def _join(
    places: Places, inputs: BinaryIO | None, rollouts: Path, only: Container[int] | None, *, stamped: bool = False
) -> Iterator[Joined]:
    for order, (number, data) in enumerate(iter_jsonl(rollouts)):
        if only is not None and number not in only:
            continue
        fields = decode_line(_fields, data, rollouts, number)
        key = decode_line(_key, data, rollouts, number)
        if inputs is not None and key.task is None and stamped:
            # In order of completion, not of the data set: its place in the file says nothing.
            raise DataError(f"{rollouts}:{number}: no _ng_task_index, so its row in {inputs.name} cannot be found")
        task, given = key.or_by_order(order)
        rollout = given or 0
        response = _checked_response(fields.get("response"), f"{rollouts}:{number}")
        if inputs is not None:
            offset = places.get((task, rollout), places.get((task, None)))
            if offset is None:
                raise DataError(f"{rollouts}:{number}: task {task}, rollout {rollout} has no row in {inputs.name}")
            fields |= read_row(inputs, offset)
        yield Joined(
            order=order,
            number=number,
            task_index=task,
            rollout_index=rollout,
            row=_row_bytes(fields),
            response=response,
        )


def _checked_response(response: msgspec.Raw | None, where: str) -> bytes:
    if response is None or bytes(response) == b"null":
        raise DataError(f"{where}: no response, so there is nothing to verify")
    # All of it: a verifier takes a response that cannot be read for an empty one, and that would be a wrong 0.
    try:
        found = _response.decode(response)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{where}: its response is no Responses object: {e}") from None
    if not isinstance(found.get("output"), list):
        raise DataError(f"{where}: its response is no Responses object: it has no list `output`")
    return bytes(response)


_response: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


def read_row(file: BinaryIO, offset: int) -> Fields:
    """The top-level fields of the line that begins at `offset` and was found valid before."""
    file.seek(offset)
    return decode_mended(_fields, file.readline().removeprefix(BOM))[1]


OBSERVATIONS = frozenset({"ng_trajectory", "ng_agent_observations", "ng_model_call_capture", "_ng_token_capture"})
"""What NeMo Gym has recorded of a rollout's making: no part of the row, and often many times as large."""

_NOT_THE_ROWS = COMPOSED | OBSERVATIONS


def _row_bytes(fields: Fields) -> bytes:
    return msgspec.json.encode({key: value for key, value in fields.items() if key not in _NOT_THE_ROWS})
