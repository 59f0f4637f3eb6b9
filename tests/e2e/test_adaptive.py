"""Repeats as they are needed, through the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from e2e.conftest import Cli, rows_of


def rounds_of(folder: Path) -> list[object]:
    plan = folder / "adaptive.json"
    rounds: list[object] = json.loads(plan.read_text())["rounds"] if plan.exists() else []
    return rounds


@pytest.mark.slow
def test_a_run_until_pass_at_1_is_known_survives_a_kill_between_its_rounds(cli: Cli, choices: Path) -> None:
    answers = "models.simulated.simulated.text=['\\boxed{A}','\\boxed{B}']"  # a third of the tasks is never right
    slow = "models.simulated.simulated.latency_s.mean=0.2"
    command = ["eval", "run", str(choices), "--model", "simulated", "--limit", "60", "--output", "out", answers]
    aim = ["--until-ci", "0.08", "--budget", "2000"]
    out = cli.folder / "out"
    process = cli.start(*command, *aim, slow, "--concurrency", "16")
    deadline = time.monotonic() + 60
    while len(rounds_of(out)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(60)
    planned = rounds_of(out)

    summary = cli.json(*command, *aim)

    known = summary["until_ci"]
    assert (known["ended"], known["half_width"] <= 0.08) == ("reached", True)
    assert known["low"] - 0.1 <= 1 / 3 <= known["high"] + 0.1  # one interval of 95 % in twenty misses what it is for
    assert rounds_of(out)[: len(planned)] == planned
    keys = [(r["_ng_task_index"], r["_ng_rollout_index"]) for r in rows_of(out / "rollouts.jsonl")]
    assert len(keys) == len(set(keys)) == summary["scored"] == known["rollouts"] > 120
    counts = [sum(task == at for task, _ in keys) for at in range(60)]
    assert sum(counts[2::3]) < sum(counts[0::3])  # what is never right is asked less
    assert cli.run("audit", "out").stdout.strip().endswith("it adds up")
