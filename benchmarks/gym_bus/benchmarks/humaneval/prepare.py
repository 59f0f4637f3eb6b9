"""HumanEval as OpenAI published it, the rows kept as they are; and HumanEval+, with the inputs of EvalPlus."""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

SOURCES = {
    "test": Source(
        file="HumanEval.jsonl.gz",
        url="https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
        sha256=("1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",),
        licence="MIT, Copyright (c) OpenAI",
    ),
    "plus": Source(
        file="HumanEvalPlus.jsonl.gz",
        url="https://github.com/evalplus/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz",
        licence="Apache 2.0, EvalPlus; after HumanEval, MIT, Copyright (c) OpenAI",
        editions="HumanEvalPlus-v*.jsonl",
    ),
}

_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution")


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """All published keys; of HumanEval+, those that tests are made of."""
    more = ("base_input", "plus_input", "atol") if "plus_input" in row else ("test",)
    return {key: row[key] for key in (*_KEYS, *more)}
