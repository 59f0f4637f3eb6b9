"""Suite files: what wins over what, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.conftest import GymBus, Said

from gym_bus.cli.target import find_target
from gym_bus.config import Config
from gym_bus.settings import ModelConfig
from gym_bus.workers.plan import Wanted, plan_job, write_down

SUITE = """\
models: [simulated]
defaults:
  split: example
  limit: 2
  responses_create_params: {temperature: 0.6, top_p: 0.9}
benchmarks:
  gsm8k:
  hot:
    benchmark: gsm8k
    num_repeats: 3
    limit: 4
    responses_create_params:
      temperature: 1.0
    seeds: 5
    verifier:
      options: {strip_think: true}
    models: [other]
settings:
  models:
    other: {kind: simulated}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a suite in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def planned(gym_bus: GymBus, *arguments: object) -> dict[str, dict[str, Any]]:
    said = gym_bus("eval", "suite", "suite.yaml", "--dry-run", "--json", *arguments)
    assert said.code == 0, said.err
    return {job["name"]: job for job in json.loads(said.out)["jobs"]}


def test_defaults_hold_where_a_benchmark_says_nothing_else(gym_bus: GymBus, folder: Path) -> None:
    jobs = planned(gym_bus)

    plain, hot = jobs["gsm8k"], jobs["hot"]
    assert (plain["model"], plain["tasks"], plain["rollouts"], plain["seeds"]) == ("simulated", 2, 2, None)
    assert plain["sampling"] == {"temperature": 0.6, "top_p": 0.9}
    assert (hot["model"], hot["tasks"], hot["rollouts"], hot["seeds"]) == ("other", 4, 12, 5)
    assert hot["sampling"] == {"temperature": 1.0, "top_p": 0.9}
    assert (hot["split"], hot["verifier_options"], plain["verifier_options"]) == ("example", {"strip_think": True}, {})
    assert hot["output"] == "runs/suite/hot/other"
    assert not (folder / "runs").exists()


def test_arguments_win_over_the_file_and_it_over_files_of_settings(gym_bus: GymBus, folder: Path) -> None:
    (folder / "settings.yaml").write_text("job: {sampling: {temperature: 0.1, max_output_tokens: 9}, seeds: 1}\n")

    hot = planned(gym_bus, "--config", "settings.yaml")["hot"]
    told = planned(
        gym_bus, "--only", "hot", "--limit", "1", "--seeds", "2", "responses_create_params.temperature=0.2",
        "benchmark.num_repeats=8", "benchmark.verifier.options.strip_think=false", "suite.name=mine",
    )  # fmt: skip

    assert (hot["sampling"], hot["seeds"]) == ({"temperature": 1.0, "top_p": 0.9, "max_output_tokens": 9}, 5)
    assert list(told) == ["hot"]
    hot = told["hot"]
    assert (hot["tasks"], hot["num_repeats"], hot["seeds"]) == (1, 8, 2)
    assert (hot["sampling"]["temperature"], hot["verifier_options"]) == (0.2, {"strip_think": False})
    assert hot["output"] == "runs/mine/hot/other"


