from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.aime24.prepare import convert
from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.spec import load_benchmark

DATA = Path(__file__).parents[1] / "data"


def a_published_row(answer: Any) -> dict[str, Any]:
    return {
        "id": 67,
        "problem": "Find the number.",
        "question": "Find the number.",
        "solution": "It is 25.",
        "answer": answer,
        "url": "https://example.org/67",
    }


@pytest.mark.parametrize(("answer", "expected"), [("025", "025"), ("204", "204"), (33, "33")])
def test_the_answer_keeps_its_digits_and_the_solution_is_left_out(answer: Any, expected: str) -> None:
    assert convert(a_published_row(answer)) == {
        "id": 67,
        "question": "Find the number.",
        "expected_answer": expected,
        "url": "https://example.org/67",
    }


@pytest.mark.parametrize("answer", ["", "1000", "-1", "2.5", "m+n"])
def test_what_cannot_be_an_aime_answer_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="an AIME answer is an integer from 0 to 999"):
        convert(a_published_row(answer))


def test_the_five_example_rows_are_valid_and_the_prompt_asks_for_a_box() -> None:
    benchmark = load_benchmark("aime24")

    tasks = list(
        materialize(DATA / "example.jsonl", agent="simple", prompt=benchmark.spec.prompt, required=["expected_answer"])
    )

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    row = json.loads(tasks[0].row)
    (message,) = row["responses_create_params"]["input"]
    assert row["question"] in message["content"]
    assert "answer within \\boxed{}." in " ".join(message["content"].split())
    assert (row["expected_answer"], benchmark.main.num_repeats) == ("204", 32)


def test_the_example_replay_has_four_answers_to_each_row() -> None:
    lines = [json.loads(line) for line in (DATA / "example_replay.jsonl").read_text().splitlines()]

    assert [(line["task_index"], len(line["completions"])) for line in lines] == [(i, 4) for i in range(5)]
