"""The report without a browser: what it says of a job, which rollouts it shows, and that its size is bounded."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jobfolder import message, row_of, write_job, write_lines

from gym_bus.cli.eval import command as eval_command
from gym_bus.errors import FailureKind, UsageError
from gym_bus.results.report import times, words
from gym_bus.results.report.choose import choose
from gym_bus.results.report.figures import heat_map, pass_curve
from gym_bus.results.report.items import MOST_CHARS, MOST_ITEMS, clip, gist, items_of
from gym_bus.results.report.jobs import Entry, read_entries
from gym_bus.results.report.page import write_report
from gym_bus.results.report.plots import figure
from gym_bus.results.report.tasks import families, task_rows, telling

LOST, LATE = FailureKind.LOST, FailureKind.DEADLINE


def entries_of(folder: Path, *jobs: Any, **more: Any) -> list[Entry]:
    """Read jobs that are written down from their rewards."""
    names = "abc"[: len(jobs)]
    for name, rewards in zip(names, jobs, strict=True):
        write_job(folder / name, rewards, **more)
    return read_entries([folder / name for name in names])


def data_of(page: Path) -> Any:
    """What the page's script unpacks."""
    packed = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page.read_text())
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_scores_stand_beside_what_they_are_over(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[1.0, 0.0], [1.0, LATE], [0.0, 0.0]])

    (row,) = words.headline(entries, families(entries))
    said = words.notes(entries, families(entries))

    assert row["pass_1"].mean == pytest.approx(0.5)
    assert (row["counts"].scored, row["counts"].expected, row["counts"].failed) == (5, 6, 1)
    assert said == [
        "1 of 6 rollouts have no reward; all scores are over the others. If they were all wrong, pass@1 would be "
        "33.33 %; if all right, 50.00 %.",
        "pass@2 and pass^2 leave out 1 tasks with fewer than 2 rewards.",
    ]


def test_what_holds_for_all_jobs_is_said_once(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[0.5], [1.0]], [[0.25], [LOST]])
    said = words.notes(entries, families(entries))
    assert [note for note in said if "not only 0 and 1" in note] == [
        "Rewards are not only 0 and 1: pass@1 is the mean reward, and a task's colour its mean reward."
    ]
    assert any(note.startswith("b: 1 of 2 rollouts have no reward") for note in said)


def test_a_job_without_any_reward_still_has_a_page(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[LOST, LATE], [LOST, LOST]])

    written = write_report([tmp_path / "a"], tmp_path / "a.html")

    text = (tmp_path / "a.html").read_text()
    assert "None of the 4 rollouts has a reward" in text
    assert written.transcripts == 4
    assert set(data_of(tmp_path / "a.html")["figures"]) == {"heat-0", "progress"}


def test_an_empty_file_of_rollouts_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").touch()
    write_report([tmp_path], tmp_path / "a.html")
    assert "None of the 0 rollouts has a reward" in (tmp_path / "a.html").read_text()


def test_failures_are_counted_by_class_with_what_to_do(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[LOST, LATE], [1.0, LOST], [LOST, 0.0]])

    rows = words.failures(entries)

    assert [(row["kind"], row["count"], row["again"]) for row in rows] == [("lost", 3, True), ("deadline", 1, True)]
    assert rows[0]["details"] == [("task 0 broke", 3)]  # they differ in a number only
    assert ("eval replay --class deadline --limit-s SECONDS", True) in rows[1]["advice"]


def test_a_class_of_another_tool_is_shown_without_advice(tmp_path: Path) -> None:
    key = {"_ng_task_index": 0, "_ng_rollout_index": 0}
    (tmp_path / "rollouts.jsonl").touch()
    write_lines(tmp_path / "rollouts_failures.jsonl", {**key, "_ng_failure_class": "kill_shaped"})
    (row,) = words.failures(read_entries([tmp_path]))
    assert (row["kind"], row["known"], row["advice"]) == ("kill_shaped", False, [])


