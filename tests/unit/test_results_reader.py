"""Reading JSONL with line numbers, and joining rollouts with what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gym_bus.errors import DataError
from gym_bus.results.files import JobFiles
from gym_bus.results.reader import decode_line, iter_jsonl, iter_lines, join_rollouts


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_come_with_their_numbers_without_blanks_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n   \n {"a": 2} \n{"a": 3}')

    assert list(iter_jsonl(path)) == [(1, b'{"a": 1}'), (4, b'{"a": 2}'), (5, b'{"a": 3}')]
    assert [(line.offset, line.ended) for line in iter_lines(path)] == [(0, True), (18, True), (29, False)]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()

    assert list(iter_jsonl(tmp_path / "empty.jsonl")) == []


@pytest.mark.parametrize("name", ["missing.jsonl", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        list(iter_jsonl(tmp_path / name))


@pytest.mark.parametrize(
    ("data", "complaint"), [(b"{", "not valid JSON"), (b'"a"', "expected kind"), (b'{"\xff": 1}', "not valid JSON")]
)
def test_a_line_that_cannot_be_decoded_is_named(data: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=f"x.jsonl:7: .*{complaint}"):
        decode_line(msgspec.json.Decoder(dict[str, int]), data, Path("x.jsonl"), 7)


def rollout(task: int, index: int, **fields: Any) -> dict[str, Any]:
    """A line of NeMo Gym's rollouts file."""
    return {
        "_ng_task_index": task,
        "_ng_rollout_index": index,
        "responses_create_params": {"input": "?"},
        "response": {"id": f"{task}-{index}", "output": []},
        "reward": 0.0,
        "reward_components": {"a": 1},
        **fields,
    }


def materialized(task: int, index: int, **fields: Any) -> dict[str, Any]:
    return {
        "_ng_task_index": task,
        "_ng_rollout_index": index,
        "responses_create_params": {"input": "?"},
        "agent_ref": {"name": "simple"},
        **fields,
    }


def test_fields_that_the_rollout_lost_come_from_its_input(tmp_path: Path) -> None:
    inputs = write(
        tmp_path / "in.jsonl",
        materialized(0, 0, verifier_metadata={"n": 0}),
        materialized(0, 1, verifier_metadata={"n": 1}),
        materialized(1, 0, verifier_metadata={"n": 2}),
    )
    rollouts = write(tmp_path / "out.jsonl", rollout(1, 0, note="kept"), rollout(0, 1, gym_bus={"job": "j"}))

    first, second = join_rollouts(inputs, rollouts)

    assert (first.order, first.number, first.task_index, first.rollout_index) == (0, 1, 1, 0)
    assert json.loads(first.row) == {
        "responses_create_params": {"input": "?"},
        "note": "kept",
        "agent_ref": {"name": "simple"},
        "verifier_metadata": {"n": 2},
    }
    assert json.loads(first.response) == {"id": "1-0", "output": []}
    assert json.loads(second.row)["verifier_metadata"] == {"n": 1}
    assert "gym_bus" not in json.loads(second.row)


