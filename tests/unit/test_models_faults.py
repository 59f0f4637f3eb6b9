"""Whatever an endpoint does to a connection, a call ends in time, with an error of the right class."""

from __future__ import annotations

import asyncio
import os
import resource
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from bad_endpoint import FAULTS, GOOD_BODY, BadEndpoint, Fault, bad_endpoint, reply

from gym_bus.errors import FailureKind, ModelError, ModelTimeout, Overloaded
from gym_bus.messages import RolloutId
from gym_bus.models.api import CallInfo, Model
from gym_bus.models.gate import Gate
from gym_bus.models.registry import Models
from gym_bus.models.throttle import End
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
    fault, retry = FAULTS[name], RetryConfig(wait_s=0.01, max_wait_s=0.02, timeout=20)
    async with asked(fault, None, retry=retry, call_limit_s=limit_of(fault)) as (model, endpoint):
        answer = await asyncio.wait_for(model.respond({"input": "hi"}, INFO), AMPLE_S / 2)
    assert b"boxed{A}" in answer.body
    tries = endpoint.asked.total()
    assert tries == 2 or (2 < tries < 22 and limit_of(fault) == LIMIT_S)  # a short limit may pass by itself


async def test_silence_is_told_apart_from_slowness() -> None:
    async with asked(FAULTS["hangs within the body"], read_limit_s=0.1) as (model, _):
        with pytest.raises(ModelTimeout, match=r"sent nothing for 0\.1 s"):
            await model.respond({"input": "hi"}, INFO)


async def test_a_slow_drip_does_not_outlive_the_rollout() -> None:
    async with asked(FAULTS["a drip of the body"]) as (model, _):
        with pytest.raises(ModelTimeout, match=r"did not answer within 0\.\d+ s"):
            await model.respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", 0, 0), limit_s=0.5))


@pytest.mark.parametrize(("rollout_s", "call_s", "end"), [(AMPLE_S, 0.1, End.TIMED_OUT), (0.1, AMPLE_S, End.UNKNOWN)])
async def test_an_endpoint_is_slow_where_it_had_its_time_not_where_the_rollout_had_none_left(
    rollout_s: float, call_s: float, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[End] = []
    monkeypatch.setattr(Gate, "leave", lambda gate, ticket, end, retry_after_s: ends.append(end))
    async with asked(FAULTS["hangs without a word"], call_limit_s=call_s) as (model, _):
        with pytest.raises(ModelTimeout):
            await model.respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", 0, 0), limit_s=rollout_s))
    assert ends == [end]


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


async def test_what_a_server_says_behind_an_answer_is_not_the_next_answer() -> None:
    """Call 1 waits on a connection of its own until the server has said something more on that of call 0."""
    waiting, answered, said_more = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def answer(text: str) -> bytes:
        return reply(GOOD_BODY.replace(b"\\\\boxed{A}", text.encode()))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(head.partition("Content-Length: ")[2].partition("\r")[0]))
                task = int(head.partition("X-Gym-Rollout: job/")[2].partition("/")[0])
                if task == 1:
                    waiting.set()
                    await said_more.wait()
                writer.write(answer(f"to {task}"))
                if task == 0:
                    await answered.wait()
                    writer.write(answer("to nobody"))
                    said_more.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    models = Models({"m": ModelConfig(base_url=address, retry=RETRY)})

    async def ask(task: int) -> bytes:
        info = CallInfo(rollout=RolloutId("job", task, 0), limit_s=AMPLE_S)
        return (await models.get("m").respond({"input": "hi"}, info)).body

    first = asyncio.create_task(ask(1))
    await waiting.wait()
    bodies = [await ask(0)]
    answered.set()
    bodies += [await first, *await asyncio.gather(ask(2), ask(3))]
    await models.close()
    server.close()
    assert [body.partition(b"to ")[2][:1] for body in bodies] == [b"0", b"1", b"2", b"3"]


async def test_large_replies_wait_for_one_another_and_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.models.reading.LARGE_REPLIES_BYTES", 2**20)
    large = Fault(reply(GOOD_BODY.replace(b"A}", b"A" * 700_000 + b"}")), FailureKind.MODEL_ERROR)
    async with asked(large) as (model, _):
        replies = await asyncio.gather(*(model.respond({"input": "hi"}, INFO) for _ in range(6)))
    assert {len(one.body) for one in replies} == {len(GOOD_BODY) + 699_999}


async def test_an_error_that_waits_for_the_next_try_does_not_hold_the_reply() -> None:
    async with asked(Fault(reply(b"x" * 2**20), FailureKind.MODEL_ERROR)) as (model, _):
        with pytest.raises(ModelError) as error:
            await model.respond({"input": "hi"}, INFO)
    kept: BaseException | None = error.value
    while kept is not None:
        held = [value for frame, _ in traceback.walk_tb(kept.__traceback__) for value in frame.f_locals.values()]
        assert not [value for value in held if isinstance(value, bytes | bytearray) and len(value) >= 2**20]
        kept = kept.__context__


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
