"""What every built-in benchmark must have; what is its own is tested in its folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gym_bus.agents.registry import AGENTS
from gym_bus.benchmarks.dataset import load_rows, materialize
from gym_bus.benchmarks.prepare import Source, load_prepare_module
from gym_bus.benchmarks.spec import data_path, list_benchmarks, load_benchmark
from gym_bus.verifiers.registry import VERIFIERS

WITHOUT_CHECKSUM = {"HumanEvalPlus.jsonl.gz", "MbppPlus.jsonl.gz"}
NAMES = [info.name for info in list_benchmarks(Path("nowhere"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_has_its_papers(name: str) -> None:
    folder = load_benchmark(name).folder

    assert (folder / "README.md").read_text().startswith("# ")
    assert len((folder / "data" / "LICENSE").read_text()) > 100
    assert list(folder.glob("tests/test_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_its_agent_and_verifier_are_registered(name: str) -> None:
    spec = load_benchmark(name).spec

    assert spec.agent.name in AGENTS
    assert spec.verifier.name in VERIFIERS


@pytest.mark.parametrize("name", NAMES)
def test_it_has_five_example_rows_that_can_be_run_and_judged_and_a_replay_of_each(name: str) -> None:
    benchmark = load_benchmark(name)
    path = data_path(benchmark, Path(), "example")
    required = VERIFIERS.load(benchmark.spec.verifier.name).required

    tasks = list(materialize(path, agent="simple", prompt=benchmark.spec.prompt, required=required))
    replay = [row for _, row in load_rows(path.with_name("example_replay.jsonl"))]

    assert [task.task_index for task in tasks] == [0, 1, 2, 3, 4]
    assert [int(bytes(row["task_index"])) for row in replay] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_that_is_prepared_has_a_public_source_a_checksum_and_a_licence(name: str) -> None:
    benchmark = load_benchmark(name)
    prepared = [dataset for dataset in benchmark.spec.datasets if dataset.prepare_script]

    for dataset in prepared:
        sources: dict[str, Source] = load_prepare_module(benchmark, dataset).SOURCES
        source = sources[dataset.name]
        assert source.url.startswith("https://")
        assert bool(source.sha256) is (source.file not in WITHOUT_CHECKSUM)
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in source.sha256)
        assert source.licence
        assert dataset.license
