"""The official OpenAI client over the worker's own connections, for external code that wants one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import aiohttp
import httpx2
from openai import AsyncOpenAI

from gym_bus.models.endpoint import endpoint_of
from gym_bus.models.gate import REFUSALS, Gate, NoTurn
from gym_bus.models.reading import MAX_REPLY_BYTES
from gym_bus.models.throttle import End, Ticket
from gym_bus.settings import ModelConfig

_PER_HOP = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding"})
"""Request headers that aiohttp sets for its own connection."""
_DECODED = frozenset({"content-encoding", "content-length", "transfer-encoding"})
"""Reply headers that no longer hold once aiohttp has decoded the body."""


TURN_LIMIT_S = 86_400.0
"""The rollout's own limit ends the wait for a turn long before."""


class _Turn:
    """A call's turn at the endpoint, where turns are kept; given back once."""

    def __init__(self, gate: Gate | None, ticket: Ticket | None) -> None:
        self._gate, self._ticket = gate, ticket

    def over(self, end: End) -> None:
        if self._gate and self._ticket and not self._ticket.ended:
            self._gate.leave(self._ticket, end)


class _Body(httpx2.AsyncByteStream):
    """The reply's body as it arrives."""

    def __init__(self, reply: aiohttp.ClientResponse, turn: _Turn) -> None:
        self._reply, self._turn = reply, turn

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            size = 0
            async for chunk in self._reply.content.iter_any():
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise httpx2.ReadError(f"the reply is larger than {MAX_REPLY_BYTES >> 20} MiB")
                yield chunk
        except TimeoutError as e:
            raise httpx2.ReadTimeout(str(e) or "the reply stopped") from e
        except aiohttp.ClientError as e:
            raise httpx2.ReadError(str(e)) from e

    async def aclose(self) -> None:
        self._reply.release()
        self._turn.over(End.TAKEN)


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """Carries the client's requests over a shared aiohttp session."""

    def __init__(self, config: ModelConfig, session: aiohttp.ClientSession, gate: Gate | None) -> None:
        self._config, self._session, self._gate = config, session, gate

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """One exchange, when it is its turn; errors become those that the client knows how to name."""
        turn = await self._enter(request)
        try:
            reply = await self._ask(request)
        except BaseException as e:
            turn.over(End.TIMED_OUT if isinstance(e, httpx2.ReadTimeout) else End.UNKNOWN)
            raise
        if reply.status in REFUSALS:
            turn.over(End.REFUSED)
        kept = [(key, value) for key, value in reply.headers.items() if key.lower() not in _DECODED]
        return httpx2.Response(reply.status, headers=kept, stream=_Body(reply, turn), request=request)

    async def _enter(self, request: httpx2.Request) -> _Turn:
        gate = self._gate
        if gate is None:
            return _Turn(None, None)
        try:
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


def make_openai_client(
    name: str, config: ModelConfig, session: aiohttp.ClientSession, gate: Gate | None = None
) -> AsyncOpenAI:
    """The official client for one configured model. It does not retry: the caller's policy is one, not two.

    Args:
        name: the model's key, for an endpoint that demands no key of its own.
        config: address, key, deadlines.
        session: carries the requests; stays open when the client is closed.
        gate: where its calls wait for their turn; None where they do not.
    """
    endpoint = endpoint_of(config)
    headers = {**endpoint.headers}
    if config.api_key:
        del headers["Authorization"]  # the client's own, which `with_options` may change
    timeout = httpx2.Timeout(config.call_limit_s, connect=config.connect_limit_s, read=config.read_limit_s)
    return AsyncOpenAI(
        base_url=endpoint.address,
        api_key=config.api_key or f"none-for-{name}",
        max_retries=0,
        timeout=timeout,
        default_headers=headers,
        http_client=httpx2.AsyncClient(transport=AiohttpTransport(config, session, gate), timeout=timeout),
    )
