"""Reading JSONL: bytes with line numbers, so that every complaint has an address."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from gym_bus.errors import DataError
from gym_bus.results.lines import COMPOSED, Fields

BOM = b"\xef\xbb\xbf"

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
            yield from _lines_of(file)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None


def _lines_of(file: BinaryIO) -> Iterator[Line]:
    offset = 0
    for number, line in enumerate(file, start=1):
        data = (line.removeprefix(BOM) if number == 1 else line).strip()
        if data:
            yield Line(number, offset, data, line.endswith(b"\n"))
        offset += len(line)


def decode_lines(
    path: Path, decoder: msgspec.json.Decoder[T], *, unended_ok: bool
) -> Generator[tuple[Line, T], None, Line | None]:
    """Every whole line with its content; returns the last line where it is torn, which is how a crash leaves a file.

    Torn is a last line that is no JSON, or, unless `unended_ok`, one without its newline.

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
            content = decoder.decode(line.data)
        except msgspec.ValidationError as e:
            raise DataError(f"{path}:{line.number}: not the expected kind of line: {e}") from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            torn = line
        else:
            yield line, content
    return torn


def decode_line(decoder: msgspec.json.Decoder[T], data: bytes, path: Path, number: int) -> T:
    """One line decoded. Raises DataError naming file and line."""
    try:
        return decoder.decode(data)
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


def join_rollouts(inputs: Path | None, rollouts: Path) -> Iterator[Joined]:
    """Every recorded rollout with its whole row, in the order of the rollouts file.

    NeMo Gym's verifiers drop row fields that their reply does not name, so those come from the materialized inputs,
    joined on (task, rollout), or on the task where they are rows of a data set: what the rollout has not, or has as
    null.

    Memory: a table of the inputs' offsets (about 150 bytes a row) and one row at a time.

    Raises:
        DataError: names file and line: a line is no JSON object, has no response, or has no input; two inputs share
            their indices.
    """
    if inputs is None:
        yield from _join({}, None, rollouts)
        return
    places, stamped = _places(inputs)
    try:
        with inputs.open("rb") as file:
            yield from _join(places, file, rollouts, stamped=stamped)
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


def _join(places: Places, inputs: BinaryIO | None, rollouts: Path, *, stamped: bool = False) -> Iterator[Joined]:
    for order, (number, data) in enumerate(iter_jsonl(rollouts)):
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
            fields = read_row(inputs, offset) | {key: value for key, value in fields.items() if bytes(value) != b"null"}
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
    try:
        _response.decode(response)
    except msgspec.DecodeError as e:
        raise DataError(f"{where}: its response is no Responses object: {e}") from None
    return bytes(response)


class _Response(msgspec.Struct, frozen=True):
    output: list[Any]


_response: msgspec.json.Decoder[_Response] = msgspec.json.Decoder(_Response)


def read_row(file: BinaryIO, offset: int) -> Fields:
    """The top-level fields of the line that begins at `offset` and was found valid before."""
    file.seek(offset)
    return _fields.decode(file.readline().removeprefix(BOM))


def _row_bytes(fields: Fields) -> bytes:
    return msgspec.json.encode({key: value for key, value in fields.items() if key not in COMPOSED})
