"""`gym-bus eval profile|aggregate|compare` as they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gym_bus.cli import eval as eval_cli
from gym_bus.cli.adaptive import take_aim
from gym_bus.errors import UsageError


def call(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(eval_cli.command, [str(one) for one in arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    assert result.return_value == code
    return result


def row(task: int, index: int, reward: float, **fields: Any) -> dict[str, Any]:
    key = {"_ng_task_index": task, "_ng_rollout_index": index, "agent_ref": {"name": "simple"}}
    return {**key, "level": "even" if task % 2 == 0 else "odd", "reward": reward, **fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A NeMo Gym run under a name of its user's, without inputs and failures."""
    (tmp_path / "nemo").mkdir()
    rows = [row(task, i, float((task + i) % 3 > 0), extracted_answer="AB"[i]) for task in range(6) for i in range(2)]
    (tmp_path / "nemo" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "nemo"


def test_a_profile_shows_its_denominators_and_the_subsets(folder: Path) -> None:
    said = call("profile", folder, "--by", "level").stdout

    assert "12 of 12 scored (100.0 %)" in said
    assert "pass@1 " in said and "pass^2" in said and "majority@2" in said and "no answer" in said
    assert "even" in said and "odd" in said
    assert (folder / "mine_reward_profiling.jsonl").exists()
    assert json.loads((folder / "mine_agent_metrics.json").read_text())[0]["mean/reward"] == pytest.approx(8 / 12)


def test_a_profile_for_programs_has_everything(folder: Path) -> None:
    found = json.loads(call("profile", folder / "mine.jsonl", "--json", "--answer-key", "extracted_answer").stdout)

    (agent,) = found["agents"]
    assert agent["estimates"]["pass@2"]["tasks"] == 6
    assert "majority@1/accuracy" in agent["agent_metrics"]
    assert found["counts"]["scored"] == 12


def test_a_file_of_nemo_gyms_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    theirs = folder / "mine_aggregate_metrics.json"
    theirs.write_text('[{"agent_ref": {"name": "simple"}, "agent_metrics": {}}]')

    with pytest.raises(UsageError, match="written by NeMo Gym; say where ours go"):
        call("profile", folder)
    call("profile", folder, "--output", tmp_path / "ours")

    assert "gym_bus" not in theirs.read_text()
    assert (tmp_path / "ours" / "mine_aggregate_metrics.json").exists()


def test_several_files_are_merged_and_profiled(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "mine.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:8]), ("b", lines[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    arguments = ("aggregate", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "all")

    said = call(*arguments).stdout

    assert "merged 12 rollouts of 2 files, 2 of them in several" in said
    assert "12 of 12 scored" in said
    with pytest.raises(UsageError, match="there are rollouts in it"):
        call(*arguments)
    assert json.loads(call(*arguments, "--overwrite", "--json").stdout)["repeated"] == 2


def test_a_folder_is_not_merged_into_itself(folder: Path) -> None:
    with pytest.raises(UsageError, match="one of the folders to merge"):
        call("aggregate", folder, "--output", folder)


def test_a_comparison_is_told_in_words(folder: Path, tmp_path: Path) -> None:
    better = (folder / "mine.jsonl").read_text().replace('"reward": 0.0', '"reward": 1.0')
    (tmp_path / "better.jsonl").write_text(better)

    result = call("compare", folder, tmp_path / "better.jsonl", "--by", "level", "--flips", "2")

    assert "+33.33 points (95 % interval" in result.stdout
    assert "tasks better in B: 4, worse: 0" in result.stdout
    assert "changed tasks, 2 of 4" in result.stdout
    assert "by level: what adds up" in result.stdout
    assert "WARNING: a job has no materialized inputs" in result.stderr


def test_a_comparison_for_programs_lists_every_flip(folder: Path) -> None:
    found = json.loads(call("compare", folder, folder, "--json").stdout)

    assert (found["difference"]["difference"], found["difference"]["p_value"]) == (0.0, 1.0)
    assert (found["flips"], found["pairing"]["paired"]) == ([], 6)


@pytest.mark.parametrize("limit", ["--budget", "--max-repeats"])
def test_limits_without_an_aim_are_refused(limit: str) -> None:
    with pytest.raises(UsageError, match="the limits of --until-ci"):
        call("run", "gsm8k", "--model", "simulated", limit, "5")


def test_a_variance_is_an_aim_too() -> None:
    options = {"until_ci": None, "until_variance": 0.0001, "budget": 50, "max_repeats": None, "other": 1}

    aim = take_aim(options)

    assert aim and (aim.half_width, aim.most.rollouts) == (pytest.approx(0.0196, abs=1e-5), 50)
    assert options == {"other": 1}


def test_two_aims_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="give one of them"):
        call("run", "gsm8k", "--model", "simulated", "--until-ci", "0.1", "--until-variance", "0.01")