def test_the_setup_shows_in_what_jobs_differ(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0]], model="m1")
    write_job(tmp_path / "b", [[1.0]], model="m2")

    settings = words.setup(read_entries([tmp_path / "a", tmp_path / "b"]))

    assert {one.name for one in settings if one.differs} == {
        "model",
        "the endpoint's model, or file of recorded answers",
    }
    assert next(one.values for one in settings if one.name == "sampling parameters") == ['{"temperature":0.5}'] * 2


def test_jobs_on_the_same_tasks_are_compared_task_by_task(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[1.0], [0.0], [0.0], [0.0]], [[1.0], [1.0], [1.0], [LOST]])

    first, second = words.headline(entries, families(entries))

    assert first["difference"] is None
    assert second["difference"].tasks == 3
    assert second["difference"].difference == pytest.approx(2 / 3)


def test_jobs_on_other_tasks_are_kept_apart(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0], [0.0]])
    write_job(tmp_path / "b", [[1.0], [0.0]], row=lambda task: {"question": f"another {task}"})
    entries = read_entries([tmp_path / "a", tmp_path / "b"])

    grouped = families(entries)

    assert [family.members for family in grouped] == [(0,), (1,)]
    assert "Compare only within: a; b." in words.notes(entries, grouped)[-1]
    assert all(row["difference"] is None for row in words.headline(entries, grouped))


def test_a_changed_row_is_pointed_out_and_enters_no_difference(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0], [0.0], [0.0]])
    write_job(
        tmp_path / "b",
        [[1.0], [1.0], [1.0]],
        row=lambda task: row_of(task) | ({"question": "new"} if task == 2 else {}),
    )
    entries = read_entries([tmp_path / "a", tmp_path / "b"])

    grouped = families(entries)

    assert [(family.members, family.strangers) for family in grouped] == [((0, 1), 1)]
    assert words.headline(entries, grouped)[1]["difference"].tasks == 2
    assert "1 tasks of a, b have equal numbers and different rows" in words.notes(entries, grouped)[-1]


def test_the_agents_of_one_file_are_jobs_of_their_own(tmp_path: Path) -> None:
    def line(task: int, agent: str) -> dict[str, Any]:
        key = {"_ng_task_index": task, "_ng_rollout_index": 0, "agent_ref": {"name": agent}}
        return {**key, "reward": float(task), "response": {"output": [message("x")]}}

    write_lines(tmp_path / "rollouts.jsonl", line(0, "one"), line(1, "two"))

    entries = read_entries([tmp_path])

    assert [(entry.label, entry.rewards.tolist(), len(entry.frame)) for entry in entries] == [
        (f"{tmp_path.name}: one", [0.0], 1),
        (f"{tmp_path.name}: two", [1.0], 1),
    ]


def test_folders_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    write_job(tmp_path / "x" / "job", [[1.0]])
    write_job(tmp_path / "y" / "job", [[1.0]])
    write_job(tmp_path / "z", [[1.0]])
    entries = read_entries([tmp_path / "x" / "job", tmp_path / "y" / "job", tmp_path / "z"])
    assert [entry.label for entry in entries] == ["x/job", "y/job", "z"]


def test_a_job_given_twice_is_refused(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0]])
    with pytest.raises(UsageError, match="given 2 times"):
        read_entries([tmp_path / "a", tmp_path / "a" / ".." / "a"])


def test_tasks_with_mixed_outcomes_come_first(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [LOST, LOST]])
    (family,) = families(entries)
    rows = task_rows(entries, family)
    assert [(row.task, row.kind) for row in rows] == [(2, "sometimes"), (1, "never"), (3, "unscored"), (0, "always")]
    assert words.kinds(rows, 0) == {"always": 1, "sometimes": 1, "never": 1, "unscored": 1}


