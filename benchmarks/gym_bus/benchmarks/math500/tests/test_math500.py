from __future__ import annotations

import json
from pathlib import Path

import pytest

from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.math500.prepare import convert
from gym_bus.benchmarks.spec import load_benchmark

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize(
    ("answer", "expected", "solution"),
    [
        ("So it is $\\boxed{9}.$The answer is: 9", "9", "So it is $\\boxed{9}.$"),
        ("$\\boxed{p - q}.$\nThe answer is:  p - q ", "p - q", "$\\boxed{p - q}.$"),
        ("$\\boxed{15\\frac{39}{40}}$ or $\\boxed{\\frac{639}{40}}$", "\\frac{639}{40}", None),
        ("The answer is: 3, or rather $\\fbox{\\{4\\}}$The answer is: ", "\\{4\\}", None),
    ],
)
def test_the_final_answer_is_taken_from_a_worked_solution(answer: str, expected: str, solution: str | None) -> None:
    row = convert({"question": "?", "answer": answer})

    assert row == {"question": "?", "expected_answer": expected, "reference_solution": solution or answer.strip()}


def test_the_form_that_openai_published_is_read_too() -> None:
    published = {
        "problem": "How many?",
        "solution": "There are $\\boxed{9}$.",
        "answer": "9",
        "subject": "Number Theory",
        "level": 3,
        "unique_id": "test/number_theory/572.json",
    }

    assert convert(published) == {
        "question": "How many?",
        "expected_answer": "9",
        "reference_solution": "There are $\\boxed{9}$.",
        "subject": "Number Theory",
        "level": 3,
        "unique_id": "test/number_theory/572.json",
    }


@pytest.mark.parametrize("answer", ["There are nine.", "There are $\\boxed{9$.", "$\\boxed{}$"])
def test_a_solution_without_a_final_answer_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="no final answer"):
        convert({"question": "?", "answer": answer})


def test_the_five_example_rows_are_valid_and_the_prompt_asks_for_a_box() -> None:
    spec = load_benchmark("math500").spec

    tasks = list(materialize(DATA / "example.jsonl", agent="simple", prompt=spec.prompt, required=["expected_answer"]))

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    row = json.loads(tasks[1].row)
    (message,) = row["responses_create_params"]["input"]
    assert row["question"] in message["content"]
    assert "within \\boxed{}." in message["content"]
    assert row["expected_answer"] == "p - q"


def test_the_example_replay_has_four_answers_to_each_row() -> None:
    lines = [json.loads(line) for line in (DATA / "example_replay.jsonl").read_text().splitlines()]

    assert [(line["task_index"], len(line["completions"])) for line in lines] == [(i, 4) for i in range(5)]
