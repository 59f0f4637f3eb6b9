"""Stored rollouts of NeMo Gym, scored again through the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest
from e2e.conftest import Cli, rows_of
from nemogym import message, reasoning, response, tool_call, write_lines, write_run

OPTIONS = [{"A": "Paris"}, {"B": "Rome"}]
REVERIFY = ("eval", "reverify", "--rollouts", "rollouts.jsonl", "--output", "again.jsonl")
INPUTS = ("--inputs", "rollouts_materialized_inputs.jsonl")


def choice(gold: str = "B", **fields: Any) -> dict[str, Any]:
    return {"options": OPTIONS, "expected_answer": gold, **fields}


def test_rows_keep_order_and_keys_and_the_flips_are_told_by_task(cli: Cli) -> None:
    path = write_run(
        cli.folder,
        [
            (choice(note="half \ud83d", score=float("nan")), response(message("half \udc00 \\boxed{B}")), 0.0),
            (choice(), response(reasoning("hm"), message("\\boxed{B}")), 1.0),
            (choice(), response(), 1.0),
            ({"options": None, "expected_answer": "B"}, response(message("\\boxed{B}")), 1.0),  # cannot be judged
        ],
        dropped=("options",),
    )
    failed = {"_ng_task_index": 9, "_ng_rollout_index": 0, "reward": 0.0, "_ng_failure_class": "remote_agent_error"}
    lines = path.read_text().splitlines()
    lines += [lines[0], json.dumps(failed)]  # a rollout twice, and a failure without an answer
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode() + b"\r\n")

    report = cli.json(*REVERIFY, *INPUTS, "--verifier", "mcqa", code=1)

    again = rows_of(cli.folder / "again.jsonl")
    assert [(row["_ng_task_index"], row["reward"]) for row in again] == [(2, 0.0), (1, 1.0), (0, 1.0)]
    stored = json.loads(lines[2])
    assert [key for key in again[1] if key in stored] == list(stored)
    assert (again[2]["note"], again[2]["score"], again[2]["extracted_answer"]) == ("half \ufffd", None, "B")
    broken, twice, kept = rows_of(cli.folder / "again_failures.jsonl")
    assert (broken["_ng_failure_class"], broken["_ng_failure_stage"]) == ("task_broken", "verifier")
    assert twice == broken
    assert "reward" not in broken
    assert kept == failed
    counts = ("rollouts", "scored", "failed", "kept", "changed", "failed_by_class")
    assert [report[name] for name in counts] == [5, 3, 2, 1, 2, {"task_broken": 2}]
    digest = report["verifier_digest"]
    flips = rows_of(cli.folder / "again_flips.jsonl")
    assert [(f["_ng_task_index"], f["up"], f["down"], f["unscored"]) for f in flips] == [
        (0, 1, 0, 0),
        (2, 0, 1, 0),
        (3, 0, 0, 2),
    ]
    assert flips[0]["changes"] == [
        {"_ng_rollout_index": 0, "reward_before": 0.0, "reward_after": 1.0, "verifier_digest_before": ""}
    ]
    assert {f["verifier_digest_after"] for f in flips} == {digest}
    assert report["tasks"] == flips
    assert (report["flips"]["mean_before"], report["flips"]["mean_after"]) == pytest.approx((2 / 3, 2 / 3))

    (cli.folder / "again.jsonl").rename(cli.folder / "rollouts.jsonl")
    table = cli.run(*REVERIFY, *INPUTS, "--verifier", "mcqa").stdout

    assert f"{digest} before, {digest} now" in table
    assert "0 rewards differ" in table
    assert (cli.folder / "again_flips.jsonl").read_bytes() == b""
    assert not (cli.folder / "again_failures.jsonl").exists()  # that of the first time is gone
    reverified = rows_of(cli.folder / "again.jsonl")[0]["gym_bus"]["reverified"]
    assert (reverified["verifier_digest_before"], reverified["reward_before"]) == (digest, 0.0)


def test_judge_failures_alone_are_scored_and_joined_to_the_rest(cli: Cli) -> None:
    path = write_run(cli.folder, [(choice(), response(message("\\boxed{B}")), 1.0) for _ in range(6)])
    rows = sorted(rows_of(path), key=lambda row: int(row["_ng_task_index"]))
    rows[0]["reward"] = 0.25  # kept, though the verifier would say 1
    rows[1]["reward"] = None
    write_lines(path, rows[:2])
    judge = {"reward": 0.0, "_ng_failure_class": "judge_failed", "_ng_failure_judge_error": "503"}
    write_lines(
        cli.folder / "rollouts_failures.jsonl",
        [
            {**rows[0], **judge},  # was scored later
            {**rows[2], **judge, "note": "first"},
            {**rows[2], **judge, "note": "second"},
            {**rows[3], "_ng_failure_class": "transient"},
            {**rows[4], "_ng_failure_class": "timeout_exceeded", "response": None},
            {
                **rows[5],
                "_ng_failure_class": "verifier_error",
                "_ng_failure_stage": "verifier",
                "gym_bus": {"job": "j", "stored": {"extra": {"turns": 2}}, "history": []},
            },
        ],
    )
    rollouts = path.read_bytes()

    report = cli.json(*REVERIFY, "--verifier", "mcqa", "--judge-failed-only")

    assert [report[name] for name in ("rollouts", "scored", "failed", "kept", "changed")] == [3, 3, 0, 5, 3]
    assert report["flips"]["newly_scored"] == 3
    again = rows_of(cli.folder / "again.jsonl")
    assert [(r["_ng_task_index"], r["reward"]) for r in again] == [(0, 0.25), (1, 1.0), (2, 1.0), (5, 1.0)]
    assert (cli.folder / "again.jsonl").read_bytes().splitlines()[0] == rollouts.splitlines()[0]
    assert again[2]["note"] == "second"
    assert not [key for row in again for key in row if key.startswith("_ng_failure")]
    assert (again[3]["turns"], "stored" in again[3]["gym_bus"], again[3]["gym_bus"]["history"]) == (2, False, [])
    left = rows_of(cli.folder / "again_failures.jsonl")
    assert [(r["_ng_task_index"], r["_ng_failure_class"]) for r in left] == [
        (0, "judge_failed"),
        (2, "judge_failed"),
        (3, "transient"),
        (4, "timeout_exceeded"),
    ]

    for name in ("", "_failures"):
        (cli.folder / f"again{name}.jsonl").rename(cli.folder / f"rollouts{name}.jsonl")
    nothing = cli.json(*REVERIFY, "--verifier", "mcqa", "--judge-failed-only")

    assert (nothing["rollouts"], nothing["kept"], nothing["mean_reward"]) == (0, 8, None)
    assert rows_of(cli.folder / "again.jsonl") == again


def unit_tests(inputs: list[str], outputs: list[str], fn_name: str | None = None) -> dict[str, Any]:
    return {"verifier_metadata": {"unit_tests": {"inputs": inputs, "outputs": outputs, "fn_name": fn_name}}}


SUM = unit_tests(["1 2\n", "3 4\n"], ["3\n", "7\n"])
ADD = unit_tests(["1\n2", "3\n4"], ["3", "7"], "add")
RIGHT = "print(sum(map(int, input().split())))"
CODE: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    (SUM, response(reasoning("how?"), message(f"```python\n{RIGHT}\n```")), 1.0),
    (SUM, response(message(f"```\nprint(0)\n```\nno:\n```py\n{RIGHT}\n```")), 1.0),  # the last two fences
    (SUM, response(message(f"```\n{RIGHT}\n```\nlike\n```")), 0.0),
    (SUM, response(message(f"```\n{RIGHT}\n"), *tool_call("run", "3"), message("```")), 1.0),
    (SUM, response(message(f"<think>x</think>```\n{RIGHT}\n```")), 0.0),  # the thinking leaks
    (SUM, response(reasoning("<think>x</think>"), message(f"```\n{RIGHT}\n```")), 1.0),
    (SUM, response(message("```\nprint(float(sum(map(int, input().split()))))\n```")), 1.0),  # as decimal numbers
    (SUM, response(message("```\na = sum(map(int, input().split()))\nprint(a, '')\n\n```")), 1.0),
    (
        SUM,
        response(
            message("```\nimport sys\nif __name__ == '__main__':\n    print(sum(map(int, input().split())))\n```")
        ),
        1.0,
    ),
    (SUM, response(message("```\nprint(3)\n```")), 0.0),
    (SUM, response(message("```\nexit(0)\n```")), 0.0),
    (SUM, response(message(RIGHT)), 0.0),
    (SUM, response(cut=True), 0.0),
    (ADD, response(message("```\nclass Solution:\n    def add(self, a, b): return a + b\n```")), 1.0),
    (ADD, response(message("```\ndef add(a, b): return a + b\n```")), 1.0),
    (ADD, response(message("```\ndef add(a, b): return str(a + b)\n```")), 0.0),
    (unit_tests(["[1, 2]"], ["[1, 2]"], "same"), response(message("```\ndef same(a): return tuple(a)\n```")), 1.0),
]


@pytest.mark.slow
def test_programs_are_run_again_against_the_tests_that_the_rollouts_have_lost(cli: Cli) -> None:
    write_run(cli.folder, CODE, dropped=("verifier_metadata",))

    report = cli.json(*REVERIFY, *INPUTS, "--verifier", "code_gen")

    assert (report["failed"], report["changed"], report["tasks"]) == (0, 0, [])
    assert "--inputs" in cli.run(*REVERIFY, "--verifier", "code_gen", code=2).stderr
