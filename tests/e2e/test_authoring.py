"""A user's own folder of code, through the command line and real workers."""

from __future__ import annotations

from e2e.conftest import Cli, rows_of


def test_a_folders_agent_and_verifier_run_on_the_workers_by_name(cli: Cli) -> None:
    cli.run("env", "init", "refine", "--kind", "multi-turn", "--folder", "mine")
    replay = "mine/refine/data/example_replay.jsonl"

    summary = cli.json(
        *("eval", "run", "refine", "--split", "example", "--num-repeats", "2", "--replay", replay),
        *("--output", "out", "benchmark_paths=[mine]"),
    )

    assert (summary["scored"], summary["failed"]) == (10, 0)
    rows = rows_of(cli.folder / "out" / "rollouts.jsonl")
    by_sample = {(row["_ng_rollout_index"], row["reward"], row["total_turns"]) for row in rows}
    assert by_sample == {(0, 1.0, 2), (1, 0.0, 3)}


def test_the_commands_say_by_their_exit_code_what_they_found(cli: Cli) -> None:
    cli.run("env", "init", "fresh")
    verifier = cli.folder / "fresh" / "verifier.py"
    verifier.write_text(verifier.read_text().replace("reward=float(answer == expected)", "reward=1.0"))
    (cli.folder / "fresh" / "README.md").unlink()

    audited = cli.json("env", "audit", "./fresh", code=1)
    papers = cli.json("env", "validate", "./fresh", code=1)
    tested = cli.json("env", "test", "./fresh", code=1)

    assert {"empty", "bad_utf8"} <= {f["case"] for f in audited["findings"] if f["state"] == "does not hold"}
    assert [problem for problem in papers["problems"] if "README.md" in problem] == papers["problems"]
    assert not tested["passed"]
    assert cli.run("env", "init", "fresh", code=2).stderr.startswith("error: ")