def test_of_many_tasks_every_kind_is_shown(tmp_path: Path) -> None:
    rewards = [[1.0, 0.0]] * 60 + [[0.0, 0.0]] * 20 + [[1.0, 1.0]] * 20
    entries = entries_of(tmp_path, rewards)
    rows = task_rows(entries, families(entries)[0])

    shown = telling(rows, 20)

    counted = {kind: sum(row.kind == kind for row in shown) for kind in ("sometimes", "never", "always")}
    assert counted == {"sometimes": 12, "never": 4, "always": 4}


def picked(entries: list[Entry], most: int) -> list[tuple[int, int, int, tuple[str, ...]]]:
    grouped = families(entries)
    picks = choose(entries, grouped, [task_rows(entries, family) for family in grouped], most)
    keys = [entries[pick.entry].frame.iloc[pick.at] for pick in picks]
    return [
        (pick.entry, int(key["task_index"]), int(key["rollout_index"]), pick.reasons)
        for pick, key in zip(picks, keys, strict=True)
    ]


def test_all_rollouts_are_shown_where_there_is_room(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[1.0, 0.0], [0.0, LOST]])
    assert {pick[1:3] for pick in picked(entries, 10)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_of_many_rollouts_the_telling_ones_are_shown(tmp_path: Path) -> None:
    rewards = [[1.0, 0.0] if task == 7 else [LOST, 0.0] if task == 3 else [0.0, 0.0] for task in range(100)]
    entries = entries_of(tmp_path, rewards)

    chosen = picked(entries, 30)

    reasons = {(task, rollout): why for _, task, rollout, why in chosen}
    assert len(chosen) == 30
    assert "failed" in reasons[3, 0]
    assert "sometimes" in reasons[7, 0] and "sometimes" in reasons[7, 1]
    assert "slow" in reasons[99, 1]
    assert sum(why == ("sample",) for why in reasons.values()) >= 5
    assert picked(entries, 30) == chosen


def test_classes_of_failures_share_the_places(tmp_path: Path) -> None:
    rewards: list[list[float | FailureKind]] = [[LOST] for _ in range(50)] + [[LATE]] + [[0.0] for _ in range(50)]
    entries = entries_of(tmp_path, rewards)
    assert (0, 50, 0) in {pick[:3] for pick in picked(entries, 10)}


def test_several_jobs_show_the_same_tasks(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[0.0]] * 200, [[1.0]] * 200)
    chosen = picked(entries, 40)
    tasks = [{task for job, task, _, why in chosen if job == place and why != ("slow",)} for place in (0, 1)]
    assert tasks[0] == tasks[1]


def test_transcripts_hold_messages_calls_reasoning_and_the_verdict(tmp_path: Path) -> None:
    key = {"_ng_task_index": 0, "_ng_rollout_index": 0}
    output = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "output": "2"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, {"type": "output_image"}]},
    ]
    given = {
        "responses_create_params": {"input": "hello", "instructions": "be brief"},
        "expected_answer": "3",
        "topic": "t",
    }
    line = {**key, "reward": 0.25, "response": {"output": output}, "extracted_answer": "2"}
    line["gym_bus"] = {"attempt": 2, "timings": {"agent_s": 2.0, "verify_s": 1.0}}
    write_lines(tmp_path / "rollouts.jsonl", line)
    write_lines(tmp_path / "rollouts_materialized_inputs.jsonl", {**given, **key})

    write_report([tmp_path], tmp_path / "a.html")

    (one,) = data_of(tmp_path / "a.html")["transcripts"]
    assert one["input"] == [{"kind": "instructions", "text": "be brief"}, {"kind": "user", "text": "hello"}]
    assert [(item["kind"], item["text"]) for item in one["output"]] == [
        ("reasoning", "hm"),
        ("call", '{"a": 1}'),
        ("result", "2"),
        ("assistant", "no\n[output_image]"),
    ]
    assert one["output"][1]["name"] == "add"
    assert one["verdict"] == [["extracted_answer", "2"], ["expected_answer", "3"]]
    assert one["row"] == [["expected_answer", "3"], ["topic", "t"]]
    assert (one["outcome"], one["reward"], one["attempt"], one["work"]) == ("partial", 0.25, 2, 3.0)


