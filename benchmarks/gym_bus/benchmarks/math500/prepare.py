r"""MATH-500 in the two forms that are in circulation.

OpenAI's file has `problem`, `solution`, `answer`. The other form has `question` and, as `answer`, a worked solution
that ends in `The answer is: X`, after a `\boxed{X}`.
"""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

SOURCES = {
    "test": Source(
        file="test.jsonl",
        url="https://github.com/openai/prm800k/raw/main/prm800k/math_splits/test.jsonl",
        sha256=(
            "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
            "27866aafb9474291b4168f8c2b5db6b92e1ba8f4e682d86db9a7f3fe5dd6a34b",
        ),
        licence="MIT; MATH by Hendrycks et al., the selection by OpenAI",
    )
}

_ANNOUNCED = "The answer is:"
_KEPT = ("subject", "level", "unique_id")


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ours from either form."""
    if "problem" in row:
        question, solution, expected = row["problem"], row["solution"], row["answer"].strip()
    else:
        question = row["question"]
        solution, expected = _split(row["answer"])
    if not expected:
        raise ValueError("no final answer in the worked solution")
    kept = {key: row[key] for key in _KEPT if key in row}
    return {"question": question, "expected_answer": expected, "reference_solution": solution, **kept}


def _split(solution: str) -> tuple[str, str]:
    """The worked solution and its final answer; the announced one wins over the boxed one."""
    worked, announced, answer = solution.rpartition(_ANNOUNCED)
    if announced and answer.strip():
        return worked.strip(), answer.strip()
    return solution.strip(), _last_boxed(solution)


def _last_boxed(text: str) -> str:
    r"""The content of the last `\boxed{...}` or `\fbox{...}`, braces balanced; empty where there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return ""
    begin = text.index("{", start) + 1
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end].strip()
    return ""
