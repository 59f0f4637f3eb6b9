"""The answers of four real models that were published beside GSM8K, as files for the `replay` model.

They make a whole evaluation possible, with a published accuracy to compare with, and no model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from gym_bus.benchmarks.dataset import load_rows
from gym_bus.errors import DataError, UsageError, did_you_mean

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
"""In `example_model_solutions.jsonl` of the data set's repository, one answer each to every test question."""


class _Recorded(msgspec.Struct, frozen=True):
    solution: str


_recorded = msgspec.json.Decoder(_Recorded)


def replay_file(solutions_path: Path, models: str | Sequence[str], out_path: Path) -> int:
    """Write a replay file: task i gets the answer of each of `models` to question i, as its samples.

    Args:
        solutions_path: `example_model_solutions.jsonl` as published.
        models: names out of `MODELS`.
        out_path: one JSON object per line, `{"task_index": i, "completions": [text, ...]}`.

    Returns:
        The number of tasks.

    Raises:
        UsageError: an unknown model.
        DataError: `file:line: what is wrong` with the published file.
    """
    names = (models,) if isinstance(models, str) else tuple(models)
    for name in names:
        if name not in MODELS:
            raise UsageError(f"no recorded answers of model {name!r}: {did_you_mean(name, MODELS)}")
    count = 0
    with out_path.open("wb") as out:
        for line, row in load_rows(solutions_path):
            completions = [_solution(row, name, f"{solutions_path}:{line}") for name in names]
            out.write(msgspec.json.encode({"task_index": count, "completions": completions}) + b"\n")
            count += 1
    return count


def _solution(row: dict[str, msgspec.Raw], model: str, where: str) -> str:
    if model not in row:
        raise DataError(f"{where}: no answer of model {model!r}")
    try:
        return _recorded.decode(row[model]).solution
    except msgspec.ValidationError as e:
        raise DataError(f"{where}: answer of model {model!r}: {e}") from None
