"""Merging shards and copies: the union of their files, and what they contradict each other in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.errors import DataError, UsageError
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.merge import merge_jobs
from gym_bus.results.profile import profile_job


def row(task: int, index: int, **fields: Any) -> dict[str, Any]:
    return {"_ng_task_index": task, "_ng_rollout_index": index, "agent_ref": {"name": "simple"}, **fields}


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def job(
    folder: Path,
    inputs: list[dict[str, Any]],
    rollouts: list[dict[str, Any]],
    failures: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> JobFiles:
    folder.mkdir()
    files = JobFiles(folder)
    for path, rows in ((files.inputs, inputs), (files.rollouts, rollouts), (files.failures, failures or [])):
        if rows or path == files.rollouts:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults: dict[str, Any] = dict.fromkeys(
        ("benchmark", "dataset_digest", "agent", "model", "model_kind", "model_name", "verifier", "config_digest"), "x"
    )
    defaults |= {"job": folder.name, "created_at": 0.0, "rows": 1, "num_repeats": 2, "gym_bus_version": "0"}
    if changes.get("manifest", True):
        Manifest(**(defaults | changes)).save(files.manifest)
    return files


def shards(tmp_path: Path) -> list[JobFiles]:
    return [
        job(
            tmp_path / f"s{at}",
            [row(task, i, q=task) for task in range(at, 4, 2) for i in range(2)],
            [row(task, i, reward=float(i)) for task in range(at, 4, 2) for i in reversed(range(2))],
            shard=f"{at}/2",
            shard_of="all",
            dataset_digest=f"d{at}",
        )
        for at in range(2)
    ]


def test_shards_become_one_job_in_order(tmp_path: Path) -> None:
    into = JobFiles(tmp_path / "all")

    merged = merge_jobs(shards(tmp_path)[::-1], into)

    assert (merged.jobs, merged.rollouts, merged.repeated, merged.missing_shards) == (2, 8, 0, [])
    keys = [(r["_ng_task_index"], r["_ng_rollout_index"]) for r in read(into.inputs)]
    assert keys == [(task, i) for task in range(4) for i in range(2)]
    assert len(read(into.rollouts)) == 8
    manifest = Manifest.load(into.manifest)
    assert (manifest.rows, manifest.shard, sorted(manifest.merged)) == (4, "", ["s0", "s1"])
    assert profile_job(into).counts.scored == 8


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    assert merge_jobs(shards(tmp_path)[1:], JobFiles(tmp_path / "all")).missing_shards == ["0/2"]


def test_a_rollout_that_is_the_same_in_both_counts_once(tmp_path: Path) -> None:
    a = job(tmp_path / "a", [row(0, 0), row(0, 1)], [row(0, 0, reward=1.0), row(0, 1, reward=0.0)])
    b = job(tmp_path / "b", [row(0, 0), row(0, 1)], [row(0, 1, reward=0.0)])
    reordered = dict(reversed(row(0, 1, reward=0.0).items()))
    c = job(tmp_path / "c", [row(0, 0), row(0, 1)], [reordered])

    merged = merge_jobs([a, b, c], JobFiles(tmp_path / "all"))

    assert (merged.rollouts, merged.repeated) == (2, 2)
    assert len(read(JobFiles(tmp_path / "all").inputs)) == 2


@pytest.mark.parametrize("file", ["rollouts", "inputs"])
def test_a_contradiction_is_named_with_both_its_lines(tmp_path: Path, file: str) -> None:
    a = job(tmp_path / "a", [row(0, 0), row(0, 1)], [row(0, 0, reward=1.0), row(0, 1, reward=0.0)])
    inputs = [row(0, 1, **({"question": "other"} if file == "inputs" else {}))]
    b = job(tmp_path / "b", inputs, [row(0, 1, reward=1.0)])
    name = getattr(a, file).name

    with pytest.raises(DataError, match=rf"b/{name}:1: another \w+ of task 0, rollout 1 than in .*a/{name}:2"):
        merge_jobs([a, b], JobFiles(tmp_path / "all"))
    assert not JobFiles(tmp_path / "all").rollouts.exists()


def test_a_rollout_that_failed_here_and_was_scored_there_is_scored(tmp_path: Path) -> None:
    failed = {"_ng_failure_class": "deadline"}
    a = job(tmp_path / "a", [row(0, 0)], [], [row(0, 0, **failed)])
    b = job(tmp_path / "b", [row(0, 0)], [row(0, 0, reward=1.0)], [row(0, 0, **failed, other=1)])
    into = JobFiles(tmp_path / "all")

    merge_jobs([a, b], into)

    assert len(read(into.failures)) == 1  # the first failure of that attempt
    assert (profile_job(into).counts.scored, profile_job(into).counts.failed) == (1, 0)


def test_jobs_of_different_runs_are_refused(tmp_path: Path) -> None:
    a = job(tmp_path / "a", [row(0, 0)], [])
    b = job(tmp_path / "b", [row(1, 0)], [], verifier="another", dataset_digest="y", rows=9)

    with pytest.raises(UsageError, match=r"b is of another run than .*a; what differs: verifier: x in .*a, another in"):
        merge_jobs([a, b], JobFiles(tmp_path / "all"))


def test_a_job_without_a_manifest_does_not_join_others(tmp_path: Path) -> None:
    a, b = (job(tmp_path / name, [row(0, 0)], []) for name in "ab")
    b.manifest.unlink()

    with pytest.raises(UsageError, match=r"b: no job\.json"):
        merge_jobs([a, b], JobFiles(tmp_path / "all"))


def test_nemo_gyms_files_are_merged_without_manifests_inputs_and_failures(tmp_path: Path) -> None:
    for name, tasks in (("one", (0, 1)), ("two", (1, 2))):
        lines = [row(task, 0, reward=1.0) for task in tasks]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    merged = merge_jobs(
        [JobFiles.found_at(tmp_path / f"{name}.jsonl") for name in ("one", "two")], JobFiles(tmp_path / "all")
    )

    assert (merged.rollouts, merged.repeated) == (3, 1)
    assert not JobFiles(tmp_path / "all").manifest.exists()
    assert profile_job(JobFiles(tmp_path / "all")).counts.expected == 3


def test_a_torn_last_line_is_left_behind(tmp_path: Path) -> None:
    a, b = shards(tmp_path)
    with a.rollouts.open("a") as file:
        file.write('{"_ng_task')

    assert merge_jobs([a, b], JobFiles(tmp_path / "all")).rollouts == 8


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["rollouts.jsonl", "other.jsonl"], "rollouts"),
        (["mine.jsonl", "mine_materialized_inputs.jsonl", "mine_failures.jsonl"], "mine"),
        (["mine.jsonl", "mine_reward_profiling.jsonl"], "mine"),
    ],
)
def test_the_rollouts_of_a_folder_are_found_whatever_their_name(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / name).touch()

    assert JobFiles.found_at(tmp_path).stem == found


def test_a_folder_of_jobs_stands_for_all_of_them(tmp_path: Path) -> None:
    places = [tmp_path / "gsm8k" / "a", tmp_path / "gsm8k" / "b", tmp_path / "single"]
    for place in places:
        place.mkdir(parents=True)
        (place / "rollouts.jsonl").touch()
    (tmp_path / "one.jsonl").touch()
    (tmp_path / "other.jsonl").touch()

    assert {at.folder for at in JobFiles.all_at(tmp_path)} == set(places)
    assert [at.folder for at in JobFiles.all_at(places[0])] == [places[0]]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [([], "no rollouts file"), (["a.jsonl", "b.jsonl"], r"name one of its rollouts files: a\.jsonl, b\.jsonl")],
)
def test_a_folder_without_one_rollouts_file_is_refused(tmp_path: Path, names: list[str], complaint: str) -> None:
    for name in names:
        (tmp_path / name).touch()

    with pytest.raises(UsageError, match=complaint):
        JobFiles.found_at(tmp_path)
    with pytest.raises(UsageError, match="no such file or folder"):
        JobFiles.found_at(tmp_path / "none")


def test_lines_with_half_a_character_are_merged_and_known_again(tmp_path: Path) -> None:
    said = row(0, 0, reward=1.0, note="half \ud83d", spread=float("nan"))
    jobs = [
        job(tmp_path / name, [row(0, 0)], [dict(reversed(said.items()))] if name == "b" else [said]) for name in "ab"
    ]

    merged = merge_jobs(jobs, JobFiles(tmp_path / "all"))

    assert (merged.rollouts, merged.repeated) == (1, 1)
    assert profile_job(JobFiles(tmp_path / "all")).counts.scored == 1
