"""What must hold when the dust has settled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from chaos.jobs import Play


def faults_of(play: Play, files: Path) -> list[str]:
    """Everything that is wrong with a finished job's files; empty where nothing is."""
    scored, failed = _rows(files / "rollouts.jsonl"), _rows(files / "rollouts_failures.jsonl")
    faults = [
        f"{play.name}: {rollout} attempt {attempt} has {count} lines"
        for (*rollout, attempt), count in Counter(_attempt(row) for row in [*scored, *failed]).items()
        if count > 1
    ]
    rewards = {_rollout(row): row["reward"] for row in scored}
    classes = {_rollout(row): row["_ng_failure_class"] for row in failed if _rollout(row) not in rewards}
    if len(rewards) != len(scored):
        faults.append(f"{play.name}: {len(scored)} scored lines for {len(rewards)} rollouts")
    if gone := play.rollouts - rewards.keys() - classes.keys():
        faults.append(f"{play.name}: {len(gone)} without a line: {sorted(gone)[:20]}")
    faults += [
        f"{play.name}: {rollout} came to {_outcome(rollout, rewards, classes)}, "
        f"expected {_outcome(rollout, play.rewards, play.classes)}"
        for rollout in sorted(rewards.keys() | classes.keys())
        if _outcome(rollout, rewards, classes) != _outcome(rollout, play.rewards, play.classes)
    ]
    faults += [f"{play.name}: a failure with a reward: {_rollout(row)}" for row in failed if "reward" in row]
    return faults


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _rollout(row: dict[str, Any]) -> tuple[int, int]:
    return row["_ng_task_index"], row["_ng_rollout_index"]


def _attempt(row: dict[str, Any]) -> tuple[int, int, int]:
    return *_rollout(row), row.get("_ng_attempt_index", 0)


def _outcome(rollout: tuple[int, int], rewards: dict[Any, float], classes: dict[Any, str]) -> float | str:
    return rewards[rollout] if rollout in rewards else classes.get(rollout, "nothing")
