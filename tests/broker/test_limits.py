"""Workers that share an endpoint with a hard limit: real HTTP, a real server between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest
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

LIMIT = 24
SLACK = 2
"""Places by which the limit may be off: it is found by trying."""
LATENCY_S = 0.3
WORKERS = 5
CALLS = 2 * LIMIT
"""Of every worker, at any time."""
LOOK_CALLS = 6 * LIMIT
"""Calls over which the endpoint is looked at: calls, not seconds, for a slow machine makes them, too."""
MOST_REFUSED = 0.05
"""Part of them: a try or two whether the endpoint takes more. How few there are in the long run is for the simulation
to show, and how fast it all goes for the benchmark."""


class Counter:
    """Counts the endpoint's calls on their way in and out."""

    def __init__(self) -> None:
        self.came = self.refused = self.in_flight = self.peak = 0

    @property
    def middleware(self) -> Middleware:
        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.came += 1
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            try:
                reply = await handler(request)
                self.refused += reply.status == 429
                return reply
            finally:
                self.in_flight -= 1

        return count

    def forget(self) -> None:
        """Count from now on."""
        self.came = self.refused = 0
        self.peak = self.in_flight


class Worker:
    """What an agent worker has to do with models, with as many rollouts as it may begin."""

    def __init__(self, bus: Bus, name: str, config: ModelConfig) -> None:
        self.name = name
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


async def kept(bus: Bus, key: str, endpoint: Counter, crew: list[Worker]) -> None:
    """Wait for a look at the endpoint, so many calls long, in which it is full, hardly refuses and everyone gets on.

    One such look is enough: on a machine that stalls, calls come in heaps, and the law then tries the limit anew.
    """
    last: object = None

    async def look() -> bool:
        nonlocal last
        endpoint.forget()
        before = [worker.done for worker in crew]
        limits: list[int | None] = []
        async with asyncio.timeout(60.0):
            while endpoint.came < LOOK_CALLS:
                limits.append((await bus.state.get(subjects.LIMITS, key, Fleet)).limit)
                await asyncio.sleep(0.01)
        done = [worker.done - earlier for worker, earlier in zip(crew, before, strict=True)]
        last = f"limits {sorted(map(str, set(limits)))}, peak {endpoint.peak}, {endpoint.refused} refused, done {done}"
        return (
            all(near(limit) for limit in limits)
            and near(endpoint.peak)  # full, and never piled up
            and endpoint.refused <= MOST_REFUSED * endpoint.came
            and min(done) >= 0.5 * max(done)
        )

    try:
        await until(look)
    except AssertionError:
        raise AssertionError(f"the limit of {LIMIT} was never kept: {last}") from None


def near(places: int | None) -> bool:
    return places is not None and abs(places - LIMIT) <= SLACK


@pytest.mark.slow
async def test_a_hard_limit_is_found_kept_and_shared_with_who_joins(bus: Bus, nats_server: NatsServer) -> None:
    async with sharing(nats_server.url, most_in_flight=LIMIT) as (endpoint, workers, key):

        async def found() -> bool:
            fleet: Fleet | None = await bus.state.get(subjects.LIMITS, key, Fleet)
            return fleet is not None and near(fleet.limit) and len(fleet.members) == WORKERS

        async def shared() -> bool:
            members = (await bus.state.get(subjects.LIMITS, key, Fleet)).members
            return joined.name in members and members[joined.name].places >= LIMIT // (WORKERS + 1) - 1

        async def all_there() -> bool:
            return (await bus.state.get(subjects.LIMITS, key, Fleet)).members.keys() == {one.name for one in crew}

        crew = [await workers.join() for _ in range(WORKERS)]
        await until(found)
        await kept(bus, key, endpoint, crew)

        joined = await workers.join()
        await until(shared)
        crew.append(joined)
        await kept(bus, key, endpoint, crew)

        await until(all_there)


async def test_an_endpoint_that_never_refuses_is_not_held_back(nats_server: NatsServer, bus: Bus) -> None:
    slow = Distribution(mean=5.0)  # all calls are there before the first is answered, on a slow machine, too
    async with sharing(nats_server.url, latency_s=slow) as (endpoint, workers, key):
        for _ in range(WORKERS):
            await workers.join()

        await until(lambda: endpoint.in_flight == WORKERS * CALLS)

        assert (await bus.state.get(subjects.LIMITS, key, Fleet)).limit is None
