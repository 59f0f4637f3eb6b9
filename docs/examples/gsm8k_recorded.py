"""Repeat the published GSM8K accuracy of four models from their recorded answers, through the whole system.

    python gsm8k_recorded.py --source DIR [--output DIR] [--limit N]

DIR holds `test.jsonl` and `example_model_solutions.jsonl` as published beside GSM8K. Exits with 1 where a figure is not
the published one (with --limit there is nothing to compare with).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from gym_bus.benchmarks.gsm8k.recorded import replay_file

PUBLISHED = {"6b_finetuning": 21.68, "6b_verification": 39.04, "175b_finetuning": 34.72, "175b_verification": 56.25}
GYM_BUS = [sys.executable, "-m", "gym_bus.cli.main"]


def evaluate(model: str, source: Path, output: Path, limit: list[str]) -> tuple[float, int]:
    """Run one model's answers as a job; returns pass@1 in per cent and the number of failed rollouts."""
    replay = output / f"{model}.jsonl"
    replay_file(source / "example_model_solutions.jsonl", model, replay)
    files = ["--input", source / "test.jsonl", "--replay", replay, "--output", output / model]
    command = [*GYM_BUS, "eval", "run", "gsm8k", *map(str, files), "--json", *limit]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if run.returncode == 2:
        raise SystemExit(2)
    summary = json.loads(run.stdout)
    return 100 * summary["pass_at"]["pass@1"]["mean"], summary["failed"]


def main() -> int:
    """Run the four jobs and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/gsm8k-recorded"))
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    source, output = arguments.source, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    limit = ["--limit", str(arguments.limit)] if arguments.limit else []
    wrong = 0
    print(f"{'model':18} {'pass@1':>7} {'published':>10} {'failures':>9}")
    for model, published in PUBLISHED.items():
        score, failures = evaluate(model, source, output, limit)
        wrong += round(score, 2) != published or failures > 0
        print(f"{model:18} {score:6.2f}% {published:9.2f}% {failures:9}", flush=True)
    return 1 if wrong and not limit else 0


if __name__ == "__main__":
    sys.exit(main())
