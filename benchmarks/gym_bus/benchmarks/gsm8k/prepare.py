"""GSM8K as OpenAI published it."""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

_AT = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"

SOURCES = {
    "test": Source(
        file="test.jsonl",
        url=f"{_AT}/test.jsonl",
        sha256=("3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",),
        licence="MIT, Copyright (c) 2021 OpenAI",
    ),
    "train": Source(
        file="train.jsonl",
        url=f"{_AT}/train.jsonl",
        sha256=("17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",),
        licence="MIT, Copyright (c) 2021 OpenAI",
    ),
}


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """The answer is a worked solution whose last line is `#### N`; N may have thousands commas."""
    solution, marker, answer = row["answer"].rpartition("####")
    expected = answer.strip().replace(",", "")
    if not marker or not expected:
        raise ValueError("the answer does not end in '#### N'")
    return {"question": row["question"], "expected_answer": expected, "reference_solution": solution.strip()}
