"""The STEM subjects of MMLU, from the evaluation data of Qwen2.5-Math."""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

SOURCES = {
    "test": Source(
        file="test.jsonl",
        url="https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/main/evaluation/data/mmlu_stem/test.jsonl",
        sha256=("fd7c16f96067d285638abb5aaef9cd8a063b11454e14cb64df93141a58691478",),
        licence="MIT, Copyright (c) 2020 Dan Hendrycks (MMLU)",
    )
}

_LETTERS = "ABCDEFGHIJ"


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """The published answer is the index of the right choice."""
    choices, answer = row["choices"], row["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(_LETTERS):
        raise ValueError(f"answer {answer!r} is not the index of one of {len(choices)} choices")
    options = [{letter: str(choice)} for letter, choice in zip(_LETTERS, choices, strict=False)]
    return {
        "question": row["question"],
        "options": options,
        "options_text": "\n".join(f"{letter}. {text}" for option in options for letter, text in option.items()),
        "expected_answer": _LETTERS[answer],
        "subject": row["type"],
    }