def test_a_field_that_the_rollout_has_is_not_taken_from_the_inputs(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in.jsonl", materialized(0, 0, expected_answer="42"))
    rollouts = write(tmp_path / "out.jsonl", rollout(0, 0, expected_answer="forty-two"))

    (joined,) = join_rollouts(inputs, rollouts)

    assert json.loads(joined.row)["expected_answer"] == "forty-two"


def test_a_field_that_the_rollout_has_as_null_is_taken_from_the_inputs(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in.jsonl", materialized(0, 0, expected_answer="42"))
    rollouts = write(tmp_path / "out.jsonl", rollout(0, 0, expected_answer=None))

    (joined,) = join_rollouts(inputs, rollouts)

    assert json.loads(joined.row)["expected_answer"] == "42"


def test_rollouts_alone_carry_their_own_rows(tmp_path: Path) -> None:
    rollouts = write(tmp_path / "out.jsonl", rollout(4, 2, expected_answer="42", _ng_attempt_index=1))

    (joined,) = join_rollouts(None, rollouts)

    assert (joined.task_index, joined.rollout_index) == (4, 2)
    assert json.loads(joined.row) == {"responses_create_params": {"input": "?"}, "expected_answer": "42"}


def test_rows_without_indices_are_joined_by_their_order(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in.jsonl", {"q": "a"}, {"q": "b"})
    rollouts = write(tmp_path / "out.jsonl", {"response": {"output": []}}, {"response": {"output": []}})

    joined = list(join_rollouts(inputs, rollouts))

    assert [(j.task_index, j.rollout_index) for j in joined] == [(0, 0), (1, 0)]
    assert [json.loads(j.row) for j in joined] == [{"q": "a"}, {"q": "b"}]


def test_inputs_with_byte_order_mark_and_leading_blanks_are_found_again(tmp_path: Path) -> None:
    inputs = tmp_path / "in.jsonl"
    inputs.write_bytes(b'\xef\xbb\xbf{"q": "a"}\n\n   {"q": "b"}')
    rollouts = write(tmp_path / "out.jsonl", {"response": {"output": []}}, {"response": {"output": []}})

    assert [json.loads(j.row) for j in join_rollouts(inputs, rollouts)] == [{"q": "a"}, {"q": "b"}]


@pytest.mark.parametrize(
    ("inputs", "rollouts", "complaint"),
    [
        (
            [materialized(0, 0)],
            [rollout(0, 0), rollout(0, 1)],
            r"out.jsonl:2: task 0, rollout 1 has no row in .*in.jsonl",
        ),
        ([materialized(0, 0), materialized(0, 0)], [rollout(0, 0)], r"in.jsonl:2: a second row for task 0, rollout 0"),
        ([materialized(0, 0)], [rollout(0, 0, response=None)], r"out.jsonl:1: no response"),
        ([materialized(0, 0)], [{"_ng_task_index": 0}], r"out.jsonl:1: no response"),
        ([materialized("x", 0)], [rollout(0, 0)], r"in.jsonl:1: .*_ng_task_index"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_joined_is_named(
    tmp_path: Path, inputs: list[dict[str, Any]], rollouts: list[dict[str, Any]], complaint: str
) -> None:
    paths = write(tmp_path / "in.jsonl", *inputs), write(tmp_path / "out.jsonl", *rollouts)

    with pytest.raises(DataError, match=complaint):
        list(join_rollouts(*paths))


def test_inputs_that_are_missing_are_named(tmp_path: Path) -> None:
    rollouts = write(tmp_path / "out.jsonl", rollout(0, 0))

    with pytest.raises(DataError, match=r"in\.jsonl: cannot be read"):
        list(join_rollouts(tmp_path / "in.jsonl", rollouts))


def test_the_files_of_a_job_are_named_after_its_rollouts(tmp_path: Path) -> None:
    files = JobFiles.beside(tmp_path / "run7.jsonl")

    assert files.rollouts == tmp_path / "run7.jsonl"
    assert files.failures.name == "run7_failures.jsonl"
    assert files.inputs.name == "run7_materialized_inputs.jsonl"
    assert files.profile.name == "run7_reward_profiling.jsonl"
    assert files.aggregate.name == "run7_aggregate_metrics.json"
    assert JobFiles.beside(tmp_path / "rollouts.jsonl") == JobFiles(tmp_path)


def test_rows_of_a_data_set_stand_for_every_rollout_of_their_task(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in.jsonl", {"q": "a"}, {"q": "b"})
    rollouts = write(tmp_path / "out.jsonl", rollout(1, 0), rollout(1, 1), rollout(0, 3))

    assert [json.loads(j.row)["q"] for j in join_rollouts(inputs, rollouts)] == ["b", "b", "a"]
