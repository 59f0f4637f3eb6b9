"""The job's manifest: read and written whole, and precise about what differs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gym_bus.errors import DataError, UsageError
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest, differences, new_job_id
from gym_bus.subjects import token


def manifest(**changes: Any) -> Manifest:
    defaults: dict[str, Any] = {
        "job": "aime24-20260131-9f3a6c",
        "created_at": 1000.5,
        "benchmark": "aime24",
        "dataset_digest": "1a2b3c4d" * 8,
        "rows": 30,
        "num_repeats": 4,
        "agent": "simple",
        "agent_options": {"max_steps": 3},
        "model": "small",
        "model_kind": "openai",
        "model_name": "org/small-7b",
        "verifier": "math",
        "config_digest": "00ff00ff" * 8,
        "gym_bus_version": "0.1.0",
    }
    return Manifest(**(defaults | changes))


def test_a_saved_manifest_loads_as_it_was(tmp_path: Path) -> None:
    path = JobFiles(tmp_path).manifest

    manifest().save(path)

    assert path.name == "job.json"
    assert Manifest.load(path) == manifest()
    assert path.read_bytes().endswith(b"}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["job.json"]


def test_saving_replaces_the_old_manifest(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    manifest().save(path)

    manifest(rows=7).save(path)

    assert Manifest.load(path).rows == 7


def test_a_manifest_that_cannot_be_written_names_its_path_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "job.json"
    blocked.mkdir()

    with pytest.raises(UsageError, match=r"job\.json: cannot be written"):
        manifest().save(blocked)

    assert [p.name for p in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        (b"", "not a job manifest"),
        (b'{"job": "a"', "not a job manifest"),
        (b'{"job": 7}', "job"),
        (b'{"job": "a"}', "missing required field"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "job.json"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(DataError, match=rf"job\.json: .*{complaint}"):
        Manifest.load(path)


def test_id_date_and_version_do_not_make_another_job() -> None:
    assert differences(manifest(), manifest(job="other", created_at=2.0, gym_bus_version="9")) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset_digest": "3c4d" * 16}, "dataset digest: 1a2b3c4d.. in job.json, 3c4d3c4d.. now"),
        ({"num_repeats": 8}, "rollouts per task: 4 in job.json, 8 now"),
        ({"agent_options": {}}, 'agent options: {"max_steps":3} in job.json, {} now'),
        (
            {"model_name": "org/large"},
            "the endpoint's model or file of recorded answers: org/small-7b in job.json, org/large now",
        ),
        ({"verifier_digest": "ab" * 32}, "verifier digest: none in job.json, abababab.. now"),
    ],
)
def test_each_difference_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    assert differences(manifest(), manifest(**change)) == [sentence]


def test_every_field_but_four_is_compared() -> None:
    free = {"job", "created_at", "gym_bus_version", "merged"}
    for field in msgspec.structs.fields(Manifest):
        value = getattr(manifest(), field.name)
        changed = {str: "changed", int: 999, float: 9.5, dict: {"changed": 1}, list: ["x"], type(None): 1}[type(value)]
        found = differences(manifest(), manifest(**{field.name: changed}))
        assert len(found) == (field.name not in free), field.name


@pytest.mark.parametrize("benchmark", ["aime24", "my bench/v2.0", "übung", "...", "x" * 300, "-_-"])
def test_a_job_id_is_a_readable_subject_token_and_fresh(benchmark: str) -> None:
    first, second = new_job_id(benchmark), new_job_id(benchmark)

    assert token(first) == first
    assert first != second
    assert re.search(r"-\d{8}-[0-9a-f]{6}$", first)


def test_a_job_id_begins_with_its_benchmark() -> None:
    assert new_job_id("my bench/v2.0").startswith("my-bench-v2-0-")
