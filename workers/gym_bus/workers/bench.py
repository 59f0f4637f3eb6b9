"""Measure the whole pipeline on one machine: a model over HTTP, the real bus, real workers, real verifiers, real files.

Without a benchmark the work is multiple-choice questions of a chosen size with a cheap verifier, so that what is
measured is the system. Rates and CPU time are taken between 10 % and 90 % of the results: neither the start of
processes nor the last stragglers count. Peak memory is that of the whole run.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from gym_bus.config import Config
from gym_bus.deadline import within
from gym_bus.errors import UsageError
from gym_bus.results.profile import profile_job
from gym_bus.results.reader import iter_jsonl
from gym_bus.results.statistics import Floats
from gym_bus.settings import ModelConfig, SimulatedConfig
from gym_bus.workers.capacity import Measured, Needs, needs
from gym_bus.workers.local import LocalStack
from gym_bus.workers.plan import Job, Wanted, plan_job, size_of, write_down
from gym_bus.workers.publish import publish_requests
from gym_bus.workers.results import open_writer
from gym_bus.workers.run import Progress, enrol, run_on
from gym_bus.workers.usage import AGENT, MODEL, POOL, ROLES, VERIFIER, Sample, Sampler

STEADY = (0.1, 0.9)
"""Shares of the results between which rates and CPU time are taken."""
SATURATED = 0.9
"""Share of a core from which an agent worker is taken to be what its rollouts wait for."""
SERVE_LIMIT_S = 30.0
STOP_LIMIT_S = 10.0
STAGES = (
    "request_queue_s",
    "model_queue_s",
    "model_s",
    "tools_s",
    "agent_s",
    "publish_s",
    "attempt_queue_s",
    "verify_s",
)

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
    """At least; with a benchmark, each of its tasks is repeated equally often."""
    benchmark: str | None = None
    """Name or folder; None for questions of `prompt_bytes`."""
    split: str | None = None
    prompt_bytes: int = 1024
    """Of each question."""
    model: str = "simulated"
    """Key in the configuration of the model that is served over HTTP: simulated or replay."""
    api: Literal["responses", "chat", "none"] = "responses"
    """none: no HTTP, the model is within the agent workers: a machine has some 28,000 connections to one address."""
    tokens: bool = False
    """Ask for token ids and log-probabilities."""
    burst: bool = False
    """Publish everything before the first worker starts."""
    target: float | None = None
    """Rollouts per second to say the needs of; None for what was measured."""


class RoleUse(msgspec.Struct, kw_only=True):
    """What the processes of one role used."""

    processes: int = 0
    cpu_ms_per_rollout: float = 0.0
    peak_rss_mb: float = 0.0
    """10^6 bytes, summed over the role's processes; shared pages count in each."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """How long rollouts spent in one stage, in seconds."""

    mean: float
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
    ideal_per_s: float | None = None
    """What the served model's limit allows, with one answered call per rollout; None where it has none."""
    model_calls: int | None = None
    """That the served model answered, in the whole run; None where none was served."""
    refused: int | None = None
    """Of `model_calls`, those answered with 429 or 503."""
    cpu_ms_per_rollout: float
    """All processes but the model server."""
    model_cpu_ms_per_rollout: float
    peak_rss_mb: float
    """All processes but the model server, at one moment."""
    roles: dict[str, RoleUse]
    stages: dict[str, Stage]
    needs: Needs | None = None
    """None where nothing was measured."""
    accepted_per_s: float | None = None
    """Of a burst: requests that the broker took per second, before any worker was there."""
    accepted: int = 0


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
async def serve_model(config: Config, name: str) -> AsyncIterator[str]:
    """`gym-bus model serve` in a process of its own; gives its address.

    Raises:
        UsageError: it did not start.
    """
    command = [sys.executable, "-m", "gym_bus.cli.main", "model", "serve", "--config", "-", "--model", name]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, "--port", "0", stdin=pipe, stdout=pipe)
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
        line = await within(SERVE_LIMIT_S, process.stdout.readline())
        if b" at http" not in line:
            raise UsageError(f"the model {name!r} could not be served")
        yield line.decode().strip().rpartition(" at ")[2]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await within(STOP_LIMIT_S, process.wait())
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
        ModelUnreachable: the served model ended before the run did.
    """
    folder = Path(tempfile.mkdtemp(prefix="gym-bus-bench-"))
    try:
        async with _model(load, config) as model:
            bench = msgspec.structs.replace(config, models={"bench": model})
            job = await asyncio.to_thread(_write_job, load, bench, folder)
            found = await _measure(job, load, bench, on_start)
            return found if load.api == "none" else await _with_answers(found, model, config.models[load.model])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def _model(load: Load, config: Config) -> AsyncIterator[ModelConfig]:
    if load.api == "none":
        yield config.models[load.model]
        return
    async with serve_model(config, load.model) as address:
        yield ModelConfig(base_url=address, api=load.api, return_tokens=load.tokens)


async def _with_answers(found: Report, at: ModelConfig, served: ModelConfig) -> Report:
    from gym_bus.models.serve import answered_by  # only now: an HTTP client is nothing that the runner needs

    answered = await answered_by(at.base_url)
    return msgspec.structs.replace(
        found, ideal_per_s=ideal_per_s(served.simulated), model_calls=answered.calls, refused=answered.refused
    )


def ideal_per_s(model: SimulatedConfig) -> float | None:
    """Calls per second that a simulated model can answer; None where nothing says so: no limit, or calls that hang."""
    limits = [model.most_per_s] if model.most_per_s else []
    if model.most_in_flight and model.latency_s.mean:
        limits.append(model.most_in_flight / model.latency_s.mean)
    if model.hang or not limits:
        return None
    return min(limits) * max(0.0, 1 - model.rate_limited - model.server_error)  # drawn faults take room like answers


def _write_job(load: Load, config: Config, folder: Path) -> Job:
    if load.benchmark is None:
        write_benchmark(folder, load)
        return write_down(plan_job(Wanted(benchmark=str(folder), model="bench"), config), folder / "out")
    wanted = Wanted(benchmark=load.benchmark, model="bench", split=load.split, num_repeats=1)
    rows = size_of(plan_job(wanted, config)).rollouts
    wanted = msgspec.structs.replace(wanted, num_repeats=-(-load.rollouts // max(1, rows)))
    return write_down(plan_job(wanted, config), folder / "out")


async def _measure(job: Job, load: Load, config: Config, on_start: Callable[[Progress], None]) -> Report:
    progress: list[Progress] = []
    sampler = Sampler(lambda: progress[0].finished if progress else 0)
    accepted_per_s: float | None = None

    def begin(run: Progress) -> None:
        progress.append(run)
        on_start(run)

    sampler.start()
    try:
        with open_writer(job.record, job.files, config.results) as writer:
            verifier = job.record.verifier
            async with LocalStack(config, job.files.folder, verifier=verifier, workers_later=load.burst) as stack:
                if load.burst:
                    accepted_per_s = await _burst(job, stack)
                    await stack.start_workers()
                result = await run_on(job, stack, writer, begin)
                stack.complete()
    finally:
        await asyncio.to_thread(sampler.end)
    counts = await asyncio.to_thread(lambda: profile_job(job.files).counts)
    stages = await asyncio.to_thread(stages_of, job.files.rollouts)
    found = report(sampler, counts.expected, counts.failed, result.wall_s, stages)
    return msgspec.structs.replace(
        found,
        accepted=job.record.total if load.burst else 0,
        accepted_per_s=accepted_per_s,
        needs=needs_of(found, load.target or found.rollouts_per_s, config) if stages else None,
    )


async def _burst(job: Job, stack: LocalStack) -> float:
    """Publish every request of the job; returns how many the broker took per second."""
    await enrol(stack.bus, job.record)
    started = time.monotonic()
    await publish_requests(stack.bus, job.order, job.files.inputs, lambda _: 1, job.record.group_size)
    return job.record.total / (time.monotonic() - started)


def needs_of(found: Report, rollouts_per_s: float, config: Config) -> Needs:
    """The workers that a rate needs, as far as this run shows it."""

    def cpu_s(role: str) -> float:
        return found.roles[role].cpu_ms_per_rollout / 1000 if role in found.roles else 0.0

    agent = found.stages["agent_s"]
    busy = found.rollouts_per_s * cpu_s(AGENT) / max(1, config.local.agents)
    measured = Measured(
        agent_cpu_s=cpu_s(AGENT),
        verifier_cpu_s=cpu_s(VERIFIER),
        pool_cpu_s=cpu_s(POOL),
        all_cpu_s=found.cpu_ms_per_rollout / 1000,
        held_s=min(agent.mean, agent.p50) if busy >= SATURATED else agent.mean,
    )
    return needs(measured, rollouts_per_s, config.agent.concurrency)


def report(sampler: Sampler, rollouts: int, failed: int, wall_s: float, stages: dict[str, Stage]) -> Report:
    """Figures from the samples of one run."""
    first, last = _steady(sampler.samples, rollouts)
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


def _steady(samples: list[Sample], rollouts: int) -> tuple[Sample, Sample]:
    low, high = (share * rollouts for share in STEADY)
    inside = [s for s in samples if low <= s.done <= high]
    return (inside[0], inside[-1]) if len(inside) > 1 else (samples[0], samples[-1])


class _Timed(msgspec.Struct):
    timings: dict[str, float]


class _Row(msgspec.Struct):
    gym_bus: _Timed


def stages_of(rollouts: Path) -> dict[str, Stage]:
    """Mean, median and 99th percentile of each stage's seconds over the lines of a rollouts file."""
    decoder = msgspec.json.Decoder(_Row)
    columns = {stage: array("d") for stage in STAGES}
    for _, data in iter_jsonl(rollouts):
        timings = decoder.decode(data).gym_bus.timings
        for stage, column in columns.items():
            column.append(timings.get(stage, 0.0))
    return {stage: _stage(np.array(column)) for stage, column in columns.items() if column}


def _stage(seconds: Floats) -> Stage:
    p50, p99 = np.percentile(seconds, [50, 99])
    return Stage(mean=float(seconds.mean()), p50=float(p50), p99=float(p99))
