"""A job's rollouts as a pandas DataFrame, one row each; NeMo Gym's files too."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import numpy as np

from gym_bus.errors import DataError
from gym_bus.results.columns import Index, read_failed
from gym_bus.results.extras import need
from gym_bus.results.files import JobFiles
from gym_bus.results.identity import manifest_of
from gym_bus.results.lines import COMPOSED, Fields
from gym_bus.results.reader import BOM, decode_lines, decode_mended
from gym_bus.results.texts import NOTHING, encodable, said, text_of, told

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

Paths = str | Path | Sequence[str | Path]

TIMINGS = (
    *("request_queue_s", "agent_s", "model_queue_s", "model_s", "tools_s"),
    *("publish_s", "attempt_queue_s", "verify_s"),
)
"""Seconds per stage; `gym_bus.messages.Timings` says what each is."""
NOT_FIELDS = COMPOSED | {"responses_create_params", "agent_ref", "skills_ref"}
"""Keys of a line that are no fields of the row or of the verifier."""


def load(paths: Paths, *, fields: Collection[str] | None = None, texts: bool = False) -> pd.DataFrame:
    """Every recorded rollout of one job or of several, in order of task and rollout.

    A scored rollout has `outcome` "scored" and a `reward`; one whose newest attempt failed has "failed", no reward, and
    `failure_class`, `failure_stage` and `failure_detail`. Columns that end in `_s` are seconds; `finished_at` is UTC.
    Parts of the reward are `reward_components.NAME`. A field of the row or of the verifier keeps its name; where a
    column above has it already, it is `row.NAME`. What the files do not say is missing: NeMo Gym's have no timings.

    Args:
        paths: folders of jobs or of suites, or rollouts files. `job` tells jobs apart: its id, else the folder's name.
        fields: the keys of row and verifier that become columns; None for all that hold text, numbers or truth values.
            Objects and lists become JSON text where they are named here.
        texts: also `input_text`, what the model was told, and `output_text`, what it said in its messages.

    Memory: the columns, about 400 bytes per rollout, and the texts among them.

    Raises:
        UsageError: no rollouts there, or pandas is not installed.
        DataError: names file and line: not a result, or a rollout recorded twice.
    """
    given = [paths] if isinstance(paths, str | Path) else paths
    found = [files for path in given for files in JobFiles.all_at(Path(path))]
    jobs = [(files, read_frame(files, fields=fields)) for files in found]
    if texts:
        jobs = [(files, with_texts(files, frame)) for files, frame in jobs]
    return join([frame for _, frame in jobs]).drop(columns=[PLACE])


def join(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The frames of several jobs, one after the other."""
    frame = need("pandas", "analysis").concat(frames, ignore_index=True)
    frame[list(CATEGORIES)] = frame[list(CATEGORIES)].astype("category")  # of each job its own: joined, they are none
    return frame


def read_frame(files: JobFiles, *, fields: Collection[str] | None = None) -> pd.DataFrame:
    """As `load`, of one job; `line_offset` says where the line begins, in the rollouts or in the failures file."""
    manifest = manifest_of(files)
    columns = _Columns(manifest.job if manifest else files.folder.resolve().name, fields)
    for line, head in decode_lines(files.rollouts, _scored, unended_ok=True):
        if columns.has(head):
            which = f"task {head.task}, rollout {head.rollout}"
            raise DataError(f"{files.rollouts}:{line.number}: a second line for {which}; remove one of the two")
        columns.add(head, line.data, line.offset)
    if files.failures.exists():
        newest = {line.number for line in read_failed(files.failures).newest.values()}
        for line, failed in decode_lines(files.failures, _failed, unended_ok=True):
            if line.number in newest and not columns.has(failed):
                columns.add(failed, line.data, line.offset)
    return columns.frame()


