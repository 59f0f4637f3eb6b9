"""One OpenAI-compatible endpoint over HTTP: deadlines on everything, retries by kind, and the endpoint's own words."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import random
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from gym_bus.errors import (
    ContextTooLong,
    ModelError,
    ModelTimeout,
    ModelUnreachable,
    Overloaded,
    RateLimited,
    RequestRefused,
    TaskError,
)
from gym_bus.messages import Call, Usage
from gym_bus.models.api import CallInfo, Reply, ResponseHead
from gym_bus.models.convert import chat_request, response_object
from gym_bus.models.gate import REFUSALS, Gate
from gym_bus.models.throttle import End, Ticket
from gym_bus.models.wire import WireChat, chat_decoder, response_decoder, token_item_decoder
from gym_bus.settings import ModelConfig, RetryConfig

MAX_REPLY_BYTES = 64 * 2**20
MAX_ERROR_CHARS = 2000
TRANSIENT_4XX = (408, 409, 425)
OVERLOAD_WORDS = frozenset(
    ["rate_limit_exceeded", "rate_limit_error", "too_many_requests", "overloaded_error", "server_overloaded"]
)
"""`type` or `code` of an error that says the same as status 429, whatever the status is."""
NO_ROOM_HERE = (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS)
"""Of connections: this machine has no port or descriptor left for one. It is as if the endpoint took no more."""
HANG_UPS = 2
"""Connections that a call may find closed before a word was said, beside its retries: servers close idle ones."""
_CONTEXT_WORDS = (
    "context length",
    "context_length",
    "context window",
    "maximum context",
    "too many tokens",
    "prompt is too long",
    "max_model_len",
)

_ENDED = (None, "completed", "incomplete")
_BROKEN_OFF = ("abort", "error")
"""Reasons to finish that are the endpoint's, not the model's: what there is of the answer must not be scored."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_encode = msgspec.json.Encoder().encode
_any = msgspec.json.Decoder()
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


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
        self._url = config.base_url.rstrip("/") + ("/chat/completions" if self._chat else "/responses")
        self._headers = {"Content-Type": "application/json", **config.headers}
        if config.api_key:
            self._headers["Authorization"] = f"Bearer {config.api_key}"

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        """Ask the endpoint; see `Model.respond`."""
        body = self._body(params)
        headers = self._headers
        if self._config.rollout_header:
            r = info.rollout
            identity = f"{r.job}/{r.task_index}/{r.rollout_index}/{info.number}"
            headers = {**headers, self._config.rollout_header: identity}
        call = _HttpCall(body, headers, params, info)
        try:  # the first try takes the short way: retrying costs nothing until it is needed
            return await self._try(call)
        except ModelError as e:
            if not e.retryable:
                raise
            return await self._retry(e, call)

    async def _retry(self, first: ModelError, call: _HttpCall) -> Reply:
        plan = _RetryPlan(self._config.retry, call)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(ModelError), stop=plan.stop, wait=plan.wait, sleep=call.sleep, reraise=True
        )
        pending: ModelError | None = first
        tries = 1
        async for attempt in retrying:
            with attempt:
                if pending is not None:  # the try that was made before tenacity came in
                    error, pending = pending, None
                    raise error
                tries += 1
                reply = await self._try(call, again=True)
                return msgspec.structs.replace(reply, tries=tries)
        raise first

    async def _try(self, call: _HttpCall, *, again: bool = False) -> Reply:
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
            end, retry_after_s = _end_of(e), getattr(e, "retry_after_s", None)
            raise
        finally:
            gate.leave(ticket, end, retry_after_s)
        return reply

    async def _turn(self, gate: Gate, call: _HttpCall, again: bool) -> Ticket:
        since = time.monotonic()
        try:
            return await gate.enter(call.left_s, self._config.retry.budget_s, again=again)
        finally:
            call.queued(time.monotonic() - since)

    async def _once(self, call: _HttpCall) -> Reply:
        for _ in range(HANG_UPS):
            try:
                return await self._exchange(call)
            except _HungUp:
                continue
        return await self._exchange(call)

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

    async def _exchange(self, call: _HttpCall) -> Reply:
        config = self._config
        call_s = min(config.call_limit_s, call.left_s)
        if call_s <= 0:
            raise ModelTimeout(f"no time left to call {self._url}")
        timeout = aiohttp.ClientTimeout(
            total=call_s, sock_connect=config.connect_limit_s, sock_read=config.read_limit_s, ceil_threshold=1e9
        )
        try:
            async with self._session().post(
                self._url, data=call.body, headers=call.headers, timeout=timeout, allow_redirects=False
            ) as reply:
                data = await _read(reply)
                if reply.status != 200:
                    raise self._refusal(reply, data)
        except aiohttp.ConnectionTimeoutError:
            raise ModelUnreachable(f"no connection to {self._url} within {config.connect_limit_s:g} s") from None
        except aiohttp.SocketTimeoutError:
            raise ModelTimeout(f"{self._url} sent nothing for {config.read_limit_s:g} s") from None
        except TimeoutError:
            raise ModelTimeout(f"{self._url} did not answer within {call_s:.3g} s") from None
        except aiohttp.ClientSSLError as e:
            raise ModelUnreachable(f"no TLS with {self._url}: {e.args[-1] if e.args else e}") from None
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
            raise ModelError(f"{self._url}: the reply broke off or is no HTTP: {type(e).__name__}: {e}") from None
        return self._from_chat(data, call.params) if self._chat else self._from_responses(data)

    def _refusal(self, reply: aiohttp.ClientResponse, data: bytes) -> ModelError:
        status, text = reply.status, self._clean(_error_text(data))
        message = f"{self._url}: {text}"
        if status == 429:
            return RateLimited(message, status, _retry_after_s(reply.headers.get("Retry-After")))
        if status in REFUSALS:
            return Overloaded(message, status, _retry_after_s(reply.headers.get("Retry-After")))
        if status in (408, 504):
            return ModelTimeout(message, status)
        if 300 <= status < 400:
            to = reply.headers.get("Location", "nowhere")
            return ModelError(f"{message}; it redirects to {to}: base_url must be the address itself", status)
        if status >= 500 or status in TRANSIENT_4XX or status < 400:
            return ModelError(message, status)
        if status in (400, 413, 422) and any(words in text.lower() for words in _CONTEXT_WORDS):
            return ContextTooLong(message, status)
        return RequestRefused(message, status)

    def _error_in_200(self, error: Any, otherwise: str = "") -> ModelError:
        message = f"{self._url}: {self._clean(_words(error) or otherwise)}"
        if isinstance(error, Mapping) and not OVERLOAD_WORDS.isdisjoint((error.get("type"), error.get("code"))):
            return RateLimited(message, 200)
        return ModelError(message, 200)

    def _clean(self, text: str) -> str:
        """Bounded, and without the key: an endpoint may echo what it was sent."""
        if self._config.api_key:
            text = text.replace(self._config.api_key, "***")
        return text[:MAX_ERROR_CHARS]

    def _bad(self, what: str, data: bytes) -> ModelError:
        return ModelError(f"{self._url}: {what}: {self._clean(data[:500].decode(errors='replace'))}", 200)

    def _from_responses(self, data: bytes) -> Reply:
        try:
            wire = response_decoder.decode(data)
        except _UNREADABLE as e:
            raise self._bad(f"the reply is no Responses object ({e})", data) from None
        if wire.error is not None or wire.status == "failed":
            raise self._error_in_200(wire.error, "status failed")
        if wire.status not in _ENDED:
            raise self._bad(f"the reply is not the end of an answer (status {wire.status!r})", data)
        if wire.output is None:
            raise self._bad("the reply has no output", data)
        if any(memoryview(item)[:1].tobytes() != b"{" for item in wire.output):
            raise self._bad("the reply has an output item that is no object", data)
        call: Call | None = None
        output = wire.output
        if self._config.return_tokens:
            try:
                data, output, call = _cut_tokens(data, output)
            except (ValueError, OverflowError, RecursionError, msgspec.DecodeError) as e:
                raise self._bad(f"its token ids do not fit their log-probabilities ({e})", data) from None
        head = ResponseHead(output=output, incomplete_details=wire.incomplete_details)
        return Reply(body=data, head=head, usage=wire.usage.plain() if wire.usage else Usage(), call=call)

    def _from_chat(self, data: bytes, params: Mapping[str, Any]) -> Reply:
        try:
            chat = chat_decoder.decode(data)
        except _UNREADABLE as e:
            raise self._bad(f"the reply is no Chat Completions object ({e})", data) from None
        if chat.error is not None:
            raise self._error_in_200(chat.error)
        if not chat.choices:
            raise self._bad("the reply has no choices", data)
        choice = chat.choices[0]
        if choice.message is None:
            raise self._bad("the reply has no message", data)
        if choice.error is not None or choice.finish_reason in _BROKEN_OFF:
            raise self._error_in_200(choice.error, f"it gave up (finish_reason {choice.finish_reason!r})")
        body = response_object(chat, choice, params, split_think=self._config.split_think)
        wire = response_decoder.decode(body)
        try:
            call = _chat_tokens(chat) if self._config.return_tokens else None
        except (ValueError, OverflowError) as e:
            raise self._bad(f"its token ids do not fit their log-probabilities ({e})", data) from None
        return Reply(
            body=body,
            head=ResponseHead(output=wire.output or [], incomplete_details=wire.incomplete_details),
            usage=chat.usage.plain() if chat.usage else Usage(),
            call=call,
        )

    async def close(self) -> None:
        """The connections are the session's."""


