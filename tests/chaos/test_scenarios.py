"""One trouble at a time, each as it happens to people."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from chaos.model import FaultyModel, Manners
from conftest import NatsServer, until, wait_for_port
from e2e.conftest import Cli, rows_of

from gym_bus import server as server_module
from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.messages import Request, RolloutId
from gym_bus.server import EmbeddedServer, find_binary, held_port
from gym_bus.settings import BusConfig, Distribution, EmbeddedConfig, MiB
from gym_bus.workers.main import _stay_awake

TASKS = 300
QUIET = Manners(latency_s=Distribution(mean=0.1), server_error=0.0, rate_limited=0.0, half_body=0.0, slow=0.0)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rewards(folder: Path) -> dict[tuple[int, int], float]:
    """Reward by rollout; no rollout has two lines."""
    rows = rows_of(folder / "rollouts.jsonl")
    found = {(row["_ng_task_index"], row["_ng_rollout_index"]): row["reward"] for row in rows}
    assert len(found) == len(rows)
    return found


def expected(tasks: int = TASKS, repeats: int = 1) -> dict[tuple[int, int], float]:
    """Of the first `tasks` of the folder `choices`, where the model says A."""
    return {(task, rollout): float(task % 3 == 0) for task in range(tasks) for rollout in range(repeats)}


@pytest.fixture
async def model(cli: Cli) -> AsyncIterator[FaultyModel]:
    """Says A, without faults, and counts."""
    answers = cli.folder / "answers.jsonl"
    given = [{"task_index": task, "completions": ["\\boxed{A}"] * 12} for task in range(TASKS)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in given))
    served = FaultyModel(0, QUIET)
    served.add("quiet", answers, {})
    async with served:
        yield served


def at(model: FaultyModel) -> list[str]:
    return ["--model", "quiet", f"models.quiet.base_url=http://127.0.0.1:{model.port}/quiet/v1"]


async def exit_of(process: subprocess.Popen[str], limit_s: float = 60.0) -> int:
    return await asyncio.to_thread(process.wait, limit_s)


# -- processes --------------------------------------------------------------------------------------------------------


def kill_at_once(pid: int) -> int:
    """Kill -9 of a process and everything below it, none of which gets to see the other's death; returns how many."""
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sig)
    psutil.wait_procs(family, timeout=60)
    return len(family)


@pytest.mark.slow
async def test_a_local_run_killed_with_all_its_children_is_finished_by_the_same_command(
    cli: Cli, choices: Path, model: FaultyModel
) -> None:
    concurrency = 16
    command = ["eval", "run", str(choices), *at(model), "--output", "out", "--concurrency", str(concurrency)]
    model.hold_after(80)
    running = cli.start(*command)
    await until(lambda: lines(cli.folder / "out" / "rollouts.jsonl") > 60)
    assert kill_at_once(running.pid) == 4  # the command, its server, an agent worker, a verifier worker
    model.let_go()
    summary = await asyncio.to_thread(cli.json, *command)
    assert (summary["scored"], summary["failed"]) == (TASKS, 0)
    assert rewards(cli.folder / "out") == expected()
    repeated = model.asked.total() - len(model.asked)
    assert repeated <= 2 * concurrency  # what was in flight, and what the broker had not yet noted as done


async def test_a_worker_that_was_paused_past_its_lease_makes_no_second_result(
    cli: Cli, choices: Path, model: FaultyModel, own_server: NatsServer
) -> None:
    short = [f"bus.url={own_server.url}", "bus.ack_wait_s=2.0", "bus.heartbeat_s=0.3", "agent.concurrency=8"]
    model.hold_after(40)
    workers = [cli.start("worker", "agent", *at(model)[2:], *short, until="ready") for _ in range(2)]
    cli.start("worker", "verifier", *short, until="ready")
    running = cli.start("eval", "run", str(choices), *at(model), "--no-workers", "--output", "out", *short)
    rollouts = cli.folder / "out" / "rollouts.jsonl"
    await until(lambda: lines(rollouts) > 20 and model.held == 16)  # both have their hands full
    workers[0].send_signal(signal.SIGSTOP)
    model.let_go()
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        try:
            await until(lambda: delivered_again(bus))
            await until(lambda: model.asked.total() > len(model.asked))  # work is done twice
        finally:
            workers[0].send_signal(signal.SIGCONT)
        assert await exit_of(running) == 0
        await until(lambda: nothing_is_queued(bus))
        assert rewards(cli.folder / "out") == expected()
        assert (await bus.streams.state(subjects.RESULTS)).messages == TASKS


