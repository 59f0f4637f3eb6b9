"""Measure the whole pipeline on one machine: a simulated model over HTTP, the real bus, real workers, real files.

The work is multiple-choice questions of a chosen size with a cheap verifier, so that what is measured is the system.
Rates and CPU time are taken between 10 % and 90 % of the results: neither the start of processes nor the last
stragglers count. Peak memory is that of the whole run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import psutil

from gym_bus.config import Config
from gym_bus.errors import UsageError
from gym_bus.results.profile import profile_job
from gym_bus.results.reader import iter_jsonl
from gym_bus.settings import ModelConfig
from gym_bus.workers.plan import Job, Wanted, plan_job, write_down
from gym_bus.workers.run import Progress, run_job

RUNNER, AGENT, VERIFIER, BROKER, MODEL, OTHER = "runner", "agent", "verifier", "nats-server", "model server", "other"
ROLES = (RUNNER, AGENT, VERIFIER, BROKER, OTHER, MODEL)
SAMPLE_S = 0.1
STEADY = (0.1, 0.9)
"""Shares of the results between which rates and CPU time are taken."""
SERVE_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0
STAGES = ("request_queue_s", "model_s", "agent_s", "attempt_queue_s", "verify_s", "publish_s")

_BENCHMARK = """\
name: bench
domain: knowledge
verifier: {name: mcqa}
prompt: {user: "{question}"}
datasets:
  - {name: bench, type: benchmark, jsonl_fpath: rows.jsonl}
"""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure with."""

    rollouts: int
    prompt_bytes: int
    """Of each question."""
    api: str
    """responses or chat."""


class RoleUse(msgspec.Struct, kw_only=True):
    """What the processes of one role used."""

    processes: int = 0
    cpu_ms_per_rollout: float = 0.0
    peak_rss_mb: float = 0.0
    """10^6 bytes, summed over the role's processes; shared pages count in each."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """How long rollouts spent in one stage, in seconds."""

    p50: float
    p99: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one run."""

    rollouts: int
    failed: int
    wall_s: float
    """From the first publish to the last line, start of the workers included."""
    rollouts_per_s: float
    """Steady."""
    cpu_ms_per_rollout: float
    """All processes but the model server."""
    model_cpu_ms_per_rollout: float
    peak_rss_mb: float
    """All processes but the model server, at one moment."""
    roles: dict[str, RoleUse]
    stages: dict[str, Stage]


class _Sample(msgspec.Struct, frozen=True):
    at_s: float
    done: int
    cpu_s: dict[str, float]
    rss: dict[str, int]


class Sampler(threading.Thread):
    """Reads CPU time and memory of this process and its children, ten times a second, from a thread."""

    def __init__(self, done: Callable[[], int]) -> None:
        super().__init__(name="bench sampler", daemon=True)
        self._done = done
        self._ended = threading.Event()
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._names: dict[tuple[int, float], str] = {}
        self.samples: list[_Sample] = []
        self.processes: dict[str, int] = {}

    def run(self) -> None:
        """Sample until `end`."""
        while not self._ended.wait(SAMPLE_S):
            self.sample()

    def end(self) -> None:
        """Take a last sample and stop."""
        self._ended.set()
        self.join()
        self.sample()

    def sample(self) -> None:
        """One look at every process; what a dead one used stays counted."""
        done, now = self._done(), time.monotonic()
        rss: dict[str, int] = {}
        count: dict[str, int] = {}
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                key = (process.pid, process.create_time())
                if key not in self._names:
                    self._names[key] = RUNNER if process.pid == os.getpid() else role_of(process.cmdline())
                role = self._names[key]
                times = process.cpu_times()
                self._cpu[key] = (role, times.user + times.system)
                rss[role] = rss.get(role, 0) + process.memory_info().rss
                count[role] = count.get(role, 0) + 1
        cpu: dict[str, float] = {}
        for role, used in self._cpu.values():
            cpu[role] = cpu.get(role, 0.0) + used
        self.processes = {role: max(n, self.processes.get(role, 0)) for role, n in (self.processes | count).items()}
        self.samples.append(_Sample(now, done, cpu, rss))


def role_of(command: list[str]) -> str:
    """The role of a child process by its command line."""
    if command and command[0].endswith("nats-server"):
        return BROKER
    for role in (AGENT, VERIFIER):
        if command[-4:-2] == ["worker", role]:
            return role
    return MODEL if "serve" in command else OTHER


