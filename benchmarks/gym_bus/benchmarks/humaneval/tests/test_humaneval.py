from __future__ import annotations

import json
from pathlib import Path

import pytest

from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.humaneval.prepare import convert
from gym_bus.benchmarks.spec import load_benchmark

DATA = Path(__file__).parents[1] / "data"
KEYS = ["task_id", "prompt", "entry_point", "canonical_solution", "test"]


def test_the_published_keys_are_kept_as_they_are() -> None:
    published = {key: f"some {key}\n" for key in KEYS}

    assert convert({**published, "more": 1}) == published


def test_of_a_row_of_evalplus_the_inputs_are_kept_and_the_contract_is_not() -> None:
    kept = {key: f"some {key}" for key in KEYS[:-1]} | {"base_input": [[1]], "plus_input": [[2]], "atol": 0}

    assert convert({**kept, "contract": "assert x", "test": "a check"}) == kept


def test_a_row_without_one_of_them_is_refused() -> None:
    with pytest.raises(KeyError, match="test"):
        convert(dict.fromkeys(KEYS[:-1], ""))


def test_the_five_example_rows_are_valid_and_the_prompt_shows_the_function() -> None:
    spec = load_benchmark("humaneval").spec

    tasks = list(materialize(DATA / "example.jsonl", agent="simple", prompt=spec.prompt, required=KEYS))

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    row = json.loads(tasks[2].row)
    (message,) = row["responses_create_params"]["input"]
    assert f"```python\n{row['prompt']}" in message["content"]
    assert message["content"].endswith("```")
    assert row["test"] not in message["content"]
    assert row["entry_point"] == "truncate_number"


def test_the_example_replay_has_four_answers_to_each_row() -> None:
    lines = [json.loads(line) for line in (DATA / "example_replay.jsonl").read_text().splitlines()]

    assert [(line["task_index"], len(line["completions"])) for line in lines] == [(i, 4) for i in range(5)]
    assert all("```python\n" in line["completions"][0] for line in lines)
