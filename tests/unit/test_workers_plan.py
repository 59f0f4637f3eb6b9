"""Writing jobs down: shards of one data set, and what they have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gym_bus.config import Config
from gym_bus.errors import DataError, UsageError
from gym_bus.origins import Layer
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.merge import merge_jobs
from gym_bus.settings import JobConfig, ModelConfig
from gym_bus.workers.plan import Job, Plan, Shard, Size, Wanted, plan_job, size_of, write_down


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    folder = tmp_path / "choices"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "name: choices\ndomain: knowledge\nverifier: {name: mcqa}\nprompt: {user: '{question}'}\n"
        "datasets:\n  - {name: choices, type: benchmark, jsonl_fpath: rows.jsonl}\n"
    )
    rows = [{"question": f"{i}?", "options": [{"A": "a"}, {"B": "b"}], "expected_answer": "A"} for i in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def planned(benchmark: Path, shard: str | None = None, *, job: JobConfig | None = None, **wanted: Any) -> Plan:
    config = Config(models={"m": ModelConfig(kind="simulated")}, job=job or JobConfig())
    part = Shard.parse(shard) if shard else None
    return plan_job(Wanted(benchmark=str(benchmark), model="m", shard=part, **{"num_repeats": 2, **wanted}), config)


def written(benchmark: Path, output: Path, shard: str | None = None, **more: Any) -> Job:
    return write_down(planned(benchmark, shard, **more), output)


def seeds_of(files: JobFiles) -> list[tuple[int, int]]:
    """Rollout index and seed of every row."""
    rows = [json.loads(line) for line in files.inputs.read_text().splitlines()]
    bodies = [row["responses_create_params"]["metadata"]["extra_body"] for row in rows]
    return [(row["_ng_rollout_index"], json.loads(body)["seed"]) for row, body in zip(rows, bodies, strict=True)]


def test_shards_share_the_tasks_among_them_and_know_the_whole(benchmark: Path, tmp_path: Path) -> None:
    jobs = [written(benchmark, tmp_path / f"s{at}", f"{at}/3") for at in range(3)]
    whole = written(benchmark, tmp_path / "whole")

    assert [job.manifest.rows for job in jobs] == [4, 3, 3]
    assert [{task % 3 for task, _, _ in job.record.spans} for job in jobs] == [{0}, {1}, {2}]
    assert {job.manifest.shard_of for job in jobs} == {whole.manifest.dataset_digest}
    assert (jobs[1].record.group_size(4), jobs[1].record.group_size(5)) == (2, 0)


def test_all_shards_merged_are_the_whole_job(benchmark: Path, tmp_path: Path) -> None:
    jobs = [written(benchmark, tmp_path / f"s{at}", f"{at}/3") for at in range(3)]
    for job in jobs:
        job.files.rollouts.touch()
    whole, merged = written(benchmark, tmp_path / "whole"), JobFiles(tmp_path / "merged")

    merge_jobs([job.files for job in jobs], merged)

    assert merged.inputs.read_bytes() == whole.files.inputs.read_bytes()
    manifest = Manifest.load(merged.manifest)
    assert manifest.dataset_digest == whole.manifest.dataset_digest
    assert (manifest.rows, manifest.shard, manifest.shard_of) == (10, "", "")


def test_a_shard_is_not_resumed_as_another(benchmark: Path, tmp_path: Path) -> None:
    written(benchmark, tmp_path / "s", "0/3")

    assert written(benchmark, tmp_path / "s", "0/3").resumed
    with pytest.raises(UsageError, match=r"shard: 0/3 in job\.json, 1/3 now"):
        written(benchmark, tmp_path / "s", "1/3")


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "0/0", "1/2/3", ""])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="give i/n, such as 0/4"):
        Shard.parse(text)


def test_a_job_that_got_further_rollouts_is_resumed_with_all_of_them(benchmark: Path, tmp_path: Path) -> None:
    job = written(benchmark, tmp_path / "job")
    last = job.files.inputs.read_text().splitlines()[-1]
    with job.files.inputs.open("a") as file:
        file.write(last.replace('"_ng_rollout_index":1', '"_ng_rollout_index":2') + "\n")

    assert written(benchmark, tmp_path / "job").record.spans == [(0, 9, 2), (9, 1, 3)]


@pytest.mark.parametrize("change", [lambda text: text[:-50], lambda text: text.replace("7?", "8?")])
def test_a_job_whose_inputs_were_changed_is_not_resumed(
    benchmark: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    job = written(benchmark, tmp_path / "job")
    job.files.inputs.write_text(change(job.files.inputs.read_text()))

    with pytest.raises(UsageError, match="it was changed or cut since"):
        written(benchmark, tmp_path / "job")

    job.files.inputs.unlink()
    assert written(benchmark, tmp_path / "job").record == job.record


def test_a_folder_whose_name_is_not_utf_8_is_refused(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its name is not UTF-8"):
        written(benchmark, tmp_path / os.fsdecode(b"\xff"))


def test_shards_with_seeds_are_merged_into_the_whole_job_with_seeds(benchmark: Path, tmp_path: Path) -> None:
    job = JobConfig(seeds=40)
    shards = [written(benchmark, tmp_path / f"s{at}", f"{at}/2", job=job) for at in range(2)]
    for shard in shards:
        shard.files.rollouts.touch()
    whole, merged = written(benchmark, tmp_path / "whole", job=job), JobFiles(tmp_path / "merged")

    merge_jobs([shard.files for shard in shards], merged)

    assert merged.inputs.read_bytes() == whole.files.inputs.read_bytes()
    assert seeds_of(merged) == [(0, 40), (1, 41)] * 10
    assert Manifest.load(merged.manifest).seeds == 40


@pytest.mark.parametrize(
    ("job", "change", "what"),
    [
        (JobConfig(seeds=1), {}, "first seed: none in job.json, 1 now"),
        (JobConfig(sampling={"top_p": 0.5}), {}, 'sampling parameters: {} in job.json, {"top_p":0.5} now'),
        (JobConfig(), {"prompt": {"user": "{question}!"}}, "prompt: "),
        (
            JobConfig(),
            {"verifier": {"options": {"grading_mode": "strict_single_letter_boxed"}}},
            "verifier options: {} in",
        ),
        (JobConfig(), {"num_repeats": 3}, "rollouts per task: 2 in job.json, 3 now"),
        (JobConfig(), {"agent": {"options": {"max_steps": 2}}}, 'agent options: {} in job.json, {"max_steps":2} now'),
    ],
)
def test_a_job_that_is_resumed_otherwise_is_refused_with_what_differs(
    benchmark: Path, tmp_path: Path, job: JobConfig, change: dict[str, Any], what: str
) -> None:
    written(benchmark, tmp_path / "job")
    changes = (Layer("usual", {"num_repeats": 2}), Layer("argument", change))

    with pytest.raises(UsageError) as refused:
        written(benchmark, tmp_path / "job", job=job, num_repeats=None, changes=changes)

    assert what in str(refused.value)


def test_a_prompt_of_the_users_is_for_rows_without_input(benchmark: Path, tmp_path: Path) -> None:
    own = {
        "question": "1?",
        "options": [{"A": "a"}],
        "expected_answer": "A",
        "responses_create_params": {"input": "2?"},
    }
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps(own) + "\n")
    mine = Layer("--prompt mine.yaml", {"prompt": {"user": "Mine: {question}"}})

    job = written(benchmark, tmp_path / "job", changes=(mine,))
    row = json.loads(job.files.inputs.read_text().splitlines()[0])

    assert row["responses_create_params"]["input"] == [{"role": "user", "content": "Mine: 0?"}]
    assert size_of(planned(benchmark, input=rows)) == Size(tasks=1, rollouts=2)
    with pytest.raises(DataError, match=r"own\.jsonl:1: the row has a responses_create_params\.input"):
        size_of(planned(benchmark, input=rows, changes=(mine,)))


def test_the_size_of_a_job_is_that_of_its_shard(benchmark: Path) -> None:
    assert size_of(planned(benchmark, "0/3")) == Size(tasks=4, rollouts=8)


def test_data_that_is_not_there_comes_with_the_command_that_gets_it(benchmark: Path, tmp_path: Path) -> None:
    (benchmark / "rows.jsonl").unlink()

    with pytest.raises(UsageError, match=f"run `gym-bus dataset prepare {benchmark}`"):
        planned(benchmark)
    with pytest.raises(UsageError, match="a folder, no file"):
        planned(benchmark, input=tmp_path)


def test_another_agent_gets_the_options_that_are_meant_for_it_alone(benchmark: Path) -> None:
    with (benchmark / "config.yaml").open("a") as file:
        file.write("agent: {name: own, options: {rounds: 3}}\n")
    change = Layer("argument", {"agent": {"options": {"max_steps": 2}}})

    plan = planned(benchmark, agent="simple", changes=(change,))

    assert (plan.agent, plan.agent_options) == ("simple", {"max_steps": 2})
