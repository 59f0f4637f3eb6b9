"""Replay and simulated models over HTTP, in both forms of the OpenAI API: any client can talk to them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from gym_bus.errors import ModelError, ModelUnreachable, RateLimited, RequestRefused
from gym_bus.messages import Usage
from gym_bus.models.api import Reply
from gym_bus.models.body import Tokens, chat_body, count_tokens, error_body, response_body, tokens_of
from gym_bus.models.prompts import prompt_text
from gym_bus.models.replay import ReplayModel
from gym_bus.models.simulated import SimulatedModel

MAX_REQUEST_BYTES = 64 * 2**20
HANG_LIMIT_S = 3600.0
REMEMBERED = 131_072
"""Rollouts whose calls are counted."""
KNOWN_TOKENS = 64
"""Lengths whose tokens are kept as JSON: the server is not what is to be measured."""
SHUTDOWN_LIMIT_S = 1.0
ASK_LIMIT_S = 10.0
TOO_MUCH = (429, 503)
"""Statuses that say that there are too many calls."""

_request = msgspec.json.Decoder(dict[str, Any])


class Answered(msgspec.Struct):
    """The calls that a served model has answered so far."""

    calls: int = 0
    """With any status."""
    refused: int = 0
    """Those of them that were too many: 429 or 503."""

    def count(self, status: int) -> None:
        """One more answer."""
        self.calls += 1
        self.refused += status in TOO_MUCH


class _Identity(msgspec.Struct, frozen=True):
    """Whose call it is: from the `X-Gym-Rollout: job/task/rollout/attempt` header, or from the prompt."""

    task: int | None
    rollout: int
    attempt: int


class _Refused(Exception):
    def __init__(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, dict(headers or {})


class _Server:
    def __init__(
        self, model: ReplayModel | SimulatedModel, prompts: Mapping[str, int] | None, api_key: str | None
    ) -> None:
        self._model, self._prompts, self._api_key = model, prompts, api_key
        self._calls = itertools.count()
        self._calls_of: OrderedDict[str, int] = OrderedDict()
        self._known_tokens: dict[tuple[int, int], Tokens | None] = {}
        self._answered = Answered()

    async def responses(self, request: web.Request) -> web.Response:
        return await self._answer(request, chat=False)

    async def chat(self, request: web.Request) -> web.Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.Response:
        try:
            body = await self._body(request, chat)
            status, headers = 200, {}
        except _Refused as e:
            status, body, headers = e.status, e.body, e.headers
        self._answered.count(status)
        return web.Response(body=body, status=status, headers=headers, content_type="application/json")

    async def _body(self, request: web.Request, chat: bool) -> bytes:
        if self._api_key and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            raise _Refused(401, error_body("wrong api key", "authentication_error", "invalid_api_key"))
        try:
            asked = _request.decode(await request.read())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            raise _Refused(400, error_body(f"the request is not a JSON object: {e}", "invalid_request_error")) from None
        given = asked.get("messages" if chat else "input")
        if given is None:
            key = "messages" if chat else "input"
            raise _Refused(400, error_body(f"missing required parameter: '{key}'", "invalid_request_error"))
        if isinstance(given, list) and not all(isinstance(item, dict) for item in given):
            raise _Refused(400, error_body("expected a list of objects", "invalid_request_error"))
        if asked.get("stream"):
            raise _Refused(400, error_body("this server does not stream", "invalid_request_error", "unsupported"))
        prompt = prompt_text(given)
        identity = self._identity(request, prompt)
        if isinstance(self._model, SimulatedModel):
            return await self._simulate(self._model, prompt, identity, chat, bool(asked.get("return_token_ids")))
        return self._replay(self._model, given, identity, chat)

    def _identity(self, request: web.Request, prompt: str) -> _Identity:
        header = request.headers.get("X-Gym-Rollout", "")
        parts = header.split("/")
        if len(parts) == 4 and all(p.isascii() and p.isdigit() for p in parts[1:]):
            return _Identity(int(parts[1]), int(parts[2]), int(parts[3]))
        return _Identity(self._prompts.get(prompt) if self._prompts else None, 0, 1)

    async def _simulate(
        self, model: SimulatedModel, prompt: str, who: _Identity, chat: bool, with_tokens: bool
    ) -> bytes:
        try:
            with model.admitted():
                return await self._drawn(model, prompt, who, chat, with_tokens)
        except RateLimited as e:
            wish = {"Retry-After": f"{e.retry_after_s:g}"} if e.retry_after_s else {}
            raise _Refused(429, error_body(e.message, "rate_limit_error", "rate_limit_exceeded"), wish) from None
        except ModelError as e:
            raise _Refused(e.status, error_body(e.message, "server_error")) from None

    async def _drawn(self, model: SimulatedModel, prompt: str, who: _Identity, chat: bool, with_tokens: bool) -> bytes:
        draw = model.draw(self._key(who))
        if draw.fault == "hang":
            await asyncio.sleep(HANG_LIMIT_S)
        if draw.latency_s:
            await asyncio.sleep(draw.latency_s)
        if fault := model.fault(draw):
            raise fault
        spent = count_tokens(prompt)
        usage = Usage(input_tokens=spent, output_tokens=draw.tokens, total_tokens=spent + draw.tokens)
        make = chat_body if chat else response_body
        return make(
            name=str(next(self._calls)),
            model=model.name,
            text=model.text(draw.tokens, draw.ending),
            usage=usage,
            created_at=int(time.time()),
            tokens=self._tokens(model, spent, draw.tokens) if with_tokens else None,
        )

    def _tokens(self, model: SimulatedModel, prompt: int, sampled: int) -> Tokens | None:
        key = (prompt, sampled)
        if key not in self._known_tokens:
            if len(self._known_tokens) >= KNOWN_TOKENS:
                self._known_tokens.clear()
            call = model.tokens(prompt, sampled)
            self._known_tokens[key] = tokens_of(call) if call else None
        return self._known_tokens[key]

    def _key(self, who: _Identity) -> str:
        """Names a call: each step and each retry of a rollout draws anew, and the same in every run."""
        if who.task is None:
            return str(next(self._calls))
        key = f"{who.task}.{who.rollout}/{who.attempt}"
        number = self._calls_of[key] = self._calls_of.pop(key, -1) + 1
        if len(self._calls_of) > REMEMBERED:
            self._calls_of.popitem(last=False)
        return f"{key}/{number}"

    def _replay(self, model: ReplayModel, given: Any, who: _Identity, chat: bool) -> bytes:
        try:
            reply = model.answer({"input": given}, who.task, who.rollout, _steps_before(given))
        except RequestRefused as e:
            raise _Refused(404, error_body(e.message, "invalid_request_error", "no_recording")) from None
        return _as_chat(reply, model.name) if chat else reply.body

    async def models(self, request: web.Request) -> web.Response:
        listed = [{"id": self._model.name, "object": "model", "created": 0, "owned_by": "gym-bus"}]
        body = msgspec.json.encode({"object": "list", "data": listed})
        return web.Response(body=body, content_type="application/json")

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(body=b'{"status":"ok"}', content_type="application/json")

    async def load(self, request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._answered), content_type="application/json")


def _steps_before(given: Any) -> int:
    """How many model calls lie behind a conversation.

    A call ends where tool outputs follow its items, or where the next call's reasoning begins. Assistant messages alone
    do not count: an agent stops at them, so they are examples that the task gives.
    """
    steps, ours, spoke = 0, False, False
    for item in given if isinstance(given, list) else []:
        kind, role = item.get("type"), item.get("role")
        reasoned = kind == "reasoning" or bool(item.get("reasoning_content"))
        answered = kind == "function_call_output" or role == "tool"
        if (ours and (reasoned or answered)) or (spoke and answered):
            steps, ours = steps + 1, False
        ours = ours or reasoned or kind == "function_call" or bool(item.get("tool_calls"))
        spoke = role == "assistant"
    return steps + ours


def _as_chat(reply: Reply, model: str) -> bytes:
    """A Responses object as the Chat Completions object that says the same."""
    texts: list[str] = []
    reasoning: list[str] = []
    refusals: list[str] = []
    calls: list[dict[str, Any]] = []
    for raw in reply.head.output:
        item = msgspec.json.decode(raw, type=dict[str, Any])
        parts = [part for part in item.get("content") or [] if isinstance(part, dict)]
        if item.get("type") == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
        elif item.get("type") == "reasoning":
            reasoning += [str(part.get("text", "")) for part in parts or item.get("summary") or []]
        else:
            texts += [str(part["text"]) for part in parts if "text" in part]
            refusals += [str(part["refusal"]) for part in parts if "refusal" in part]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(texts) if texts or not (calls or refusals) else None,
    }
    if refusals:
        message["refusal"] = "".join(refusals)
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    reason = reply.head.incomplete_details.reason if reply.head.incomplete_details else None
    finish = {"max_output_tokens": "length", "content_filter": "content_filter"}.get(reason or "")
    usage = reply.usage
    return msgspec.json.encode(
        {
            "id": "chatcmpl-recorded",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": finish or ("tool_calls" if calls else "stop"),
                }
            ],
            "usage": {
                "prompt_tokens": usage.input_tokens,
                "completion_tokens": usage.output_tokens,
                "total_tokens": usage.total_tokens,
            },
        }
    )


def make_app(
    model: ReplayModel | SimulatedModel, *, prompts: Mapping[str, int] | None = None, api_key: str | None = None
) -> web.Application:
    """The HTTP application of one model.

    Args:
        model: who answers.
        prompts: task index by prompt text, for clients that do not send the rollout header.
        api_key: demand this bearer token.
    """
    server = _Server(model, prompts, api_key)
    app = web.Application(client_max_size=MAX_REQUEST_BYTES)
    app.router.add_post("/v1/responses", server.responses)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/v1/models", server.models)
    app.router.add_get("/health", server.health)
    app.router.add_get("/load", server.load)
    return app


async def serve(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Start to serve; returns the runner (to clean up) and the bound port. Raises OSError where it cannot listen."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_LIMIT_S)
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=4096)
    try:
        await site.start()
    except OSError:
        await runner.cleanup()
        raise
    server = site._server
    sockets = getattr(server, "sockets", None)
    return runner, int(sockets[0].getsockname()[1]) if sockets else port


async def answered_by(base_url: str) -> Answered:
    """What the model that is served at this address has answered so far.

    Raises:
        ModelUnreachable: it is no longer there.
    """
    timeout = aiohttp.ClientTimeout(total=ASK_LIMIT_S)
    address = base_url.removesuffix("/v1") + "/load"
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session,
            session.get(address) as reply,
        ):
            return msgspec.json.decode(await reply.read(), type=Answered)
    except (aiohttp.ClientError, TimeoutError) as e:
        raise ModelUnreachable(f"{address} does not say how many calls it answered: {e or type(e).__name__}") from None