@pytest.mark.parametrize("output", [None, "text", 7, [3], [{"type": "message"}], [{"type": "message", "content": 5}]])
def test_an_output_of_any_shape_becomes_a_transcript(output: Any) -> None:
    assert all(isinstance(item["text"], str) for item in items_of(output))


def test_long_texts_and_long_conversations_are_cut_in_the_middle() -> None:
    text = clip("a" * MOST_CHARS + "b" * MOST_CHARS, MOST_CHARS)
    assert text.startswith("aa") and text.endswith("bb") and f"{MOST_CHARS:,} characters are left out" in text
    items = items_of([message(str(at)) for at in range(MOST_ITEMS + 5)])
    assert len(items) == MOST_ITEMS + 1
    assert items[MOST_ITEMS // 2]["text"] == "5 items are left out here"
    assert items[-1]["text"] == str(MOST_ITEMS + 4)


def test_the_page_is_bounded_however_long_the_answers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.results.report.page.MOST_CHARS", 20_000)
    write_job(tmp_path / "a", [[1.0]] * 30, said=lambda task, _: f"{task} " * 1000)

    written = write_report([tmp_path / "a"], tmp_path / "a.html")

    assert 0 < written.transcripts < 30
    assert sum(len(json.dumps(one)) for one in data_of(tmp_path / "a.html")["transcripts"]) <= 20_000
    assert f"{written.transcripts} of 30 recorded rollouts" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("row", "about"),
    [
        ({"question": "why?", "responses_create_params": {"input": "long prompt: why?"}}, "why?"),
        (
            {
                "responses_create_params": {
                    "input": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
                }
            },
            "b",
        ),
        ({"responses_create_params": {"input": [{"role": "system", "content": "a"}]}}, ""),
        ({}, ""),
    ],
)
def test_a_task_is_told_by_its_question_or_its_prompt(row: dict[str, Any], about: str) -> None:
    assert gist({key: json.dumps(value).encode() for key, value in row.items()}) == about


def test_many_tasks_share_the_cells_of_a_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.results.report.figures.MOST_CELLS", 25)
    (entry,) = entries_of(tmp_path, [[float(task % 2)] for task in range(100)])
    heat = heat_map(entry)
    assert heat
    cells = [value for row in heat["data"][0]["z"] for value in row if value is not None]
    assert cells == [0.5] * 25


def test_the_curve_of_passes_takes_any_number_of_draws(tmp_path: Path) -> None:
    curve = pass_curve(entries_of(tmp_path, [[1.0] + [0.0] * 399, [0.0] * 400]))
    assert curve
    best, worst = curve["data"]
    assert list(best["x"])[-2:] == [256, 400]
    assert (best["y"][-1], worst["y"][-1]) == (0.5, 0.0)


def test_labels_are_no_markup_for_the_plotting_library(tmp_path: Path) -> None:
    write_job(tmp_path / "<b>x&y", [[1.0, 0.0]])
    plots = times.figures(read_entries([tmp_path / "<b>x&y"]))
    assert plots["waterfall"]["data"][0]["name"] == "&lt;b&gt;x&amp;y"


def test_the_progress_is_in_seconds_since_the_first_result(tmp_path: Path) -> None:
    (entry,) = entries_of(tmp_path, [[1.0], [1.0], [1.0], [LOST]])
    (trace,) = times.figures([entry])["progress"]["data"]
    assert trace["x"] == [0.0, 1.0, 2.0, 3.0]
    assert trace["y"] == [0.25, 0.5, 0.75, 1.0]


def test_the_waterfall_begins_each_stage_where_the_last_ended(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, [[1.0, 0.0]])  # agents took 0 and 2 s, 0.5 s of it in the model
    (trace,) = times.figures(entries)["waterfall"]["data"]
    assert trace["base"] == [0.0, 1.0, 1.0, 1.5, 1.5, 2.25, 2.25, 2.25]
    assert list(trace["x"]) == [1.0, 0.0, 0.5, 0.0, 0.75, 0.0, 0.0, 0.25]