class _HungUp(ModelUnreachable):
    """The endpoint closed the connection without a word."""


class _HttpCall:
    """One model call over all its tries."""

    def __init__(self, body: bytes, headers: Mapping[str, str], params: Mapping[str, Any], info: CallInfo) -> None:
        self.body, self.headers, self.params, self._info = body, headers, params, info
        self.started_at = time.monotonic()
        self.queued_s = 0.0
        """Seconds in which it waited for its turn: they count against the rollout's time, not against its own."""

    @property
    def left_s(self) -> float:
        """Seconds until the rollout's time is up."""
        return self._info.limit_s - (time.monotonic() - self.started_at)

    def queued(self, seconds: float) -> None:
        """It waited for its turn."""
        self.queued_s += seconds
        self._info.timings.model_queue_s += seconds

    async def sleep(self, seconds: float) -> None:
        """Wait for the next try."""
        self._info.timings.model_queue_s += seconds
        await asyncio.sleep(seconds)


def _end_of(error: ModelError) -> End:
    """What an error says of the endpoint's load."""
    if isinstance(error, Overloaded):
        return End.REFUSED
    if isinstance(error, ModelTimeout):
        return End.TIMED_OUT
    return End.UNKNOWN if isinstance(error, ModelUnreachable) else End.TAKEN


