"""Replay and simulated models over HTTP, as the official client sees them, in both forms of the API."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from openai import AsyncOpenAI

from gym_bus.errors import ModelUnreachable
from gym_bus.messages import RolloutId
from gym_bus.models.api import CallInfo
from gym_bus.models.registry import Models
from gym_bus.models.replay import ReplayModel
from gym_bus.models.serve import Answered, answered_by, make_app, serve
from gym_bus.models.simulated import SimulatedModel
from gym_bus.settings import Distribution, ModelConfig, SimulatedConfig

CALL = {"type": "function_call", "id": "fc", "call_id": "a", "name": "add", "arguments": '{"a": 1}'}
THOUGHT = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]}
TOOL: dict[str, Any] = {"type": "function_call_output", "call_id": "a", "output": "2"}
USER: dict[str, Any] = {"role": "user", "content": "1+1?"}
ASK: list[Any] = [USER]
INFO = CallInfo(rollout=RolloutId("job", 0, 0), limit_s=60.0)


def says(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": content}


def response(*output: dict[str, Any], **more: Any) -> dict[str, Any]:
    head = {"id": "r", "object": "response", "created_at": 1, "model": "recorded", "tools": []}
    return {**head, "parallel_tool_calls": True, "tool_choice": "auto", "output": list(output), **more}


def simulated(**config: Any) -> SimulatedModel:
    settings: dict[str, Any] = {"output_tokens": Distribution(mean=4), "text": "the end", **config}
    return SimulatedModel(SimulatedConfig(**settings), name="sim")


def replay(folder: Path, *lines: dict[str, Any]) -> ReplayModel:
    file = folder / "answers.jsonl"
    file.write_bytes(b"\n".join(map(msgspec.json.encode, lines)))
    return ReplayModel(file, name="rec")


def whose(task: int, rollout: int = 0, attempt: int = 1) -> dict[str, str]:
    return {"X-Gym-Rollout": f"job/{task}/{rollout}/{attempt}"}


@asynccontextmanager
async def served(model: ReplayModel | SimulatedModel, **options: Any) -> AsyncIterator[tuple[AsyncOpenAI, str]]:
    """The official client, and the address for requests that it would not make."""
    runner, port = await serve(make_app(model, **options), "127.0.0.1", 0)
    base = f"http://127.0.0.1:{port}"
    try:
        async with AsyncOpenAI(base_url=f"{base}/v1", api_key="key", max_retries=0) as client:
            yield client, base
    finally:
        await runner.cleanup()
        await model.close()


async def chat_text(client: AsyncOpenAI, messages: list[Any], **more: Any) -> str:
    chat = await client.chat.completions.create(model="any", messages=messages, **more)
    return str(chat.choices[0].message.content)


@pytest.mark.parametrize("api", ["responses", "chat"])
async def test_token_ids_and_log_probabilities_travel_over_http_as_in_process(api: str) -> None:
    model = SimulatedModel(SimulatedConfig(output_tokens=Distribution(mean=40), tokens=True), name="sim")
    inside = await model.respond({"input": "one two three"}, INFO)
    runner, port = await serve(make_app(model), "127.0.0.1", 0)
    at: dict[str, Any] = {"base_url": f"http://127.0.0.1:{port}/v1", "api": api}
    models = Models({"m": ModelConfig(**at, return_tokens=True)})
    try:
        outside = await models.get("m").respond({"input": "one two three"}, INFO)
    finally:
        await models.close()
        await runner.cleanup()

    assert inside.call and outside.call
    assert (outside.call.token_ids, outside.call.prompt_token_ids) == (
        inside.call.token_ids,
        inside.call.prompt_token_ids,
    )
    assert len(outside.call.token_ids) == 160
    assert list(array("f", outside.call.logprobs)) == pytest.approx(list(array("f", inside.call.logprobs)), abs=1e-4)


async def test_a_simulated_model_answers_in_both_forms() -> None:
    async with served(simulated()) as (client, _):
        made = await client.responses.create(model="any", input="one two three")
        chat = await client.chat.completions.create(model="any", messages=ASK)

    assert (made.output_text, made.model, made.status) == ("so we the end", "sim", "completed")
    assert made.usage
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (3, 4, 7)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("so we the end", "stop")
    assert chat.usage and chat.usage.total_tokens == 5
    assert made.id != chat.id


async def test_the_model_is_listed_and_the_server_says_that_it_lives() -> None:
    async with served(simulated()) as (client, base):
        assert [listed.id for listed in (await client.models.list()).data] == ["sim"]
        async with aiohttp.ClientSession() as session, session.get(f"{base}/health") as reply:
            assert (reply.status, await reply.json()) == (200, {"status": "ok"})


async def test_the_server_counts_its_answers_and_those_that_were_too_many() -> None:
    async with served(simulated(rate_limited=1.0)) as (client, base):
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(model="any", input="x")
        with pytest.raises(openai.RateLimitError):
            await chat_text(client, ASK)
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(model="any", input="x", stream=True)
        await client.models.list()

        assert await answered_by(f"{base}/v1") == Answered(calls=3, refused=2)


async def test_a_server_that_is_gone_does_not_say_what_it_answered() -> None:
    async with served(simulated()) as (_, base):
        pass
    with pytest.raises(ModelUnreachable, match="/load"):
        await answered_by(f"{base}/v1")


async def test_one_rollout_draws_the_same_in_either_form_and_on_any_server() -> None:
    varied = Distribution(kind="uniform", mean=5000, spread=4990)
    found: list[list[int]] = []
    for _ in range(2):
        async with served(simulated(output_tokens=varied)) as (client, _base):
            made = [
                await client.responses.create(model="any", input="x", extra_headers=whose(*at))
                for at in ((0,), (0, 1), (1,), (0, 0, 2))
            ]
            found.append([m.usage.output_tokens for m in made if m.usage])
    async with served(simulated(output_tokens=varied)) as (client, _base):
        text = await chat_text(client, ASK, extra_headers=whose(0, 1))
        again = await chat_text(client, ASK, extra_headers=whose(0, 1))
    assert len(text.split()) == found[0][1] != len(again.split())
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"rate_limited": 1.0}, openai.RateLimitError, "too many requests"),
        ({"server_error": 1.0}, openai.InternalServerError, "internal error"),
    ],
)
async def test_a_simulated_fault_is_one_that_the_official_client_knows(
    config: dict[str, Any], error: type[openai.APIStatusError], words: str
) -> None:
    async with served(simulated(**config)) as (client, _):
        with pytest.raises(error, match=words) as e:
            await client.responses.create(model="any", input="x")
        with pytest.raises(error, match=words):
            await chat_text(client, ASK)
    assert e.value.response.headers.get("retry-after") == ("1" if error is openai.RateLimitError else None)


async def test_a_simulated_hang_is_a_timeout_of_the_client_and_does_not_hold_the_server_up() -> None:
    async with served(simulated(hang=1.0)) as (client, _):
        with pytest.raises(openai.APITimeoutError):
            await client.responses.create(model="any", input="x", timeout=0.05)


async def test_latency_is_waited_for_and_calls_do_not_wait_for_each_other() -> None:
    loop = asyncio.get_running_loop()
    async with served(simulated(latency_s=Distribution(mean=0.4))) as (client, _):
        started = loop.time()
        await asyncio.gather(*(client.responses.create(model="any", input="x") for _ in range(100)))
    assert 0.399 <= loop.time() - started < 100 * 0.4


async def test_recorded_samples_are_given_by_header_in_both_forms(tmp_path: Path) -> None:
    model = replay(tmp_path, {"task_index": 3, "completions": ["a", "b"]})
    async with served(model) as (client, _):
        made = [await client.responses.create(model="any", input="?", extra_headers=whose(3, i)) for i in range(2)]
        text = await chat_text(client, ASK, extra_headers=whose(3, 1))
    assert [m.output_text for m in made] == ["a", "b"]
    assert text == "b"


@pytest.mark.parametrize("header", [None, "job/0", "job/x/0/1", "a/b/0/0/1", "job/-1/0/1"])
async def test_without_a_rollout_header_the_prompt_says_which_task(tmp_path: Path, header: str | None) -> None:
    model = replay(tmp_path, {"task_index": 0, "completions": ["two"]}, {"prompt": "2+2?", "completions": ["four"]})
    headers = {"X-Gym-Rollout": header} if header else {}
    async with served(model, prompts={"1+1?": 0}) as (client, _):
        assert await chat_text(client, ASK, extra_headers=headers) == "two"
        made = await client.responses.create(model="any", input="2+2?", extra_headers=headers)
    assert made.output_text == "four"


async def test_a_recorded_conversation_goes_on_from_what_was_said(tmp_path: Path) -> None:
    steps = [response(THOUGHT, CALL, id="1"), response(says("first"), CALL, id="2"), response(says("done"), id="3")]
    items: list[Any] = [USER]
    ids: list[str] = []
    async with served(replay(tmp_path, {"prompt": "1+1?", "responses": [steps]})) as (client, _):
        for step in steps:
            ids.append((await client.responses.create(model="any", input=items)).id)
            items += [*step["output"], TOOL]
        with pytest.raises(openai.NotFoundError, match="3 model calls, the agent makes another"):
            await client.responses.create(model="any", input=items)
    assert ids == ["1", "2", "3"]


async def test_a_recorded_conversation_goes_on_in_chat_with_tools_and_reasoning(tmp_path: Path) -> None:
    steps = [response(THOUGHT, CALL), response(says("It is "), says("2."))]
    usage = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
    steps[0]["usage"] = usage
    messages: list[Any] = [USER]
    async with served(replay(tmp_path, {"prompt": "1+1?", "responses": [steps]})) as (client, _):
        chat = await client.chat.completions.create(model="any", messages=messages)
        first = chat.choices[0]
        messages += [first.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": "a", "content": "2"}]
        text = await chat_text(client, messages)

    assert (first.message.content, first.finish_reason) == (None, "tool_calls")
    assert first.message.tool_calls and first.message.tool_calls[0].type == "function"
    assert first.message.tool_calls[0].id == "a"
    assert first.message.tool_calls[0].function.model_dump() == {"name": "add", "arguments": '{"a": 1}'}
    assert first.message.model_dump()["reasoning_content"] == "hm"
    assert (chat.model, chat.usage and chat.usage.total_tokens) == ("rec", 11)
    assert text == "It is 2."


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [("max_output_tokens", "length"), ("content_filter", "content_filter"), (None, "stop")],
)
async def test_a_recorded_response_that_ended_early_says_so_in_chat(
    tmp_path: Path, reason: str | None, finish_reason: str
) -> None:
    one = response(says("cut"), incomplete_details={"reason": reason} if reason else None)
    async with served(replay(tmp_path, {"prompt": "1+1?", "responses": [one]})) as (client, _):
        chat = await client.chat.completions.create(model="any", messages=ASK)
    assert chat.choices[0].finish_reason == finish_reason


async def test_what_was_not_recorded_is_not_found_in_words(tmp_path: Path) -> None:
    async with served(replay(tmp_path, {"task_index": 0, "completions": ["a"]})) as (client, _):
        with pytest.raises(openai.NotFoundError, match="no sample 1 for task 0") as e:
            await client.responses.create(model="any", input="?", extra_headers=whose(0, 1))
        with pytest.raises(openai.NotFoundError, match="no recorded answer for this prompt"):
            await chat_text(client, ASK)
    assert e.value.code == "no_recording"


async def test_a_wrong_key_is_refused_and_the_right_one_is_not() -> None:
    async with served(simulated(), api_key="key") as (client, _):
        assert await chat_text(client, ASK)
        with pytest.raises(openai.AuthenticationError, match="wrong api key") as e:
            await client.with_options(api_key="other").responses.create(model="any", input="x")
    assert e.value.code == "invalid_api_key"


async def test_streams_are_refused_in_words() -> None:
    async with served(simulated()) as (client, _):
        with pytest.raises(openai.BadRequestError, match="does not stream"):
            await client.responses.create(model="any", input="x", stream=True)
        with pytest.raises(openai.BadRequestError, match="does not stream"):
            await client.chat.completions.create(model="any", messages=ASK, stream=True)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("responses", b"", "not a JSON object"),
        ("responses", b"{", "not a JSON object"),
        ("chat/completions", b"[]", "not a JSON object"),
        ("responses", b'{"messages": []}', "missing required parameter: 'input'"),
        ("chat/completions", b'{"input": "x"}', "missing required parameter: 'messages'"),
        ("chat/completions", b'{"messages": null}', "missing required parameter: 'messages'"),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong(path: str, body: bytes, words: str) -> None:
    async with (
        served(simulated()) as (_, base),
        aiohttp.ClientSession() as session,
        session.post(f"{base}/v1/{path}", data=body) as reply,
    ):
        error = (await reply.json())["error"]
        assert (reply.status, reply.content_type) == (400, "application/json")
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/embeddings", 404), ("GET", "/", 404), ("GET", "/v1/responses", 405), ("POST", "/v1/models", 405)],
)
async def test_an_unknown_route_is_refused(method: str, path: str, status: int) -> None:
    async with (
        served(simulated()) as (_, base),
        aiohttp.ClientSession() as session,
        session.request(method, f"{base}{path}", json={}) as reply,
    ):
        assert reply.status == status


async def test_a_port_that_is_taken_is_an_error_and_leaves_the_first_server_alone() -> None:
    async with served(simulated()) as (client, base):
        model = simulated()
        with pytest.raises(OSError, match="address already in use"):
            await serve(make_app(model), "127.0.0.1", int(base.rpartition(":")[2]))
        assert await chat_text(client, ASK)


async def test_a_retry_after_a_fault_draws_anew() -> None:
    async with served(simulated(rate_limited=0.5)) as (client, _base):
        refused = 0
        for _ in range(40):
            try:
                await client.responses.create(model="any", input="x", extra_headers=whose(0))
            except openai.RateLimitError:
                refused += 1
    assert 5 < refused < 35


@pytest.mark.parametrize(
    "body",
    [
        b'{"input": "\xff"}',
        b'{"input": ["hi"]}',
        b'{"input": ' + b"[" * 100_000,
    ],
)
async def test_a_body_that_cannot_be_read_is_a_bad_request(body: bytes) -> None:
    async with (
        served(simulated()) as (_client, base),
        aiohttp.ClientSession() as session,
        session.post(f"{base}/v1/responses", data=body) as reply,
    ):
        assert reply.status == 400
        assert (await reply.json())["error"]["type"] == "invalid_request_error"


async def test_a_rollout_header_of_another_form_is_passed_over() -> None:
    async with served(simulated()) as (client, _base):
        made = await client.responses.create(model="any", input="x", extra_headers={"X-Gym-Rollout": "job/x/0/1"})
    assert made.output_text


async def test_two_replies_of_reasoning_alone_are_two_steps(tmp_path: Path) -> None:
    steps = [response(THOUGHT, id="1"), response(THOUGHT, id="2"), response(says("done"), id="3")]
    async with served(replay(tmp_path, {"prompt": "1+1?", "responses": [steps]})) as (client, _):
        made = await client.responses.create(model="any", input=[USER, THOUGHT, THOUGHT])
    assert made.id == "3"


async def test_examples_in_the_task_are_no_steps(tmp_path: Path) -> None:
    steps = [response(says("first"), id="1"), response(says("second"), id="2")]
    shown = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}, USER]
    async with served(replay(tmp_path, {"prompt": "1+1?", "responses": [steps]})) as (client, _):
        made = await client.responses.create(model="any", input=shown)  # type: ignore[arg-type]
    assert made.id == "1"


async def test_a_recorded_refusal_stays_one_in_chat(tmp_path: Path) -> None:
    refused = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    async with served(replay(tmp_path, {"prompt": "1+1?", "responses": [response(refused)]})) as (client, _):
        made = await client.chat.completions.create(model="any", messages=[{"role": "user", "content": "1+1?"}])
    assert (made.choices[0].message.refusal, made.choices[0].message.content) == ("no", None)
