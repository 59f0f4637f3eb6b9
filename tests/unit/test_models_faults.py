"""Whatever an endpoint does to a connection, a call ends in time, with an error of the right class."""

from __future__ import annotations

import asyncio
import os
import resource
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
"""Of calls that end by it; the others must end by themselves, however slow the machine is."""
AMPLE_S = 60.0
INFO = CallInfo(rollout=RolloutId("job", 0, 0), limit_s=10 * AMPLE_S)


@asynccontextmanager
async def asked(*faults: Fault | None, **config: Any) -> AsyncIterator[tuple[Model, BadEndpoint]]:
    """A model whose endpoint does one thing after the other, the last of them for ever."""
    left = list(faults)
    async with bad_endpoint(lambda _: left.pop(0) if len(left) > 1 else left[0]) as endpoint:
        settings = {"retry": RETRY, "call_limit_s": AMPLE_S, **config}
        models = Models({"m": ModelConfig(base_url=f"http://127.0.0.1:{endpoint.port}/v1", **settings)})
        try:
            yield models.get("m"), endpoint
        finally:
            await models.close()


def limit_of(fault: Fault) -> float:
    return LIMIT_S if fault.kind is FailureKind.MODEL_TIMEOUT else AMPLE_S


@pytest.mark.parametrize("name", FAULTS)
async def test_a_call_ends_in_time_with_the_class_of_what_was_wrong(name: str) -> None:
    fault = FAULTS[name]
    async with asked(fault, call_limit_s=limit_of(fault)) as (model, _):
        with pytest.raises(ModelError) as error:
            await asyncio.wait_for(model.respond({"input": "hi"}, INFO), AMPLE_S / 2)
    assert error.value.kind == fault.kind


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.kind != FailureKind.REQUEST_REFUSED])
async def test_the_next_try_is_not_harmed_by_it(name: str) -> None:
    fault, retry = FAULTS[name], RetryConfig(wait_s=0.01, max_wait_s=0.02, timeout=5)
    async with asked(fault, None, retry=retry, call_limit_s=limit_of(fault)) as (model, endpoint):
        reply = await asyncio.wait_for(model.respond({"input": "hi"}, INFO), AMPLE_S / 2)
    assert b"boxed{A}" in reply.body
    tries = endpoint.asked.total()
    assert tries == 2 or (tries < 6 and fault.kind is FailureKind.MODEL_TIMEOUT)  # a short limit may pass by itself


async def test_silence_is_told_apart_from_slowness() -> None:
    async with asked(FAULTS["hangs within the body"], read_limit_s=0.1) as (model, _):
        with pytest.raises(ModelTimeout, match=r"sent nothing for 0\.1 s"):
            await model.respond({"input": "hi"}, INFO)


async def test_a_slow_drip_does_not_outlive_the_rollout() -> None:
    async with asked(FAULTS["a drip of the body"]) as (model, _):
        with pytest.raises(ModelTimeout, match=r"did not answer within 0\.\d+ s"):
            await model.respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", 0, 0), limit_s=0.5))


async def test_good_calls_go_on_beside_bad_ones() -> None:
    bad = list(FAULTS.values())
    async with bad_endpoint(lambda task: bad[task] if task < len(bad) else None) as endpoint:
        limits = [limit_of(fault) for fault in bad] + [AMPLE_S] * 100
        address = f"http://127.0.0.1:{endpoint.port}/v1"
        models = Models({f"{s}": ModelConfig(base_url=address, retry=RETRY, call_limit_s=s) for s in {*limits}})
        calls = [
            models.get(f"{limit_s}").respond(
                {"input": "hi"}, CallInfo(rollout=RolloutId("job", task, 0), limit_s=AMPLE_S)
            )
            for task, limit_s in enumerate(limits)
        ]
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), AMPLE_S)
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
    async with asked(None) as (model, _):
        with no_descriptor_left(), pytest.raises(Overloaded, match="no further connection from this machine"):
            await model.respond({"input": "hi"}, INFO)
        await model.respond({"input": "hi"}, INFO)
