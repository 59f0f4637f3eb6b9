"""The HTTP model client against real servers that behave badly."""

from __future__ import annotations

import asyncio
import json
import time
from array import array
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from aiohttp import web

from gym_bus.errors import (
    ContextTooLong,
    ModelError,
    ModelTimeout,
    ModelUnreachable,
    Overloaded,
    RateLimited,
    RequestRefused,
    TaskError,
    UsageError,
)
from gym_bus.messages import RolloutId, Usage
from gym_bus.models.api import CallInfo, Reply
from gym_bus.models.gate import Gate, endpoint_key
from gym_bus.models.refusals import Refusals
from gym_bus.models.registry import Models
from gym_bus.models.serve import make_app, serve
from gym_bus.models.simulated import SimulatedModel
from gym_bus.settings import Distribution, ModelConfig, RetryConfig, SimulatedConfig

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]

RETRY = RetryConfig(unreachable=1, rate_limited=2, server_error=2, timeout=0, wait_s=0.01, max_wait_s=0.05)
INFO = CallInfo(rollout=RolloutId("job", 3, 1), number=2)
KEY = "sk-very-secret"
GOOD = {"id": "r", "object": "response", "output": [{"type": "message", "role": "assistant", "content": []}]}


class Endpoint:
    """A server that answers in turn what the test says, and remembers what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.asked: list[web.Request] = []
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        self.bodies.append(msgspec.json.decode(await request.read()))
        answer = self._answers[min(len(self.asked), len(self._answers)) - 1]
        return await answer(request)


def says(value: Any, status: int = 200, **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        body = value if isinstance(value, bytes) else msgspec.json.encode(value)
        return web.Response(body=body, status=status, headers=headers, content_type="application/json")

    return answer


@asynccontextmanager
async def asking(
    endpoint: Endpoint, credentials: str = "", **config: Any
) -> AsyncIterator[Callable[..., Awaitable[Reply]]]:
    app = web.Application()
    app.router.add_post("/v1/{tail:.*}", endpoint.answer)
    runner, port = await serve(app, "127.0.0.1", 0)
    settings = {"retry": RETRY, "api_key": KEY, "base_url": f"http://{credentials}127.0.0.1:{port}/v1", **config}
    models = Models({"m": ModelConfig(**settings)})

    async def ask(params: dict[str, Any] | None = None, info: CallInfo = INFO) -> Reply:
        return await asyncio.wait_for(models.get("m").respond(params or {"input": "hi"}, info), 60)

    try:
        yield ask
    finally:
        await models.close()
        await runner.shutdown()
        await runner.cleanup()


async def test_the_reply_comes_back_as_the_bytes_it_was() -> None:
    body = msgspec.json.encode({**GOOD, "usage": {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}})
    endpoint = Endpoint(says(body))
    async with asking(endpoint, model="real-name", sampling={"temperature": 0.5}) as ask:
        reply = await ask({"input": "hi", "temperature": 1.0})
    assert reply.body == body
    assert (reply.usage.total_tokens, reply.usage.cached_tokens, reply.tries) == (5, None, 1)
    assert endpoint.bodies == [{"input": "hi", "temperature": 0.5, "model": "real-name"}]
    headers = endpoint.asked[0].headers
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["X-Gym-Rollout"] == "job/3/1/2"


async def test_a_reply_of_more_values_than_an_answer_has_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.models.replies.MOST_VALUES", 100)
    too_many = says({**GOOD, "x": [[]] * 101})
    async with asking(Endpoint(too_many, too_many, too_many, says({**GOOD, "x": [[]] * 40}))) as ask:
        with pytest.raises(ModelError, match="more values than any answer"):
            await ask()
        assert (await ask()).tries == 1


async def test_what_metadata_carries_for_the_request_leaves_the_metadata() -> None:
    endpoint = Endpoint(says(GOOD))
    metadata = {"extra_body": '{"seed": 7}', "chat_template_kwargs": '{"thinking": true}', "mine": "stays"}
    async with asking(endpoint) as ask:
        await ask({"input": "hi", "metadata": metadata})
        await ask({"input": "hi", "metadata": {"extra_body": '{"seed": 8}'}})
        with pytest.raises(TaskError, match="metadata"):
            await ask({"input": "hi", "metadata": {"extra_body": "[1"}})
    assert endpoint.bodies[0]["seed"] == 7
    assert endpoint.bodies[0]["chat_template_kwargs"] == {"thinking": True}
    assert endpoint.bodies[0]["metadata"] == {"mine": "stays"}
    assert "metadata" not in endpoint.bodies[1]


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, RequestRefused, "no such thing"),
        (401, RequestRefused, "no such thing"),
        (404, RequestRefused, "no such thing"),
        (429, RateLimited, "no such thing"),
        (500, ModelError, "no such thing"),
        (503, Overloaded, "no such thing"),
        (529, Overloaded, "no such thing"),
        (504, ModelTimeout, "no such thing"),
        (302, ModelError, "no such thing"),
    ],
)
async def test_every_status_has_its_class_and_the_endpoints_own_words(
    status: int, error: type[ModelError], words: str
) -> None:
    endpoint = Endpoint(says({"error": {"message": f"no such thing, {KEY}"}}, status))
    async with asking(endpoint) as ask:
        with pytest.raises(error) as e:
            await ask()
    assert type(e.value) is error
    assert words in str(e.value)
    assert KEY not in str(e.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "This model's maximum context length is 4096 tokens"}),
        (400, {"message": "The input (9000 tokens) is longer than the model's context length (8192 tokens)."}),
        (400, {"message": "The decoder prompt (length 9) is longer than the maximum model length of 8."}),
        (400, {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"}),
        (400, {"message": "Your input exceeds the limit", "code": "context_length_exceeded"}),
        (400, {"message": "The input token count (9) exceeds the maximum number of tokens allowed (8)."}),
        (400, {"message": "Input is too long for requested model."}),
        (413, {"message": "prompt is too long: 9 tokens > 8 maximum"}),
        (422, {"message": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens"}),
    ],
)
async def test_a_context_that_is_too_long_is_told_apart(status: int, error: dict[str, str]) -> None:
    endpoint = Endpoint(says({"error": error}, status))
    async with asking(endpoint) as ask:
        with pytest.raises(ContextTooLong):
            await ask()
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        says(b"x" * 490 + KEY.encode()),
        says("😀" * 1995 + KEY, 500),
        says({"error": {"message": KEY, "type": KEY}}, 401),
        says(b"", 307, Location=f"http://elsewhere/?key={KEY}"),
        says(b"{}", **{"Content-Encoding": KEY, "Content-Type": KEY}),
        says({"error": {"message": "its header said other-very-secret"}}, 400),
    ],
)
async def test_what_an_endpoint_echoes_of_the_keys_stays_out_of_the_error(answer: Answer) -> None:
    async with asking(Endpoint(answer), headers={"api-key": "Bearer other-very-secret"}) as ask:
        with pytest.raises(ModelError) as error:
            await ask()
    assert KEY[:8] not in str(error.value)
    assert "other-very" not in str(error.value)


PASSWORD = "p@ss/w,rd"


@pytest.mark.parametrize("written", [PASSWORD, quote(PASSWORD, safe="")])
async def test_user_and_password_of_the_address_are_sent_and_not_told(written: str) -> None:
    async def parrot(request: web.Request) -> web.StreamResponse:
        scheme, _, sent = request.headers["Authorization"].partition(" ")
        told = f"{scheme} {sent} is {b64decode(sent).decode()}, written me:{written}"
        return await says({"error": {"message": told}}, 401)(request)

    endpoint = Endpoint(parrot)
    async with asking(endpoint, credentials=f"me:{written}@", api_key="") as ask:
        with pytest.raises(
            RequestRefused, match=r"http://127[^@]*/v1/responses: Basic \*\*\* is me:\*\*\*, written me:\*\*\* "
        ):
            await ask()
    assert endpoint.asked[0].headers["Authorization"] == f"Basic {b64encode(b'me:' + PASSWORD.encode()).decode()}"


async def test_a_key_goes_before_user_and_password_of_the_address() -> None:
    endpoint = Endpoint(says(GOOD))
    async with asking(endpoint, credentials="me:hush@") as ask:
        await ask()
    assert endpoint.asked[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("address", ["http://{}127.0.0.1:1/v1", "http://{}no-such-host.invalid", "{}h/v1", "http://{}"])
async def test_an_address_that_does_not_serve_is_named_without_user_and_password(address: str) -> None:
    async with asking(Endpoint(says(GOOD)), base_url=address.format("me:hush@")) as ask:
        with pytest.raises(ModelError) as error:
            await ask()
    assert address.format("") in str(error.value)
    assert "me:" not in str(error.value) and "hush" not in str(error.value)


ODD_KEY = 'a"b/c\\d-é😀-secret-9'


@pytest.mark.parametrize(
    "spelled",
    [
        json.dumps(ODD_KEY),
        json.dumps(ODD_KEY, ensure_ascii=False),
        json.dumps(ODD_KEY).replace("/", "\\/"),
        json.dumps(ODD_KEY, ensure_ascii=False).replace("/", "\\/"),
        json.dumps(ODD_KEY).replace("\\u00e9", "\\u00E9").replace("-s", "\\u002Ds"),
    ],
)
@pytest.mark.parametrize("reply", ['{{"output": {}, 1', '{{"error": {{"code": {}}}}}', '{{"detail": {}}}'])
def test_a_secret_is_masked_however_json_spells_it(reply: str, spelled: str) -> None:
    refusals, data = Refusals("http://h/v1", [ODD_KEY]), reply.format(spelled).encode()
    assert json.loads(spelled) == ODD_KEY

    for error in (refusals.no_answer("no JSON", data), refusals.refusal(400, {}, data)):
        assert "***" in str(error) and "secret-9" not in str(error)


def test_a_secret_is_masked_in_an_error_that_is_told_as_json() -> None:
    assert "secret-9" not in str(Refusals("http://h/v1", [ODD_KEY]).error_in_200({"code": ODD_KEY}))


def test_the_limits_of_an_endpoint_are_kept_and_told_under_its_address_alone() -> None:
    plain, secret = ModelConfig(base_url="http://h/v1"), ModelConfig(base_url="http://me:hush@h/v1")
    assert endpoint_key(secret) == endpoint_key(plain)
    assert Gate("key", secret, lambda gate, within_s: None).address == "http://h/v1"


async def test_a_line_that_is_no_http_does_not_bring_the_key_into_the_error() -> None:
    async def parrot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readuntil(b"\r\n\r\n"))
        writer.write_eof()

    server = await asyncio.start_server(parrot, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/{KEY}"
    models = Models({"m": ModelConfig(base_url=address, api_key=KEY, retry=RETRY)})
    with pytest.raises(ModelError, match="no HTTP") as error:
        await models.get("m").respond({"input": "hi"}, INFO)
    await models.close()
    server.close()
    assert "POST /***" in str(error.value)


NONSENSE = ("many", [1], -1, 10**25, 2**63, 7.5, None)


@pytest.mark.parametrize("count", NONSENSE)
@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_a_usage_that_says_nothing_costs_nobody_the_answer(count: Any, api: str) -> None:
    usage = {"input_tokens": count, "prompt_tokens": count, "output_tokens": 3, "completion_tokens": 3}
    answer = {**GOOD, "choices": [{"message": {"content": "x"}}]}
    async with asking(Endpoint(says({**answer, "usage": usage}), says({**answer, "usage": count})), api=api) as ask:
        replies = [await ask(), await ask()]
    assert [(reply.tries, reply.usage) for reply in replies] == [(1, Usage()), (1, Usage())]
    assert [msgspec.json.decode(reply.body)["usage"] for reply in replies] == [None, None]


@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_half_of_a_surrogate_pair_costs_nobody_the_answer(api: str) -> None:
    text = rb"cut \ud83d and \uDE00, whole \ud83d\ude00, none \\ud83d"
    said = b'{"output": [{"type": "message", "content": "%b"}], "choices": [{"message": {"content": "%b"}}]}'
    async with asking(Endpoint(says(said % (text, text))), api=api) as ask:
        answer = await ask()
    content = msgspec.json.decode(answer.body)["output"][0]["content"]
    read = content if api == "responses" else content[0]["text"]
    assert read == "cut \ufffd and \ufffd, whole 😀, none \\ud83d"


@pytest.mark.parametrize("retry_after", ["0.01", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", ""])
async def test_rate_limits_are_waited_for(retry_after: str) -> None:
    limited = says({"error": {"message": "slow down"}}, 429, **{"Retry-After": retry_after})
    endpoint = Endpoint(limited, limited, says(GOOD))
    async with asking(endpoint) as ask:
        assert (await ask()).tries == 3


async def test_the_endpoints_retry_after_is_honoured() -> None:
    endpoint = Endpoint(says({}, 429, **{"Retry-After": "0.3"}), says(GOOD))
    async with asking(endpoint, retry=RetryConfig(wait_s=0.001)) as ask:
        started = time.monotonic()
        await ask()
    assert time.monotonic() - started >= 0.3


async def test_server_errors_are_retried_so_often_and_no_more() -> None:
    endpoint = Endpoint(says({"error": "boom"}, 500))
    async with asking(endpoint) as ask:
        with pytest.raises(ModelError, match="boom"):
            await ask()
    assert len(endpoint.asked) == 1 + RETRY.server_error


async def test_a_refused_request_is_not_repeated() -> None:
    endpoint = Endpoint(says({"error": "bad"}, 400))
    async with asking(endpoint) as ask:
        with pytest.raises(RequestRefused):
            await ask()
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>busy</html>",
        b'{"output": 3, "choices": 3}',
        b'{"output": [3], "choices": [3]}',
        b'{"output": ["A"], "choices": [{"text": "A"}]}',
        b'{"output": [], "status": "queued", "choices": []}',
        b'{"id": "x"}',
        b'{"output": [], "model": 7, "choices": []}',
        b'{"output": [',
        b"[]",
        b"\xff\xfe",
        b"null",
    ],
)
@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_a_reply_that_is_none_is_an_error_and_tried_again(body: bytes, api: str) -> None:
    good = GOOD if api == "responses" else {"choices": [{"message": {"content": "x"}}]}
    endpoint = Endpoint(says(body), says(good))
    async with asking(endpoint, api=api) as ask:
        assert (await ask()).tries == 2


@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_an_error_inside_a_200_is_an_error(api: str) -> None:
    endpoint = Endpoint(says({"error": {"message": "overloaded"}}))
    async with asking(endpoint, api=api) as ask:
        with pytest.raises(ModelError, match="overloaded"):
            await ask()


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "half an"}, "finish_reason": "abort"},
        {"message": {"content": "half an"}, "finish_reason": "error"},
        {"message": {"content": ""}, "finish_reason": "stop", "error": {"message": "provider gone"}},
    ],
)
async def test_an_answer_that_the_endpoint_broke_off_is_an_error(choice: dict[str, Any]) -> None:
    endpoint = Endpoint(says({"choices": [choice]}), says({"choices": [{"message": {"content": "x"}}]}))
    async with asking(endpoint, api="chat") as ask:
        assert (await ask()).tries == 2


async def test_a_refused_connection_names_the_address(closed_port: int) -> None:
    async with asking(Endpoint(says(GOOD)), base_url=f"http://127.0.0.1:{closed_port}/v1") as ask:
        with pytest.raises(ModelUnreachable, match=str(closed_port)):
            await ask()


async def test_an_unknown_host_and_a_bad_address_are_named() -> None:
    async with asking(Endpoint(says(GOOD)), base_url="http://no-such-host.invalid/v1") as ask:
        with pytest.raises(ModelUnreachable, match="no-such-host"):
            await ask()


async def test_token_arrays_travel_packed_and_leave_the_body() -> None:
    item = {
        **GOOD["output"][0],  # type: ignore[dict-item]
        "prompt_token_ids": [1, 2],
        "generation_token_ids": [3, 4, 5],
        "generation_log_probs": [-0.5, -1.0, -2.0],
    }
    endpoint = Endpoint(says({**GOOD, "output": [item]}))
    async with asking(endpoint, return_tokens=True) as ask:
        reply = await ask()
    assert reply.call
    assert list(array("I", reply.call.token_ids)) == [3, 4, 5]
    assert list(array("I", reply.call.prompt_token_ids)) == [1, 2]
    assert list(array("f", reply.call.logprobs)) == [-0.5, -1.0, -2.0]
    assert b"token_ids" not in reply.body


async def test_chat_tokens_are_read_as_vllm_writes_them() -> None:
    content = [{"token": "token_id:11", "logprob": -0.25}, {"token": "token_id:12", "logprob": -0.5}]
    choice = {"message": {"content": "x"}, "logprobs": {"content": content}}
    endpoint = Endpoint(says({"choices": [choice], "prompt_token_ids": [9]}))
    async with asking(endpoint, api="chat", return_tokens=True) as ask:
        reply = await ask()
    assert reply.call
    assert list(array("I", reply.call.token_ids)) == [11, 12]
    assert endpoint.bodies[0]["return_tokens_as_token_ids"] is True


async def test_an_unknown_model_is_suggested() -> None:
    with pytest.raises(UsageError, match="did you mean 'policy'"):
        Models({"policy": ModelConfig(base_url="http://x")}).get("polcy")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_official_client_runs_over_our_connections(stream: bool) -> None:
    async def chunks(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for text in ("a", "b"):
            delta = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
            choices = [{"index": 0, "delta": {"content": text}}]
            await reply.write(b"data: " + msgspec.json.encode({**delta, "choices": choices}) + b"\n\n")
        await reply.write(b"data: [DONE]\n\n")
        return reply

    app = (
        make_app(SimulatedModel(SimulatedConfig(output_tokens=Distribution(mean=4), text="end")))
        if not stream
        else web.Application()
    )
    if stream:
        app.router.add_post("/v1/chat/completions", chunks)
    runner, port = await serve(app, "127.0.0.1", 0)
    models = Models({"m": ModelConfig(base_url=f"http://127.0.0.1:{port}/v1")})
    try:
        client = models.client("m", INFO, lambda usage: None)
        messages: Any = [{"role": "user", "content": "hi"}]
        if stream:
            found = [
                chunk.choices[0].delta.content
                async for chunk in await client.chat.completions.create(model="m", messages=messages, stream=True)
            ]
            assert found == ["a", "b"]
        else:
            chat = await client.chat.completions.create(model="m", messages=messages)
            assert (chat.choices[0].message.content or "").endswith("end")
            response = await client.responses.create(model="m", input="hi")
            assert response.output_text.endswith("end")
    finally:
        await models.close()
        await runner.cleanup()
