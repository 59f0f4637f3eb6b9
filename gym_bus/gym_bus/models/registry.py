"""The models of a worker, by name: built on first use, sharing one pool of connections."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import aiohttp

from gym_bus.errors import UsageError, did_you_mean
from gym_bus.messages import Usage
from gym_bus.models.api import CallInfo, Model
from gym_bus.models.gate import Alone, Gate, endpoint_key
from gym_bus.settings import ModelConfig

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from gym_bus.models.openai_client import Clients

KEEPALIVE_S = 60.0
DNS_CACHE_S = 300


def _keepalive_socket(address: aiohttp.connector.AddrInfoType) -> socket.socket:
    """A socket that notices a peer which vanished without a goodbye: such a call would wait for ever."""
    made = socket.socket(address[0], address[1], address[2])
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return made


class _Connector(aiohttp.TCPConnector):
    """Gives out no idle connection on which the server has said something since: that would pass for the answer."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[aiohttp.tracing.Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - its signature
    ) -> aiohttp.connector.Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()


class Gates(Protocol):
    """Who knows how many calls each endpoint takes."""

    def open(self, key: str, config: ModelConfig) -> Gate:
        """The gate of an endpoint."""
        ...


class Models:
    """Everything a worker needs to talk to models."""

    def __init__(self, configs: Mapping[str, ModelConfig], gates: Gates | None = None) -> None:
        """Nothing is opened yet.

        Args:
            configs: by name.
            gates: shares the endpoints' limits with other processes; without it, this process is by itself.
        """
        self._configs = dict(configs)
        self._gates = gates or Alone()
        self._open_gates: dict[str, Gate] = {}
        self.on_room: Callable[[], None] = lambda: None
        """Called where calls that waited for their turn were let in."""
        self._models: dict[str, Model] = {}
        self._clients: dict[str, Clients] = {}
        self._session: aiohttp.ClientSession | None = None

    def _config(self, name: str) -> ModelConfig:
        if name not in self._configs:
            raise UsageError(f"unknown model {name!r}: {did_you_mean(name, self._configs)}")
        return self._configs[name]

    def get(self, name: str) -> Model:
        """The model of that name. Raises UsageError where the configuration has none."""
        if name not in self._models:
            self._models[name] = self._build(name, self._config(name))
        return self._models[name]

    def _build(self, name: str, config: ModelConfig) -> Model:
        if config.kind == "replay":
            from gym_bus.models.replay import ReplayModel

            return ReplayModel(config.file or "", name=name, cycle=config.cycle)
        if config.kind == "simulated":
            from gym_bus.models.simulated import SimulatedModel

            return SimulatedModel(config.simulated, name=name)
        from gym_bus.models.http import OpenAIModel

        return OpenAIModel(name, config, self.session, self._gate(config))

    def _gate(self, config: ModelConfig) -> Gate | None:
        if not config.adaptive:
            return None
        key = endpoint_key(config)
        if key not in self._open_gates:
            gate = self._open_gates[key] = self._gates.open(key, config)
            gate.on_room = lambda: self.on_room()
        return self._open_gates[key]

    @property
    def crowded(self) -> bool:
        """Whether so many calls wait for their turn that further rollouts would only wait with them."""
        return any(gate.crowded for gate in self._open_gates.values())

    def client(self, name: str, info: CallInfo, on_usage: Callable[[Usage], None]) -> AsyncOpenAI:
        """The official client for one rollout's calls of a model, over the same connections; for code that wants one.

        Args:
            name: of the model.
            info: whose calls they are, with the timings to which they add.
            on_usage: told the tokens of each call that says them.
        """
        if name not in self._clients:
            from gym_bus.models.openai_client import Clients

            config = self._config(name)
            self._clients[name] = Clients(name, config, self.session(), self._gate(config))
        return self._clients[name].client(info, on_usage)

    def session(self) -> aiohttp.ClientSession:
        """The process's one HTTP session, opened in the running loop on first use."""
        if self._session is None:
            connector = _Connector(
                limit=0,  # the worker bounds what is in flight; a second bound would only hide it
                limit_per_host=0,
                ttl_dns_cache=DNS_CACHE_S,
                keepalive_timeout=KEEPALIVE_S,
                socket_factory=_keepalive_socket,
            )
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._session

    async def close(self) -> None:
        """Close models and connections."""
        for model in self._models.values():
            await model.close()
        for gate in self._open_gates.values():
            gate.close()
        if self._session is not None:
            await self._session.close()