def write_benchmark(folder: Path, load: Load) -> None:
    """A benchmark of `load.rollouts` different questions, a quarter of which the simulated answer A solves."""
    (folder / "config.yaml").write_text(_BENCHMARK)
    options = [{letter: f"choice {letter}"} for letter in "ABCD"]
    with (folder / "rows.jsonl").open("wb") as file:
        for i in range(load.rollouts):
            question = f"Question {i}: ".ljust(load.prompt_bytes, "x")
            row = {"question": question, "options": options, "expected_answer": "ABCD"[i % 4]}
            file.write(msgspec.json.encode(row) + b"\n")


@contextlib.asynccontextmanager
async def serve_model(config: Config) -> AsyncIterator[str]:
    """`gym-bus model serve` in a process of its own; gives its address.

    Raises:
        UsageError: it did not start.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gym_bus.cli.main",
        "model",
        "serve",
        "--config",
        "-",
        "--model",
        "simulated",
        "--port",
        "0",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
        line = await asyncio.wait_for(process.stdout.readline(), SERVE_LIMIT_S)
        if b" at http" not in line:
            raise UsageError("the simulated model could not be served")
        yield line.decode().strip().rpartition(" at ")[2]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def measure(load: Load, config: Config, on_start: Callable[[Progress], None] = lambda _: None) -> Report:
    """Run the load once in a temporary folder.

    Args:
        load: the work.
        config: how many workers, their concurrency, and `models.simulated`: latency, length, errors.
        on_start: as `run_job`'s.

    Raises:
        UsageError, BusError: it could not be run.
    """
    folder = Path(tempfile.mkdtemp(prefix="gym-bus-bench-"))
    try:
        write_benchmark(folder, load)
        async with serve_model(config) as address:
            model = ModelConfig(base_url=address, api="chat" if load.api == "chat" else "responses")
            config = msgspec.structs.replace(config, models={"bench": model})
            job = write_down(plan_job(Wanted(benchmark=str(folder), model="bench"), config), folder / "out")
            return await _measure(job, config, on_start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(job: Job, config: Config, on_start: Callable[[Progress], None]) -> Report:
    progress: list[Progress] = []
    sampler = Sampler(lambda: progress[0].finished if progress else 0)

    def begin(run: Progress) -> None:
        progress.append(run)
        on_start(run)

    sampler.start()
    try:
        result = await run_job(job, config, on_start=begin)
    finally:
        await asyncio.to_thread(sampler.end)
    counts = profile_job(job.files).counts
    return report(sampler, counts.expected, counts.failed, result.wall_s, stages_of(job.files.rollouts))


def report(sampler: Sampler, rollouts: int, failed: int, wall_s: float, stages: dict[str, Stage]) -> Report:
    """Figures from the samples of one run."""
    low, high = (share * rollouts for share in STEADY)
    inside = [s for s in sampler.samples if low <= s.done <= high]
    first, last = (inside[0], inside[-1]) if len(inside) > 1 else (sampler.samples[0], sampler.samples[-1])
    done = max(1, last.done - first.done)
    roles = {
        role: RoleUse(
            processes=count,
            cpu_ms_per_rollout=1000 * (last.cpu_s.get(role, 0.0) - first.cpu_s.get(role, 0.0)) / done,
            peak_rss_mb=max(s.rss.get(role, 0) for s in sampler.samples) / 1e6,
        )
        for role in ROLES
        if (count := sampler.processes.get(role, 0))
    }
    return Report(
        rollouts=rollouts,
        failed=failed,
        wall_s=wall_s,
        rollouts_per_s=done / max(1e-9, last.at_s - first.at_s),
        cpu_ms_per_rollout=sum(use.cpu_ms_per_rollout for role, use in roles.items() if role != MODEL),
        model_cpu_ms_per_rollout=roles[MODEL].cpu_ms_per_rollout if MODEL in roles else 0.0,
        peak_rss_mb=max(sum(n for role, n in s.rss.items() if role != MODEL) for s in sampler.samples) / 1e6,
        roles=roles,
        stages=stages,
    )


class _Timed(msgspec.Struct):
    timings: dict[str, float]


class _Row(msgspec.Struct):
    gym_bus: _Timed


def stages_of(rollouts: Path) -> dict[str, Stage]:
    """Median and 99th percentile of each stage's seconds over the lines of a rollouts file."""
    decoder = msgspec.json.Decoder(_Row)
    rows = [decoder.decode(data).gym_bus.timings for _, data in iter_jsonl(rollouts)]
    if not rows:
        return {}
    made = {}
    for stage in STAGES:
        p50, p99 = np.percentile([row.get(stage, 0.0) for row in rows], [50, 99])
        made[stage] = Stage(p50=float(p50), p99=float(p99))
    return made
