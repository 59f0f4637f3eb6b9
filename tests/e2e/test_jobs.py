"""Whole jobs through the command line."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from e2e.conftest import Cli, rows_of, wait_for


def every_rollout_has_one_line(folder: Path, count: int) -> None:
    keys = [(r["_ng_task_index"], r["_ng_rollout_index"]) for r in rows_of(folder / "rollouts.jsonl")]
    assert len(keys) == len(set(keys)) == count


def test_a_local_run_scores_every_task_and_writes_nemo_gyms_files(cli: Cli, choices: Path) -> None:
    summary = cli.json("eval", "run", str(choices), "--model", "simulated", "--num-repeats", "2", "--output", "out")
    assert (summary["expected"], summary["scored"], summary["failed"]) == (600, 600, 0)
    assert summary["pass_at"]["pass@1"]["mean"] == pytest.approx(1 / 3)
    out = cli.folder / "out"
    every_rollout_has_one_line(out, 600)
    row = rows_of(out / "rollouts.jsonl")[0]
    assert row["agent_ref"] == {"name": "simple"}
    assert row["reward"] in (0.0, 1.0)
    assert row["response"]["output"][0]["content"][0]["text"].endswith("\\boxed{A}")
    ours = row["gym_bus"]
    assert ours["timings"]["model_calls"] == 1
    assert {"agent_s", "model_s", "verify_s"} <= set(ours["timings"])
    assert ours["agent_worker"].startswith("agent-")
    assert ours["verifier_worker"].startswith("verifier-")
    assert len(rows_of(out / "rollouts_materialized_inputs.jsonl")) == 600
    assert len(rows_of(out / "rollouts_reward_profiling.jsonl")) == 300
    aggregate = json.loads((out / "rollouts_aggregate_metrics.json").read_text())
    assert aggregate[0]["agent_metrics"]["mean/reward"] == pytest.approx(1 / 3)
    assert not (out / ".bus").exists()


def test_the_same_command_again_changes_nothing_and_other_settings_are_refused(cli: Cli, choices: Path) -> None:
    command = ["eval", "run", str(choices), "--model", "simulated", "--limit", "30", "--output", "out"]
    cli.json(*command)
    before = (cli.folder / "out" / "rollouts.jsonl").read_bytes()
    assert cli.json(*command)["resumed"] is True
    assert (cli.folder / "out" / "rollouts.jsonl").read_bytes() == before
    refused = cli.run(*command, "--temperature", "0.5", code=2)
    assert "holds another job" in refused.stderr
    assert "dataset digest" in refused.stderr


def test_a_killed_run_is_resumed_by_the_same_command(cli: Cli, choices: Path) -> None:
    command = ["eval", "run", str(choices), "--model", "simulated", "--num-repeats", "2", "--output", "out"]
    slow = "models.simulated.simulated.latency_s.mean=0.3"
    process = cli.start(*command, slow, "--concurrency", "24")
    rollouts = cli.folder / "out" / "rollouts.jsonl"
    wait_for(lambda: rollouts.exists() and rollouts.read_bytes().count(b"\n") > 100)
    process.kill()
    process.wait(60)
    done = rollouts.read_bytes().count(b"\n")
    assert 100 < done < 600
    summary = cli.json(*command, slow, "--concurrency", "64")
    assert (summary["scored"], summary["failed"]) == (600, 0)
    every_rollout_has_one_line(cli.folder / "out", 600)


def test_an_unreachable_model_ends_in_failures_with_their_class_and_exit_1(
    cli: Cli, choices: Path, closed_port: int
) -> None:
    command = ["eval", "run", str(choices), "--model", "policy", "--limit", "5", "--output", "out"]
    settings = [f"models.policy.base_url=http://127.0.0.1:{closed_port}/v1", "models.policy.retry.wait_s=0.01"]
    summary = cli.json(*command, *settings, "models.policy.api_key=sk-secret", code=1)
    assert summary["failed_by_class"] == {"model_unreachable": 5}
    assert summary["pass_at"] == {} or summary["pass_at"]["pass@1"]["mean"] is None
    failures = rows_of(cli.folder / "out" / "rollouts_failures.jsonl")
    assert all("reward" not in row and row["_ng_failure_class"] == "model_unreachable" for row in failures)
    everything = "".join(p.read_text(errors="replace") for p in (cli.folder / "out").rglob("*") if p.is_file())
    assert "sk-secret" not in everything


def test_failed_rollouts_are_tried_again_by_the_next_run(cli: Cli, choices: Path, closed_port: int) -> None:
    command = ["eval", "run", str(choices), "--model", "policy", "--limit", "20", "--output", "out"]
    settings = [f"models.policy.base_url=http://127.0.0.1:{closed_port}/v1", "models.policy.retry.wait_s=0.01"]
    assert cli.json(*command, *settings, code=1)["failed"] == 20
    cli.start("model", "serve", "--port", str(closed_port), until="serving")
    summary = cli.json(*command, *settings)
    assert (summary["scored"], summary["failed"]) == (20, 0)
    rows = rows_of(cli.folder / "out" / "rollouts.jsonl")
    assert {row["_ng_attempt_index"] for row in rows} == {1}


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_recorded_answers_over_http_score_as_in_process(cli: Cli, choices: Path, api: str) -> None:
    lines = [{"task_index": i, "completions": [f"\\boxed{{{'ABC'[i % 2]}}}"]} for i in range(60)]
    (cli.folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval", "run", str(choices), "--limit", "60"]
    plain = cli.json(*command, "--replay", "answers.jsonl", "--output", "plain")
    server = cli.start("model", "serve", "--replay", "answers.jsonl", "--port", "0", until="serving")
    url = re.search(r"http://\S+", server.said)  # type: ignore[attr-defined]
    assert url
    settings = [f"models.policy.base_url={url[0]}", f"models.policy.api={api}"]
    served = cli.json(*command, "--model", "policy", "--output", "served", *settings)
    assert served["pass_at"]["pass@1"]["mean"] == plain["pass_at"]["pass@1"]["mean"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_workers_of_every_kind_may_die_and_join_while_a_job_runs(cli: Cli, choices: Path) -> None:
    server = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    url = server.said.split()[-1]  # type: ignore[attr-defined]
    quick = ["bus.ack_wait_s=3.0", "bus.heartbeat_s=1.0"]
    slow = "models.simulated.simulated.latency_s.mean=0.4"

    def worker(role: str) -> object:
        more = [slow, "agent.concurrency=16"] if role == "agent" else []
        more += ["--output", "shared"] if role == "results" else []
        return cli.start("worker", role, "--nats", url, *quick, *more, until="worker ready")

    workers = {role: [worker(role) for _ in range(3)] for role in ("agent", "verifier", "results")}
    job = cli.run(
        "eval", "submit", str(choices), "--model", "simulated", "--num-repeats", "4", "--nats", url, "--output", "sub"
    ).stdout.strip()
    rollouts = cli.folder / "shared" / job / "rollouts.jsonl"
    wait_for(lambda: rollouts.exists() and rollouts.read_bytes().count(b"\n") > 150)
    for role in workers:
        os.killpg(workers[role][0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        worker(role)
    last = cli.run("eval", "watch", job, "--nats", url).stdout.splitlines()[-1]
    assert "1,200 of 1,200" in last
    every_rollout_has_one_line(cli.folder / "shared" / job, 1200)
    assert len({r["gym_bus"]["agent_worker"] for r in rows_of(rollouts)}) >= 3
    statuses = cli.json("eval", "status", "--nats", url)
    assert [(s["job"], s["state"], s["scored"], s["in_flight"]) for s in statuses] == [(job, "done", 1200, 0)]


def test_a_cancelled_job_ends_with_every_rollout_accounted_for(cli: Cli, choices: Path) -> None:
    server = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    url = server.said.split()[-1]  # type: ignore[attr-defined]
    slow = "models.simulated.simulated.latency_s.mean=5"
    cli.start("worker", "agent", "--nats", url, slow, "agent.concurrency=8", until="worker ready")
    command = ["eval", "run", str(choices), "--model", "simulated", "--nats", url, "--no-workers", "--output", "out"]
    running = cli.start(*command)
    wait_for(lambda: (cli.folder / "out" / "job.json").exists())
    job = json.loads((cli.folder / "out" / "job.json").read_text())["job"]
    wait_for(lambda: cli.json("eval", "status", "--nats", url)[:1] and True)
    # The results consumer of the run sees the cancellation, too, and both fail what is left: each rollout once.
    assert 0 < cli.json("eval", "cancel", job, "--nats", url)["cancelled"] <= 300
    assert running.wait(60) == 1
    kinds = collections.Counter(r["_ng_failure_class"] for r in rows_of(cli.folder / "out" / "rollouts_failures.jsonl"))
    assert kinds == {"cancelled": 300}
    again = cli.run("eval", "cancel", job, "--nats", url, code=2)
    assert "cancelled already" in again.stderr


def test_stored_rollouts_are_scored_again_in_their_order(cli: Cli, choices: Path) -> None:
    cli.json("eval", "run", str(choices), "--model", "simulated", "--limit", "30", "--output", "out")
    rows = rows_of(cli.folder / "out" / "rollouts.jsonl")
    for row in rows:
        row["reward"] = 0.25
        del row["options"]
    (cli.folder / "stored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "reverify", "--rollouts", "stored.jsonl", "--verifier", "mcqa", "--output", "again.jsonl"]
    assert "--inputs" in cli.run(*command, code=2).stderr
    report = cli.json(*command, "--inputs", "out/rollouts_materialized_inputs.jsonl")
    assert (report["rollouts"], report["scored"], report["changed"]) == (30, 30, 30)
    again = rows_of(cli.folder / "again.jsonl")
    assert [r["_ng_task_index"] for r in again] == [r["_ng_task_index"] for r in rows]
    assert [r["reward"] for r in again] == [float(r["_ng_task_index"] % 3 == 0) for r in again]


def test_a_trainer_learns_from_a_live_job(cli: Cli, choices: Path) -> None:
    from gym_bus.rewards import SyncRewardStream

    server = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    url = server.said.split()[-1]  # type: ignore[attr-defined]
    command = ["eval", "run", str(choices), "--model", "simulated", "--num-repeats", "4", "--nats", url]
    outcome: list[object] = []
    thread = threading.Thread(target=lambda: outcome.append(cli.json(*command, "--output", "out")))
    thread.start()
    wait_for(lambda: (cli.folder / "out" / "job.json").exists())
    job = json.loads((cli.folder / "out" / "job.json").read_text())["job"]
    wait_for(lambda: any(s["job"] == job for s in cli.json("eval", "status", "--nats", url)))
    with SyncRewardStream(url, job=job, group_size=4, durable="learner") as stream:
        groups = []
        for group in stream:
            groups.append(group)
            stream.ack(group)
    thread.join(60)
    assert outcome
    assert sorted(g.task_index for g in groups) == list(range(300))
    assert all(len(g.rewards) == 4 for g in groups)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "run", "gsm8q", "--model", "simulated"], "did you mean 'gsm8k'"),
        (["eval", "run", "gsm8k", "--model", "simulate"], "did you mean 'simulated'"),
        (["eval", "run", "gsm8k", "--model", "simulated"], "gym-bus dataset prepare gsm8k"),
        (["eval", "run", "gsm8k", "--model", "simulated", "agent.concurency=1"], "did you mean 'concurrency'"),
        (["eval", "run", "gsm8k", "--model", "simulated", "agent.concurrency=x"], "expected `int`, got `str`"),
        (["eval", "run", "gsm8k", "--replay", "nothing.jsonl"], "no such file"),
        (["eval", "run", "gsm8k", "--model", "simulated", "--input", "nothing.jsonl"], "no such file"),
        (["eval", "run", "gsm8k", "--model", "simulated", "--split", "exmple"], "did you mean 'example'"),
        (["eval", "submit", "gsm8k", "--model", "simulated"], "--nats"),
        (["evl", "run"], "did you mean 'eval'"),
        (["worker", "agent", "--nats", "nats://127.0.0.1:9", "bus.connect_limit_s=1.0"], "cannot reach a NATS server"),
    ],
)
def test_wrong_usage_is_told_with_what_to_do_and_exits_2(cli: Cli, arguments: list[str], said: str) -> None:
    assert said in cli.run(*arguments, code=2).stderr


def test_a_malformed_dataset_line_is_named_with_file_and_line(cli: Cli, choices: Path) -> None:
    rows = (choices / "rows.jsonl").read_text().splitlines()
    (cli.folder / "bad.jsonl").write_text("\n".join([*rows[:3], "{broken", *rows[3:]]))
    command = ["eval", "run", str(choices), "--model", "simulated", "--input", "bad.jsonl", "--output", "out"]
    assert "bad.jsonl:4: not valid JSON" in cli.run(*command, code=2).stderr
    assert not (cli.folder / "out" / "rollouts.jsonl").exists()


def test_an_output_folder_that_cannot_be_written_is_named(cli: Cli, choices: Path) -> None:
    (cli.folder / "file").write_text("")
    command = ["eval", "run", str(choices), "--model", "simulated", "--output", "file/out"]
    assert "cannot be written" in cli.run(*command, code=2).stderr


def test_a_run_whose_workers_have_no_place_for_their_logs_says_so(cli: Cli, choices: Path) -> None:
    (cli.folder / "out").mkdir()
    (cli.folder / "out" / "logs").write_text("")
    command = ["eval", "run", str(choices), "--model", "simulated", "--output", "out"]
    assert "out/logs: a worker cannot be started: File exists" in cli.run(*command, code=2).stderr


def test_a_terminated_run_stops_in_order_and_the_same_command_finishes_it(cli: Cli, choices: Path) -> None:
    slow = "models.simulated.simulated.latency_s.mean=0.3"
    command = ["eval", "run", str(choices), "--model", "simulated", "--output", "out"]
    running = cli.start(*command, slow, "agent.concurrency=8")
    rollouts = cli.folder / "out" / "rollouts.jsonl"
    wait_for(lambda: rollouts.exists() and rollouts.read_bytes().count(b"\n") > 20)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 130
    assert running.stdout
    assert "the same command resumes" in running.stdout.read()
    cli.run(*command, slow)
    every_rollout_has_one_line(cli.folder / "out", 300)


def test_a_server_on_a_port_or_a_store_that_is_taken_is_refused(cli: Cli) -> None:
    server = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    port = server.said.rpartition(":")[2]  # type: ignore[attr-defined]
    taken = cli.run("bus", "serve", "--port", port, "--store", "other", code=2)
    assert "address already in use" in taken.stderr
    shared = cli.run("bus", "serve", "--port", "0", "--store", "nats", code=2)
    assert "another nats-server keeps its streams there" in shared.stderr


def test_a_store_that_the_user_named_is_kept(cli: Cli, choices: Path) -> None:
    (cli.folder / "mine").mkdir()
    (cli.folder / "mine" / "precious.txt").write_text("x")
    command = ["eval", "run", str(choices), "--model", "simulated", "--limit", "3", "--output", "out"]
    cli.run(*command, "bus.embedded.store_dir=mine")
    assert (cli.folder / "mine" / "precious.txt").exists()
    assert not (cli.folder / "out" / ".bus").exists()


def test_a_run_that_cannot_reach_its_server_leaves_the_folder_free(cli: Cli, choices: Path) -> None:
    command = ["eval", "run", str(choices), "--model", "simulated", "--output", "out"]
    cli.run(*command, "--nats", "nats://127.0.0.1:9", "bus.connect_limit_s=1.0", code=2)
    cli.run(*command, "--limit", "3")


@pytest.mark.parametrize(
    "argument", ["models.policy.hedaers.Authorization=sk-SECRET", "models.policy.api_key=[sk-SECRET", "sk-SECRET"]
)
def test_a_mistaken_argument_is_told_without_what_may_be_a_secret(cli: Cli, choices: Path, argument: str) -> None:
    told = cli.run("eval", "run", str(choices), "--model", "simulated", argument, code=2).stderr
    assert "argument" in told or "key" in told
    assert "SECRET" not in told


def test_a_job_that_is_over_is_not_submitted_again(cli: Cli, choices: Path) -> None:
    server = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    url = server.said.split()[-1]  # type: ignore[attr-defined]
    command = ["eval", "submit", str(choices), "--model", "simulated", "--nats", url, "--output", "sub"]
    job = cli.run(*command).stdout.strip()
    assert cli.json(*command) == {"job": job, "rollouts": 0}
    cli.run("eval", "cancel", job, "--nats", url)
    assert "is cancelled already" in cli.run(*command, code=2).stderr
