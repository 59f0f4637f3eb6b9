"""A model over HTTP whose answers are fixed and whose manners are bad; it counts who asks how often."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web

from gym_bus.models.replay import ReplayModel
from gym_bus.models.serve import make_app, serve
from gym_bus.models.simulated import sample
from gym_bus.settings import Distribution

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Manners(msgspec.Struct, frozen=True, kw_only=True):
    """How the endpoint behaves; shares of calls."""

    latency_s: Distribution
    server_error: float = 0.03
    rate_limited: float = 0.01
    half_body: float = 0.01
    slow: float = 0.02
    """Calls that take ten times as long."""


class FaultyModel:
    """Serves recorded answers, one endpoint per file: `/<name>/v1/responses`."""

    def __init__(self, seed: int, manners: Manners) -> None:
        self._seed, self._manners = seed, manners
        self._root = web.Application()
        self._runner: web.AppRunner | None = None
        self.asked: Counter[str] = Counter()
        """Calls by `job/task/rollout/attempt`, those apart that were answered with a fault."""
        self.faults: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()
        self.port = 0
        self.held = 0
        """Calls that are not answered now."""
        self._hold_after = math.inf
        self._open = asyncio.Event()

    def add(self, name: str, answers: Path, always: dict[int, int]) -> None:
        """An endpoint; `always`: tasks that get nothing but this HTTP status."""

        @web.middleware
        async def misbehave(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._answer(request, handler, always)

        app = make_app(ReplayModel(answers, name=name))
        app.middlewares.append(misbehave)
        self._root.add_subapp(f"/{name}", app)

    async def __aenter__(self) -> FaultyModel:
        self._runner, self.port = await serve(self._root, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner
        await self._runner.cleanup()

    def hold_after(self, answered: int) -> None:
        """Once so many calls were answered, answer none until `let_go`: a run cannot end before it is looked at."""
        self._hold_after = answered
        self._open.clear()

    def let_go(self) -> None:
        """Answer, from now on."""
        self._hold_after = math.inf
        self._open.set()

    @property
    def needed(self) -> int:
        """Calls that a run without faults makes."""
        return len(self.asked)

    @property
    def repeated_share(self) -> float:
        """Share of the calls that had been made before; the faults of this endpoint and their retries do not count."""
        total = self.asked.total()
        return (total - len(self.asked)) / total if total else 0.0

    async def _answer(self, request: web.Request, handler: Handler, always: dict[int, int]) -> web.StreamResponse:
        who = request.headers["X-Gym-Rollout"]
        self._tries[who] += 1
        await request.read()  # now: who asks may be killed before the answer
        drawn, m = random.Random(f"{self._seed}:{who}:{self._tries[who]}"), self._manners
        dice = drawn.random()
        status = always.get(int(who.split("/")[1]))
        for fault, share in ((500, m.server_error), (429, m.rate_limited)):
            if status is None and dice < share:
                status = fault
            dice -= share
        await asyncio.sleep(sample(m.latency_s, drawn) * (10 if drawn.random() < m.slow else 1))
        if self.asked.total() >= self._hold_after:
            self.held += 1
            try:
                await self._open.wait()
            finally:
                self.held -= 1
        if status is not None:
            self.faults[str(status)] += 1
            return web.json_response(
                {"error": {"message": "as planned"}}, status=status, headers={"Retry-After": "0.1"}
            )
        if dice < m.half_body:
            self.faults["half body"] += 1
            return await _half(request)
        self.asked[who] += 1
        return await handler(request)


async def _half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"object": "response", "output": [{"type":')
    assert request.transport
    request.transport.close()
    return response
