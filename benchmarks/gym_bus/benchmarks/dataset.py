"""Data files to tasks: read JSONL line by line, check every row, and bring it into the form that travels.

Nothing holds all rows: what is remembered of a task is a digest, in about 30 bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from gym_bus.benchmarks.occurrences import Occurrences
from gym_bus.benchmarks.prompt import Prompt
from gym_bus.errors import DataError, did_you_mean
from gym_bus.logs import get_logger

log = get_logger(__name__)

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is no row: it is a file that is no JSONL."""

TASK_KEY, ROLLOUT_KEY = "_ng_task_index", "_ng_rollout_index"

DAMAGED = (OSError, EOFError, zlib.error)
"""What reading a gzip file raises where it is cut off or is none."""

CHECKED_CHARACTERS = 256
"""Of a text within create params: more than any of the words that their types allow has."""

RESULT_KEYS = frozenset({"response", "reward", "reward_components", "gym_bus"})
"""Keys that results set, as every key that starts with `_ng_`: rows of an earlier run are cleaned of them."""

PER_ROLLOUT = frozenset({"responses_create_params", "agent_ref"})
"""Row keys that may differ between rollouts of one task."""

Convert = Callable[[dict[str, Any]], dict[str, Any] | None]
"""A row as the data set's authors published it to a row of ours; None where it is not part of the benchmark."""

Row = dict[str, msgspec.Raw]

_raw_row: msgspec.json.Decoder[Row] = msgspec.json.Decoder(Row)
_CHUNK_BYTES = 2**18
_any = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode


class TaskRow(msgspec.Struct, frozen=True):
    """One row of a data set, checked and ready to be issued."""

    task_index: int
    row: bytes
    """Compact JSON object, without the two index keys."""
    line: int
    """Line number in the data file, from 1."""
    occurrence: int = 0
    """How many earlier rows are of the same task: their rollout indices come first."""