def test_a_suite_may_build_on_another_and_names_files_beside_itself(gym_bus: GymBus, folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "suite.yaml").rename(folder / "base" / "usual.yaml")
    (folder / "prompt.yaml").write_text("user: '{question}!'\n")
    (folder / "suite.yaml").write_text(
        "config_paths: [base/usual.yaml]\nbenchmarks: {hot: {limit: 1, prompt: prompt.yaml}}\n"
    )

    jobs = planned(gym_bus)

    assert (jobs["hot"]["tasks"], jobs["hot"]["num_repeats"], jobs["gsm8k"]["tasks"]) == (1, 3, 2)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("num_repeats: 3", "num_repeat: 3", "suite.yaml:10: unknown key 'benchmarks.hot.num_repeat': did you mean"),
        ("num_repeats: 3", "num_repeats: x", "suite.yaml:10: key 'benchmarks.hot.num_repeats': expected `int"),
        ("seeds: 5", "seeds: -1", "suite.yaml:14: key 'benchmarks.hot.seeds'"),
        ("benchmark: gsm8k", "benchmark: gsm8q", "suite.yaml:8: key 'benchmarks.hot': unknown benchmark 'gsm8q'"),
        ("[other]", "[othr]", "suite.yaml:17: key 'benchmarks.hot.models': unknown model 'othr': did you mean 'other'"),
        ("temperature: 1.0", "temperatur: 1.0", "suite.yaml:13: responses_create_params: unknown key 'temperatur'"),
        ("temperature: 1.0", "temperature: x", "suite.yaml:13: responses_create_params.temperature: expected a number"),
        ("strip_think: true", "strip_thik: true", "suite.yaml:8: key 'benchmarks.hot': verifier 'math': unknown"),
        ("verifier:", "verifer:", "suite.yaml:15: unknown key 'benchmarks.hot.verifer': did you mean 'verifier'"),
        ("split: example", "split: exmple", "suite.yaml:7: key 'benchmarks.gsm8k': benchmark 'gsm8k' has no dataset"),
        ("split: example", "prompt: none.yaml", "suite.yaml:3: no file 'none.yaml'"),
        ("other: {kind: simulated}", "other: {kid: simulated}", "suite.yaml:20: unknown key 'models.other.kid'"),
        ("models: [simulated]\n", "models: []\n", "suite.yaml:7: key 'benchmarks.gsm8k': no models"),
        ("  hot:", "  hot/x:", "suite.yaml:8: key 'benchmarks.hot/x'"),
        ("seeds: 5", "seeds: ???", "missing values: benchmarks.hot.seeds (suite.yaml:14)"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_file_line_and_key(
    gym_bus: GymBus, folder: Path, old: str, new: str, what: str
) -> None:
    (folder / "suite.yaml").write_text(SUITE.replace(old, new, 1))

    said = gym_bus("eval", "suite", "suite.yaml", "--dry-run")

    assert said.code == 2
    assert what in said.err


def test_all_parts_that_cannot_be_run_are_named_at_once(gym_bus: GymBus, folder: Path) -> None:
    (folder / "suite.yaml").write_text(
        SUITE.replace("  gsm8k:", "  gsm8k: {models: [non]}").replace("[other]", "[oter]")
    )

    said = gym_bus("eval", "suite", "suite.yaml")

    assert said.code == 2
    assert "unknown model 'non'" in said.err
    assert "unknown model 'oter'" in said.err


def test_a_mistake_that_concerns_several_parts_is_named_once(gym_bus: GymBus, folder: Path) -> None:
    (folder / "suite.yaml").write_text("models: [simulatd]\nbenchmarks: {gsm8k: {limit: 1}, math500: {limit: 1}}\n")

    assert gym_bus("eval", "suite", "suite.yaml", "--dry-run").err.count("unknown model 'simulatd'") == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--only", "hott"], "--only hott: no such benchmark in the suite: did you mean 'hot'"),
        (["suite.jobs=1"], "argument suite.jobs=...: unknown key 'jobs': did you mean 'jobs_at_once'"),
        (["benchmark.verifer.name=mcqa"], "argument benchmark.verifer.name=...: unknown key 'verifer'"),
        (["--no-workers"], "--no-workers needs --nats"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(gym_bus: GymBus, arguments: list[str], what: str) -> None:
    said: Said = gym_bus("eval", "suite", "suite.yaml", "--dry-run", *arguments)

    assert said.code == 2
    assert what in said.err


def test_a_job_of_a_suite_is_found_by_its_id() -> None:
    wanted = Wanted(benchmark="gsm8k", model="m", split="example")
    plan = plan_job(wanted, Config(models={"m": ModelConfig(kind="simulated")}))
    job = write_down(plan, Path("runs/nightly/gsm8k/m"))

    assert find_target(job.record.job).folder == Path("runs/nightly/gsm8k/m")
