"""Whatever an endpoint does to a connection, a call ends in time, with an error of the right class."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from bad_endpoint import FAULTS, BadEndpoint, Fault, bad_endpoint

from gym_bus.errors import FailureKind, ModelError, ModelTimeout, Overloaded
from gym_bus.messages import RolloutId
from gym_bus.models.api import CallInfo, Model
from gym_bus.models.registry import Models
from gym_bus.settings import ModelConfig, RetryConfig

RETRY = RetryConfig(unreachable=1, rate_limited=1, server_error=1, timeout=0, wait_s=0.01, max_wait_s=0.02)
LIMIT_S = 0.3
INFO = CallInfo(rollout=RolloutId("job", 0, 0), limit_s=10.0)


@asynccontextmanager
async def asked(*faults: Fault | None, **config: Any) -> AsyncIterator[tuple[Model, BadEndpoint]]:
    """A model whose endpoint does one thing after the other, the last of them for ever."""
    left = list(faults)
    async with bad_endpoint(lambda _: left.pop(0) if len(left) > 1 else left[0]) as endpoint:
        settings = {"retry": RETRY, "call_limit_s": LIMIT_S, **config}
        models = Models({"m": ModelConfig(base_url=f"http://127.0.0.1:{endpoint.port}/v1", **settings)})
        try:
            yield models.get("m"), endpoint
        finally:
            await models.close()


@pytest.mark.parametrize("name", FAULTS)
async def test_a_call_ends_in_time_with_the_class_of_what_was_wrong(name: str) -> None:
    fault = FAULTS[name]
    async with asked(fault) as (model, _):
        started = time.monotonic()
        with pytest.raises(ModelError) as error:
            await asyncio.wait_for(model.respond({"input": "hi"}, INFO), 10)
    assert error.value.kind == fault.kind
    assert time.monotonic() - started < 3 * LIMIT_S + 1


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.kind != FailureKind.REQUEST_REFUSED])
async def test_the_next_try_is_not_harmed_by_it(name: str) -> None:
    retry = RetryConfig(wait_s=0.01, max_wait_s=0.02)
    async with asked(FAULTS[name], None, retry=retry) as (model, endpoint):
        reply = await asyncio.wait_for(model.respond({"input": "hi"}, INFO), 10)
    assert b"boxed{A}" in reply.body
    assert endpoint.asked.total() == 2


async def test_silence_is_told_apart_from_slowness() -> None:
    async with asked(FAULTS["hangs within the body"], call_limit_s=10.0, read_limit_s=0.1) as (model, _):
        with pytest.raises(ModelTimeout, match=r"sent nothing for 0\.1 s"):
            await model.respond({"input": "hi"}, INFO)


async def test_a_slow_drip_does_not_outlive_the_rollout() -> None:
    async with asked(FAULTS["a drip of the body"], call_limit_s=60.0) as (model, _):
        with pytest.raises(ModelTimeout, match=r"did not answer within 0\.2 s"):
            await model.respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", 0, 0), limit_s=0.2))


async def test_good_calls_go_on_beside_bad_ones() -> None:
    bad = list(FAULTS.values())
    async with bad_endpoint(lambda task: bad[task] if task < len(bad) else None) as endpoint:
        config = ModelConfig(base_url=f"http://127.0.0.1:{endpoint.port}/v1", retry=RETRY, call_limit_s=1.0)
        models = Models({"m": config})
        calls = [
            models.get("m").respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", task, 0), limit_s=20.0))
            for task in range(len(bad) + 100)
        ]
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
        await models.close()
    assert [getattr(end, "kind", "answered") for end in ends] == [fault.kind for fault in bad] + ["answered"] * 100


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    most, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, most[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


async def test_a_machine_without_a_descriptor_for_a_connection_waits_as_for_a_full_endpoint() -> None:
    async with asked(None, call_limit_s=5.0) as (model, _):
        with no_descriptor_left(), pytest.raises(Overloaded, match="no further connection from this machine"):
            await model.respond({"input": "hi"}, INFO)
        await model.respond({"input": "hi"}, INFO)
