from __future__ import annotations

import gc
import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gym_bus.benchmarks import dataset
from gym_bus.benchmarks.dataset import (
    Converter,
    TaskRow,
    dataset_digest,
    expand,
    load_rows,
    materialize,
    materialized_line,
    with_seed,
)
from gym_bus.benchmarks.prompt import Prompt
from gym_bus.errors import DataError

PROMPT = Prompt(user="Solve: {question}")


def a_file(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def a_row(text: str = "1+1?", **fields: Any) -> dict[str, Any]:
    return {"question": text, "expected_answer": "2", **fields}


def tasks(path: Path, **options: Any) -> list[TaskRow]:
    return list(materialize(path, **{"agent": "simple", "prompt": PROMPT, **options}))


def decoded(task: TaskRow) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(task.row)
    return row


# reading


def test_rows_come_with_their_line_numbers_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = a_file(tmp_path, "\ufeff" + json.dumps({"a": 1}), "", "  ", '{ "b" : [1,  2] }')

    rows = [(line, {key: bytes(value) for key, value in row.items()}) for line, row in load_rows(path)]

    assert rows == [(1, {"a": b"1"}), (4, {"b": b"[1,2]"})]


def test_a_gzip_file_is_read_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a":1}\n'))

    assert [line for line, _ in load_rows(path)] == [1]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"a": 1', "not valid JSON"),
        ('{"a": "x}', "not valid JSON"),
        ('{"a": {"b": tru}}', "not valid JSON"),
        ('{"a": NaN}', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('"text"', "expected a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' + "9" * 5000 + "}", "not valid JSON: Integer value out of range"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_file_and_line(tmp_path: Path, line: str, what: str) -> None:
    path = a_file(tmp_path, a_row(), line)

    with pytest.raises(DataError, match=rf"rows.jsonl:2: {what}"):
        list(load_rows(path))


def test_text_that_is_not_utf8_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":"\xff"}\n')

    with pytest.raises(DataError, match=r"rows.jsonl:1: not valid JSON"):
        list(load_rows(path))


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_LINE_BYTES", 1000)
    path = a_file(tmp_path, a_row(), "x" * 1001)

    with pytest.raises(DataError, match=r"rows.jsonl:2: longer than"):
        list(load_rows(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        list(load_rows(tmp_path / "gone.jsonl"))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: b"no gzip", lambda data: data[:20] + b"\0" * 40]
)
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"a":1}\n' * 50)))

    with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: cannot be read"):
        list(load_rows(path))
    with pytest.raises(DataError, match=r"rows.jsonl.gz: cannot be read"):
        dataset_digest(path)


def test_a_digest_is_that_of_the_content_however_it_is_packed(tmp_path: Path) -> None:
    content = b'{"a":1}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))

    assert dataset_digest(tmp_path / "a.jsonl") == hashlib.sha256(content).hexdigest()
    assert dataset_digest(tmp_path / "a.jsonl.gz") == hashlib.sha256(content).hexdigest()


# materializing


def test_a_row_is_brought_into_the_form_that_travels(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row(level=3, agent_ref={"name": "other"}))

    (task,) = tasks(path, overrides={"temperature": 0.5})

    assert task.row.decode() == (
        '{"question":"1+1?","expected_answer":"2","level":3,"agent_ref":{"name":"simple"},'
        '"responses_create_params":{"input":[{"role":"user","content":"Solve: 1+1?"}],"temperature":0.5}}'
    )
    assert (task.task_index, task.line, task.occurrence) == (0, 1, 0)


def test_numbers_keep_their_text(tmp_path: Path) -> None:
    path = a_file(tmp_path, '{"question":"?","big":123456789012345678901234567890,"small":1.10e-7}')

    assert b'"big":123456789012345678901234567890,"small":1.10e-7' in tasks(path)[0].row


def test_a_row_with_its_own_input_needs_no_prompt_and_overrides_win_key_by_key(tmp_path: Path) -> None:
    own = {"input": "1+1?", "temperature": 1.0, "metadata": {"a": "1"}}
    path = a_file(tmp_path, {"responses_create_params": own})

    (task,) = tasks(path, prompt=None, overrides={"temperature": 0.0, "metadata": {"b": "2"}, "top_p": 0.9})

    assert decoded(task)["responses_create_params"] == {
        "input": "1+1?",
        "temperature": 0.0,
        "metadata": {"b": "2"},
        "top_p": 0.9,
    }


def test_a_prompt_joins_create_params_that_have_no_input(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row(responses_create_params={"max_output_tokens": 9}))

    params = decoded(tasks(path)[0])["responses_create_params"]

    assert params == {"input": [{"role": "user", "content": "Solve: 1+1?"}], "max_output_tokens": 9}


def test_what_an_earlier_run_wrote_is_stripped(tmp_path: Path) -> None:
    earlier: dict[str, Any] = {
        "response": {},
        "reward": 1.0,
        "reward_components": {},
        "gym_bus": {},
        "_ng_rollout_index": 4,
        "_ng_x": 1,
    }
    path = a_file(tmp_path, a_row(**earlier))

    assert decoded(tasks(path)[0]).keys() == {"question", "expected_answer", "agent_ref", "responses_create_params"}


def test_a_row_of_another_file_may_bring_its_own_input(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row(responses_create_params={"input": "its own"}), a_row())

    first, second = tasks(path, own_input=True)

    assert decoded(first)["responses_create_params"]["input"] == "its own"
    assert decoded(second)["responses_create_params"]["input"] != "its own"


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        (a_row(responses_create_params={"input": "?"}), {}, "leave one out"),
        (a_row(responses_create_params="?"), {}, "responses_create_params must be an object"),
        (a_row(), {"prompt": None}, "no responses_create_params.input, and no prompt"),
        ({"text": "?"}, {}, "the prompt needs the key 'question'"),
        (a_row(), {"required": ["options"]}, "the verifier needs the key 'options', which the row lacks"),
        (a_row(x=None), {"required": ["x", "y"]}, "the verifier needs the keys 'x', 'y'"),
        (a_row(), {"overrides": {"temprature": 1}}, "temprature"),
        (a_row(responses_create_params={"max_output_tokens": "many"}), {}, "max_output_tokens"),
    ],
)
def test_a_row_that_cannot_be_run_or_judged_is_named_with_file_and_line(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], what: str
) -> None:
    path = a_file(tmp_path, "", row)

    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{what}"):
        tasks(path, **options)


