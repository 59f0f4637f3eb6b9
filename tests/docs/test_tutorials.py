"""The tutorials, followed to the letter: files are written and commands run in the order of the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from docs.test_docs import BLOCK, TUTORIALS

BIN = Path(sys.executable).parent
LIMIT_S = 250


def follow(page: Path, folder: Path) -> list[str]:
    """Do what the page says in `folder`; returns what each block of commands printed."""
    said = []
    for block in BLOCK.finditer(page.read_text()):
        if block["file"]:
            (folder / block["file"]).write_text(block["text"])
        elif block["kind"] == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block["text"]],
                cwd=folder,
                env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            assert done.returncode == 0, f"{block['text']}\n{done.stdout}\n{done.stderr}"
            said.append(done.stdout)
    return said


def rewards_in(folder: Path) -> list[float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    return sorted(row["reward"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_leads_to_what_it_promises(page: Path, tmp_path: Path) -> None:
    said = "\n".join(follow(page, tmp_path))

    promised = {
        "native-benchmark": ("runs/sort_words", [0.0] * 5 + [1.0] * 5, "answers_listed does not hold"),
        "external-benchmark": ("runs/json_facts", [0.0] + [1.0] * 4, "fit to be handed in"),
    }
    runs, rewards, words = promised[page.stem]
    assert rewards_in(tmp_path / runs) == rewards
    assert words in said
    assert said.count("coverage of") == 2
