from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gym_bus.benchmarks.dataset import materialize
from gym_bus.benchmarks.spec import load_benchmark

DATA = Path(__file__).parents[1] / "data"


def lines_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def values_handed_in(steps: list[dict[str, Any]]) -> list[int] | None:
    """Those of the last call that hands in values; None where there is none."""
    calls = [item for step in steps for item in step["output"] if item["type"] == "function_call"]
    handed_in = [json.loads(call["arguments"]) for call in calls if call["name"] == "extract_synonym_values"]
    values: list[int] | None = handed_in[-1]["synonym_values"] if handed_in else None
    return values


def test_the_five_example_rows_are_valid_and_bring_their_tools() -> None:
    spec = load_benchmark("example_multi_step").spec
    required = ["expected_synonym_values"]

    tasks = list(materialize(DATA / "example.jsonl", agent=spec.agent.name, prompt=spec.prompt, required=required))

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    params = json.loads(tasks[0].row)["responses_create_params"]
    assert [tool["name"] for tool in params["tools"]] == ["get_synonym_value", "extract_synonym_values"]
    assert [item["role"] for item in params["input"]] == ["system", "user"]
    assert spec.agent.options["toolbox"] == "example_multi_step"


def test_the_expected_values_are_those_of_the_listed_synonyms_in_their_order() -> None:
    for row in lines_of("example.jsonl"):
        instructions = row["responses_create_params"]["input"][0]["content"]
        places = [instructions.index(f"'{synonym}' is a synonym of") for synonym in row["expected_synonyms"]]

        assert places == sorted(places)
        assert row["expected_synonym_values"] == [sum(map(ord, synonym)) for synonym in row["expected_synonyms"]]
        assert row["minefield_label_value"] == sum(map(ord, row["minefield_label"]))


def test_the_example_replay_has_right_and_wrong_samples_of_several_steps() -> None:
    expected = [row["expected_synonym_values"] for row in lines_of("example.jsonl")]

    right = [
        [values_handed_in(steps) == expected[line["task_index"]] for steps in line["responses"]]
        for line in lines_of("example_replay.jsonl")
    ]

    assert right == [[True, False, True, False]] * 5


def test_every_recorded_sample_ends_in_words_and_its_steps_are_whole_responses() -> None:
    for line in lines_of("example_replay.jsonl"):
        for steps in line["responses"]:
            assert [step["object"] for step in steps] == ["response"] * len(steps)
            assert [item["type"] for item in steps[-1]["output"]] == ["message"]
            assert all(step["usage"]["total_tokens"] > 0 for step in steps)
