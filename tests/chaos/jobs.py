"""The two benchmarks of a chaos run, their recorded answers, and what each rollout must come to."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec

REFUSED, BROKEN = 400, 500
PROGRAMS = {
    1.0: "```python\ndef add(a, b):\n    return a + b\n```",
    0.0: "```python\ndef add(a, b):\n    return a - b\n```",
}

Rollout = tuple[int, int]


class Play(msgspec.Struct, frozen=True, kw_only=True):
    """A job: what the model says, and what must come of it."""

    folder: Path
    """Of the benchmark."""
    answers: Path
    """For a replay model."""
    repeats: int
    rewards: dict[Rollout, float]
    """By (task, rollout); those that cannot be scored are missing."""
    classes: dict[Rollout, str] = {}
    """Failure class of those."""
    always: dict[int, int] = {}
    """HTTP status that the model gives to a task, whatever it asks."""

    @property
    def name(self) -> str:
        """Of the benchmark, and of its model."""
        return self.folder.name

    @property
    def rollouts(self) -> set[Rollout]:
        """Every rollout of the job."""
        return {*self.rewards, *self.classes}


def choices(root: Path, rollouts: int, drawn: random.Random) -> Play:
    """Multiple choice, four rollouts a task; some tasks the model refuses, others always break it."""
    repeats = 4
    tasks = range(max(1, rollouts // repeats))
    always = dict.fromkeys(tasks[3::40], REFUSED) | dict.fromkeys(tasks[17::60], BROKEN)
    options = [{letter: f"choice {letter}"} for letter in "ABC"]
    rows = [{"question": f"No. {i}?", "options": options, "expected_answer": drawn.choice("ABC")} for i in tasks]
    given = {(task, rollout): drawn.choice("ABC") for task in tasks for rollout in range(repeats)}
    classes = {REFUSED: "request_refused", BROKEN: "model_error"}
    return Play(
        folder=_benchmark(root / "choices", "mcqa", "{question} Answer with a letter in a box.", rows),
        answers=_answers(root, "choices", [[f"\\boxed{{{given[t, r]}}}" for r in range(repeats)] for t in tasks]),
        repeats=repeats,
        rewards={at: float(x == rows[at[0]]["expected_answer"]) for at, x in given.items() if at[0] not in always},
        classes={at: classes[always[at[0]]] for at in given if at[0] in always},
        always=always,
    )


def programs(root: Path, rollouts: int, drawn: random.Random) -> Play:
    """Functions to write, two rollouts a task, judged by running them in the sandbox."""
    repeats = 2
    tasks = range(max(1, rollouts // repeats))
    test = "def check(candidate):\n    assert candidate(2, 1) == 3\n"
    rows = [
        {"task_id": f"add/{i}", "prompt": f"def add(a, b):\n    '''No. {i}.'''\n", "entry_point": "add", "test": test}
        for i in tasks
    ]
    rewards = {(task, rollout): drawn.choice((0.0, 1.0)) for task in tasks for rollout in range(repeats)}
    return Play(
        folder=_benchmark(root / "programs", "humaneval", "{prompt}", rows),
        answers=_answers(root, "programs", [[PROGRAMS[rewards[t, r]] for r in range(repeats)] for t in tasks]),
        repeats=repeats,
        rewards=rewards,
    )


def _benchmark(folder: Path, verifier: str, prompt: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"name: {folder.name}\ndomain: knowledge\nverifier: {{name: {verifier}}}\nprompt: {{user: '{prompt}'}}\n"
        f"datasets:\n  - {{name: {folder.name}, type: benchmark, jsonl_fpath: rows.jsonl}}\n"
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _answers(root: Path, name: str, texts: list[list[str]]) -> Path:
    path = root / f"{name}.answers.jsonl"
    lines = [{"task_index": task, "completions": completions} for task, completions in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
