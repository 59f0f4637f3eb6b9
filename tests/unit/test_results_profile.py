"""Profiling whole folders: the numbers, the denominators, the files' shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gym_bus.errors import DataError, FailureKind, UsageError
from gym_bus.messages import Failed, Failure, Policy, RolloutId, Scored
from gym_bus.results import profile
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.profile import Counts, Options, differences_of_profile, foreign_file, profile_job
from gym_bus.results.writer import ResultsWriter


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def key(task: int, index: int) -> dict[str, Any]:
    return {"_ng_task_index": task, "_ng_rollout_index": index, "agent_ref": {"name": "simple"}}


def row(task: int, index: int, reward: float, tokens: int | None = None, **fields: Any) -> dict[str, Any]:
    usage = {"usage": {"output_tokens": tokens, "details": {"cached": 1}}} if tokens is not None else {}
    return {**key(task, index), "response": usage, "reward": reward, **fields}


def profile_rows(files: JobFiles) -> list[Any]:
    return [json.loads(line) for line in files.profile.read_bytes().splitlines()]


def aggregate(files: JobFiles) -> Any:
    return json.loads(files.aggregate.read_bytes())


def test_a_task_is_described_by_its_rollouts(files: JobFiles) -> None:
    write(files.inputs, [{**key(0, i), "question": "?", "level": 3} for i in range(2)])
    write(files.rollouts, [row(0, 1, 0.0, 30, ok=False), row(0, 0, 1.0, 20, ok=True, note="text", parts={"a": 1})])

    profile_job(files)

    (task,) = profile_rows(files)
    assert task == {
        "_ng_task_index": 0,
        "mean/reward": 0.5,
        "mean/ok": 0.5,
        "mean/output_tokens": 25.0,
        "max/reward": 1.0,
        "max/ok": 1,
        "max/output_tokens": 30,
        "min/reward": 0.0,
        "min/ok": 0,
        "min/output_tokens": 20,
        "median/reward": 0.5,
        "median/ok": 0.5,
        "median/output_tokens": 25.0,
        "std/reward": pytest.approx(math.sqrt(0.5)),
        "std/ok": pytest.approx(math.sqrt(0.5)),
        "std/output_tokens": pytest.approx(math.sqrt(50)),
        "num_rollouts": 2,
        "expected_num_rollouts": 2,
        "missing_num_rollouts": 0,
        "failed_num_rollouts": 0,
        "reward_profile_completion_pct": 100.0,
        "rollout_infos": [
            {
                "rollout_id": "0:0",
                "_ng_task_index": 0,
                "_ng_rollout_index": 0,
                "reward": 1.0,
                "ok": 1,
                "output_tokens": 20,
            },
            {
                "rollout_id": "0:1",
                "_ng_task_index": 0,
                "_ng_rollout_index": 1,
                "reward": 0.0,
                "ok": 0,
                "output_tokens": 30,
            },
        ],
        "sample": {"agent_ref": {"name": "simple"}, "question": "?", "level": 3},
    }
    assert '"output_tokens":20,' in files.profile.read_text() or '"output_tokens":20}' in files.profile.read_text()


def test_a_single_rollout_has_spread_zero_and_absent_fields_have_no_metric(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0, 20), row(1, 0, 0.0)])

    profile_job(files)

    first, second = profile_rows(files)
    assert (first["std/reward"], first["std/output_tokens"]) == (0.0, 0.0)
    assert second["std/reward"] == 0.0
    assert not [name for name in second if "output_tokens" in name]
    assert second["rollout_infos"] == [
        {"rollout_id": "1:0", "_ng_task_index": 1, "_ng_rollout_index": 0, "reward": 0.0}
    ]


def test_failed_and_pending_rollouts_are_counted_and_enter_no_metric(files: JobFiles) -> None:
    write(files.inputs, [key(task, i) for task in range(3) for i in range(4)])
    write(files.rollouts, [row(0, i, 1.0) for i in range(4)] + [row(1, 0, 0.0), row(1, 3, 1.0)])
    late = {"_ng_failure_class": "model_timeout", "reward": 0.0}
    write(
        files.failures,
        [
            {**key(1, 1), **late},
            {**key(1, 3), **late},  # was scored later
            {**key(1, 2), **late},
            {**key(1, 2), "_ng_failure_class": "sandbox_lost", "_ng_attempt_index": 1},
        ],
    )

    profile = profile_job(files)

    expected = Counts(
        expected=12, scored=6, failed=2, pending=4, failed_by_class={"model_timeout": 1, "sandbox_lost": 1}
    )
    assert profile.counts == profile.agents[0].counts == expected
    assert profile.agents[0].agent_metrics["mean/reward"] == pytest.approx(5 / 6)
    assert profile.agents[0].estimates["pass@1"].mean == pytest.approx(0.75)
    assert [
        (t["num_rollouts"], t["missing_num_rollouts"], t["failed_num_rollouts"], t["reward_profile_completion_pct"])
        for t in profile_rows(files)
    ] == [(4, 0, 0, 100.0), (2, 2, 2, 50.0), (0, 4, 0, 0.0)]
    assert profile_rows(files)[2]["rollout_infos"] == []
    assert "mean/reward" not in profile_rows(files)[2]


def test_the_aggregate_has_one_indented_entry_per_agent(files: JobFiles) -> None:
    rows = [row(0, 0, 1.0), row(0, 1, 0.0), row(1, 0, 1.0, agent_ref={"name": "other"})]
    write(files.rollouts, rows)

    profile_job(files)

    simple, other = aggregate(files)
    assert list(simple) == ["agent_ref", "agent_metrics", "key_metrics", "gym_bus", "group_level_metrics"]
    assert (simple["agent_ref"], other["agent_ref"]) == ({"name": "simple"}, {"name": "other"})
    assert simple["agent_metrics"]["pass@2/accuracy"] == 100.0
    assert simple["agent_metrics"]["pass@1[avg-of-2]/accuracy"] == 50.0
    assert simple["agent_metrics"]["per_sample_aggregate"] == {"accuracy": [100.0, 0.0]}
    assert simple["key_metrics"] == {
        "mean/reward": 0.5,
        "pass@2/accuracy": 100.0,
        "pass@1[avg-of-2]/accuracy": 50.0,
    }
    assert simple["gym_bus"]["counts"]["scored"] == 2
    assert simple["gym_bus"]["estimates"]["pass@1"]["mean"] == 0.5
    assert [group["_ng_task_index"] for group in simple["group_level_metrics"]] == [0]
    assert [group["_ng_task_index"] for group in other["group_level_metrics"]] == [1]
    assert other["group_level_metrics"][0]["sample"] == {"agent_ref": {"name": "other"}}
    text = files.aggregate.read_bytes()
    assert text == msgspec.json.format(text, indent=2) + b"\n"


def test_majority_needs_answers_and_takes_them_from_the_extracted_answer(files: JobFiles) -> None:
    long = "x" * 1000
    answers = ["a", "a", "b", None, long, long, long]
    write(files.rollouts, [row(0, i, float(a == "a"), extracted_answer=a) for i, a in enumerate(answers)])

    metrics = profile_job(files).agents[0].agent_metrics

    assert metrics["majority@3/accuracy"] == 100.0
    assert metrics["majority@7/accuracy"] == 0.0
    assert metrics["pass@1/no_answer"] == pytest.approx(100 / 7)


def test_another_answer_key_can_be_named(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0, choice="A")])

    assert "majority@1/accuracy" not in profile_job(files).agents[0].agent_metrics
    assert profile_job(files, Options(answer_key="choice")).agents[0].agent_metrics["majority@1/accuracy"] == 100.0


def test_an_answer_key_that_no_rollout_has_is_refused(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0, choice="A")])

    with pytest.raises(UsageError, match="--answer-key 'chioce': no rollout has this field"):
        profile_job(files, Options(answer_key="chioce"))


def test_a_reward_may_be_a_truth_value(files: JobFiles) -> None:
    write(files.rollouts, [{**key(0, i), "reward": i == 0} for i in range(4)])

    metrics = profile_job(files).agents[0].agent_metrics

    assert (metrics["mean/reward"], metrics["max/reward"], metrics["pass@2/accuracy"]) == (0.25, 1, 50.0)


def test_the_answer_key_is_the_known_one_that_most_rollouts_have(files: JobFiles) -> None:
    code = [row(0, i, float(i < 2), extracted_model_code=["x", "x", "y"][i]) for i in range(3)]
    write(files.rollouts, [*code, row(1, 0, 0.0, extracted_answer="A")])

    metrics = profile_job(files).agents[0].agent_metrics

    assert metrics["majority@3/accuracy"] == 50.0  # x wins, rightly; task 1 has no code
    assert metrics["pass@1/no_answer"] == 50.0


def test_numbers_are_columns_and_nothing_else_is(files: JobFiles) -> None:
    fields: dict[str, Any] = {
        "number": 1,
        "text": "1",
        "nothing": None,
        "list": [1],
        "gym_bus": {"attempt": 2, "agent": "simple"},
        "_ng_attempt_index": 1,
    }
    write(files.rollouts, [row(0, 0, 1.0, **fields), row(0, 1, 1.0, number=2.5)])
    with files.rollouts.open("a") as file:
        file.write('{"_ng_task_index": 0, "_ng_rollout_index": 2, "reward": 1, "number": 1e999, "response": null}\n')

    metrics = profile_job(files).agents[0].agent_metrics

    names = {name.split("/", 1)[1] for name in metrics if name.startswith("mean/")}
    assert names == {"reward", "number", "_ng_attempt_index"}
    assert (metrics["mean/number"], metrics["max/number"]) == (1.75, 2.5)


def test_a_usage_number_wins_over_a_field_of_its_name(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0, 20, output_tokens=99), row(0, 1, 1.0, 40, output_tokens=99)])

    assert profile_job(files).agents[0].agent_metrics["mean/output_tokens"] == 30.0


def test_agents_that_share_a_task_are_profiled_apart(files: JobFiles) -> None:
    other = {"agent_ref": {"name": "other"}}
    write(files.inputs, [key(0, 0), key(0, 1), {**key(0, 2), **other}, {**key(0, 3), **other}])
    write(files.rollouts, [row(0, 0, 1.0), row(0, 1, 1.0), row(0, 2, 0.0, **other)])
    write(files.failures, [{**key(0, 3), **other, "_ng_failure_class": "deadline"}])

    simple, second = profile_job(files).agents

    assert (simple.agent_metrics["mean/reward"], second.agent_metrics["mean/reward"]) == (1.0, 0.0)
    assert simple.counts == Counts(expected=2, scored=2, failed=0, pending=0)
    assert second.counts == Counts(expected=2, scored=1, failed=1, pending=0, failed_by_class={"deadline": 1})
    assert [entry["group_level_metrics"][0]["num_rollouts"] for entry in aggregate(files)] == [2, 1]
    assert profile_rows(files)[0]["mean/reward"] == pytest.approx(2 / 3)


def test_the_agents_numeric_metrics_have_a_file_of_their_own(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0, 20), row(0, 1, 0.0, 30)])

    profile_job(files)

    (entry,) = json.loads(files.agent_metrics.read_bytes())
    assert entry["agent_ref"] == {"name": "simple"}
    assert (entry["mean/reward"], entry["max/output_tokens"]) == (0.5, 30)
    assert not [name for name in entry if "pass" in name]


def test_a_field_of_the_row_divides_the_tasks_into_subsets(files: JobFiles) -> None:
    levels = [{"meta": {"level": level}} for level in ("easy", "hard", "easy", None)]
    write(files.inputs, [{**key(task, i), **level} for task, level in enumerate(levels) for i in range(2)])
    rewards = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
    write(files.rollouts, [row(task, i, reward) for task, pair in enumerate(rewards) for i, reward in enumerate(pair)])

    (agent,) = profile_job(files, Options(by="meta.level")).agents

    assert (agent.agent_metrics["easy/pass@1/accuracy"], agent.agent_metrics["hard/pass@1/accuracy"]) == (75.0, 50.0)
    assert agent.agent_metrics["hard/pass^2/accuracy"] == 0.0
    assert list(agent.subsets) == ["easy", "hard"]  # the task without a level is in none
    assert agent.subsets["easy"].counts.scored == 4
    assert agent.subsets["easy"].estimates["pass@1"].mean == 0.75
    assert aggregate(files)[0]["gym_bus"]["subsets"]["hard"]["estimates"]["pass@2"]["mean"] == 1.0
    assert list(differences_of_profile(files)) == []  # it knows what the profile was made with


def test_without_inputs_the_subset_is_read_from_the_rollouts_and_numbers_are_names_too(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0, needles=2), row(1, 0, 0.0, needles=8), row(1, 1, 0.0, needles=8)])

    (agent,) = profile_job(files, Options(by="needles")).agents

    assert {name: subset.counts.scored for name, subset in agent.subsets.items()} == {"2": 1, "8": 2}


@pytest.mark.parametrize(
    ("by", "error", "complaint"),
    [
        ("levle", UsageError, "no task has this field: did you mean 'level'"),
        ("meta", DataError, "task 0 has no single value there; name a field inside, such as meta.level"),
    ],
)
def test_a_field_that_divides_nothing_is_refused(
    files: JobFiles, by: str, error: type[Exception], complaint: str
) -> None:
    write(files.inputs, [{**key(0, 0), "level": "easy", "meta": {"level": 1}}])
    write(files.rollouts, [row(0, 0, 1.0)])

    with pytest.raises(error, match=complaint):
        profile_job(files, Options(by=by))


def test_the_files_can_go_elsewhere(files: JobFiles, tmp_path: Path) -> None:
    write(files.rollouts, [row(0, 0, 1.0)])
    (tmp_path / "other").mkdir()

    profile_job(files, into=JobFiles(tmp_path / "other"))

    assert not files.profile.exists()
    assert JobFiles(tmp_path / "other").profile.exists()


@pytest.mark.parametrize(
    ("name", "content", "foreign"),
    [
        ("aggregate", '[{"agent_ref": {}, "key_metrics": {}}]', True),
        ("aggregate", '[{"gym_bus": {}}]', False),
        ("aggregate", "[]", False),
        ("aggregate", "[", False),
        ("profile", '{"_ng_task_index": 0, "mean/reward": 1.0}\n{"_ng_task_index": 1}\n', True),
        ("profile", '{"_ng_task_index": 0, "failed_num_rollouts": 0}\n', False),
        ("profile", "", False),
    ],
)
def test_what_nemo_gym_wrote_is_told_from_ours(files: JobFiles, name: str, content: str, foreign: bool) -> None:
    path: Path = getattr(files, name)
    path.write_text(content)

    assert foreign_file(files) == (path if foreign else None)


def test_the_torn_last_line_of_a_running_job_is_passed_over(files: JobFiles) -> None:
    write(files.rollouts, [row(0, 0, 1.0)])
    with files.rollouts.open("a") as file:
        file.write('{"_ng_task_index": 0, "_ng_ro')

    assert profile_job(files).counts.scored == 1


def manifest(**changes: Any) -> Manifest:
    defaults: dict[str, Any] = dict.fromkeys(
        ("job", "benchmark", "dataset_digest", "model", "model_kind", "model_name", "verifier", "config_digest"), "x"
    )
    return Manifest(
        **(defaults | {"created_at": 0.0, "rows": 3, "num_repeats": 2, "agent": "simple", "gym_bus_version": "0"})
        | changes
    )


def test_without_inputs_the_manifest_says_what_is_expected(files: JobFiles) -> None:
    manifest().save(files.manifest)
    write(files.rollouts, [row(0, 0, 1.0)])

    profile = profile_job(files)

    assert (profile.counts.expected, profile.counts.pending) == (6, 5)
    assert [task["expected_num_rollouts"] for task in profile_rows(files)] == [2, 2, 2]
    assert "sample" not in profile_rows(files)[0]


def test_without_inputs_and_manifest_every_result_counts_as_expected(files: JobFiles) -> None:
    write(files.rollouts, [row(7, 0, 1.0)])
    write(files.failures, [{**key(9, 1), "_ng_failure_class": "deadline"}])

    assert profile_job(files).counts == Counts(
        expected=2, scored=1, failed=1, pending=0, failed_by_class={"deadline": 1}
    )
    assert [task["_ng_task_index"] for task in profile_rows(files)] == [7, 9]


def test_a_job_of_failures_only_has_denominators_and_no_metrics(files: JobFiles) -> None:
    write(files.rollouts, [])
    write(files.failures, [{**key(0, 0), "_ng_failure_class": "deadline"}])

    (agent,) = profile_job(files).agents

    assert (agent.agent_metrics, agent.key_metrics, agent.estimates) == ({}, {}, {})
    assert aggregate(files)[0]["gym_bus"]["counts"]["failed"] == 1


def test_an_empty_job_gives_empty_files(files: JobFiles) -> None:
    write(files.rollouts, [])

    assert profile_job(files).agents == []
    assert aggregate(files) == []
    assert profile_rows(files) == []


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_tasks_are_described_alike_however_many_at_a_time(
    files: JobFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    rollouts = [(0, 0), (0, 1), (2, 0), (3, 0), (3, 1), (3, 2), (9, 0)]
    write(files.inputs, [key(*one) for one in [*rollouts, (1, 0), (4, 0), (10, 0)]])
    write(files.rollouts, [row(*one, at / 8, tokens=at) for at, one in enumerate(rollouts)])
    write(files.failures, [{**key(4, 0), "_ng_failure_class": "deadline"}])
    profile_job(files)

    monkeypatch.setattr(profile, "TASKS_AT_A_TIME", at_a_time)
    (tmp_path / "parts").mkdir()
    profile_job(files, into=(parts := JobFiles(tmp_path / "parts")))

    assert parts.profile.read_bytes() == files.profile.read_bytes()
    assert parts.aggregate.read_bytes() == files.aggregate.read_bytes()


STRANGER = {**key(5, 0), "_ng_failure_class": "deadline"}


@pytest.mark.parametrize(
    ("inputs", "rollouts", "failures", "complaint"),
    [
        ([key(0, 0)], [row(0, 0, 1.0), row(0, 0, 0.0)], [], r"rollouts.jsonl:2: a second line for task 0, rollout 0"),
        ([key(0, 0), key(0, 0)], [row(0, 0, 1.0)], [], r"inputs.jsonl:2: a second line for task 0, rollout 0"),
        ([key(0, 0)], [row(0, 0, 1.0), row(5, 0, 1.0)], [], r"rollouts.jsonl:2: task 5, rollout 0 is not in"),
        ([key(0, 0)], [row(0, 0, 1.0)], [STRANGER], r"failures.jsonl:1: task 5, rollout 0 is not one of this job"),
        (None, [key(0, 0)], [], r"rollouts.jsonl:1: .*reward"),
        (None, [row(-1, 0, 1.0)], [], r"rollouts.jsonl:1: .*_ng_task_index"),
        (None, [row(0, 0, 1.0)], [key(0, 0)], r"failures.jsonl:1: .*_ng_failure_class"),
    ],
)
def test_files_that_contradict_each_other_are_named_by_line(
    files: JobFiles,
    inputs: list[dict[str, Any]] | None,
    rollouts: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    complaint: str,
) -> None:
    if inputs is not None:
        write(files.inputs, inputs)
    write(files.rollouts, rollouts)
    write(files.failures, failures)

    with pytest.raises(DataError, match=complaint):
        profile_job(files)
    assert not files.profile.exists()


def test_results_of_another_manifest_are_refused(files: JobFiles) -> None:
    manifest(rows=1).save(files.manifest)
    write(files.rollouts, [row(1, 0, 1.0)])

    with pytest.raises(DataError, match=r"rollouts\.jsonl:1: task 1, rollout 0 is not in job\.json"):
        profile_job(files)


def test_a_missing_rollouts_file_is_named(files: JobFiles) -> None:
    with pytest.raises(DataError, match=r"rollouts\.jsonl: cannot be read"):
        profile_job(files)


def test_what_the_writer_wrote_can_be_profiled(files: JobFiles) -> None:
    with ResultsWriter(files, "job-1", 2, 2) as writer:
        writer.append(
            [
                (
                    sequence,
                    Scored(
                        rollout=RolloutId("job-1", *key),
                        agent="simple",
                        verifier="mcqa",
                        reward=reward,
                        extra=b'{"extracted_answer": "B"}',
                        row=b'{"question": "?"}',
                        response=b'{"usage": {"output_tokens": 9}}',
                        policy=Policy(model="small"),
                    ),
                )
                for sequence, (key, reward) in enumerate([((0, 0), 1.0), ((0, 1), 0.0), ((1, 1), 1.0)])
            ]
        )
        failure = Failure(kind=FailureKind.DEADLINE, detail="late")
        writer.append([(9, Failed(rollout=RolloutId("job-1", 1, 0), failure=failure, agent="simple"))])

    profile = profile_job(files)

    assert profile.counts == Counts(expected=4, scored=3, failed=1, pending=0, failed_by_class={"deadline": 1})
    (agent,) = profile.agents
    assert agent.agent == "simple"
    assert agent.agent_metrics["mean/output_tokens"] == 9.0
    assert {name for name in agent.agent_metrics if name.startswith("mean/")} == {"mean/reward", "mean/output_tokens"}
