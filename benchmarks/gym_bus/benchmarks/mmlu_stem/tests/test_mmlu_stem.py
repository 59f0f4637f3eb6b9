from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.mmlu_stem.prepare import convert
from gym_bus.benchmarks.spec import load_benchmark

DATA = Path(__file__).parents[1] / "data"


def a_published_row(answer: Any = 2) -> dict[str, Any]:
    return {"question": "Which?", "type": "astronomy", "choices": ["one", "two", "{three}", "four"], "answer": answer}


def test_the_index_of_the_choice_becomes_its_letter() -> None:
    assert convert(a_published_row()) == {
        "question": "Which?",
        "options": [{"A": "one"}, {"B": "two"}, {"C": "{three}"}, {"D": "four"}],
        "options_text": "A. one\nB. two\nC. {three}\nD. four",
        "expected_answer": "C",
        "subject": "astronomy",
    }


@pytest.mark.parametrize("answer", [4, -1, "C", None])
def test_an_answer_that_is_no_index_of_a_choice_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="is not the index of one of 4 choices"):
        convert(a_published_row(answer))


def test_the_five_example_rows_are_valid_and_the_prompt_shows_the_options() -> None:
    spec = load_benchmark("mmlu_stem").spec
    required = ["options", "expected_answer"]

    tasks = list(materialize(DATA / "example.jsonl", agent="simple", prompt=spec.prompt, required=required))

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    row = json.loads(tasks[2].row)
    (message,) = row["responses_create_params"]["input"]
    assert row["question"] in message["content"]
    assert "A. amnion\nB. chorion\nC. allantois\nD. yolk sac" in message["content"]
    assert "\\boxed{}" in message["content"]
    assert (row["expected_answer"], row["subject"]) == ("A", "college_biology")


def test_the_example_replay_has_four_answers_to_each_row() -> None:
    lines = [json.loads(line) for line in (DATA / "example_replay.jsonl").read_text().splitlines()]

    assert [(line["task_index"], len(line["completions"])) for line in lines] == [(i, 4) for i in range(5)]