def with_texts(files: JobFiles, frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of `read_frame` with `input_text` and `output_text`, read from their lines."""
    texts = []
    with ExitStack() as opened:
        open_files: dict[Path, BinaryIO] = {}
        for outcome, offset in zip(frame["outcome"], frame[PLACE].tolist(), strict=True):
            path = files.rollouts if outcome == "scored" else files.failures
            if path not in open_files:
                open_files[path] = opened.enter_context(path.open("rb"))
            open_files[path].seek(offset)
            texts.append(_texts_of(open_files[path].readline().removeprefix(BOM)))
    return frame.assign(
        input_text=_typed("input_text", [told for told, _ in texts]),
        output_text=_typed("output_text", [said for _, said in texts]),
    )


def _texts_of(line: bytes) -> tuple[str, str]:
    _, read = decode_mended(_told_and_said, line)
    input_text = told(read.params.input) if read.params else ""
    return input_text, "\n\n".join(said(read.response.output)) if read.response else ""


class _Details(msgspec.Struct, frozen=True):
    reasoning_tokens: float | None = None
    cached_tokens: float | None = None


class _Usage(msgspec.Struct, frozen=True):
    input_tokens: float | None = None
    output_tokens: float | None = None
    total_tokens: float | None = None
    reasoning_tokens: float | None = None
    cached_tokens: float | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Timings(msgspec.Struct, frozen=True):
    request_queue_s: float = nan
    agent_s: float = nan
    model_queue_s: float = nan
    model_s: float = nan
    model_calls: float = nan
    tools_s: float = nan
    publish_s: float = nan
    attempt_queue_s: float = nan
    verify_s: float = nan


class _Ours(msgspec.Struct, frozen=True):
    attempt: int = 1
    agent: str = ""
    model: str | None = None
    temperature: float | None = None
    policy_version_start: int | None = None
    policy_version_end: int | None = None
    verifier: str = ""
    verifier_digest: str = ""
    agent_worker: str = ""
    verifier_worker: str = ""
    timings: _Timings = _Timings()
    usage: _Usage | None = None
    finished_at: float | None = None


class _Named(msgspec.Struct, frozen=True):
    name: str = ""


class _Incomplete(msgspec.Struct, frozen=True):
    reason: str | None = None


class _Response(msgspec.Struct, frozen=True):
    model: str | None = None
    incomplete_details: _Incomplete | None = None
    usage: _Usage | None = None
    output: msgspec.Raw = NOTHING


class _Params(msgspec.Struct, frozen=True):
    input: msgspec.Raw = NOTHING


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    task: Index = msgspec.field(name="_ng_task_index")
    rollout: Index = msgspec.field(name="_ng_rollout_index")
    earlier: int = msgspec.field(default=0, name="_ng_attempt_index")
    components: Fields | None = msgspec.field(default=None, name="reward_components")
    agent_ref: _Named | None = None
    params: _Params | None = msgspec.field(default=None, name="responses_create_params")
    response: _Response | None = None
    ours: _Ours = msgspec.field(default=_Ours(), name="gym_bus")


class _Scored(_Line, frozen=True, kw_only=True):
    reward: float | bool


class _Failed(_Line, frozen=True, kw_only=True):
    kind: str = msgspec.field(name="_ng_failure_class")
    stage: str = msgspec.field(default="", name="_ng_failure_stage")
    detail: str = msgspec.field(default="", name="_ng_failure_detail")
    judge_error: str = msgspec.field(default="", name="_ng_failure_judge_error")


_scored = msgspec.json.Decoder(_Scored)
_failed = msgspec.json.Decoder(_Failed)
_told_and_said = msgspec.json.Decoder(_Line)
_fields: msgspec.json.Decoder[Fields] = msgspec.json.Decoder(Fields)


def _cells(line: _Scored | _Failed) -> dict[str, Any]:
    ours, response = line.ours, line.response or _Response()
    return {
        "task_index": line.task,
        "rollout_index": line.rollout,
        "attempt": max(ours.attempt, line.earlier + 1),
        **_outcome(line),
        "agent": (line.agent_ref.name if line.agent_ref else "") or ours.agent or "agent",
        "model": ours.model or response.model,
        "verifier": ours.verifier or None,
        "incomplete": response.incomplete_details and (response.incomplete_details.reason or "incomplete"),
        **_tokens(ours.usage or response.usage or _Usage()),
        "output_chars": sum(map(len, said(response.output))),
        "model_calls": ours.timings.model_calls,
        **{name: getattr(ours.timings, name) for name in TIMINGS},
        "finished_at": ours.finished_at,
        "temperature": ours.temperature,
        "policy_version_start": ours.policy_version_start,
        "policy_version_end": ours.policy_version_end,
        "verifier_digest": ours.verifier_digest or None,
        "agent_worker": ours.agent_worker or None,
        "verifier_worker": ours.verifier_worker or None,
    }


def _outcome(line: _Scored | _Failed) -> dict[str, Any]:
    if isinstance(line, _Scored):
        empty = {"failure_class": None, "failure_stage": None, "failure_detail": None}
        return {"outcome": "scored", "reward": float(line.reward) if isfinite(line.reward) else nan, **empty}
    return {
        "outcome": "failed",
        "reward": nan,
        "failure_class": line.kind,
        "failure_stage": line.stage or None,
        "failure_detail": encodable(line.detail or line.judge_error),
    }


def _tokens(usage: _Usage) -> dict[str, float | None]:
    told, made = usage.input_tokens_details or _Details(), usage.output_tokens_details or _Details()
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "reasoning_tokens": made.reasoning_tokens if usage.reasoning_tokens is None else usage.reasoning_tokens,
        "cached_tokens": told.cached_tokens if usage.cached_tokens is None else usage.cached_tokens,
    }


CATEGORIES = (
    "job",
    "outcome",
    "failure_class",
    "failure_stage",
    "agent",
    "model",
    "verifier",
    "incomplete",
    "verifier_digest",
    "agent_worker",
    "verifier_worker",
)
"""Columns of few different texts."""
TEXTS = ("failure_detail", "input_text", "output_text")
PLACE = "line_offset"
WHOLE = ("task_index", "rollout_index", "attempt", "output_chars", PLACE)
NAMES = ("job", *_cells(_Scored(task=0, rollout=0, reward=0.0)), PLACE)


class _Columns:
    """The columns of one job, as lists that grow line by line."""

    def __init__(self, job: str, fields: Collection[str] | None) -> None:
        self._job, self._fields = job, fields
        self._cells: dict[str, list[Any]] = {name: [] for name in NAMES}
        self._components: dict[str, list[bytes | None]] = {}
        self._others: dict[str, list[bytes | None]] = {}
        self._seen: set[tuple[int, int]] = set()

    def has(self, line: _Line) -> bool:
        """Whether the line's rollout is here already."""
        return (line.task, line.rollout) in self._seen

    def add(self, line: _Scored | _Failed, data: bytes, offset: int) -> None:
        """One more rollout; `data` is the whole line."""
        rows = len(self._seen)
        self._seen.add((line.task, line.rollout))
        for name, value in {"job": self._job, **_cells(line), PLACE: offset}.items():
            self._cells[name].append(value)
        _append(self._components, rows, line.components or {})
        _append(self._others, rows, dict(self._others_in(data)))

    def _others_in(self, data: bytes) -> Iterator[tuple[str, msgspec.Raw]]:
        if self._fields is not None and not self._fields:
            return
        for name, value in _fields.decode(data).items():
            if self._fields is None:
                wanted = bytes(value)[:1] not in (b"{", b"[") and not name.startswith(("_ng_", "ng_"))
            else:
                wanted = name in self._fields
            if wanted and name not in NOT_FIELDS:
                yield name, value

    def frame(self) -> pd.DataFrame:
        """All columns, the rollouts in order."""
        made = {name: _typed(name, values) for name, values in self._cells.items()}
        for name, raws in self._components.items():
            made[f"reward_components.{name}"] = _numbers(_values(raws))
        for name, raws in self._others.items():
            made[f"row.{name}" if name in made else name] = _values(raws)
        frame = need("pandas", "analysis").DataFrame(made)
        return frame.sort_values(["task_index", "rollout_index"], ignore_index=True)


def _append(columns: dict[str, list[bytes | None]], rows: int, cells: Fields) -> None:
    """One more row to columns of `rows` cells each; None where the row has no such cell."""
    for name in cells:
        columns.setdefault(name, [None] * rows)
    for name, column in columns.items():
        column.append(bytes(cells[name]) if name in cells else None)  # a copy: a Raw keeps its whole line


def _typed(name: str, values: list[Any]) -> Any:
    pandas = need("pandas", "analysis")
    if name in CATEGORIES:
        return pandas.Categorical(pandas.Series(values, dtype="str"))
    if name in TEXTS:
        return pandas.Series(values, dtype="str").array  # without an index of its own
    if name in WHOLE:
        return np.array(values, np.int64)
    if name == "finished_at":
        return pandas.to_datetime(_numbers(values), unit="s", utc=True).as_unit("us")
    return _numbers(values)


def _numbers(values: Sequence[Any]) -> Any:
    return np.array([value if isinstance(value, float | int) else nan for value in values], float)


def _values(cells: Sequence[bytes | None]) -> list[Any]:
    """The values of a field: as they are where all are of one kind, else as JSON text."""
    kinds = {_kind(cell) for cell in cells if cell not in (None, b"null")}
    read = _READ[kinds.pop()] if len(kinds) == 1 else _as_json
    return [None if cell is None or cell == b"null" else read(cell) for cell in cells]


def _kind(cell: bytes) -> str:
    if cell[:1] == b'"':
        return "text"
    if cell in (b"true", b"false"):
        return "truth"
    if cell[:1] in b"{[" or (len(cell) > 18 and cell.lstrip(b"-").isdigit()):  # 64 bits do not hold it
        return "json"
    return "number"


def _as_json(cell: bytes) -> str:
    return cell.decode(errors="replace")


_READ: dict[str, Callable[[bytes], Any]] = {
    "text": text_of,
    "number": json.loads,
    "truth": json.loads,
    "json": _as_json,
}
