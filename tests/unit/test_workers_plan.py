"""Writing jobs down: shards of one data set, and what they have in common."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gym_bus.config import Config
from gym_bus.errors import UsageError
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.merge import merge_jobs
from gym_bus.settings import ModelConfig
from gym_bus.workers.plan import Job, Shard, Wanted, plan_job, write_down


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


def written(benchmark: Path, output: Path, shard: str | None = None) -> Job:
    config = Config(models={"m": ModelConfig(kind="simulated")})
    wanted = Wanted(benchmark=str(benchmark), model="m", num_repeats=2, shard=Shard.parse(shard) if shard else None)
    return write_down(plan_job(wanted, config), output)


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