def test_rows_of_identical_text_are_one_task(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row("a"), a_row("b"), a_row("a"), a_row("c"), a_row("a"))

    assert [(t.task_index, t.occurrence, t.line) for t in tasks(path)] == [
        (0, 0, 1),
        (1, 0, 2),
        (0, 1, 3),
        (2, 0, 4),
        (0, 2, 5),
    ]


def test_a_task_index_in_the_row_is_honoured(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row("a", _ng_task_index=7), a_row("b", _ng_task_index=3), a_row("c", _ng_task_index=7))

    assert [(t.task_index, t.occurrence) for t in tasks(path)] == [(7, 0), (3, 0), (7, 1)]


def test_different_rows_of_one_task_index_are_told_once(tmp_path: Path) -> None:
    same = a_row("a", _ng_task_index=0), a_row("a", _ng_task_index=0, responses_create_params={"temperature": 1})
    other = a_row("b", _ng_task_index=0), a_row("c", _ng_task_index=0), a_row("c", _ng_task_index=1)

    with capture_logs() as of_same:
        tasks(a_file(tmp_path, *same))
    with capture_logs() as of_other:
        tasks(a_file(tmp_path, *same, *other))

    assert of_same == []
    assert [(told["event"], told["row"][-2:]) for told in of_other] == [("one_task_index_for_different_rows", ":3")]


@pytest.mark.parametrize("stamped_first", [True, False])
def test_task_indices_in_some_rows_only_are_refused(tmp_path: Path, stamped_first: bool) -> None:
    rows = [a_row("a", _ng_task_index=0), a_row("b")]
    path = a_file(tmp_path, *(rows if stamped_first else rows[::-1]))

    with pytest.raises(DataError, match=r"rows.jsonl:2: _ng_task_index must be in every row or in none"):
        tasks(path)


@pytest.mark.parametrize("index", [-1, "0", 1.5, None, [0]])
def test_a_task_index_that_is_no_index_is_refused(tmp_path: Path, index: Any) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: _ng_task_index must be an integer from 0"):
        tasks(a_file(tmp_path, a_row(_ng_task_index=index)))


def test_the_limit_counts_tasks_and_later_rows_are_not_read(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row("a"), a_row("a"), a_row("b"), a_row("c"), "no row at all")

    assert [t.task_index for t in tasks(path, limit=2)] == [0, 0, 1]
    assert tasks(path, limit=0) == []


def test_long_texts_are_gone_with_their_rows(tmp_path: Path) -> None:
    rows = 40
    path = a_file(tmp_path, *(a_row(f"{i}" + "x" * 100_000) for i in range(rows)))
    tasks(path, limit=1)
    gc.collect()
    gc.disable()  # reference cycles stay
    tracemalloc.start()
    try:
        assert sum(1 for _ in materialize(path, agent="simple", prompt=PROMPT)) == rows
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()

    assert left < 5 * 100_000


# published rows


def published(row: dict[str, Any]) -> dict[str, Any] | None:
    if row["split"] != "test":
        return None
    return {"question": row["q"], "expected_answer": str(row["a"] + 0)}