def test_waiting_for_an_endpoint_is_a_stage_of_its_own(tmp_path: Path) -> None:
    timed = {"agent_s": 3.0, "model_queue_s": 1.25, "model_s": 1.5}
    line = {"_ng_task_index": 0, "_ng_rollout_index": 0, "reward": 1.0, "gym_bus": {"timings": timed}}
    write_lines(tmp_path / "rollouts.jsonl", line)
    entries = read_entries([tmp_path])

    (trace,) = times.figures(entries)["waterfall"]["data"]
    (slow,) = times.slowest_rows(entries, {})

    seconds = dict(zip(trace["y"], trace["x"], strict=True))
    names = ("waiting for the model", "model", "rest of the agent")
    assert [seconds[name] for name in names] == [1.25, 1.5, 0.25]
    assert [(name, said) for name, said, _ in slow["parts"]][:2] == [("wait", "1.25 s"), ("model", "1.5 s")]


def test_jobs_side_by_side_have_a_row_each_of_their_stages(tmp_path: Path) -> None:
    first = entries_of(tmp_path / "x", [[1.0, 0.0]])
    second = entries_of(tmp_path / "y", [[1.0, 0.0], [1.0, 0.0]])
    plot = times.figures([*first, *second])["waterfall"]
    seconds = {trace["name"]: list(trace["x"]) for trace in plot["data"]}
    assert list(seconds) == ["waiting for an agent", "model", "rest of the agent", "verifying"]
    assert seconds["model"] == [0.5, 0.5]
    assert plot["layout"]["barmode"] == "stack"


def test_the_names_of_many_jobs_leave_the_plot_its_height() -> None:
    few, many = (figure([{"type": "bar"}] * count, 300)["layout"]["height"] for count in (3, 8))
    assert (few, many) == (300, 340)


def test_a_file_and_a_folder_of_one_name_are_two_jobs(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0]])
    write_lines(tmp_path / "a.jsonl", {"_ng_task_index": 0, "_ng_rollout_index": 0, "reward": 1.0})
    assert [entry.label for entry in read_entries([tmp_path / "a", tmp_path / "a.jsonl"])] == ["a", "a.jsonl"]


def test_a_timing_that_a_row_lacks_took_no_time(tmp_path: Path) -> None:
    timed = {"reward": 1.0, "gym_bus": {"timings": {"agent_s": 2.0, "model_s": 1.5}}}
    write_lines(tmp_path / "rollouts.jsonl", {"_ng_task_index": 0, "_ng_rollout_index": 0, **timed})

    (trace,) = times.figures(read_entries([tmp_path]))["waterfall"]["data"]

    assert list(trace["x"]) == [0.0, 0.0, 1.5, 0.0, 0.5, 0.0, 0.0, 0.0]


def test_a_page_without_timings_says_so(tmp_path: Path) -> None:
    write_lines(tmp_path / "rollouts.jsonl", {"_ng_task_index": 0, "_ng_rollout_index": 0, "reward": 1.0})
    write_report([tmp_path], tmp_path / "a.html")
    assert "The files hold no timings." in (tmp_path / "a.html").read_text()


def test_the_command_writes_the_page_beside_the_job(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0, 0.0]])

    done = CliRunner().invoke(eval_command, ["report", str(tmp_path / "a"), "--html", "--by", "level", "--json"])

    told = json.loads(done.stdout)
    page = tmp_path / "a" / "report.html"
    assert told == {
        "output": str(page),
        "size_bytes": page.stat().st_size,
        "jobs": 1,
        "rollouts": 2,
        "transcripts": 2,
    }
    assert "subsets" in data_of(page)["figures"]


def test_a_field_that_no_task_has_is_an_error(tmp_path: Path) -> None:
    write_job(tmp_path / "a", [[1.0]])
    with pytest.raises(UsageError, match="'levle': no task has this field: did you mean 'level'"):
        write_report([tmp_path / "a"], tmp_path / "a.html", by="levle")
