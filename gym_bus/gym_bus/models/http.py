"""One OpenAI-compatible endpoint over HTTP: deadlines on everything, retries by kind, and the endpoint's own words."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec

from gym_bus.errors import ModelError, ModelTimeout, ModelUnreachable, Overloaded, RequestRefused, TaskError
from gym_bus.models.api import CallInfo, Reply
from gym_bus.models.convert import chat_request
from gym_bus.models.endpoint import endpoint_of
from gym_bus.models.gate import Gate
from gym_bus.models.reading import Reader
from gym_bus.models.refusals import Refusals
from gym_bus.models.replies import Replies
from gym_bus.models.retries import HttpCall, retrying
from gym_bus.models.throttle import End, Ticket
from gym_bus.settings import ModelConfig

NO_ROOM_HERE = (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS)
"""Of connections: this machine has no port or descriptor left for one. It is as if the endpoint took no more."""
HANG_UPS = 2
"""Connections that a call may find closed before a word was said, beside its retries: servers close idle ones."""

_encode = msgspec.json.Encoder().encode


class OpenAIModel:
    """A named endpoint that speaks the Responses or the Chat Completions API."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        session: Callable[[], aiohttp.ClientSession],
        gate: Gate | None = None,
    ) -> None:
        self._name, self._config, self._session, self._gate = name, config, session, gate
        self._chat = config.api == "chat"
        endpoint = endpoint_of(config)
        self._url = endpoint.address.rstrip("/") + ("/chat/completions" if self._chat else "/responses")
        self._headers = {"Content-Type": "application/json", **endpoint.headers}
        self._refusals = Refusals(self._url, endpoint.secrets)
        self._replies, self._reader = Replies(config, self._refusals), Reader()

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        """Ask the endpoint; see `Model.respond`."""
        body = self._body(params)
        headers = self._headers
        if self._config.rollout_header:
            headers = {**headers, self._config.rollout_header: info.identity}
        call = HttpCall(body, headers, params, info)
        try:  # the first try takes the short way: retrying costs nothing until it is needed
            return await self._try(call)
        except ModelError as e:
            if not e.retryable:
                raise
            return await self._retry(e, call)

    async def _retry(self, first: ModelError, call: HttpCall) -> Reply:
        pending: ModelError | None = first
        tries = 1
        async for attempt in retrying(self._config.retry, call):
            with attempt:
                if pending is not None:  # the try that was made before tenacity came in
                    error, pending = pending, None
                    raise error
                tries += 1
                reply = await self._try(call, again=True)
                return msgspec.structs.replace(reply, tries=tries)
        raise first

    async def _try(self, call: HttpCall, *, again: bool = False) -> Reply:
        """One request, when it is its turn."""
        gate = self._gate
        if gate is None:
            return await self._once(call)
        ticket = gate.pass_through() or await self._turn(gate, call, again)
        end, retry_after_s = End.UNKNOWN, None
        try:
            reply = await self._once(call)
            end = End.TAKEN
        except ModelError as e:
            if call.left_s > 0:  # else it was the rollout's time that was up, maybe as soon as the turn had come
                end, retry_after_s = _end_of(e), getattr(e, "retry_after_s", None)
            raise
        finally:
            gate.leave(ticket, end, retry_after_s)
        return reply

    async def _turn(self, gate: Gate, call: HttpCall, again: bool) -> Ticket:
        since = time.monotonic()
        try:
            return await gate.enter(call.left_s, self._config.retry.budget_s, again=again)
        finally:
            call.queued(time.monotonic() - since)

    async def _once(self, call: HttpCall) -> Reply:
        try:
            for _ in range(HANG_UPS):
                try:
                    return await self._exchange(call)
                except _HungUp:
                    continue
            return await self._exchange(call)
        except ModelError as e:
            e.__context__ = None  # frames of either traceback hold the reply, and the error may wait for the next try
            raise e.with_traceback(None) from None

    def _body(self, params: Mapping[str, Any]) -> bytes:
        config = self._config
        merged: dict[str, Any] = {**params, **config.sampling, "model": config.model or self._name}
        side = self._side_channels(merged)
        request = chat_request(merged) if self._chat else merged
        if self._chat:
            request["model"] = merged["model"]
        if config.return_tokens:
            request |= (
                {"logprobs": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
                if self._chat
                else {
                    "include": [*(merged.get("include") or []), "message.output_text.logprobs"],
                    "return_token_ids": True,
                }
            )
        return _encode({**request, **config.extra_body, **side})

    @staticmethod
    def _side_channels(merged: dict[str, Any]) -> dict[str, Any]:
        """What `metadata` carries for the request itself, NeMo Gym's way; it does not stay in the metadata."""
        metadata = merged.get("metadata")
        if not isinstance(metadata, Mapping):
            return {}
        rest = dict(metadata)
        side: dict[str, Any] = {}
        try:
            if text := rest.pop("extra_body", None):
                side |= msgspec.json.decode(text, type=dict[str, Any])
            if text := rest.pop("chat_template_kwargs", None):
                side["chat_template_kwargs"] = msgspec.json.decode(text)
        except (msgspec.DecodeError, TypeError) as e:
            raise TaskError(f"responses_create_params.metadata: not the text of a JSON object: {e}") from None
        if rest:
            merged["metadata"] = rest
        else:
            del merged["metadata"]
        return side

    async def _exchange(self, call: HttpCall) -> Reply:
        config = self._config
        call_s = min(config.call_limit_s, call.left_s)
        if call_s <= 0:
            raise ModelTimeout(f"no time left to call {self._url}")
        ends_at = asyncio.get_running_loop().time() + call_s
        timeout = aiohttp.ClientTimeout(
            total=call_s, sock_connect=config.connect_limit_s, sock_read=config.read_limit_s, ceil_threshold=1e9
        )
        try:
            async with self._session().post(
                self._url, data=call.body, headers=call.headers, timeout=timeout, allow_redirects=False
            ) as reply:
                data = await self._reader.read(reply, ends_at)
                if reply.status != 200:
                    raise self._refusals.refusal(reply.status, reply.headers, data)
        except aiohttp.ConnectionTimeoutError:
            raise ModelUnreachable(f"no connection to {self._url} within {config.connect_limit_s:g} s") from None
        except aiohttp.SocketTimeoutError:
            raise ModelTimeout(f"{self._url} sent nothing for {config.read_limit_s:g} s") from None
        except TimeoutError:
            raise ModelTimeout(f"{self._url} did not answer within {call_s:.3g} s") from None
        except aiohttp.ClientSSLError as e:
            why = self._refusals.clean(e.args[-1] if e.args else e)
            raise ModelUnreachable(f"no TLS with {self._url}: {why}") from None
        except aiohttp.ClientConnectorError as e:
            if e.os_error.errno in NO_ROOM_HERE:
                why = f"no further connection from this machine: {e.os_error.strerror}"
                raise Overloaded(f"{self._url}: {why}") from None
            raise ModelUnreachable(f"cannot reach {self._url}: {e.os_error.strerror or e}") from None
        except aiohttp.InvalidURL as e:
            raise RequestRefused(f"base_url is no address: {e}") from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
            raise _HungUp(f"{self._url} closed the connection: {e}") from None
        except aiohttp.ClientError as e:
            what = self._refusals.clean(e)  # with words of the reply, which may be the request's
            raise ModelError(f"{self._url}: the reply broke off or is no HTTP: {type(e).__name__}: {what}") from None
        replies = self._replies
        return replies.from_chat(data, call.params) if self._chat else replies.from_responses(data)

    async def close(self) -> None:
        """The connections are the session's."""


class _HungUp(ModelUnreachable):
    """The endpoint closed the connection without a word."""


def _end_of(error: ModelError) -> End:
    """What an error says of the endpoint's load."""
    if isinstance(error, Overloaded):
        return End.REFUSED
    if isinstance(error, ModelTimeout):
        return End.TIMED_OUT
    return End.UNKNOWN if isinstance(error, ModelUnreachable) else End.TAKEN