class RolloutRow(msgspec.Struct, frozen=True):
    """One rollout to issue."""

    task_index: int
    rollout_index: int
    row: bytes
    """As in `TaskRow`; with seeds it differs from rollout to rollout."""


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a data file: what stands in it, and what is wrong with it."""

    line: int
    row: Row = {}
    params: Row = {}
    """Its create params as they would be issued; empty where they cannot be."""
    problem: str = ""
    """`file:line: what is wrong`; empty where nothing is."""
    same_as: int | None = None
    """An earlier line with the same text."""


def open_lines(path: Path, compressed: bool | None = None) -> IO[bytes]:
    """The file opened for reading, decompressed where it is gzip: by its name, if `compressed` does not say.

    Raises:
        DataError: it cannot be opened.
    """
    gzipped = path.suffix == ".gz" if compressed is None else compressed
    try:
        return cast(IO[bytes], gzip.open(path)) if gzipped else path.open("rb")
    except OSError as e:
        raise DataError(f"{path}: {(e.strerror or str(e)).lower()}") from None


def load_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number and row, values as compact undecoded JSON; blank lines are passed over.

    Raises:
        DataError: `file:line: what is wrong`, for the first line that is no JSON object.
    """
    for number, line in _lines(path):
        yield number, parse_row(line, f"{path}:{number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with open_lines(path) as file:
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except DAMAGED as e:
                raise DataError(f"{path}:{number}: cannot be read: {e}") from None
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: longer than {MAX_LINE_BYTES >> 20} MiB: is this a JSONL file?")
            text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if text:
                yield number, text


def parse_row(line: bytes, where: str) -> Row:
    """The top-level keys of one line. Raises DataError, named after `where`, where it is no JSON object."""
    try:
        _any.decode(line)  # the whole of it: values kept as Raw are not checked
        return _raw_row.decode(msgspec.json.format(line, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        what = "expected a JSON object" if "`object`" in str(e) else f"not valid JSON: {e}"
        raise DataError(f"{where}: {what}") from None


class Converter:
    """Published rows to rows of ours, one call per row, in the order of the file.

    A row that was already there is marked with `occurrence` (2, 3, ...). A data set that asks a question twice counts
    it twice: without the mark the two would be rollouts of one task.
    """

    def __init__(self, convert: Convert) -> None:
        self._convert = convert
        self._seen = Occurrences()

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """Our row, or None where it is not part of the benchmark.

        Raises:
            DataError: the row is not of the published form.
        """
        try:
            converted = self._convert(dict(row))
        except KeyError as e:
            raise DataError(f"{where}: not a row as published: {_missing([str(e.args[0])], row)}") from None
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
            raise DataError(f"{where}: not a row as published: {e}") from None
        if converted is None:
            return None
        _, earlier = self._seen.add(_encode(converted))
        return {**converted, "occurrence": earlier + 1} if earlier else converted


def materialize(
    path: Path,
    *,
    agent: str,
    prompt: Prompt | None = None,
    required: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    limit: int | None = None,
    convert: Convert | None = None,
    own_input: bool = False,
) -> Iterator[TaskRow]:
    """The tasks of a data file, one by one, as they are issued: NeMo Gym's materialized rows.

    A row's `_ng_task_index` is honoured; without it, rows of identical text are one task (NeMo Gym's rule), numbered
    by first occurrence.

    Args:
        path: prepared rows, or rows as the data set's authors published them, where there is a `convert`.
        agent: registered name; stamped as `agent_ref`, whatever the row says.
        prompt: builds `responses_create_params.input`.
        required: row keys that the verifier cannot do without.
        overrides: create params that win over the row's, key by key.
        limit: how many tasks; reading ends before the first row of the next one.
        convert: makes a row of ours from a published one; used for rows that lack what is needed.
        own_input: a row with a `responses_create_params.input` keeps it; otherwise it is refused where there is a
            prompt, as NeMo Gym does.

    Raises:
        DataError: `file:line: what is wrong`, for the first row that cannot be run or judged.
    """
    numbers = _TaskNumbers()
    converter = Converter(convert) if convert else None
    builder = _RowBuilder(agent, prompt, required, overrides or {}, own_input=own_input)
    for line, text in _lines(path):
        where = f"{path}:{line}"
        row = parse_row(text, where)
        if converter and (absent := builder.absent(row)):
            try:
                converted = converter(_decoded(row), where)
            except DataError as e:
                needed = ", ".join(map(repr, absent))
                raise DataError(f"{e}; nor a prepared row, of which prompt or verifier need {needed}") from None
            if converted is None:
                continue
            text = _encode(converted)
            row = _raw_row.decode(text)
        task_index, occurrence = numbers.of(text, row, where)
        if limit is not None and len(numbers) > limit:
            return
        yield TaskRow(task_index, builder.build(row, where), line, occurrence)


def examine(
    path: Path, *, prompt: Prompt | None = None, required: Sequence[str] = (), own_input: bool = False
) -> Iterator[Examined]:
    """Every row of a data file, whatever is wrong with it; the arguments are those of `materialize`.

    Raises:
        DataError: the file cannot be read.
    """
    builder = _RowBuilder("", prompt, required, {}, own_input=own_input)
    texts, first_line = Occurrences(), array("I")
    for line, text in _lines(path):
        where, row, params, problem = f"{path}:{line}", {}, {}, ""
        number, earlier = texts.add(text)
        if not earlier:
            first_line.append(line)
        try:
            row = parse_row(text, where)
            params = builder.params(row, where)
        except DataError as e:
            problem = str(e)
        same_as = first_line[number] if earlier else None
        yield Examined(line=line, row=row, params=params, problem=problem, same_as=same_as)


def expand(tasks: Iterable[TaskRow], repeats: int, *, seeds: int | None = None) -> Iterator[RolloutRow]:
    """The rollouts of each task, `repeats` per row, tasks in order: a b c gives a a b b c c.

    Args:
        tasks: as `materialize` yields them.
        repeats: rollouts per row.
        seeds: ask the model for a seed of its own in each rollout: this number plus the rollout's index.
    """
    for task in tasks:
        first = task.occurrence * repeats
        for rollout_index in range(first, first + repeats):
            row = task.row if seeds is None else with_seed(task.row, seeds + rollout_index)
            yield RolloutRow(task.task_index, rollout_index, row)


def materialized_line(row: bytes, task_index: int, rollout_index: int) -> bytes:
    """`row` with the two index keys as its last ones: a line of the materialized inputs, without the newline."""
    comma = b"" if row == b"{}" else b","
    return b'%b%b"%b":%d,"%b":%d}' % (
        row[:-1],
        comma,
        TASK_KEY.encode(),
        task_index,
        ROLLOUT_KEY.encode(),
        rollout_index,
    )


def with_seed(row: bytes, seed: int) -> bytes:
    """`row` with `{"seed": seed}` in `responses_create_params.metadata.extra_body`, a JSON text, as NeMo Gym keeps it.

    Raises:
        DataError: the row's own metadata or extra body is no object.
    """
    fields = _raw_row.decode(row)
    params: dict[str, Any] = _any.decode(fields["responses_create_params"])
    metadata = params.get("metadata") or {}
    try:
        body = msgspec.json.decode(metadata.get("extra_body") or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, AttributeError, TypeError) as e:
        raise DataError(f"responses_create_params.metadata.extra_body must be the text of a JSON object: {e}") from None
    params["metadata"] = {**metadata, "extra_body": _encode({**body, "seed": seed}).decode()}
    fields["responses_create_params"] = msgspec.Raw(_encode(params))
    return _encode(fields)


def dataset_digest(path: Path, compressed: bool | None = None) -> str:
    """SHA-256 of the file's content, in hex: which data a job ran on.

    Args:
        path: the file; gzip is decompressed, so that a data set counts as the same however it is packed.
        compressed: whether it is gzip; None goes by its name.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_lines(path, compressed) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except DAMAGED as e:
        raise DataError(f"{path}: cannot be read: {e}") from None
    return digest.hexdigest()


class _TaskNumbers:
    """Task index and occurrence of each row."""

    def __init__(self) -> None:
        self._tasks = Occurrences()
        """By text, or by the index where rows say their task."""
        self._contents = Occurrences()
        self._first_content = array("I")
        """By task: the number of its first row's content."""
        self._warned = False
        self._stamped: bool | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def of(self, text: bytes, row: Row, where: str) -> tuple[int, int]:
        stamp = row.get(TASK_KEY)
        if self._stamped is None:
            self._stamped = stamp is not None
        if self._stamped != (stamp is not None):
            raise DataError(f"{where}: {TASK_KEY} must be in every row or in none, or tasks would be mixed up")
        return self._tasks.add(text) if stamp is None else self._of_stamped(stamp, row, where)

    def _of_stamped(self, stamp: msgspec.Raw, row: Row, where: str) -> tuple[int, int]:
        task = _task_index(stamp, where)
        number, occurrence = self._tasks.add(b"%d" % task)
        # Create params and agents may differ from rollout to rollout of one task.
        shared = {k: v for k, v in row.items() if not k.startswith("_ng_") and k not in PER_ROLLOUT}
        content, _ = self._contents.add(_encode(shared))
        if not occurrence:
            self._first_content.append(content)
        elif self._first_content[number] != content and not self._warned:
            self._warned = True
            log.warning("one_task_index_for_different_rows", row=where, task_index=task)
        return task, occurrence


def _task_index(stamp: msgspec.Raw, where: str) -> int:
    try:
        index = msgspec.json.decode(stamp, type=int)
    except msgspec.DecodeError:
        index = -1
    if index < 0:
        raise DataError(f"{where}: {TASK_KEY} must be an integer from 0, not {bytes(stamp).decode()[:40]}")
    return index


class _RowBuilder:
    """One row of the data file to the bytes of the materialized row."""

    def __init__(
        self,
        agent: str,
        prompt: Prompt | None,
        required: Sequence[str],
        overrides: Mapping[str, Any],
        *,
        own_input: bool,
    ) -> None:
        self._agent_ref, self._own_input = msgspec.Raw(_encode({"name": agent})), own_input
        self._prompt, self._required = prompt, tuple(required)
        self._overrides = {key: msgspec.Raw(_encode(value)) for key, value in overrides.items()}

    def absent(self, row: Row) -> Sequence[str]:
        """The keys of the verifier and the prompt that are missing, as they are in a row of published form."""
        needed = self._required
        if self._prompt is not None and "responses_create_params" not in row:
            needed += self._prompt.fields()
        return lacking(needed, row.__contains__)

    def build(self, row: Row, where: str) -> bytes:
        """The materialized row. Raises DataError where it cannot be run or judged."""
        params = self.params(row, where)
        kept = {key: value for key, value in row.items() if key not in RESULT_KEYS and not key.startswith("_ng_")}
        kept["responses_create_params"] = msgspec.Raw(_encode(params))
        kept["agent_ref"] = self._agent_ref
        return _encode(kept)

    def params(self, row: Row, where: str) -> Row:
        """The row's create params. Raises DataError where it cannot be run or judged."""
        if missing := lacking(self._required, lambda key: not _is_null(row.get(key))):
            raise DataError(f"{where}: the verifier needs {_missing(missing, row)}")
        params = self._own_params(row, where)
        if self._prompt is not None and not (self._own_input and "input" in params):
            if "input" in params:
                raise DataError(
                    f"{where}: the row has a responses_create_params.input, and the benchmark has a prompt that builds "
                    "it: leave one out"
                )
            params = {"input": msgspec.Raw(_encode(self._prompt.render(_decoded(row), where))), **params}
        params |= self._overrides
        if "input" not in params:
            raise DataError(f"{where}: no responses_create_params.input, and no prompt that builds it")
        _check_params(_decoded(params), where)
        return params

    @staticmethod
    def _own_params(row: Row, where: str) -> Row:
        raw = row.get("responses_create_params")
        if raw is None:
            return {}
        try:
            return _raw_row.decode(raw)
        except msgspec.ValidationError:
            raise DataError(f"{where}: responses_create_params must be an object") from None


def lacking(required: Iterable[str], has: Callable[[str], bool]) -> list[str]:
    """Those of the required keys that a row does not have; of `a|b`, either will do."""
    return [key for key in required if not any(map(has, key.split("|")))]


def _is_null(value: msgspec.Raw | None) -> bool:
    return value is None or bytes(value) == b"null"


def _decoded(row: Row) -> dict[str, Any]:
    return {key: _any.decode(value) for key, value in row.items()}


def _missing(keys: Sequence[str], row: Mapping[str, Any]) -> str:
    named = ", ".join(repr(key) for key in keys)
    others = [key for key in row if key not in keys]
    return (
        f"the key{'s' if len(keys) > 1 else ''} {named}, which the row lacks or has null: "
        f"{did_you_mean(keys[0], others)}"
    )


def _check_params(params: dict[str, Any], where: str) -> None:
    from gym_bus.models.schema import check_create_params  # only who materializes rows needs the schema

    check_create_params(_checked_part(params), where)


def _checked_part(value: Any) -> Any:
    """Create params without what does not matter to their check.

    A key that is null counts as not given, at any depth: NeMo Gym writes rows out with all their defaults. Texts are
    cut: no type bounds their length, and pydantic leaves reference cycles that hold them until Python looks for some.
    """
    if isinstance(value, dict):
        return {key: _checked_part(below) for key, below in value.items() if below is not None}
    if isinstance(value, list):
        return [_checked_part(item) for item in value]
    return value[:CHECKED_CHARACTERS] if isinstance(value, str) else value