async def delivered_again(bus: Bus) -> bool:
    info = await bus.consumers.info(subjects.REQUESTS, "agent-batch-simple")
    return bool(info.num_redelivered)


async def nothing_is_queued(bus: Bus) -> bool:
    states = [await bus.streams.state(stream) for stream in (subjects.REQUESTS, subjects.ATTEMPTS)]
    return not any(state.messages for state in states)


async def test_a_second_run_of_one_output_folder_is_refused_and_disturbs_nothing(
    cli: Cli, choices: Path, model: FaultyModel
) -> None:
    command = ["eval", "run", str(choices), *at(model), "--limit", "90", "--output", "out", "--concurrency", "4"]
    model.hold_after(20)
    running = cli.start(*command)
    await until(lambda: lines(cli.folder / "out" / "rollouts.jsonl") > 10)
    refused = await asyncio.to_thread(cli.run, *command, code=2)
    model.let_go()
    assert f"already being written by process {running.pid}" in refused.stderr
    assert await exit_of(running) == 0
    assert rewards(cli.folder / "out") == expected(90)


PLUGIN = '''
import os, signal, time
from gym_bus.agents.simple import SimpleAgent


class Deadly(SimpleAgent):
    """Kills its worker, or hangs it, with one task."""

    async def run(self, task, context):
        if task.rollout.task_index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if task.rollout.task_index == 11:
            time.sleep(3600)
        return await super().run(task, context)
'''


@pytest.fixture
def deadly_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an agent that an installed package brings along."""
    folder = tmp_path / "plugin"
    info = folder / "deadly_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "deadly_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gym_bus.agents]\ndeadly = deadly_plugin:Deadly\n")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return "deadly"


@pytest.mark.long
def test_a_task_that_kills_its_worker_and_one_that_hangs_it_end_as_poison_and_all_others_are_scored(
    cli: Cli, choices: Path, deadly_agent: str
) -> None:
    command = ["eval", "run", str(choices), "--model", "simulated", "--agent", deadly_agent, "--output", "out"]
    quick = ["bus.ack_wait_s=1.5", "bus.heartbeat_s=0.5", "results.idle_s=1.0"]
    summary = cli.json(*command, *quick, "models.simulated.simulated.latency_s.mean=0.2", code=1)
    assert (summary["scored"], summary["failed_by_class"]) == (TASKS - 2, {"poison": 2})
    failures = rows_of(cli.folder / "out" / "rollouts_failures.jsonl")
    assert {row["_ng_task_index"] for row in failures} == {7, 11}
    assert "deadly_plugin.py" in (cli.folder / "out" / "logs" / "agent-0.log").read_text()  # where it hung


def test_a_process_whose_event_loop_hangs_ends_itself_and_says_where() -> None:
    code = """
import asyncio, time
from gym_bus.workers.main import _stay_awake

async def hang():
    awake = asyncio.create_task(_stay_awake(0.5))
    await asyncio.sleep(0)
    time.sleep(100)

asyncio.run(hang())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "in hang" in done.stderr


async def test_a_process_whose_event_loop_comes_round_puts_its_end_off(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s, ends = 0.16, []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda after_s, exit: ends.append((after_s, exit)))
    awake = asyncio.create_task(_stay_awake(limit_s))
    await until(lambda: len(ends) > 16)
    awake.cancel()
    assert set(ends) == {(limit_s, True)}


# -- time -------------------------------------------------------------------------------------------------------------

JUMPING = """
import itertools, time

_real, _offsets = time.time, itertools.cycle([0.0, -86_400.0, 3600.0, 1e8])
_offset, _until = 0.0, 0.0

def jumping():
    global _offset, _until
    if time.monotonic() > _until:
        _offset, _until = next(_offsets), time.monotonic() + 0.2
    return _real() + _offset

time.time = jumping
"""


