"""The profile of a NeMo Gym run beside pandas, which NeMo Gym computes its own with."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from nemogym import message, response, write_lines

from gym_bus.results.files import JobFiles
from gym_bus.results.profile import profile_job

TASK, ROLLOUT = "_ng_task_index", "_ng_rollout_index"


def the_run(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Two agents, tasks of one to four rollouts, fields that some rows lack or have as null; returns its results."""
    draw = random.Random(seed)
    inputs: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for task in range(9):
        for rollout in range(draw.randint(1, 4)):
            key = {TASK: task, ROLLOUT: rollout, "agent_ref": {"name": f"agent-{(task + 1) % 2}"}}
            inputs.append({**key, "question": "half \ud83d", "level": task})
            answered = response(message("x"))
            answered["usage"] = draw.choice([None, answered["usage"] | {"output_tokens": draw.randint(1, 99)}])
            fields = {
                "judged": draw.choice([True, False]),
                "library_reward": draw.choice([draw.random(), None]),
                "turns": draw.randint(0, 5),
                "seed": 2**62 + task,
                "extracted_answer": draw.choice(["A", None]),
                "nested": {"number": 1},
                "spread": float("nan"),
            }
            some = {name: value for name, value in fields.items() if draw.random() < 0.8}
            results.append({**key, "response": answered, "reward": draw.choice([0.0, 0.98, 1.0]), **some})
    draw.shuffle(results)
    write_lines(folder / "rollouts_materialized_inputs.jsonl", inputs)
    write_lines(folder / "rollouts.jsonl", results)
    failed = {**inputs[0], ROLLOUT: 0, "reward": 0.0, "_ng_failure_class": "judge_failed", "turns": 99}
    write_lines(folder / "rollouts_failures.jsonl", [failed])
    return results


def numbers_of(result: dict[str, Any]) -> dict[str, float]:
    row = result | (result["response"]["usage"] or {})
    return {name: float(value) for name, value in row.items() if isinstance(value, bool | int | float)}


def described(rows: pd.DataFrame) -> dict[str, float]:
    """NeMo Gym's statistics of some rows."""
    rows = rows.drop(columns=[TASK, ROLLOUT]).dropna(axis="columns", how="all")
    spread = rows.std()
    if spread.isna().all():
        spread = spread.where(rows.isna().any(), 0.0)
    statistics = {"mean": rows.mean(), "max": rows.max(), "min": rows.min(), "median": rows.median(), "std": spread}
    return {
        f"{what}/{name}": float(value)
        for what, values in statistics.items()
        for name, value in values.items()
        if not math.isnan(value)
    }


def metrics_in(found: dict[str, Any]) -> dict[str, float]:
    kinds = ("mean/", "max/", "min/", "median/", "std/", "histogram/")
    return {name: value for name, value in found.items() if name.startswith(kinds)}


@pytest.mark.parametrize("seed", range(5))
def test_names_and_numbers_are_those_of_pandas(tmp_path: Path, seed: int) -> None:
    results = the_run(tmp_path, seed)
    table = pd.DataFrame.from_records([numbers_of(result) for result in results])
    agents = pd.Series([result["agent_ref"]["name"] for result in results])

    profile = profile_job(JobFiles(tmp_path))

    tasks = [json.loads(line) for line in (tmp_path / "rollouts_reward_profiling.jsonl").read_text().splitlines()]
    for task in tasks:
        rows = table[table[TASK] == task[TASK]]
        assert metrics_in(task) == pytest.approx(described(rows), rel=1e-9)
        infos = sorted((numbers_of(r) for r in results if r[TASK] == task[TASK]), key=lambda info: info[ROLLOUT])
        told = [{name: value for name, value in info.items() if name != "rollout_id"} for info in task["rollout_infos"]]
        assert told == [{name: v for name, v in info.items() if not math.isnan(v)} for info in infos]
        assert [info["rollout_id"] for info in task["rollout_infos"]] == [
            f"{task[TASK]}:{int(info[ROLLOUT])}" for info in infos
        ]
        counts = ("num_rollouts", "expected_num_rollouts", "missing_num_rollouts", "reward_profile_completion_pct")
        assert [task[name] for name in counts] == [len(rows), len(rows), 0, 100.0]
        assert task["sample"] == {"agent_ref": {"name": f"agent-{(task[TASK] + 1) % 2}"}} | {
            "question": "half \ufffd",
            "level": task[TASK],
        }
    assert [task[TASK] for task in tasks] == list(range(9))
    entries = json.loads((tmp_path / "rollouts_agent_metrics.json").read_text())
    for entry in entries:
        rows = table[agents == entry["agent_ref"]["name"]]
        assert metrics_in(entry) == pytest.approx(described(rows), rel=1e-9)
    assert [entry["agent_ref"]["name"] for entry in entries] == ["agent-0", "agent-1"]
    assert [agent.agent for agent in profile.agents] == ["agent-1", "agent-0"]  # by task
