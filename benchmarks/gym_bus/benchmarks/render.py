"""Apply a prompt to a data file: every row gets its `responses_create_params.input`, and says which prompt made it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.benchmarks.dataset import load_rows
from gym_bus.benchmarks.prompt import Prompt, read_prompt
from gym_bus.errors import DataError
from gym_bus.results.disk import replace_file

_SHOWN = 20


def render(source: Path, prompt_config: Path, target: Path) -> int:
    """Write the rows of `source` with the prompt applied into `target`; returns how many there are.

    Everything else in a row stays as it is, create params too.

    Raises:
        ConfigError: the prompt is broken.
        DataError: a row is, or lacks what the prompt needs; or rows have an input already, all named.
        UsageError: `target` cannot be written.
    """
    prompt = read_prompt(prompt_config)
    if taken := [line for line, params, _ in _rows(source) if params.get("input")]:
        more = f" and {len(taken) - _SHOWN} more" if len(taken) > _SHOWN else ""
        raise DataError(
            f"{source}: line{'s' if len(taken) > 1 else ''} {', '.join(map(str, taken[:_SHOWN]))}{more} already have a "
            f"responses_create_params.input, which {prompt_config} builds: leave one out"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    written = _Counted(_rendered(source, prompt, str(prompt_config.resolve())))
    replace_file(target, written)
    return written.count


class _Counted:
    """Lines, counted as they go by."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines, self.count = lines, 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self.count += 1
            yield line


def _rendered(source: Path, prompt: Prompt, used: str) -> Iterator[bytes]:
    for line, params, row in _rows(source):
        params = {**params, "input": prompt.render(row, f"{source}:{line}")}
        yield msgspec.json.encode({**row, "responses_create_params": params, "prompt_config_used": used}) + b"\n"


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Line number, create params and the whole row, decoded."""
    for line, raw in load_rows(source):
        row = {key: msgspec.json.decode(value) for key, value in raw.items()}
        params = row.get("responses_create_params") or {}
        if not isinstance(params, dict):
            raise DataError(f"{source}:{line}: responses_create_params must be an object")
        yield line, params, row
