"""The example_multi_step environment: the last call that hands in values decides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gym_bus.errors import TaskError, UsageError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task, Verifier
from gym_bus.verifiers.example_multi_step import ExampleMultiStep


def call(arguments: Any, name: str = "extract_synonym_values") -> dict[str, Any]:
    return {"type": "function_call", "name": name, "arguments": arguments}


def hands_in(values: Any) -> dict[str, Any]:
    return call(json.dumps({"synonym_values": values}))


def judged(*output: Any, expected: Any = (489, 504)) -> Verdict:
    row = {"expected_synonym_values": list(expected) if isinstance(expected, tuple) else expected}
    return ExampleMultiStep().verify(Task(row=row, response={"output": list(output)}))


def test_it_is_an_inline_verifier() -> None:
    assert isinstance(ExampleMultiStep(), Verifier)
    assert (ExampleMultiStep.placement, ExampleMultiStep.required) == (Placement.INLINE, ("expected_synonym_values",))


def test_the_expected_values_are_right() -> None:
    verdict = judged(call("{}", "get_synonym_value"), hands_in([489, 504]), {"type": "function_call_output"})

    assert verdict.reward == 1.0
    assert verdict.extra == {"parsed_synonym_values": [489, 504], "accuracy": True}


@pytest.mark.parametrize("values", [[504, 489], [489], [489, 504, 1], ["489", "504"], [], None, "489,504", {"a": 489}])
def test_other_values_are_wrong(values: Any) -> None:
    verdict = judged(hands_in(values))

    assert (verdict.reward, verdict.extra) == (0.0, {"parsed_synonym_values": values, "accuracy": False})


def test_the_last_call_decides() -> None:
    right, wrong = hands_in([489, 504]), hands_in([1])

    assert (judged(wrong, right).reward, judged(right, wrong).reward) == (1.0, 0.0)


@pytest.mark.parametrize(
    "output",
    [
        [],
        [None, "x"],
        [call("{}", "get_synonym_value")],
        [{**hands_in([489, 504]), "type": "message"}],
        [{"type": "function_call"}],
    ],
)
def test_without_a_call_no_values_are_handed_in(output: list[Any]) -> None:
    assert judged(*output).extra == {"parsed_synonym_values": [], "accuracy": False}
    assert judged(*output, expected=[]).reward == 1.0


@pytest.mark.parametrize(
    "arguments",
    ["", "{", "no json", "[489, 504]", "null", "{}", '{"values": [489, 504]}', '{"synonym_values": [1e999]}', None, 5],
)
def test_arguments_that_hold_no_values_are_a_wrong_answer(arguments: Any) -> None:
    verdict = judged(call(arguments))

    assert (verdict.reward, verdict.extra["parsed_synonym_values"]) == (0.0, [])


@pytest.mark.parametrize("expected", [None, "489", {"a": 489}, 489])
def test_a_row_whose_expected_values_are_no_list_is_refused(expected: Any) -> None:
    with pytest.raises(TaskError, match="expected_synonym_values must be a list"):
        judged(hands_in([489]), expected=expected)


def test_there_are_no_options() -> None:
    with pytest.raises(UsageError, match="verifier 'example_multi_step': unknown option 'x': known: none"):
        ExampleMultiStep(x=1)


@pytest.mark.parametrize("arguments", ['{"a":' + "[" * 100_000, "\ud800"])
def test_arguments_that_no_decoder_takes_are_a_wrong_answer(arguments: str) -> None:
    call = {"type": "function_call", "name": "extract_synonym_values", "arguments": arguments}
    task = Task({"expected_synonym_values": [1]}, {"output": [call]})

    assert ExampleMultiStep().verify(task).reward == 0.0
