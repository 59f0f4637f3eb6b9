"""Which subset each task belongs to, by a field of its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

import msgspec
import numpy as np

from gym_bus.errors import DataError, UsageError, did_you_mean
from gym_bus.results.files import JobFiles
from gym_bus.results.lines import Fields
from gym_bus.results.reader import read_row
from gym_bus.results.table import Table


def task_subsets(files: JobFiles, table: Table, field: str) -> list[str | None]:
    """The subset of every task of the table; None for those whose row has no such field, or nothing in it.

    Args:
        files: the job's.
        table: of the same job.
        field: a key of the row, or a path of keys with dots between them, such as `verifier_metadata.difficulty`. The
            materialized input is asked first, then the task's first scored rollout, which may have fields of the
            verifier's.

    Raises:
        UsageError: no task has the field, with suggestions; or it holds an object or a list.
    """
    known: set[str] = set()
    subsets: list[str | None] = []
    for task, rows in zip(table.tasks.tolist(), _rows(files, table), strict=True):
        known.update(*rows)
        subsets.append(_subset([_look_up(row, field) for row in rows], field, task))
    if len(subsets) and not any(subsets):
        raise UsageError(f"--by {field!r}: no task has this field: {did_you_mean(field, known)}")
    return subsets


def _rows(files: JobFiles, table: Table) -> Iterator[list[Fields]]:
    """The rows of every task: its input and its first scored rollout, as far as there are any."""
    scored = np.full(len(table.tasks), -1, np.int64)
    scored[table.row_task[::-1]] = table.row_offset[::-1]
    with ExitStack() as opened:
        rollouts = opened.enter_context(files.rollouts.open("rb"))
        inputs: BinaryIO | None = opened.enter_context(files.inputs.open("rb")) if table.has_inputs else None
        for first, row in zip(table.input_offset[table.task_first].tolist(), scored.tolist(), strict=True):
            yield [
                *([read_row(inputs, first)] if inputs else []),
                *([read_row(rollouts, row)] if row >= 0 else []),
            ]


def _look_up(row: Fields, field: str) -> Any:
    key, _, rest = field.partition(".")
    if field not in row and rest and key in row:
        try:
            return _look_up(msgspec.json.decode(row[key], type=Fields), rest)
        except msgspec.ValidationError:
            return None
    return msgspec.json.decode(row[field]) if field in row else None


def _subset(values: list[Any], field: str, task: int) -> str | None:
    value = next((value for value in values if value not in (None, "")), None)
    if isinstance(value, dict | list):
        inside = f", such as {field}.{next(iter(value))}" if value and isinstance(value, dict) else ""
        raise DataError(f"--by {field}: task {task} has no single value there; name a field inside{inside}")
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()
