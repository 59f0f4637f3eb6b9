"""The command line as a user runs it: real processes, real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GYM_BUS = [sys.executable, "-m", "gym_bus.cli.main"]
LIMIT_S = 250


class Cli:
    """Runs commands in a folder of the test's own; whatever is still running at the end is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[str]] = []

    def run(self, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*GYM_BUS, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert code is None or done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str, code: int | None = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code).stdout)

    def start(self, *arguments: str, until: str = "") -> subprocess.Popen[str]:
        """Start a command and wait for a line of its output that contains `until`."""
        process = subprocess.Popen(
            [*GYM_BUS, *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._running.append(process)
        assert process.stdout
        while until:
            line = process.stdout.readline()
            assert line, f"{arguments} ended before it said {until!r}"
            if until in line:
                process.said = line.strip()  # type: ignore[attr-defined]
                break
        return process

    def stop_all(self) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
            if process.stdout:
                process.stdout.close()


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    made = Cli(tmp_path)
    yield made
    made.stop_all()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def choices(tmp_path: Path) -> Path:
    """A benchmark folder: 300 multiple-choice questions, every third answered by A."""
    folder = tmp_path / "choices"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "name: choices\ndomain: knowledge\nverifier: {name: mcqa}\n"
        'prompt: {user: "{question} Answer with the letter in a box."}\n'
        "datasets:\n  - {name: choices, type: benchmark, jsonl_fpath: rows.jsonl}\n"
    )
    options = [{letter: f"choice {letter}"} for letter in "ABC"]
    rows = [{"question": f"Question {i}?", "options": options, "expected_answer": "ABC"[i % 3]} for i in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def wait_for(condition: object, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "never true"
        time.sleep(0.02)
