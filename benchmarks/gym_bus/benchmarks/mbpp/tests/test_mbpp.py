from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.mbpp.prepare import convert
from gym_bus.benchmarks.spec import load_benchmark
from gym_bus.errors import DataError

DATA = Path(__file__).parents[1] / "data"


def a_published_row(task_id: int = 14, setup: str = "") -> dict[str, Any]:
    return {
        "text": "Write a function to double a number.",
        "code": "def double(x):\r\n  return 2 * x",
        "task_id": task_id,
        "test_setup_code": setup,
        "test_list": ["assert double(1) == 2", "assert double(2) == 4"],
        "challenge_test_list": [],
    }


def test_the_published_keys_are_kept_and_the_tests_are_joined_for_the_prompt() -> None:
    assert convert(a_published_row()) == {
        **a_published_row(),
        "tests_text": "assert double(1) == 2\nassert double(2) == 4",
    }


PLUS = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nWrite a function\nto double.\nassert double(1) == 2\nassert double(2) == 4\n"""\n',
    "entry_point": "double",
    "canonical_solution": "\ndef double(x):\n    return 2 * x\n",
    "base_input": [[1]],
    "plus_input": [[2]],
    "atol": 0,
}


def test_of_a_row_of_evalplus_the_sentence_and_the_asserts_are_told_apart_for_the_prompt(tmp_path: Path) -> None:
    row = convert({**PLUS, "contract": "assert x", "assertion": "assert double(1) == 2"})

    assert row == {
        **PLUS,
        "text": "Write a function\nto double.",
        "code": PLUS["canonical_solution"],
        "tests_text": "assert double(1) == 2\nassert double(2) == 4",
    }
    file = tmp_path / "plus.jsonl"
    file.write_text(json.dumps(row))
    prompt = load_benchmark("mbpp").spec.prompt
    with pytest.raises(DataError, match=r"the verifier needs the key 'test_list\|plus_tests'"):
        list(materialize(file, agent="simple", prompt=prompt, required=["test_list|plus_tests"]))
    file.write_text(json.dumps({**row, "plus_tests": {}}))
    (task,) = materialize(file, agent="simple", prompt=prompt, required=["test_list|plus_tests"])
    (message,) = json.loads(task.row)["responses_create_params"]["input"]
    assert "here is your task: Write a function\nto double.\n" in message["content"]
    assert "```python\nassert double(1) == 2\n" in message["content"]


def test_the_setup_of_the_tests_is_shown_before_them() -> None:
    row = convert(a_published_row(setup="root = 1"))

    assert row is not None
    assert row["tests_text"] == "root = 1\nassert double(1) == 2\nassert double(2) == 4"


@pytest.mark.parametrize(("task_id", "kept"), [(10, False), (11, True), (510, True), (511, False)])
def test_only_the_test_split_is_kept(task_id: int, kept: bool) -> None:
    assert (convert(a_published_row(task_id)) is not None) == kept


def test_the_five_example_rows_are_valid_and_the_prompt_shows_the_tests() -> None:
    spec = load_benchmark("mbpp").spec
    required = ["task_id", "text", "code", "test_setup_code", "test_list", "challenge_test_list"]

    tasks = list(materialize(DATA / "example.jsonl", agent="simple", prompt=spec.prompt, required=required))

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    row = json.loads(tasks[3].row)
    (message,) = row["responses_create_params"]["input"]
    assert row["text"] in message["content"]
    assert "```python\nassert find_Volume(10,8,6) == 240\nassert" in message["content"]
    assert row["code"] not in message["content"]


def test_published_rows_are_run_without_being_prepared(tmp_path: Path) -> None:
    spec = load_benchmark("mbpp").spec
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(a_published_row(task_id)) + "\n" for task_id in (10, 11, 12)))

    tasks = list(materialize(path, agent="simple", prompt=spec.prompt, required=["test_list"], convert=convert))

    assert [json.loads(task.row)["task_id"] for task in tasks] == [11, 12]


def test_the_example_replay_has_four_answers_to_each_row() -> None:
    lines = [json.loads(line) for line in (DATA / "example_replay.jsonl").read_text().splitlines()]

    assert [(line["task_index"], len(line["completions"])) for line in lines] == [(i, 4) for i in range(5)]
    assert all("```python\n" in line["completions"][0] for line in lines)