class _RetryPlan:
    """When to try again, by the kind of the last error."""

    def __init__(self, config: RetryConfig, call: _HttpCall) -> None:
        self._config, self._call = config, call
        self._counts: dict[str, int] = {}

    def _kind(self, error: BaseException) -> tuple[str, int]:
        c = self._config
        if isinstance(error, Overloaded):
            return "rate_limited", c.rate_limited
        if isinstance(error, ModelTimeout):
            return "timeout", c.timeout
        if isinstance(error, ModelUnreachable):
            return "unreachable", c.unreachable
        return "server_error", c.server_error

    def _left_s(self) -> float:
        call = self._call
        spent_s = time.monotonic() - call.started_at - call.queued_s
        return min(call.left_s, self._config.budget_s - spent_s)

    def stop(self, state: RetryCallState) -> bool:
        """Whether the last error ends the call. Called once per failed try."""
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, ModelError) or not error.retryable:
            return True
        kind, most = self._kind(error)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind] > most or self._wait_s(error, kind) >= self._left_s()

    def wait(self, state: RetryCallState) -> float:
        """Seconds until the next try."""
        error = state.outcome.exception() if state.outcome else None
        if error is None:
            return 0.0
        return self._wait_s(error, self._kind(error)[0])

    def _wait_s(self, error: BaseException, kind: str) -> float:
        c = self._config
        backoff = min(c.wait_s * 2 ** min(self._counts.get(kind, 0), 16), c.max_wait_s) * random.uniform(0.5, 1.0)
        wished = getattr(error, "retry_after_s", None)
        return float(backoff if wished is None else min(max(wished, 0.0) + random.uniform(0, c.wait_s), c.max_wait_s))


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """The whole body as UTF-8, what is none replaced. Raises ModelError where it is larger than any answer."""
    data = await _read_bytes(reply)
    if data.isascii():
        return data
    try:
        data.decode()
    except UnicodeDecodeError:  # a server cut a character in two: the answer is still the model's
        return data.decode(errors="replace").encode()
    return data


