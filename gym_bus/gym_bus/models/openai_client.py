"""The official OpenAI client over the worker's own connections, for external code that wants one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import aiohttp
import httpx2
from openai import AsyncOpenAI

from gym_bus import activity
from gym_bus.messages import Timings, Usage
from gym_bus.models.api import CallInfo
from gym_bus.models.endpoint import endpoint_of
from gym_bus.models.gate import REFUSALS, Gate, NoTurn
from gym_bus.models.passing import PassingUsage
from gym_bus.models.reading import MAX_REPLY_BYTES
from gym_bus.models.throttle import End, Ticket
from gym_bus.settings import ModelConfig

_PER_HOP = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding"})
"""Request headers that aiohttp sets for its own connection."""
_DECODED = frozenset({"content-encoding", "content-length", "transfer-encoding"})
"""Reply headers that no longer hold once aiohttp has decoded the body."""
_CALLS = ("/responses", "/completions")
"""Ends of the paths to which a POST asks the model for an answer."""

TURN_LIMIT_S = 86_400.0
"""The rollout's own limit ends the wait for a turn long before."""


class _Turn:
    """A call's turn at the endpoint, where turns are kept; given back once."""

    def __init__(self, gate: Gate | None, ticket: Ticket | None) -> None:
        self._gate, self._ticket = gate, ticket

    def over(self, end: End) -> None:
        if self._gate and self._ticket and not self._ticket.ended:
            self._gate.leave(self._ticket, end)


class _Account:
    """What one request adds to its rollout's account."""

    def __init__(self, timings: Timings, on_usage: Callable[[Usage], None], request: httpx2.Request) -> None:
        self._timings, self._on_usage = timings, on_usage
        path = request.url.path
        self._call = request.method == "POST" and path.endswith(_CALLS)
        self._chat = not path.endswith("/responses")
        self._usage: PassingUsage | None = None
        if self._call and request.headers.get("x-stainless-retry-count", "0") == "0":  # a retry is the same call
            timings.model_calls += 1
            activity.note(f"model call {timings.model_calls}")

    @contextmanager
    def waited(self, stage: Literal["model_s", "model_queue_s"] = "model_s") -> Iterator[None]:
        """The endpoint is to say something, or its turn is to come."""
        since = time.monotonic()
        try:
            yield
        finally:
            setattr(self._timings, stage, getattr(self._timings, stage) + time.monotonic() - since)

    def answered(self, reply: aiohttp.ClientResponse) -> None:
        """The body comes now."""
        if self._call and reply.status == 200:
            self._usage = PassingUsage(chat=self._chat, events=reply.content_type == "text/event-stream")

    def passes(self, chunk: bytes) -> None:
        """A piece of the body."""
        if self._usage:
            self._usage.passes(chunk)

    def ends(self) -> None:
        """Nobody reads on."""
        if self._call:
            activity.note(f"agent, after model call {self._timings.model_calls}")
        if self._usage and (usage := self._usage.ends()):
            self._on_usage(usage)
        self._usage = None


