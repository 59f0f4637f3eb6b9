"""A suite: several benchmarks times several models by one command, with a folder's own tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.conftest import Cli, rows_of

TOOLS = '''
class Cellar:
    """A cellar that knows its row."""

    def __init__(self, row, rollout):
        self._row = row

    def names(self):
        return ("look",)

    async def call(self, name, arguments):
        return bytes(self._row["expected_answer"]).decode().strip('"') + " is there"

    async def close(self):
        pass
'''

SUITE = """\
# suite.yaml
models: [simulated, recorded]
benchmarks:
  choices:
    benchmark: ./choices
    num_repeats: 2
    limit: 3
    seeds: 7
    responses_create_params: {temperature: 0.5}
    prompt: short.yaml
  cellar:
    benchmark: ./cellar
settings:
  models:
    recorded: {kind: replay, file: answers.jsonl}
"""


@pytest.fixture
def suite(cli: Cli, choices: Path) -> Path:
    """Beside `choices` a benchmark with tools of its own, and a suite of both."""
    folder = cli.folder / "cellar"
    folder.mkdir()
    (folder / "tools.py").write_text(TOOLS)
    (folder / "config.yaml").write_text(
        "name: cellar\ndomain: games\nverifier: {name: string_match}\ntoolbox: {name: cellar, code: tools.py:Cellar}\n"
        "prompt: {user: '{question}'}\ndatasets:\n  - {name: rows, type: benchmark, jsonl_fpath: rows.jsonl}\n"
    )
    rows = [{"question": f"What is in cellar {i}?", "expected_answer": f"wine {i}"} for i in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (cli.folder / "short.yaml").write_text("user: 'In short: {question}'\n")
    call = {"type": "function_call", "id": "f", "call_id": "c", "name": "look", "arguments": "{}"}
    answers: list[dict[str, object]] = [
        {"prompt": f"In short: Question {i}?", "completions": [f"\\boxed{{{letter}}}"] * 2}
        for i, letter in enumerate("AB")  # the third question has no answer: its rollouts fail
    ]
    for i in range(2):
        content = [{"type": "output_text", "text": f"wine {i}", "annotations": []}]
        said = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": content}
        answers.append({"prompt": f"What is in cellar {i}?", "responses": [[{"output": [call]}, {"output": [said]}]]})
    (cli.folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (cli.folder / "suite.yaml").write_text(SUITE)
    return cli.folder / "runs" / "suite"


def test_a_suite_runs_every_benchmark_with_every_model_and_is_resumed_by_the_same_command(
    cli: Cli, suite: Path
) -> None:
    said = cli.run("eval", "suite", "suite.yaml", code=1)
    jobs = json.loads((suite / "summary.json").read_text())["jobs"]
    before = {path: path.read_bytes() for path in suite.glob("*/*/rollouts.jsonl")}
    again = cli.json("eval", "suite", "suite.yaml", "--only", "cellar")

    assert [(j["name"], j["model"], j["expected"], j["failed"]) for j in jobs] == [
        ("choices", "simulated", 6, 0),
        ("choices", "recorded", 6, 2),
        ("cellar", "simulated", 2, 0),
        ("cellar", "recorded", 2, 0),
    ]
    table = [line.split() for line in said.stdout.splitlines()]
    assert table[1] == ["benchmark", "simulated", "recorded"]
    assert table[2][:3] == ["choices", "33.33", "%"]
    assert table[2][-2:] == ["2", "failed"]
    assert "choices, recorded: 2 (" in said.stdout
    for row in rows_of(suite / "choices" / "recorded" / "rollouts.jsonl"):
        params = row["responses_create_params"]
        assert params["temperature"] == 0.5
        assert json.loads(params["metadata"]["extra_body"]) == {"seed": 7 + row["_ng_rollout_index"]}
    cellar = rows_of(suite / "cellar" / "recorded" / "rollouts.jsonl")
    outputs = [item.get("output") for row in cellar for item in row["response"]["output"]]
    assert sorted(filter(None, outputs)) == ["wine 0 is there", "wine 1 is there"]
    assert not (suite / ".bus").exists()

    assert [(j["name"], j["resumed"], j["wall_s"]) for j in again["jobs"][2:]] == [("cellar", True, 0.0)] * 2
    assert [j["name"] for j in again["jobs"]] == ["choices", "choices", "cellar", "cellar"]
    assert {path: path.read_bytes() for path in before} == before
