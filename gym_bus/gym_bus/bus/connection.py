"""The connection to the NATS server and everything gym_bus does with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from gym_bus import subjects
from gym_bus.bus.asking import API_LIMIT_S, answered, trouble
from gym_bus.bus.blobs import Blobs
from gym_bus.bus.client import Client, NoTLS
from gym_bus.bus.consumers import Consumers
from gym_bus.bus.publish import Publisher
from gym_bus.bus.pull import CLAIM_BYTES_HEADER, CLAIM_HEADER, FAILURE_HEADER, ID_HEADER
from gym_bus.bus.state import State
from gym_bus.bus.streams import Streams
from gym_bus.bus.topology import MAX_MESSAGE_BYTES, NO_ROOM, ensure_replicas, ensure_stream, stream_configs
from gym_bus.bus.tries import Tries
from gym_bus.deadline import within
from gym_bus.errors import BusError, UsageError
from gym_bus.logs import get_logger
from gym_bus.masking import redact
from gym_bus.messages import Attempt, Failed, Message, Request, Result, encode
from gym_bus.settings import BusConfig, MiB

log = get_logger(__name__)

SCHEMES = ("nats", "tls", "ws", "wss")
INIT_TRIES, INIT_PAUSE_S = 3, 0.5
CLOSE_LIMIT_S = 2.0
HEADER_ROOM_BYTES = 4096
"""What the headers of one message may take: servers and streams count them with the body."""
_BUCKETS = (subjects.JOBS, subjects.WORKERS, subjects.LIMITS, subjects.TRAINERS)
_UNCHANGEABLE = 10052
"""err_code: a setting that a stream cannot change, of ours its storage alone."""
_STORE_BUSY = 10049
"""err_code: the files of a stream cannot be made; those of one that was deleted may be in the way."""


class Bus:
    """A connection to the NATS server and everything gym_bus does with it."""

    def __init__(self, client: Client, config: BusConfig) -> None:
        self.client, self.config = client, config
        self.js: JetStreamContext = client.jetstream(timeout=API_LIMIT_S)
        self.on_reconnect: list[Callable[[], None]] = []
        self._publisher = Publisher(client, config.publish_limit_s)
        self.streams, self.consumers = Streams(self), Consumers(self)
        self.state, self.blobs = State(self.js, config), Blobs(client, self.js, config)
        self.tries = Tries(self._publisher, self.streams)

    @classmethod
    async def connect(cls, config: BusConfig, *, name: str = "gym-bus", url: str | None = None) -> Bus:
        """Connect, reconnecting for ever afterwards.

        Raises:
            BusError: no server answers at the address within `connect_limit_s`, or it refuses.
        """
        address = url or config.url
        if not address:
            raise UsageError("no NATS server given: set bus.url, or pass --nats URL")
        servers = [server.strip() for server in address.split(",")]
        _check_schemes(servers)
        made: list[Bus] = []

        async def reconnected() -> None:
            for bus in made:
                for callback in list(bus.on_reconnect):
                    callback()

        told: list[Exception] = []
        deadline = asyncio.timeout(config.connect_limit_s)

        async def error(e: Exception) -> None:
            if not told or not _is_telling(told[0]):  # a server that refuses also closes the connection, first or later
                told[:] = [e]
            log.info("bus_error", error=repr(e))
            hopeless = len(servers) == 1 and _is_telling(e)  # it would say the same until the time is over
            if hopeless and not made and not deadline.expired():
                deadline.reschedule(asyncio.get_running_loop().time())

        options: dict[str, Any] = {"user_credentials": config.credentials} if config.credentials else {}
        client = Client()
        try:
            async with deadline:
                await client.connect(
                    servers,
                    name=name,
                    connect_timeout=config.connect_limit_s / 2,  # of one try: the first may meet a dead connection
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=32 * MiB,
                    error_cb=error,
                    reconnected_cb=reconnected,
                    **options,
                )
        except (TimeoutError, OSError, nats.errors.Error, ValueError) as e:
            cause = told[0] if told else e
            why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            what = f"cannot reach a NATS server at {redact(address)} within {config.connect_limit_s:g} s: {why}"
            raise BusError(f"{what}; {_what_to_check(cause)}") from None
        bus = cls(client, config)
        made.append(bus)
        await bus._publisher.start()
        return bus

    async def close(self) -> None:
        """Flush and disconnect."""
        await self._publisher.close()
        with contextlib.suppress(Exception):
            await within(CLOSE_LIMIT_S, self.client.flush())
        with contextlib.suppress(Exception):
            await within(CLOSE_LIMIT_S, self.client.close())

    async def __aenter__(self) -> Bus:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def init(self) -> list[str]:
        """Create or update streams, buckets and the object store; the same settings twice change nothing.

        Returns the names, for the user to see.

        Raises:
            BusError: the server has no JetStream or not enough room, or did not answer in any of a few tries.
        """
        for tries_left in reversed(range(INIT_TRIES)):
            try:
                return await self._set_up()
            except (TimeoutError, nats.errors.Error) as e:
                # A server that was restarted in between has swallowed the question, or is still clearing away what
                # was deleted a moment ago.
                passing = isinstance(e, TimeoutError) or getattr(e, "err_code", 0) == _STORE_BUSY
                if not (passing and tries_left):
                    told = trouble("JetStream did not set up the streams", e)
                    raise BusError(f"{told}; {_remedy(e)}") from None
                await asyncio.sleep(INIT_PAUSE_S)
        raise AssertionError("unreachable")

    async def _set_up(self) -> list[str]:
        await self.js.account_info()
        streams = stream_configs(self.config)
        for stream in streams:
            await ensure_stream(self.js, stream)
        for bucket in _BUCKETS:
            await self.state.opened(bucket)
        await self.blobs.opened()
        for backing in (*(f"KV_{bucket}" for bucket in _BUCKETS), f"OBJ_{subjects.BLOBS}"):
            await ensure_replicas(self.js, backing, self.config.replicas)
        return [*(str(stream.name) for stream in streams), *_BUCKETS, subjects.BLOBS]

    # -- publishing and answering -------------------------------------------------------------------------------------

    async def publish(self, message: Message, message_id: str, *, lane: str = "batch") -> bool:
        """Publish and wait until the broker has stored it. Returns False where it had it before.

        Args:
            message: its subject follows from what it is.
            message_id: starts with the rollout's identity; a repeat under the same id is dropped by the broker.
            lane: the priority class, for requests.

        Raises:
            PayloadTooLarge, BusError not retryable: publishing it again cannot help.
            BusError: the broker did not take it within `publish_limit_s`; a full stream is waited for so long.
            msgspec.EncodeError, TypeError, ValueError: the message holds what cannot be encoded.
        """
        if isinstance(message, Request):
            subject = subjects.request(lane, message.agent, message.rollout.job)
        elif isinstance(message, Attempt):
            subject = subjects.attempt(message.verifier, message.rollout.job)
        else:
            r = message.rollout
            subject = subjects.result(r.job, r.task_index, r.rollout_index)
        payload = encode(message)
        headers = {ID_HEADER: message_id}
        if isinstance(message, Failed):
            headers[FAILURE_HEADER] = message.failure.kind.value
        if len(payload) > self.inline_limit_bytes:
            headers[CLAIM_HEADER] = await self.blobs.put(subject, message_id, payload)
            headers[CLAIM_BYTES_HEADER] = str(len(payload))
            payload = b""
        return await self._publisher.publish(subject, payload, headers)

    @property
    def inline_limit_bytes(self) -> int:
        """The largest body that travels in its message: what is configured, or less where server or stream take less.

        A server closes the connection of whoever sends more than its `max_payload`, 1 MB as it comes.
        """
        taken = min(self.client.max_payload, MAX_MESSAGE_BYTES) - HEADER_ROOM_BYTES
        return max(0, min(self.config.inline_limit_bytes, taken))

    async def respond(self, reply: str, body: bytes) -> None:
        """Answer a delivery. Where the connection is away the answer is dropped and the lease runs out."""
        with contextlib.suppress(nats.errors.Error):
            await self.client.publish(reply, body)

    async def ack_confirmed(self, reply: str) -> None:
        """Ack a delivery and wait until the broker says that it has noted it. Raises BusError where it does not."""
        await answered(self.client.request(reply, b"+ACK", timeout=API_LIMIT_S), "confirmed ack")

    # -- told to whoever listens --------------------------------------------------------------------------------------

    async def announce(self, subject: str, body: bytes = b"") -> None:
        """Tell whoever listens now; not stored. Raises BusError where the server does not confirm."""

        async def told() -> None:
            await self.client.publish(subject, body)
            await self.client.flush()

        await answered(told(), subject)

    async def listen(self, subject: str, callback: Callable[[str, bytes], None]) -> None:
        """Call back for every announcement on `subject`."""

        async def on_message(message: Msg) -> None:
            callback(message.subject, message.data)

        await self.client.subscribe(subject, cb=on_message)


def _check_schemes(servers: Sequence[str]) -> None:
    """Raise UsageError for an address of another protocol, which the client would take for the name of a host."""
    for server in servers:
        scheme, separator, _ = server.rpartition("://")
        if separator and scheme not in SCHEMES:
            known = ", ".join(f"{known}://" for known in SCHEMES)
            raise UsageError(f"bus.url: {redact(server)}: not the address of a NATS server: {known} host:port")


def _is_telling(error: Exception) -> bool:
    """Whether nothing that is heard later can say it better."""
    return _is_refused(error) or isinstance(error, NoTLS)


def _is_refused(error: Exception) -> bool:
    """Whether a server wants a user, another one or another password."""
    return "authorization" in str(error).lower()


def _what_to_check(error: Exception) -> str:
    if _is_refused(error):
        return "give user and password in the address (nats://user:password@host:port), or bus.credentials"
    return "is it running, and is the address right?"


def _remedy(error: Exception) -> str:
    if getattr(error, "err_code", 0) in NO_ROOM:
        return (
            "the streams reserve their max_bytes: lower bus.{requests,attempts,results}.max_bytes, or give it more "
            "disk, with bus.storage=memory more memory; configs/memory.yaml has limits for a local server"
        )
    if getattr(error, "err_code", 0) == _UNCHANGEABLE:
        return "a stream keeps its storage: delete it and all that is in it, or leave bus.storage as it was"
    return "gym_bus needs nats-server 2.11 or newer with JetStream enabled (`nats-server -js`)"


def as_result(message: Message) -> Result:
    """`message` as the result it must be."""
    if isinstance(message, Request | Attempt):
        raise BusError(f"expected a result on the result stream, found {type(message).__name__}")
    return message
