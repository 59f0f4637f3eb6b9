"""HumanEval as OpenAI published it; the rows are kept as they are."""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

SOURCES = {
    "test": Source(
        file="HumanEval.jsonl.gz",
        url="https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
        sha256=("1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",),
        licence="MIT, Copyright (c) OpenAI",
    )
}

_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """All published keys."""
    return {key: row[key] for key in _KEYS}
