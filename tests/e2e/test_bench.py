"""`gym-bus bench` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.conftest import Cli

ANSWERS = Path("benchmarks/gym_bus/benchmarks/mmlu_stem/data/example_replay.jsonl").resolve()


def test_a_burst_is_measured_and_says_what_a_rate_needs(cli: Cli) -> None:
    options = ["--burst", "--rollouts", "400", "--latency", "uniform:0.05:0.02", "--server-error", "0.1"]
    limits = ["--rate-limited", "0.05", "--most-per-second", "1e6", "--retry-after", "0"]

    report = cli.json("bench", *options, *limits, "--target", "5000", "--concurrency", "100")

    assert (report["rollouts"], report["failed"], report["accepted"]) == (400, 0, 400)
    assert report["accepted_per_s"] > 0
    assert {"runner", "agent", "verifier", "nats-server", "model server"} <= report["roles"].keys()
    assert report["stages"]["model_s"]["mean"] > 0.03
    assert report["stages"]["model_queue_s"]["p99"] > 0  # one call in ten is made again
    assert 0 < report["refused"] < report["model_calls"] - 400  # the rest are the server's errors
    assert report["ideal_per_s"] == pytest.approx(0.85e6)
    assert report["needs"]["rollouts_per_s"] == 5000
    assert report["needs"]["agents"] >= report["needs"]["in_flight"] / 100 > 1


def test_a_benchmark_is_measured_with_its_own_verifier_and_recorded_answers(cli: Cli) -> None:
    shown = cli.run("bench", "mmlu_stem", "--split", "example", "--replay", str(ANSWERS), "--rollouts", "120").stdout

    assert "120, 0 failed" in shown
    assert "agent workers" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--latency", "often:2"], "KIND:MEAN[:SPREAD]"),
        (["--latency", "constant:-1"], "KIND:MEAN[:SPREAD]"),
        (["--replay", "answers.jsonl"], "needs the BENCHMARK"),
        (["gsm8k", "mbpp"], "one benchmark at a time"),
        (["gsm9k"], "did you mean 'gsm8k'"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli.run("bench", *arguments, code=2).stderr