async def test_clocks_that_jump_by_hours_and_years_change_no_result(
    cli: Cli, choices: Path, model: FaultyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every process of the run but the server, which keeps its own time; libfaketime is not at hand everywhere."""
    (cli.folder / "site").mkdir()
    (cli.folder / "site" / "sitecustomize.py").write_text(JUMPING)
    monkeypatch.setenv("PYTHONPATH", str(cli.folder / "site"), prepend=os.pathsep)
    command = ["eval", "run", str(choices), *at(model), "--limit", "120", "--output", "out", "--concurrency", "16"]
    summary = await asyncio.to_thread(cli.json, *command)
    assert (summary["scored"], summary["failed"]) == (120, 0)
    assert rewards(cli.folder / "out") == expected(120)
    timings = [row["gym_bus"]["timings"] for row in rows_of(cli.folder / "out" / "rollouts.jsonl")]
    assert all(seconds >= 0 for timing in timings for seconds in timing.values())
    assert any(timing.get("request_queue_s", 0.0) > 3000 for timing in timings)  # the clock did jump


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


async def test_a_full_disk_makes_publishers_wait_and_room_lets_them_go_on(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "DISK_LOOK_S", 0.1)
    monkeypatch.setattr("gym_bus.bus.publish.REPUBLISH_S", 0.3)
    (small_disk / "ballast").write_bytes(os.urandom(16 * MiB))
    server = EmbeddedServer(small_disk / "store", EmbeddedConfig())
    await server.start()
    try:
        async with await Bus.connect(BusConfig(url=server.url)) as bus:
            await bus.init()
            publishing = [asyncio.create_task(bus.publish(a_large_request(i), f"job.{i}.0#1")) for i in range(300)]
            await until(lambda: b"no space left on device" in (small_disk / "store" / "server.log").read_bytes())
            stored = sum(task.done() for task in publishing)
            assert 0 < stored < 300
            assert server.starts == 1  # nothing is gained by starting it on a full disk
            (small_disk / "ballast").unlink()
            await asyncio.wait_for(asyncio.gather(*publishing), 60)
            assert server.starts >= 2
            assert await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 300
    finally:
        await server.stop()


def a_large_request(task: int) -> Request:
    row = os.urandom(40_000)
    return Request(rollout=RolloutId("job", task, 0), agent="simple", model="m", verifier="v", row=row)


@pytest.mark.long
async def test_a_run_on_a_full_disk_finishes_when_there_is_room(
    cli: Cli, choices: Path, model: FaultyModel, small_disk: Path
) -> None:
    (small_disk / "ballast").write_bytes(os.urandom(22 * MiB))
    command = ["eval", "run", str(choices), *at(model), "--output", "out", "--num-repeats", "4"]
    command.append(f"bus.embedded.store_dir={small_disk / 'store'}")
    running = await asyncio.to_thread(cli.start, *command, until="nats_server_cannot_write")
    assert lines(cli.folder / "out" / "rollouts.jsonl") < 4 * TASKS
    (small_disk / "ballast").unlink()
    assert await exit_of(running) == 0
    assert rewards(cli.folder / "out") == expected(repeats=4)


def slowed(pid: int) -> subprocess.Popen[bytes]:
    """Has every write and sync of a process take 20 ms longer."""
    calls = "pwrite64,write,fsync,fdatasync"
    inject = f"inject={calls}:delay_enter=20000"
    return subprocess.Popen(["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject, "-p", str(pid)])


@pytest.mark.long
async def test_a_slow_disk_slows_a_run_and_breaks_nothing(cli: Cli, choices: Path, model: FaultyModel) -> None:
    """A traced server is the slow disk at hand."""
    if not shutil.which("strace"):
        pytest.skip("no strace to slow the server's system calls")
    serving = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    (server,) = psutil.Process(serving.pid).children()
    slowing = slowed(server.pid)
    try:
        url = serving.said.split()[-1]  # type: ignore[attr-defined]
        started = time.monotonic()
        command = ["eval", "run", str(choices), *at(model), "--output", "out", "--nats", url]
        summary = await asyncio.to_thread(cli.json, *command)
        assert time.monotonic() - started > 5.0
        assert (summary["scored"], summary["failed"]) == (TASKS, 0)
        assert rewards(cli.folder / "out") == expected()
    finally:
        slowing.terminate()
        slowing.wait(60)


@pytest.mark.long
async def test_what_a_power_cut_took_from_the_bus_is_ordered_again(
    cli: Cli, choices: Path, model: FaultyModel, own_server: NatsServer
) -> None:
    """The server is killed and finds its store as it was a second ago: what a power cut may cost with the default."""
    quick = ["bus.ack_wait_s=2.0", "bus.heartbeat_s=0.5", "results.idle_s=1.0", "--nats", own_server.url]
    command = ["eval", "run", str(choices), *at(model), "--num-repeats", "4", "--output", "out", *quick]
    running = cli.start(*command, "agent.concurrency=32")
    rollouts = cli.folder / "out" / "rollouts.jsonl"
    for least in (100, 500):
        await until(lambda least=least: lines(rollouts) > least)
        copy = cli.folder / f"copy-{least}"
        assert own_server.process
        own_server.process.send_signal(signal.SIGSTOP)
        shutil.copytree(own_server.store / "js", copy)
        own_server.process.send_signal(signal.SIGCONT)
        more = lines(rollouts) + 100
        await until(lambda more=more: lines(rollouts) > more)
        own_server.kill()
        shutil.rmtree(own_server.store / "js")
        copy.rename(own_server.store / "js")
        own_server.start()
    assert await exit_of(running, 90) == 0
    assert rewards(cli.folder / "out") == expected(repeats=4)


# -- a cluster --------------------------------------------------------------------------------------------------------


class Cluster:
    """Three servers on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held, ports = zip(*(held_port() for _ in range(6)), strict=True)
        self._ports, self._routes = ports[:3], ports[3:]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.names = ["n0", "n1", "n2"]

    @property
    def url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port in self._ports)

    def start(self, name: str) -> None:
        place = self.names.index(name)
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self._routes)
        config = self._folder / f"{name}.conf"
        config.write_text(
            f'server_name: {name}\nlisten: "127.0.0.1:{self._ports[place]}"\nmax_payload: 8MB\n'
            f'jetstream {{ store_dir: "{self._folder}/{name}", max_file: 64G, sync_interval: "1s" }}\n'
            f'cluster {{ name: c, listen: "127.0.0.1:{self._routes[place]}", routes: [{routes}] }}\n'
        )
        self._processes[name] = subprocess.Popen(
            [find_binary(), "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for_port(self._ports[place])

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait(60)

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(60)
        for port in self._held:
            port.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    for name in made.names:
        made.start(name)
    yield made
    made.stop()


@pytest.mark.long
async def test_a_cluster_that_loses_its_leader_in_mid_job_loses_nothing(
    cli: Cli, choices: Path, model: FaultyModel, cluster: Cluster
) -> None:
    quick = [f"bus.url={cluster.url}", "bus.replicas=3", "bus.ack_wait_s=5.0", "bus.heartbeat_s=1.5"]
    command = ["eval", "run", str(choices), *at(model), "--num-repeats", "12", "--output", "out", *quick]
    rollouts = cli.folder / "out" / "rollouts.jsonl"
    async with await Bus.connect(BusConfig(url=cluster.url, replicas=3)) as bus:
        await until(lambda: is_set_up(bus))
        running = cli.start(*command, "agent.concurrency=32")
        for stream, least in ((subjects.ATTEMPTS, 100), (subjects.RESULTS, 500)):
            await until(lambda least=least: lines(rollouts) > least)
            leader = str((await bus.js.stream_info(stream)).cluster.leader)
            await asyncio.to_thread(cluster.kill, leader)
            before = lines(rollouts)
            await until(lambda before=before: lines(rollouts) > before + 100)
            await asyncio.to_thread(cluster.start, leader)
        assert await exit_of(running, 90) == 0
        assert rewards(cli.folder / "out") == expected(repeats=12)
        info = await bus.js.stream_info(subjects.RESULTS)
        assert (info.config.num_replicas, info.state.messages) == (3, 12 * TASKS)


@pytest.mark.long
async def test_a_cluster_keeps_everything_as_many_times_as_the_settings_come_to_say(cluster: Cluster) -> None:
    for replicas in (1, 3):
        async with await Bus.connect(BusConfig(url=cluster.url, replicas=replicas)) as bus:
            await until(lambda bus=bus: is_set_up(bus))
            for name in (subjects.RESULTS, f"KV_{subjects.JOBS}", f"KV_{subjects.TRAINERS}", f"OBJ_{subjects.BLOBS}"):
                assert (await bus.js.stream_info(name)).config.num_replicas == replicas, name


async def is_set_up(bus: Bus) -> bool:
    with contextlib.suppress(Exception):
        await asyncio.wait_for(bus.js.account_info(), 1.0)
        return bool(await bus.init())
    return False
