"""What EvalPlus accepts beside the canonical output, and what it makes of MBPP's inputs; without a sandbox."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from gym_bus.errors import TaskError
from gym_bus.verifiers import evalplus_data, wire_values
from gym_bus.verifiers.code_text import closed_block
from gym_bus.verifiers.evalplus_oracles import Oracle, RowError


def frame(value: Any) -> Any:
    return wire_values.encode(value, lambda _: [wire_values.HANDLE, 0, True])


def accepts(task: str, given: tuple[Any, ...], output: Any, expected: Any, atol: float = 0.0) -> bool:
    dataset, _, entry_point = task.partition("/")
    return Oracle(dataset, entry_point, atol).accepts(frame(given), frame(output), frame(expected))


@pytest.mark.parametrize(
    ("output", "expected", "atol", "accepted"),
    [
        (1, 1, 0, True),
        (1, True, 0, True),
        (1.0, 1, 0, True),
        ("1", 1, 0, False),
        ([1, 2], (1, 2), 0, False),
        ({1: [2]}, {1: [2]}, 0, True),
        ({2, 1}, {1, 2}, 0, True),
        (None, None, 0, True),
        (None, 0.0, 0, False),
        (1.0000005, 1.0, 0, True),
        (1.00001, 1.0, 0, False),
        (1.00001, 1.0, 1e-4, True),
        ([1.0, 2.0000001], [1.0, 2.0], 0, True),
        ([1.0, 2.1], [1.0, 2.0], 0, False),
        ([1.0], [1.0, 2.0], 0, False),
        ((1.0, 2.0000001), [1.0, 2.0], 0, False),
        ([[1.0, 2.0000001]], [[1.0, 2.0]], 0, False),  # nested floats have no tolerance of their own
        ([[1.0, 2.0000001]], [[1.0, 2.0]], 1e-6, True),
        ([[1.0], [2.0]], [[1.0, 2.0]], 1e-6, False),
        ([[1.0], 2.0, 3.0], [1.0, [2.0], 3.0], 1e-6, False),
        ([1.0, [2.0], 3.0], [[1.0], 2.0, 3.0], 1e-6, False),
        ([(1.0, 2.0)], [[1.0, 2.0]], 1e-6, True),  # as arrays, inner sequences are alike
        (["a", 1.0000001], ["a", 1.0], 1e-6, False),
        ({"a": 1.0000001}, {"a": 1.0}, 1e-6, False),
        (math.inf, math.inf, 0, True),
        (1e308, math.inf, 0, False),
        (math.nan, 1.0, 0, False),
        (1j, 1.0000001j, 1e-6, True),
        (2**70, 1.0, 0, False),
        (10**400, 1.0, 0, False),
        (object(), 1.0, 0, False),
        ([], 0.5, 0, False),
    ],
)
def test_outputs_are_compared_as_python_does_and_floats_with_a_tolerance(
    output: Any, expected: Any, atol: float, accepted: bool
) -> None:
    assert accepts("humaneval/f", (), output, expected, atol) is accepted
    assert accepts("mbpp/f", (), output, expected, atol) is accepted


@pytest.mark.parametrize(
    ("task", "given", "output", "expected", "atol", "accepted"),
    [
        ("humaneval/find_zero", ([-6, 11, -6, 1],), 3.0, 1.0, 1e-4, True),
        ("humaneval/find_zero", ([-6, 11, -6, 1],), 2.5, 1.0, 1e-4, False),
        ("humaneval/find_zero", ([1, 1],), "-1", -1.0, 1e-4, False),
        ("humaneval/find_zero", ([1, 1],), [-1.0], -1.0, 1e-4, False),
        ("humaneval/find_zero", ([1, 1],), math.nan, -1.0, 1e-4, False),
        ("humaneval/find_zero", ([1, 1, 1],), 1e300, -1.0, 1e-4, False),
        ("mbpp/find_zero", ([-6, 11, -6, 1],), 3.0, 1.0, 1e-4, False),
        ("mbpp/are_equivalent", (1, 2), "whatever", True, 0, True),
        ("humaneval/are_equivalent", (1, 2), "whatever", True, 0, False),
        ("mbpp/sum_div", (8,), 0, 7, 0, True),
        ("mbpp/sum_div", (8,), 7, 7, 0, True),
        ("mbpp/sum_div", (8,), 8, 7, 0, False),
        ("mbpp/sum_div", (8,), [], 7, 0, False),
        ("mbpp/surface_Area", (3, 4), 33, 33, 0, True),
        ("mbpp/surface_Area", (3, 4), 35, 33, 0, True),
        ("mbpp/surface_Area", (3, 4), 34, 33, 0, False),
        ("mbpp/digit_distance_nums", (1, 23), 4, 9, 0, True),
        ("mbpp/digit_distance_nums", (1, 23), 9, 9, 0, True),
        ("mbpp/digit_distance_nums", (1, 23), 5, 9, 0, False),
        ("mbpp/Diff", (), [3, 1, 1], [1, 3], 0, True),
        ("mbpp/Diff", (), {1, 3}, [1, 3], 0, True),
        ("mbpp/Diff", (), [1], [1, 3], 0, False),
        ("mbpp/Diff", (), [1, 3, 4], [1, 3], 0, False),
        ("mbpp/Diff", (), [1, [3]], [1, 3], 0, False),
        ("mbpp/Diff", (), [[1], [3]], [1, 3, 5, 7], 0, False),
        ("mbpp/Diff", (), [(1, 2)], [(1, 2)], 0, True),
        ("mbpp/Diff", (), {1: 2}, [1], 0, False),
        ("mbpp/Diff", (), 7, [7], 0, False),
        ("humaneval/Diff", (), [3, 1], [1, 3], 0, False),
        ("mbpp/check_str", (), object(), True, 0, True),
        ("mbpp/check_str", (), True, True, 0, True),
        ("mbpp/check_str", (), None, False, 0, True),
        ("mbpp/check_str", (), False, True, 0, False),
        ("mbpp/check_str", (), None, True, 0, False),
    ],
)
def test_tasks_with_more_than_one_right_output_are_judged_in_their_own_way(
    task: str, given: tuple[Any, ...], output: Any, expected: Any, atol: float, accepted: bool
) -> None:
    assert accepts(task, given, output, expected, atol) is accepted


COLLIDING = [i * (2**61 - 1) for i in range(1, 100_000)]


@pytest.mark.parametrize("output", [["s", COLLIDING], ["l", COLLIDING], ["l", [["s", COLLIDING]]]])
@pytest.mark.parametrize("task", ["mbpp/Diff", "mbpp/f", "humaneval/f"])
def test_an_output_made_to_collide_is_refused_at_once(task: str, output: Any) -> None:
    dataset, _, entry_point = task.partition("/")
    started = time.process_time()

    assert not Oracle(dataset, entry_point, 1e-6).accepts(["t", []], output, ["l", [1, 2]])

    assert time.process_time() - started < 10  # the rest would take minutes


@pytest.mark.parametrize("output", [[], ["l"], [["l"], 1], ["l", 3], {}, ["?", 1], ["f", "x"], ["d", [1]]])
@pytest.mark.parametrize("task", ["mbpp/Diff", "mbpp/f", "mbpp/sum_div", "humaneval/find_zero"])
def test_what_is_no_value_is_wrong(task: str, output: Any) -> None:
    dataset, _, entry_point = task.partition("/")

    assert not Oracle(dataset, entry_point, 1e-6).accepts(["t", [["l", [1]]]], output, ["l", [1]])


def test_what_a_row_expects_must_be_data() -> None:
    with pytest.raises(RowError):
        Oracle("humaneval", "f", 0).accepts(["t", []], 1, ["h", 0, True])
    with pytest.raises(RowError):
        Oracle("humaneval", "find_zero", 0).accepts(["?", []], 1, 1)


@pytest.mark.parametrize(
    ("number", "given", "arguments"),
    [
        (1, [[1], 2], ([1], 2)),
        (2, [[1], [2]], ((1,), (2,))),
        (63, [[[1, 2], [3]]], ([(1, 2), (3,)],)),
        (75, [[[1], [2]], 3], ([(1,), (2,)], 3)),
        (106, [[1], [2]], ([1], (2,))),
        (115, [[[1, 2], [], {}]], ([{1, 2}, {}, {}],)),
        (124, ["1.5", "2j"], (1.5, 2j)),
        (250, [[1], 2], ((1,), 2)),
        (252, ["1+2j"], (1 + 2j,)),
        (259, [[[1], [2]], [[3]]], (((1,), (2,)), ((3,),))),
        (278, [[1, [2]]], ((1, (2,)),)),
        (307, [[1], 2, 3], ((1,), 2, 3)),
        (580, [[1, [2, [3]]]], ((1, (2, (3,))),)),
        (722, [{"a": [1.5, 2]}, 3.0, 4], ({"a": (1.5, 2)}, 3.0, 4)),
    ],
)
def test_mbpp_gets_the_tuples_sets_and_complex_numbers_that_json_cannot_write(
    number: int, given: list[Any], arguments: tuple[Any, ...]
) -> None:
    made = evalplus_data.arguments_of(f"Mbpp/{number}", given)

    assert made == list(arguments)
    assert repr(made) == repr(list(arguments))


@pytest.mark.parametrize(("task_id", "given"), [("Mbpp/2", [3]), ("Mbpp/106", [1]), ("Mbpp/x", []), ("Mbpp/722", [[]])])
def test_an_input_of_another_form_is_told_with_its_task(task_id: str, given: list[Any]) -> None:
    with pytest.raises(TaskError, match=f"{task_id}: an input is not as published"):
        evalplus_data.arguments_of(task_id, given)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```\n```python\r\n  b\r\n```", "b"),
        ("```python\na\n```\nand\n```\nb\n```", "a"),
        ("so ```x```", None),
        ("```\na\n```", None),  # behind the last fence is nothing
        ("```python\na", None),
        ("```python\n```", None),
        ("a", None),
        ("", None),
    ],
)
def test_the_closed_block_is_that_of_the_reference(text: str, code: str | None) -> None:
    assert closed_block(text) == code
