"""The official client over our own connections: it must not notice the difference, errors included."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import openai
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from gym_bus.agents.base import Context, Produced, Task
from gym_bus.agents.registry import AGENTS
from gym_bus.errors import AgentError
from gym_bus.messages import Attempt, Failed, Request, RolloutId, Usage
from gym_bus.models.api import CallInfo
from gym_bus.models.body import chat_body, response_body
from gym_bus.models.gate import Gate
from gym_bus.models.registry import Models
from gym_bus.models.serve import serve
from gym_bus.models.throttle import End, Ticket
from gym_bus.settings import AgentConfig, ModelConfig, RetryConfig
from gym_bus.workers.agent import AgentWorker

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEY = "sk-very-secret"
CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "é"}, "finish_reason": "stop"}],
}
ASK: Any = [{"role": "user", "content": "hi"}]
ROLLOUT = RolloutId("job", 3, 1)
USAGE = Usage(input_tokens=3, output_tokens=4, total_tokens=7)


class Account:
    """What the calls of one rollout add up to."""

    def __init__(self, rollout: RolloutId = ROLLOUT) -> None:
        self.info = CallInfo(rollout=rollout, number=2)
        self.timings = self.info.timings
        self.usages: list[Usage] = []

    def client(self, models: Models) -> AsyncOpenAI:
        return models.client("m", self.info, self.usages.append)


def event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def chunk(text: str) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}}]
    return event({"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": choices})


@asynccontextmanager
async def client_of(
    answer: Answer, credentials: str = "", account: Account | None = None, **config: Any
) -> AsyncIterator[tuple[AsyncOpenAI, Models]]:
    """The client of a server that always answers so."""
    app = web.Application()
    app.router.add_route("*", "/v1/{tail:.*}", answer)
    runner, port = await serve(app, "127.0.0.1", 0)
    settings: dict[str, Any] = {"base_url": f"http://{credentials}127.0.0.1:{port}/v1", "api_key": KEY, **config}
    models = Models({"m": ModelConfig(**settings)})
    try:
        yield (account or Account()).client(models), models
    finally:
        await models.close()
        await runner.cleanup()


async def chat(client: AsyncOpenAI, **more: Any) -> str | None:
    made = await asyncio.wait_for(client.chat.completions.create(model="m", messages=ASK, **more), 60)
    return str(made.choices[0].message.content)


async def test_the_request_arrives_whole_with_key_and_configured_headers() -> None:
    asked: list[tuple[web.Request, bytes]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request, await request.read()))
        return web.json_response(CHAT)

    async with client_of(answer, headers={"X-Team": "blue"}) as (client, _):
        assert await chat(client, extra_query={"q": "a b&c/é"}, temperature=0.5) == "é"

    request, body = asked[0]
    assert (request.method, request.path, dict(request.query)) == (
        "POST",
        "/v1/chat/completions",
        {"q": "a b&c/é"},
    )
    assert (request.headers["Authorization"], request.headers["X-Team"]) == (f"Bearer {KEY}", "blue")
    assert [len(request.headers.getall(name)) for name in ("Host", "Content-Length", "Content-Type")] == [1, 1, 1]
    assert msgspec.json.decode(body) == {"model": "m", "messages": ASK, "temperature": 0.5}


async def test_a_model_without_a_key_gets_a_client_all_the_same() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({**CHAT, "id": request.headers["Authorization"]})

    async with client_of(answer, api_key="") as (client, _):
        made = await client.chat.completions.create(model="m", messages=ASK)
    assert made.id == "Bearer none-for-m"


async def test_user_and_password_of_the_address_are_sent() -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers["Authorization"])
        return web.json_response(CHAT)

    async with client_of(answer, api_key="", credentials="me:p%40ss@") as (client, _):
        await chat(client)

    assert asked == ["Basic bWU6cEBzcw=="]


async def test_a_compressed_reply_is_read() -> None:
    async def answer(request: web.Request) -> web.Response:
        assert "gzip" in request.headers["Accept-Encoding"]
        body = gzip.compress(msgspec.json.encode(CHAT))
        return web.Response(body=body, headers={"Content-Encoding": "gzip", "Content-Type": "application/json"})

    async with client_of(answer) as (client, _):
        assert await chat(client) == "é"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_status_is_the_official_error_and_is_asked_for_once(
    status: int, error: type[openai.APIStatusError], stream: bool
) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        body = {"error": {"message": "no such thing", "code": "why"}}
        return web.json_response(body, status=status, headers={"X-Request-Id": "r1", "Retry-After": "0"})

    async with client_of(answer) as (client, _):
        with pytest.raises(error, match="no such thing") as e:
            await client.chat.completions.create(model="m", messages=ASK, stream=stream)

    assert (type(e.value), e.value.status_code, e.value.code, e.value.request_id) == (error, status, "why", "r1")
    assert len(asked) == 1


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    paths: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        paths.append(request.path)
        return web.Response(status=302, headers={"Location": "/v1/elsewhere"})

    async with client_of(answer) as (client, _):
        with pytest.raises(openai.APIStatusError):
            await chat(client)
    assert paths == ["/v1/chat/completions"]


async def test_a_stream_is_handed_on_as_it_arrives() -> None:
    read = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(chunk("a"))
        await asyncio.wait_for(read.wait(), 60)  # the second part exists only once the first was read
        await reply.write(chunk("b") + b"data: [DONE]\n\n")
        return reply

    found: list[str | None] = []
    async with client_of(answer) as (client, _):
        async for part in await client.chat.completions.create(model="m", messages=ASK, stream=True):
            found.append(part.choices[0].delta.content)
            read.set()
    assert found == ["a", "b"]


async def test_a_stream_of_responses_events_is_read() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for number, text in enumerate(("a", "b")):
            where = {"item_id": "i", "output_index": 0, "content_index": 0, "sequence_number": number, "logprobs": []}
            await reply.write(event({"type": "response.output_text.delta", "delta": text, **where}))
        return reply

    async with client_of(answer) as (client, _):
        stream = await client.responses.create(model="m", input="hi", stream=True)
        assert [part.delta async for part in stream if part.type == "response.output_text.delta"] == ["a", "b"]


async def test_a_stream_that_is_left_early_gives_its_connection_back() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if b'"stream":true' not in (await request.read()).replace(b" ", b""):
            return web.json_response(CHAT)
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(chunk("a"))
        await asyncio.Event().wait()
        return reply

    async with client_of(answer) as (client, models):
        async with await client.chat.completions.create(model="m", messages=ASK, stream=True) as stream:
            assert (await anext(aiter(stream))).choices[0].delta.content == "a"
        connector = models.session().connector
        assert connector
        assert not connector._acquired
        assert await chat(client) == "é"


async def test_an_error_within_a_stream_is_raised_where_it_comes() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(chunk("a") + event({"error": {"message": "overloaded"}}))
        return reply

    async with client_of(answer) as (client, _):
        parts = aiter(await client.chat.completions.create(model="m", messages=ASK, stream=True))
        assert (await anext(parts)).choices[0].delta.content == "a"
        with pytest.raises(openai.APIError, match="overloaded"):
            await anext(parts)


async def test_a_connection_that_breaks_within_a_body_is_a_connection_error() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
        await reply.prepare(request)
        await reply.write(b'{"id": ')
        assert request.transport
        request.transport.close()
        return reply

    async with client_of(answer) as (client, _):
        with pytest.raises(openai.APIConnectionError):
            await chat(client)


async def test_a_connection_that_breaks_before_the_reply_is_a_connection_error() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport
        request.transport.close()
        return web.Response()

    async with client_of(answer) as (client, _):
        with pytest.raises(openai.APIConnectionError):
            await chat(client)


@pytest.mark.parametrize("headers_first", [True, False])
async def test_an_endpoint_that_falls_silent_is_a_timeout(headers_first: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "application/json"})
        if headers_first:
            await reply.prepare(request)
            await reply.write(b"{")
        await asyncio.Event().wait()
        return reply

    async with client_of(answer, read_limit_s=0.1) as (client, _):
        with pytest.raises(openai.APITimeoutError):
            await chat(client)


async def test_the_callers_own_timeout_wins() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        return web.Response()

    async with client_of(answer) as (client, _):
        with pytest.raises(openai.APITimeoutError):
            await chat(client, timeout=0.1)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
async def test_an_endpoint_that_is_not_there_is_a_connection_error(host: str, closed_port: int) -> None:
    models = Models({"m": ModelConfig(base_url=f"http://{host}:{closed_port}/v1")})
    try:
        with pytest.raises(openai.APIConnectionError) as e:
            await chat(Account().client(models))
    finally:
        await models.close()
    assert type(e.value) is openai.APIConnectionError


async def test_closing_the_client_leaves_the_workers_connections_open() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response(CHAT)

    async with client_of(answer) as (client, models):
        await client.close()
        assert await chat(Account().client(models)) == "é"


async def test_many_calls_run_at_once_and_each_gets_its_own_answer() -> None:
    count, arrived, everyone = 50, 0, asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal arrived
        arrived += 1
        if arrived == count:
            everyone.set()
        await asyncio.wait_for(everyone.wait(), 60)
        return web.json_response({**CHAT, "id": request.headers["X-Number"]})

    async with client_of(answer) as (client, _):
        made = await asyncio.gather(
            *(
                client.chat.completions.create(model="m", messages=ASK, extra_headers={"X-Number": str(i)})
                for i in range(count)
            )
        )
    assert [one.id for one in made] == [str(i) for i in range(count)]


async def test_a_call_that_drips_for_ever_ends_at_its_limit() -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "application/json"})
        await reply.prepare(request)
        for _ in range(200):
            await reply.write(b" ")
            await asyncio.sleep(0.05)
        return reply

    async with client_of(drip, call_limit_s=0.3) as (client, _):
        with pytest.raises(openai.APITimeoutError):
            await chat(client)


async def test_a_reply_larger_than_any_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.models.openai_client.MAX_REPLY_BYTES", 1000)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({**CHAT, "x": "y" * 1000})

    async with client_of(answer) as (client, _):
        with pytest.raises(openai.APIConnectionError) as error:
            await chat(client)

    assert "larger than" in str(error.value.__cause__)


def said(chat: bool, usage: Usage = USAGE) -> bytes:
    make = chat_body if chat else response_body
    return make(name="n", model="m", text="2", usage=usage, created_at=1)


async def ask(client: AsyncOpenAI, chat: bool, **more: Any) -> Any:
    if chat:
        return await client.chat.completions.create(model="m", messages=ASK, **more)
    return await client.responses.create(model="m", input="hi", **more)


@pytest.mark.parametrize("chat", [True, False])
async def test_the_calls_of_a_rollout_carry_its_header_and_are_accounted(chat: bool) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.extend(request.headers.getall("X-Gym-Rollout"))
        await asyncio.sleep(0.05)
        return web.Response(body=said(chat), content_type="application/json")

    one, other = Account(), Account(RolloutId("job", 4, 0))
    async with client_of(answer, account=one) as (client, models):
        await ask(client, chat)
        await ask(client.with_options(timeout=60), chat, extra_headers={"x-gym-rollout": "of/no/body/else"})
        await ask(other.client(models), chat)

    assert asked == ["job/3/1/2", "job/3/1/2", "job/4/0/2"]
    assert [[usage.total_tokens for usage in account.usages] for account in (one, other)] == [[7, 7], [7]]
    assert (one.timings.model_calls, other.timings.model_calls) == (2, 1)
    assert one.timings.model_s >= 0.1


async def test_the_header_has_the_configured_name_or_is_left_out() -> None:
    asked: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append({name: value for name, value in request.headers.items() if value.startswith("job/")})
        return web.json_response(CHAT)

    for name in ("X-Session", None):
        async with client_of(answer, rollout_header=name) as (client, _):
            await chat(client)

    assert [{name.lower(): value for name, value in headers.items()} for headers in asked] == [
        {"x-session": "job/3/1/2"},
        {},
    ]


CHAT_USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
RESPONSES_USAGE = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}


def delta(text: str, usage: Any) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}}] if text else []
    head = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return event({**head, "choices": choices, "usage": usage})


def progress(kind: str, number: int, usage: Any) -> bytes:
    response = {**msgspec.json.decode(said(chat=False)), "usage": usage}
    return f"event: {kind}\r\n".encode() + event({"type": kind, "sequence_number": number, "response": response})


STREAMS = {
    "chat": (True, delta("a", None) + delta("b", None) + delta("", CHAT_USAGE) + b"data: [DONE]\n\n"),
    "chat, growing": (True, delta("a", {**CHAT_USAGE, "completion_tokens": 1}) + delta("b", CHAT_USAGE)),
    "responses": (False, progress("response.created", 0, None) + progress("response.completed", 1, RESPONSES_USAGE)),
    "carriage returns": (True, delta("a", CHAT_USAGE).replace(b"\n", b"\r\n")),
    "no last line end": (True, delta("a", CHAT_USAGE).rstrip()),
}


@pytest.mark.parametrize("piece", [1, 7, 10_000])
@pytest.mark.parametrize("what", STREAMS)
async def test_of_a_stream_the_last_usage_counts_however_it_is_cut(what: str, piece: int) -> None:
    is_chat, body = STREAMS[what]

    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await reply.prepare(request)
        for at in range(0, len(body), piece):
            await reply.write(body[at : at + piece])
        return reply

    account = Account()
    async with client_of(answer, account=account) as (client, _):
        async for _ in await ask(client, is_chat, stream=True):
            pass

    assert account.usages == [USAGE]


async def test_the_time_in_which_the_caller_thinks_about_a_stream_is_not_the_models() -> None:
    thinks, thought = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(chunk("a"))
        await thinks.wait()
        await asyncio.sleep(0.1)
        await reply.write(chunk("b"))
        thought.set()
        return reply

    account, thinking_s, began = Account(), 0.0, time.monotonic()
    async with client_of(answer, account=account) as (client, _):
        async for _ in await ask(client, chat=True, stream=True):
            since = time.monotonic()
            thinks.set()
            await asyncio.wait_for(thought.wait(), 60)
            thinking_s += time.monotonic() - since
    whole_s = time.monotonic() - began

    assert thinking_s >= 0.1
    assert 0 < account.timings.model_s <= whole_s - thinking_s


@pytest.mark.parametrize(
    "usage",
    [None, "many", {"prompt_tokens": -1}, {"prompt_tokens": "3"}, [], {"prompt_tokens": 2**60}],
    ids=str,
)
async def test_a_usage_that_cannot_be_read_is_unknown_and_no_error(usage: Any) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({**CHAT, "usage": usage})

    account = Account()
    async with client_of(answer, account=account) as (client, _):
        assert await chat(client) == "é"

    assert (account.usages, account.timings.model_calls) == ([], 1)


async def test_only_what_asks_the_model_counts_and_a_retry_is_the_same_call() -> None:
    statuses = iter((200, 500, 200, 400))

    async def answer(request: web.Request) -> web.Response:
        status = next(statuses)
        return web.json_response({**CHAT, "data": [], "usage": CHAT_USAGE}, status=status)

    account = Account()
    async with client_of(answer, account=account) as (client, _):
        assert (await client.models.list()).data == []
        assert account.timings.model_calls == 0
        await chat(client.with_options(max_retries=1))
        assert (account.timings.model_calls, account.usages) == (1, [USAGE])
        with pytest.raises(openai.BadRequestError):
            await chat(client)

    assert (account.timings.model_calls, account.usages) == (2, [USAGE])


async def test_the_wait_for_a_turn_is_queueing_and_not_the_models_time(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = Gate.enter

    async def enter_late(gate: Gate, *limits: float) -> Ticket:
        await asyncio.sleep(0.2)
        return await enter(gate, *limits)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(CHAT)

    monkeypatch.setattr(Gate, "enter", enter_late)
    account, began = Account(), time.monotonic()
    async with client_of(answer, account=account) as (client, _):
        await chat(client)
    whole_s = time.monotonic() - began

    assert account.timings.model_queue_s >= 0.199
    assert 0 < account.timings.model_s <= whole_s - account.timings.model_queue_s


async def test_the_gate_is_told_of_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    leave, ends, statuses = Gate.leave, list[End](), iter((429, 200))

    def leave_with(gate: Gate, ticket: Ticket, end: End, retry_after_s: float | None = None) -> None:
        ends.append(end)
        leave(gate, ticket, end, retry_after_s)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(CHAT, status=next(statuses))

    monkeypatch.setattr(Gate, "leave", leave_with)
    async with client_of(answer, retry=RetryConfig(wait_s=0.01, max_wait_s=0.01)) as (client, _):
        with pytest.raises(openai.RateLimitError):
            await chat(client)
        assert await chat(client) == "é"

    assert ends == [End.REFUSED, End.TAKEN]


class Chatty:
    """An external agent: asks through the official client and through the context; may say itself what it used."""

    def __init__(self, says: int | None = None) -> None:
        self._usage = None if says is None else Usage(total_tokens=says)

    async def run(self, task: Task, context: Context) -> Produced:
        client = context.openai()
        assert context.openai() is client
        await client.chat.completions.create(model="m", messages=ASK)
        made = await client.responses.create(model="m", input="hi")
        reply = await context.respond(task.params)
        if "fail" in task.row:
            raise AgentError("the library gave up")
        assert made.usage and made.usage.total_tokens == 7  # within `response`, too: counted once all the same
        return Produced(response=reply.body, usage=self._usage)


async def worked(monkeypatch: pytest.MonkeyPatch, row: bytes, options: bytes) -> tuple[Attempt | Failed, list[str]]:
    """What an agent worker makes of a request for the chatty agent, and for which rollouts the endpoint was asked."""
    monkeypatch.setitem(AGENTS._paths, "chatty", f"{__name__}:Chatty")
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers["X-Gym-Rollout"])
        return web.Response(body=said(request.path.endswith("/chat/completions")), content_type="application/json")

    async with client_of(answer) as (_, models):
        request = Request(
            rollout=ROLLOUT, agent="chatty", model="m", verifier="v", row=row, agent_options=options, number=2
        )
        outcome = await AgentWorker(AgentConfig(), models, "w").handle(request, stored_at=0.0)
    return outcome, asked


@pytest.mark.parametrize(("options", "tokens"), [(b"{}", 21), (b'{"says": 100}', 100), (b'{"says": 0}', 0)])
async def test_an_attempt_has_the_tokens_that_its_agent_says_or_those_that_its_context_saw(
    monkeypatch: pytest.MonkeyPatch, options: bytes, tokens: int
) -> None:
    outcome, asked = await worked(monkeypatch, b'{"responses_create_params": {"input": "hi"}}', options)

    assert isinstance(outcome, Attempt)
    assert asked == ["job/3/1/2"] * 3
    assert outcome.usage.total_tokens == tokens
    assert outcome.timings.model_calls == 3
    assert 0 < outcome.timings.model_s <= outcome.timings.agent_s


async def test_a_failed_rollout_has_the_tokens_that_its_context_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, _ = await worked(monkeypatch, b'{"fail": true, "responses_create_params": {"input": "hi"}}', b"{}")

    assert isinstance(outcome, Failed)
    assert (outcome.usage.total_tokens, outcome.timings.model_calls) == (21, 3)
