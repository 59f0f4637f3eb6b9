"""What a user sees of a system that has far more to do than it can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from conftest import until
from e2e.conftest import Cli, rows_of, wait_for

from gym_bus.bus import Bus
from gym_bus.jobs import find_job
from gym_bus.models.serve import make_app, serve
from gym_bus.models.simulated import SimulatedModel
from gym_bus.settings import BusConfig, Distribution, SimulatedConfig
from gym_bus.workers.run import cancel_job

SERVICE_S = 4.0
LATENCY_S, CONCURRENCY = 0.2, 64
QUEUED = 65_700
"""219 rollouts of each of 300 tasks."""
CANCELLED = 10_200


@pytest.fixture
def bus_url(cli: Cli) -> str:
    server = cli.start("bus", "serve", "--port", "0", "--store", "nats", until="serving")
    return str(server.said.split()[-1])  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_interactive_job_behind_a_burst_starts_within_one_rollouts_time(
    cli: Cli, choices: Path, bus_url: str
) -> None:
    slow = f"models.simulated.simulated.latency_s.mean={SERVICE_S}"
    cli.start("worker", "agent", "--nats", bus_url, slow, "agent.concurrency=64", until="worker ready")
    cli.start("worker", "verifier", "--nats", bus_url, "verifier.names=[mcqa]", until="worker ready")
    burst = ["eval", "submit", str(choices), "--model", "simulated", "--num-repeats", str(QUEUED // 300)]
    cli.run(*burst, "--nats", bus_url, "--output", "burst")

    small = ["eval", "run", str(choices), "--model", "simulated", "--limit", "8", "job.lane=interactive"]
    cli.run(*small, "--nats", bus_url, "--no-workers", "--output", "small")

    waits = [
        row["gym_bus"]["timings"].get("request_queue_s", 0.0) for row in rows_of(cli.folder / "small/rollouts.jsonl")
    ]
    assert len(waits) == 8
    assert max(waits) < SERVICE_S
    assert max(job["in_flight"] for job in cli.json("eval", "status", "--nats", bus_url)) > QUEUED * 0.9


class Counting:
    """A model over HTTP that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.url = ""

    @web.middleware
    async def count(self, request: web.Request, handler: web.RequestHandler) -> web.StreamResponse:  # type: ignore[type-arg]
        self.calls += 1
        return await handler(request)  # type: ignore[operator, no-any-return]


@pytest.fixture
async def model() -> AsyncIterator[Counting]:
    counting = Counting()
    app = make_app(SimulatedModel(SimulatedConfig(latency_s=Distribution(mean=LATENCY_S))))
    app.middlewares.append(counting.count)  # type: ignore[arg-type]
    runner, port = await serve(app, "127.0.0.1", 0)
    counting.url = f"http://127.0.0.1:{port}/v1"
    yield counting
    await runner.cleanup()


async def test_a_cancelled_job_of_ten_thousand_makes_no_model_call_a_second_later(
    cli: Cli, choices: Path, bus_url: str, model: Counting
) -> None:
    def submit() -> str:
        at = f"models.policy.base_url={model.url}"
        cli.start("worker", "agent", "--nats", bus_url, at, f"agent.concurrency={CONCURRENCY}", until="worker ready")
        command = ["eval", "submit", str(choices), "--model", "policy", "--num-repeats", str(CANCELLED // 300), at]
        job = cli.run(*command, "--nats", bus_url, "--output", "out").stdout.strip()
        wait_for(lambda: model.calls > 200)
        return job

    job = await asyncio.to_thread(submit)
    async with await Bus.connect(BusConfig(url=bus_url)) as bus:
        before = model.calls
        cancelled = await cancel_job(bus, await find_job(bus, job))
    status = await asyncio.to_thread(cli.json, "eval", "status", job, "--nats", bus_url)

    assert cancelled == CANCELLED  # there is no verifier worker: none has a reward
    assert (status[0]["state"], status[0]["in_flight"]) == ("cancelled", 0)

    async def quiet() -> bool:
        calls = model.calls
        await asyncio.to_thread(cli.json, "eval", "status", job, "--nats", bus_url)
        return model.calls == calls

    await until(quiet)
    assert model.calls - before <= CONCURRENCY / LATENCY_S  # what the worker can do in a second, where it has a second