class _Body(httpx2.AsyncByteStream):
    """The reply's body as it arrives."""

    def __init__(self, reply: aiohttp.ClientResponse, turn: _Turn, account: _Account) -> None:
        self._reply, self._turn, self._account = reply, turn, account

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            size = 0
            while chunk := await self._next():
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise httpx2.ReadError(f"the reply is larger than {MAX_REPLY_BYTES >> 20} MiB")
                self._account.passes(chunk)
                yield chunk
        except TimeoutError as e:
            raise httpx2.ReadTimeout(str(e) or "the reply stopped") from e
        except aiohttp.ClientError as e:
            raise httpx2.ReadError(str(e)) from e

    async def _next(self) -> bytes:
        """Empty at the end."""
        with self._account.waited():
            return await self._reply.content.readany()

    async def aclose(self) -> None:
        self._reply.release()
        self._turn.over(End.TAKEN)
        self._account.ends()


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """Carries the requests of one rollout over a shared aiohttp session."""

    def __init__(
        self,
        config: ModelConfig,
        session: aiohttp.ClientSession,
        gate: Gate | None,
        info: CallInfo,
        on_usage: Callable[[Usage], None],
    ) -> None:
        self._config, self._session, self._gate = config, session, gate
        self._info, self._on_usage = info, on_usage

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One exchange, when it is its turn; errors become those that the client knows how to name."""
        if name := self._config.rollout_header:
            request.headers[name] = self._info.identity
        account = _Account(self._info.timings, self._on_usage, request)
        turn = await self._enter(request, account)
        try:
            with account.waited():
                reply = await self._ask(request)
        except BaseException as e:
            turn.over(End.TIMED_OUT if isinstance(e, httpx2.ReadTimeout) else End.UNKNOWN)
            account.ends()
            raise
        if reply.status in REFUSALS:
            turn.over(End.REFUSED)
        account.answered(reply)
        kept = [(key, value) for key, value in reply.headers.items() if key.lower() not in _DECODED]
        return httpx2.Response(reply.status, headers=kept, stream=_Body(reply, turn, account), request=request)

    async def _enter(self, request: httpx2.Request, account: _Account) -> _Turn:
        gate = self._gate
        if gate is None:
            return _Turn(None, None)
        try:
            with account.waited("model_queue_s"):
                return _Turn(gate, await gate.enter(TURN_LIMIT_S, self._config.retry.budget_s))
        except NoTurn as e:
            raise httpx2.PoolTimeout(str(e), request=request) from e

    async def _ask(self, request: httpx2.Request) -> aiohttp.ClientResponse:
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _PER_HOP}
        try:
            return await self._session.request(
                request.method,
                str(request.url),
                headers=headers,
                data=await request.aread(),
                timeout=self._timeout(request.extensions.get("timeout", {})),
                allow_redirects=False,
            )
        except aiohttp.ConnectionTimeoutError as e:
            raise httpx2.ConnectTimeout(str(e), request=request) from e
        except TimeoutError as e:
            raise httpx2.ReadTimeout(str(e), request=request) from e
        except aiohttp.ClientConnectorError as e:
            raise httpx2.ConnectError(str(e), request=request) from e
        except aiohttp.ClientError as e:
            raise httpx2.RemoteProtocolError(str(e), request=request) from e

    def _timeout(self, limits: Mapping[str, float | None]) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(
            total=self._config.call_limit_s, sock_connect=limits.get("connect"), sock_read=limits.get("read")
        )


class Clients:
    """The official client for one configured model, made for each rollout that wants one.

    It does not retry: the caller's policy is one, not two.
    """

    def __init__(
        self, name: str, config: ModelConfig, session: aiohttp.ClientSession, gate: Gate | None = None
    ) -> None:
        """What all rollouts share.

        Args:
            name: the model's key, for an endpoint that demands no key of its own.
            config: address, key, deadlines.
            session: carries the requests; stays open when a client is closed.
            gate: where the calls wait for their turn; None where they do not.
        """
        self._config, self._session, self._gate = config, session, gate
        endpoint = endpoint_of(config)
        headers = {**endpoint.headers}
        if config.api_key:
            del headers["Authorization"]  # the client's own, which `with_options` may change
        self._timeout = httpx2.Timeout(config.call_limit_s, connect=config.connect_limit_s, read=config.read_limit_s)
        self._template = AsyncOpenAI(
            base_url=endpoint.address,
            api_key=config.api_key or f"none-for-{name}",
            max_retries=0,
            timeout=self._timeout,
            default_headers=headers,
            http_client=httpx2.AsyncClient(transport=httpx2.AsyncBaseTransport()),  # each rollout has its own
        )

    def client(self, info: CallInfo, on_usage: Callable[[Usage], None]) -> AsyncOpenAI:
        """The client of one rollout, see `Models.client`. A copy takes a fraction of what a new one does."""
        transport = AiohttpTransport(self._config, self._session, self._gate, info, on_usage)
        return self._template.with_options(http_client=httpx2.AsyncClient(transport=transport, timeout=self._timeout))
