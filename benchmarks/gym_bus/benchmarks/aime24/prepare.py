"""AIME 2024, both contests, from the evaluation data of Qwen2.5-Math."""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

SOURCES = {
    "test": Source(
        file="test.jsonl",
        url="https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data/aime24/test.jsonl",
        sha256=("af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",),
        licence="see the source; the problems are by the Mathematical Association of America",
    )
}


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """The answer keeps its leading zeros, as it is published. The solutions are left out: their licence is unknown."""
    answer = str(row["answer"]).strip()
    if not answer.isdecimal() or int(answer) > 999:
        raise ValueError(f"an AIME answer is an integer from 0 to 999, not {answer!r}")
    return {"id": row["id"], "question": row["problem"], "expected_answer": answer, "url": row["url"]}
