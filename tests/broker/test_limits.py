"""Workers that share an endpoint with a hard limit: real HTTP, a real server between them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from conftest import NatsServer, until

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.messages import RolloutId
from gym_bus.models.api import CallInfo
from gym_bus.models.fleet import Fleet
from gym_bus.models.gate import endpoint_key
from gym_bus.models.registry import Models
from gym_bus.models.serve import make_app, serve
from gym_bus.models.simulated import SimulatedModel
from gym_bus.settings import BusConfig, Distribution, ModelConfig, SimulatedConfig
from gym_bus.workers.limits import SharedLimits

LIMIT = 40
LATENCY_S = 0.25
IDEAL_PER_S = LIMIT / LATENCY_S
WORKERS = 6
CALLS = 2 * LIMIT
"""Of every worker, at any time."""


class Counter:
    """Counts the endpoint's calls on their way in and out."""

    def __init__(self) -> None:
        self.came = self.refused = self.in_flight = 0

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.came += 1
            self.in_flight += 1
            try:
                reply = await handler(request)
                self.refused += reply.status == 429
                return reply
            finally:
                self.in_flight -= 1

        return count

    async def over(self, seconds: float) -> tuple[float, float]:
        """Calls taken per second, and the share of refused ones, over the next seconds."""
        came, refused, begun = self.came, self.refused, time.monotonic()
        await asyncio.sleep(seconds)
        came, refused = self.came - came, self.refused - refused
        return (came - refused) / (time.monotonic() - begun), refused / max(1, came)


class Worker:
    """What an agent worker has to do with models, with as many rollouts as it may begin."""

    def __init__(self, bus: Bus, name: str, config: ModelConfig) -> None:
        self._limits = SharedLimits(bus, name)
        self._models = Models({"m": config}, self._limits)
        self.done = 0

    async def work(self) -> None:
        await self._limits.start()
        model = self._models.get("m")

        async def calls(number: int) -> None:
            while True:
                await model.respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", number, 0), limit_s=60.0))
                self.done += 1

        try:
            await asyncio.gather(*(calls(number) for number in range(CALLS)))
        finally:
            await self._limits.close()
            await self._models.close()


class Workers:
    def __init__(self, url: str, config: ModelConfig, stack: AsyncExitStack) -> None:
        self._url, self._config, self._stack = url, config, stack
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self) -> Worker:
        name = f"agent-{len(self._tasks)}"
        bus = await self._stack.enter_async_context(await Bus.connect(BusConfig(url=self._url), name=name))
        worker = Worker(bus, name, self._config)
        self._tasks.append(asyncio.create_task(worker.work()))
        return worker

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


@asynccontextmanager
async def sharing(url: str, **simulated: object) -> AsyncIterator[tuple[Counter, Workers, str]]:
    settings = {"latency_s": Distribution(mean=LATENCY_S), "output_tokens": Distribution(mean=2), **simulated}
    endpoint = Counter()
    app = make_app(SimulatedModel(msgspec.convert(settings, SimulatedConfig)))
    app.middlewares.append(endpoint.middleware)
    runner, port = await serve(app, "127.0.0.1", 0)
    config = ModelConfig(base_url=f"http://127.0.0.1:{port}/v1")
    async with AsyncExitStack() as stack:
        workers = Workers(url, config, stack)
        try:
            yield endpoint, workers, endpoint_key(config)
        finally:
            await workers.leave()
            await runner.cleanup()


async def test_a_hard_limit_is_found_kept_and_shared_with_who_joins(bus: Bus, nats_server: NatsServer) -> None:
    async with sharing(nats_server.url, most_in_flight=LIMIT) as (endpoint, workers, key):
        for _ in range(WORKERS):
            await workers.join()
        await until(lambda: endpoint.came > 2 * LIMIT)
        await asyncio.sleep(1.0)

        per_s, refused = await endpoint.over(2.0)
        joined = await workers.join()
        per_s_then, refused_then = await endpoint.over(2.0)

        assert min(per_s, per_s_then) >= 0.9 * IDEAL_PER_S
        assert max(refused, refused_then) < 0.02
        assert joined.done >= 0.3 * IDEAL_PER_S / (WORKERS + 1)
        fleet = await bus.get(subjects.LIMITS, key, Fleet)
        assert LIMIT - 2 <= fleet.limit <= LIMIT + 2
        assert len(fleet.members) == WORKERS + 1


async def test_an_endpoint_that_never_refuses_is_not_held_back(nats_server: NatsServer, bus: Bus) -> None:
    async with sharing(nats_server.url) as (endpoint, workers, _):
        for _ in range(3):
            await workers.join()

        await until(lambda: endpoint.in_flight == 3 * CALLS)
