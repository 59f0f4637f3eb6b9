"""Reading JSONL with line numbers, and joining rollouts with what they were made from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gym_bus.errors import DataError
from gym_bus.results.files import JobFiles
from gym_bus.results.reader import decode_line, decode_lines, iter_jsonl, iter_lines, join_rollouts, mended


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


def test_a_compressed_file_is_to_be_decompressed_first(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))

    with pytest.raises(DataError, match=r"data\.jsonl\.gz: is compressed; decompress it first"):
        list(iter_jsonl(path))


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


@pytest.mark.parametrize("stored", ["forty-two", None])
def test_the_row_is_the_inputs_one_whatever_the_verifiers_reply_had_under_its_names(
    tmp_path: Path, stored: str | None
) -> None:
    inputs = write(tmp_path / "in.jsonl", materialized(0, 0, expected_answer="42"))
    rollouts = write(tmp_path / "out.jsonl", rollout(0, 0, expected_answer=stored))

    (joined,) = join_rollouts(inputs, rollouts)

    assert json.loads(joined.row)["expected_answer"] == "42"


def test_only_the_wanted_lines_are_joined_and_tasks_are_still_counted_by_all(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in.jsonl", {"q": "a"}, {"q": "b"}, {"q": "c"})
    rollouts = write(tmp_path / "out.jsonl", {}, {"response": {"output": []}}, {"reward": 1.0})

    (joined,) = join_rollouts(inputs, rollouts, only={2})

    assert (joined.number, joined.task_index, json.loads(joined.row)) == (2, 1, {"q": "b"})


def test_rollouts_alone_carry_their_own_rows(tmp_path: Path) -> None:
    rollouts = write(tmp_path / "out.jsonl", rollout(4, 2, expected_answer="42", _ng_attempt_index=1, ng_trajectory={}))

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
        ([materialized(0, 0)], [rollout(0, 0, response={"output": None})], r"out.jsonl:1: its response .*`output`"),
        ([materialized(0, 0)], [rollout(0, 0, response=[])], r"out.jsonl:1: its response is no Responses object"),
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


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r'{"a": "\ud83d"}', "\ufffd"),
        (r'{"a": "x\udE00\uD83dy"}', "x\ufffd\ufffdy"),
        (r'{"a": "\ud83d\ud83d\ude00"}', "\ufffd\U0001f600"),
        (r'{"\udc00": 1, "a": 2}', 2),
        (r'{"a": "\\ud83d \ud83d"}', r"\ud83d" + " \ufffd"),
        ('{"a": NaN}', None),
        ('{"a": [-Infinity, Infinity, "NaN -Infinity \\" NaN"]}', [None, None, 'NaN -Infinity " NaN']),
        ('{"a": 123456789012345678901234567890}', 123456789012345678901234567890),
    ],
)
def test_what_pythons_json_writes_and_json_has_not_is_mended(tmp_path: Path, written: str, read: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"a": 0}}\n{written}\n')

    (_, first), (line, second) = decode_lines(path, msgspec.json.Decoder(dict[str, Any]), unended_ok=False)

    assert (first["a"], second["a"]) == (0, read)
    assert json.loads(line.data)["a"] == read
    assert decode_line(msgspec.json.Decoder(dict[str, Any]), written.encode(), path, 2)["a"] == read


@pytest.mark.parametrize("line", ["{}", r'{"a": "\ud83d\ude00 \\ud83d \n\" NaN", "NaN": -1e5, "Infinity": "\u00e9"}'])
def test_json_has_nothing_to_mend(line: str) -> None:
    assert mended(line.encode()) == line.encode()


@pytest.mark.parametrize("line", ['{"a": nan}', '{"a": NaN', '{"a": "\\ud83"}', "{'a': NaN}"])
def test_what_no_json_module_reads_stays_refused(line: str) -> None:
    with pytest.raises(DataError, match="x:1: not valid JSON"):
        decode_line(msgspec.json.Decoder(dict[str, Any]), line.encode(), Path("x"), 1)


def test_half_a_character_in_a_rollout_or_its_input_does_not_stop_the_join(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in.jsonl", materialized(0, 0, question="why \ud83d?", score=float("nan")))
    message = {"type": "message", "content": [{"type": "output_text", "text": "so \udc00 \\boxed{A}"}]}
    rollouts = write(tmp_path / "out.jsonl", rollout(0, 0, response={"output": [message]}, spread=float("inf")))

    (joined,) = join_rollouts(inputs, rollouts)

    row = json.loads(joined.row)
    assert (row["question"], row["score"], row["spread"]) == ("why \ufffd?", None, None)
    assert json.loads(joined.response)["output"][0]["content"][0]["text"] == "so \ufffd \\boxed{A}"