async def _read_bytes(reply: aiohttp.ClientResponse) -> bytes:
    packed = "Content-Encoding" in reply.headers  # then its length says nothing of what comes out of it
    size = reply.content_length or 0
    if reply.content_length is not None and size <= MAX_REPLY_BYTES and not packed:
        return await reply.read()
    chunks: list[bytes] = []
    if size <= MAX_REPLY_BYTES:
        size = 0
        async for chunk in reply.content.iter_any():
            size += len(chunk)
            if size > MAX_REPLY_BYTES:
                break
            chunks.append(chunk)
        else:
            return b"".join(chunks)
    raise ModelError(f"{reply.url}: the reply is larger than {MAX_REPLY_BYTES >> 20} MiB", reply.status)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds from a `Retry-After` header: a number, or an HTTP date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _error_text(data: bytes) -> str:
    try:
        decoded = _any.decode(data)
    except _UNREADABLE:
        return data[: 4 * MAX_ERROR_CHARS].decode(errors="replace").strip() or "no error text"
    return _words(decoded.get("error", decoded) if isinstance(decoded, dict) else decoded)


def _words(error: Any) -> str:
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("detail") or _encode(error).decode())
    return "" if error is None else str(error)


def _pack(ids: list[int] | None) -> bytes:
    return array("I", ids or []).tobytes()


def _cut_tokens(data: bytes, output: list[msgspec.Raw]) -> tuple[bytes, list[msgspec.Raw], Call | None]:
    """Take the token arrays out of the body: they travel packed, at a third of the size and a hundredth of the cost."""
    call: Call | None = None
    kept: list[msgspec.Raw] = []
    for raw in output:
        tokens = token_item_decoder.decode(raw)
        if tokens.generation_token_ids is None:
            kept.append(raw)
            continue
        call = Call(
            prompt_token_ids=_pack(tokens.prompt_token_ids),
            token_ids=_pack(tokens.generation_token_ids),
            logprobs=array("f", tokens.generation_log_probs or []).tobytes(),
        )
        item = _object.decode(raw)
        for key in ("prompt_token_ids", "generation_token_ids", "generation_log_probs"):
            item.pop(key, None)
        kept.append(msgspec.Raw(_encode(item)))
    if call is not None:
        body = _object.decode(data)
        body["output"] = msgspec.Raw(_encode(kept))
        data = _encode(body)
    return data, kept, call


def _chat_tokens(chat: WireChat) -> Call | None:
    choice = (chat.choices or [])[0]
    sampled = (choice.logprobs.content if choice.logprobs else None) or []
    ids = choice.token_ids
    if ids is None:
        texts = [token.token for token in sampled]
        if not texts or not all(text.startswith("token_id:") for text in texts):
            return None
        ids = [int(text.removeprefix("token_id:")) for text in texts]
    if len(ids) != len(sampled):
        raise ModelError(f"{len(sampled)} log-probabilities for {len(ids)} tokens", 200)
    return Call(
        prompt_token_ids=_pack(chat.prompt_token_ids),
        token_ids=_pack(ids),
        logprobs=array("f", (token.logprob for token in sampled)).tobytes(),
    )