def test_published_rows_are_converted_and_rows_of_ours_are_left_alone(tmp_path: Path) -> None:
    path = a_file(tmp_path, {"split": "test", "q": "a", "a": 1}, {"split": "train", "q": "b", "a": 2}, a_row("c"))

    found = tasks(path, convert=published, required=["expected_answer"])

    assert [(t.line, decoded(t)["question"], decoded(t)["expected_answer"]) for t in found] == [
        (1, "a", "1"),
        (3, "c", "2"),
    ]


def test_a_row_with_create_params_of_its_own_is_one_of_ours(tmp_path: Path) -> None:
    path = a_file(
        tmp_path, {"responses_create_params": {"max_output_tokens": 9}, "question": "a", "expected_answer": "1"}
    )

    assert decoded(tasks(path, convert=published, required=["expected_answer"])[0])["expected_answer"] == "1"


def test_a_misspelt_prompt_is_named_where_rows_may_be_published_ones_too(tmp_path: Path) -> None:
    path = a_file(tmp_path, {"question": "a", "expected_answer": "1"})

    with pytest.raises(DataError, match=r"rows.jsonl:1: not a row as published: .*; nor .* need 'qestion'"):
        tasks(path, convert=published, required=["expected_answer"], prompt=Prompt(user="{qestion}"))


def test_a_question_that_was_published_twice_is_two_tasks(tmp_path: Path) -> None:
    row = {"split": "test", "q": "a", "a": 1}
    path = a_file(tmp_path, row, row, row)

    found = tasks(path, convert=published, required=["expected_answer"])

    assert [(t.task_index, decoded(t).get("occurrence")) for t in found] == [(0, None), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"split": "test", "Q": "a"}, "not a row as published: the key 'q'"),
        ({"split": "test", "q": "a", "a": "x"}, "not a row as published: .*concatenate"),
    ],
)
def test_a_row_that_is_neither_ours_nor_as_published_is_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:1: {what}"):
        tasks(a_file(tmp_path, row), convert=published, required=["expected_answer"])


def test_converting_does_not_change_the_row_that_was_given() -> None:
    def greedy(row: dict[str, Any]) -> dict[str, Any]:
        return {"q": row.pop("q")}

    row = {"q": "a"}

    assert Converter(greedy)(row, "rows.jsonl:1") == {"q": "a"}
    assert row == {"q": "a"}


# rollouts


def test_repeats_stand_together_and_go_on_over_the_rows_of_a_task(tmp_path: Path) -> None:
    path = a_file(tmp_path, a_row("a"), a_row("b"), a_row("a"))

    rollouts = [(r.task_index, r.rollout_index) for r in expand(tasks(path), 2)]

    assert rollouts == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)]


def test_each_rollout_may_ask_for_a_seed_of_its_own(tmp_path: Path) -> None:
    rows = [r.row for r in expand(tasks(a_file(tmp_path, a_row(), a_row("b"))), 2, seeds=7)]

    bodies = [json.loads(row)["responses_create_params"]["metadata"]["extra_body"] for row in rows]
    assert bodies == ['{"seed":7}', '{"seed":8}'] * 2


def test_a_seed_joins_the_extra_body_and_the_metadata_that_are_there() -> None:
    metadata = {"a": "1", "extra_body": '{"top_k": 5, "seed": 9}'}
    row = json.dumps({"responses_create_params": {"input": "?", "metadata": metadata}, "x": 1}).encode()

    seeded = json.loads(with_seed(row, 3))

    assert seeded["x"] == 1
    assert seeded["responses_create_params"]["input"] == "?"
    assert seeded["responses_create_params"]["metadata"]["a"] == "1"
    assert json.loads(seeded["responses_create_params"]["metadata"]["extra_body"]) == {"top_k": 5, "seed": 3}


@pytest.mark.parametrize(
    "metadata", [{"extra_body": "no json"}, {"extra_body": "[1]"}, {"extra_body": {"a": 1}}, "text"]
)
def test_a_seed_cannot_join_an_extra_body_that_is_no_object(metadata: Any) -> None:
    row = json.dumps({"responses_create_params": {"input": "?", "metadata": metadata}}).encode()

    with pytest.raises(DataError, match="extra_body must be the text of a JSON object"):
        with_seed(row, 1)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (b'{"a":1}', b'{"a":1,"_ng_task_index":4,"_ng_rollout_index":2}'),
        (b"{}", b'{"_ng_task_index":4,"_ng_rollout_index":2}'),
    ],
)
def test_a_materialized_line_ends_in_the_two_indices(row: bytes, line: bytes) -> None:
    assert materialized_line(row, 4, 2) == line
