"""Rollouts as a data frame: what becomes a column, in which order, from which files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from jobfolder import message, write_job, write_lines

from gym_bus.errors import DataError, FailureKind, UsageError
from gym_bus.results import load


def line(task: int, rollout: int, reward: float | None = 1.0, **more: Any) -> dict[str, Any]:
    key = {"_ng_task_index": task, "_ng_rollout_index": rollout, "agent_ref": {"name": "simple"}}
    return {**key, **({} if reward is None else {"reward": reward}), **more}


def test_every_rollout_is_a_row_in_order_with_its_numbers(tmp_path: Path) -> None:
    write_job(tmp_path / "job-1", [[1.0, 0.0], [FailureKind.DEADLINE, 0.5]])

    frame = load(tmp_path / "job-1")

    keys = ["task_index", "rollout_index", "outcome", "reward"]
    assert frame[keys].fillna(-1).values.tolist() == [
        [0, 0, "scored", 1.0],
        [0, 1, "scored", 0.0],
        [1, 0, "failed", -1.0],
        [1, 1, "scored", 0.5],
    ]
    assert set(frame["job"]) == {"job-1"}
    failed, scored = frame.iloc[2], frame.iloc[3]
    assert (failed["failure_class"], failed["failure_stage"], failed["failure_detail"]) == (
        "deadline",
        "agent",
        "task 1 broke",
    )
    assert (scored["model"], scored["agent"], scored["verifier"]) == ("m", "simple", "math")
    assert (scored["agent_s"], scored["verify_s"], scored["tools_s"]) == (3.0, 0.25, 0.0)
    assert (scored["input_tokens"], scored["output_tokens"], scored["output_chars"]) == (5, 11, len("task 1 makes 2"))
    assert scored["finished_at"] == pd.Timestamp(1003, unit="s", tz="UTC")
    assert (scored["question"], scored["level"], scored["extracted_answer"]) == ("what is 1?", "L1", "2")


def test_texts_are_columns_where_they_are_asked_for(tmp_path: Path) -> None:
    write_job(tmp_path / "job", [[1.0], [FailureKind.MODEL_ERROR]])

    assert "output_text" not in load(tmp_path / "job")
    frame = load(tmp_path / "job", texts=True)

    assert frame["input_text"].tolist() == ["please: what is 0?", "please: what is 1?"]
    assert frame["output_text"].tolist() == ["task 0 makes 0", ""]


def test_half_a_character_in_a_text_is_replaced(tmp_path: Path) -> None:
    told = line(0, 0, responses_create_params={"input": "why \ud83d?"}, response={"output": [message("so \udc00")]})
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(told) + "\n")

    frame = load(tmp_path, texts=True)

    assert (frame["input_text"][0], frame["output_text"][0]) == ("why \ufffd?", "so \ufffd")


def test_several_jobs_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0, 1.0]])
    write_job(tmp_path / "b", [[0.0]], model="other")

    frame = load([tmp_path / "a", str(tmp_path / "b")])

    assert frame.groupby("job", observed=True)["reward"].agg(["count", "mean"]).values.tolist() == [[2, 1.0], [1, 0.0]]
    assert isinstance(frame["model"].dtype, pd.CategoricalDtype)


def test_files_of_nemo_gym_are_read_and_what_they_do_not_say_is_missing(tmp_path: Path) -> None:
    usage = {"input_tokens": 3, "output_tokens": 7, "output_tokens_details": {"reasoning_tokens": 4}}
    response = {"output": [message("a"), message("bc")], "usage": usage, "incomplete_details": {"reason": "length"}}
    failure = {"_ng_failure_class": "judge_failed", "_ng_failure_judge_error": "no reply", "_ng_attempt_index": 1}
    write_lines(
        tmp_path / "out.jsonl", line(0, 0, response=response, reward_components={"form": 0.5, "odd": "x"}, ok=True)
    )
    write_lines(tmp_path / "out_failures.jsonl", line(0, 1, None, **failure), line(0, 0, None, **failure))

    frame = load(tmp_path / "out.jsonl")

    scored, failed = frame.iloc[0], frame.iloc[1]
    assert (scored["output_tokens"], scored["reasoning_tokens"], scored["output_chars"]) == (7, 4, 3)
    assert (scored["incomplete"], scored["reward_components.form"], scored["ok"]) == ("length", 0.5, True)
    assert pd.isna(scored["reward_components.odd"]) and pd.isna(scored["agent_s"]) and pd.isna(scored["finished_at"])
    assert (failed["failure_class"], failed["failure_detail"], failed["attempt"]) == ("judge_failed", "no reply", 2)
    assert len(frame) == 2  # the first rollout failed once and was scored later


@pytest.mark.parametrize(
    ("values", "column"),
    [
        (["a", "b"], ["a", "b"]),
        ([1, 2.5], [1.0, 2.5]),
        ([True, False], [True, False]),
        ([1, "b"], ["1", '"b"']),
        ([True, 2], ["true", "2"]),
        ([2**70, 1], [str(2**70), "1"]),
    ],
)
def test_a_field_is_a_column_of_one_kind(tmp_path: Path, values: list[Any], column: list[Any]) -> None:
    write_lines(tmp_path / "rollouts.jsonl", *(line(task, 0, field=value) for task, value in enumerate(values)))
    assert load(tmp_path)["field"].tolist() == column


def test_a_reward_that_is_a_truth_value_is_a_number(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", *(line(task, 0) | {"reward": task == 0} for task in range(2)))
    assert load(tmp_path)["reward"].tolist() == [1.0, 0.0]


def test_objects_and_lists_are_columns_only_where_they_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", line(0, 0, tests=["a"], level=3), line(1, 0, level=4))

    assert "tests" not in load(tmp_path)
    frame = load(tmp_path, fields=["tests"])

    assert frame["tests"].iloc[0] == '["a"]' and pd.isna(frame["tests"].iloc[1])
    assert "level" not in frame


def test_a_field_that_has_the_name_of_a_column_stands_beside_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", line(0, 0, model="of the row"))
    frame = load(tmp_path)
    assert pd.isna(frame["model"].iloc[0])
    assert frame["row.model"].iloc[0] == "of the row"


def test_a_job_without_any_result_is_an_empty_frame_with_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").touch()
    frame = load(tmp_path)
    assert len(frame) == 0
    assert {"task_index", "reward", "failure_class", "agent_s"} <= set(frame.columns)


def test_a_rollout_that_is_recorded_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", line(3, 1), line(3, 1))
    with pytest.raises(DataError, match=r"rollouts\.jsonl:2: a second line for task 3, rollout 1"):
        load(tmp_path)


def test_a_folder_without_rollouts_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no rollouts file"):
        load(tmp_path)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "rollouts.jsonl", line(0, 0))

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("gym_bus.results.extras.import_module", missing)
    with pytest.raises(UsageError, match=r"needs pandas .*pip install 'gym-bus\[analysis\]'"):
        load(tmp_path)
