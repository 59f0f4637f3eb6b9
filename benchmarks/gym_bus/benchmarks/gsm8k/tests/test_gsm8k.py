from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.gsm8k.prepare import convert
from gym_bus.benchmarks.gsm8k.recorded import MODELS, replay_file
from gym_bus.benchmarks.spec import load_benchmark
from gym_bus.errors import DataError, UsageError

DATA = Path(__file__).parents[1] / "data"


def an_answer(model: str, text: str) -> dict[str, Any]:
    return {model: {"is_correct": False, "solution": text}}


@pytest.mark.parametrize(
    ("answer", "expected", "solution"),
    [
        ("He runs 3*3=<<3*3=9>>9 sprints\n#### 540", "540", "He runs 3*3=<<3*3=9>>9 sprints"),
        ("It costs a lot.\n#### 2,125", "2125", "It costs a lot."),
        ("A loss.\n#### -10", "-10", "A loss."),
        ("#### is how it ends\n#### 1,450,000 ", "1450000", "#### is how it ends"),
    ],
)
def test_the_number_after_the_marker_is_the_expected_answer(answer: str, expected: str, solution: str) -> None:
    assert convert({"question": "How many?", "answer": answer}) == {
        "question": "How many?",
        "expected_answer": expected,
        "reference_solution": solution,
    }


@pytest.mark.parametrize("answer", ["He runs 540 meters.", "He runs.\n#### "])
def test_an_answer_without_a_number_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="does not end in '#### N'"):
        convert({"question": "How many?", "answer": answer})


def test_the_five_example_rows_are_valid_and_the_prompt_asks_for_a_boxed_number() -> None:
    spec = load_benchmark("gsm8k").spec

    tasks = list(materialize(DATA / "example.jsonl", agent="simple", prompt=spec.prompt, required=["expected_answer"]))

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    row = json.loads(tasks[0].row)
    (message,) = row["responses_create_params"]["input"]
    assert message["role"] == "user"
    assert row["question"] in message["content"]
    assert "within \\boxed{}." in message["content"]
    assert row["expected_answer"] == "18"


def test_the_example_replay_holds_the_answers_of_the_four_models() -> None:
    lines = [json.loads(line) for line in (DATA / "example_replay.jsonl").read_text().splitlines()]

    assert [line["task_index"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(len(line["completions"]) == len(MODELS) for line in lines)
    assert lines[0]["completions"][3].endswith("\nA: 18")


def test_recorded_answers_become_a_replay_file(tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.jsonl"
    rows = [
        {"question": "?", **an_answer("6b_finetuning", f"A: {i}"), **an_answer("175b_finetuning", "B")}
        for i in range(2)
    ]
    recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))

    one = replay_file(recorded, "6b_finetuning", tmp_path / "one.jsonl")
    two = replay_file(recorded, ("175b_finetuning", "6b_finetuning"), tmp_path / "two.jsonl")

    assert (one, two) == (2, 2)
    assert [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()] == [
        {"task_index": 0, "completions": ["A: 0"]},
        {"task_index": 1, "completions": ["A: 1"]},
    ]
    assert json.loads((tmp_path / "two.jsonl").read_text().splitlines()[1])["completions"] == ["B", "A: 1"]


def test_an_unknown_recorded_model_is_answered_with_close_matches(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'6b_finetune': did you mean '6b_finetuning'"):
        replay_file(tmp_path / "recorded.jsonl", "6b_finetune", tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("row", "what"),
    [({"question": "?"}, "no answer of model"), ({"6b_finetuning": {"is_correct": True}}, "missing required field")],
)
def test_a_broken_recorded_answer_is_named_with_file_and_line(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text(json.dumps(row))

    with pytest.raises(DataError, match=rf"recorded.jsonl:1: .*{what}"):
        replay_file(recorded, "6b_finetuning", tmp_path / "out.jsonl")
