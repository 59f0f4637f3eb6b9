"""Consuming: leased deliveries, a continuous pull on one inbox, and an in-order reader without acks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import nats.errors
from nats.aio.msg import Msg

from gym_bus.errors import BusError
from gym_bus.logs import get_logger
from gym_bus.messages import Message, RolloutId, decode
from gym_bus.settings import MiB

if TYPE_CHECKING:
    from gym_bus.bus.connection import Bus

log = get_logger(__name__)

PULL_MESSAGES = 256
PULL_BYTES = 16 * MiB
"""Of one pull request: the server cuts a connection that is sent much more at once."""
PULL_EXPIRES_S = 30.0
IDLE_HEARTBEAT_S = 2.0

CLAIM_HEADER = "Gym-Claim"
ID_HEADER = "Nats-Msg-Id"


class Delivery:
    """One leased message."""

    __slots__ = ("_bus", "data", "headers", "message_id", "reply", "subject")

    def __init__(self, bus: Bus, message: Msg) -> None:
        self._bus = bus
        self.subject, self.data, self.reply = message.subject, message.data, message.reply
        self.headers: dict[str, str] = message.headers or {}
        self.message_id = self.headers.get(ID_HEADER) or f"{self.subject}@{self.sequence}"

    def _meta(self, from_end: int) -> int:
        # $JS.ACK.[domain.account.]stream.consumer.deliveries.stream_seq.consumer_seq.time.pending[.token]
        parts = self.reply.split(".")
        return int(parts[(7 if len(parts) >= 11 else 5) + from_end - 1])

    @property
    def deliveries(self) -> int:
        """1 for the first delivery."""
        return self._meta(0)

    @property
    def sequence(self) -> int:
        """The message's number in its stream."""
        return self._meta(1)

    @property
    def consumer_sequence(self) -> int:
        """The number of this delivery to its consumer."""
        return self._meta(2)

    @property
    def stored_at(self) -> float:
        """When the broker stored the message, seconds since the epoch on the broker's clock."""
        return self._meta(3) / 1e9

    @property
    def rollout(self) -> RolloutId | None:
        """Whose message this is, from its id: readable where the body is not."""
        with contextlib.suppress(ValueError):
            return RolloutId.parse(self.message_id)
        return None

    async def message(self) -> Message:
        """The decoded message, fetched from the object store where only its claim travelled.

        Raises:
            msgspec.DecodeError: it is none.
            BusError: the object store did not answer.
        """
        if claim := self.headers.get(CLAIM_HEADER):
            return decode(await self._bus.fetch_blob(claim))
        return decode(self.data)

    async def ack(self) -> None:
        """The message is done."""
        await self._bus.respond(self.reply, b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """Deliver it again, after `delay_s` seconds."""
        body = b'-NAK {"delay": %d}' % int(delay_s * 1e9) if delay_s > 0 else b"-NAK"
        await self._bus.respond(self.reply, body)

    async def term(self, reason: str) -> None:
        """Never deliver it again."""
        await self._bus.respond(self.reply, b"+TERM " + reason.encode()[:200])

    async def extend(self) -> None:
        """Still working: keep the lease."""
        await self._bus.respond(self.reply, b"+WPI")


class Pull:
    """A continuous pull of one consumer: as many messages are asked for as `wanted()` says there is room for."""

    def __init__(
        self,
        bus: Bus,
        stream: str,
        consumer: str,
        on_delivery: Callable[[Delivery], None],
        wanted: Callable[[], int],
        *,
        refill: int = 1,
        on_lost: Callable[[], Any] | None = None,
    ) -> None:
        self._bus, self._nc = bus, bus.client
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._on_delivery, self._wanted, self._on_lost = on_delivery, wanted, on_lost
        self._refill = max(1, min(refill, PULL_MESSAGES // 2))
        self._inbox = self._nc.new_inbox()
        self._generation = 0
        self._outstanding = 0
        self._heard_at = time.monotonic()
        self._asking = False
        self._stopped = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Any = None

    async def start(self) -> None:
        """Begin to pull."""
        self._subscription = await self._nc.subscribe(
            f"{self._inbox}.*", cb=self._on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        self._bus.on_reconnect.append(self.reset)
        self._spawn(self._watch())
        self.poke()

    async def stop(self) -> None:
        """Ask for nothing more; what was delivered stays leased."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(ValueError):
            self._bus.on_reconnect.remove(self.reset)
        for task in self._tasks:
            task.cancel()
        if self._subscription:
            with contextlib.suppress(nats.errors.Error):
                await self._subscription.unsubscribe()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def reset(self) -> None:
        """Forget what was asked for and ask anew: after a reconnect, or when the server has gone silent."""
        self._generation += 1
        self._outstanding = 0
        self._heard_at = time.monotonic()
        self.poke()

    def poke(self) -> None:
        """There may be room: ask for more if it is worth a request."""
        if self._stopped or self._asking or self._outstanding > PULL_MESSAGES // 2:
            return
        room = self._wanted() - self._outstanding
        if room >= self._refill or (room > 0 and self._outstanding == 0):
            self._asking = True
            self._spawn(self._ask(min(room, PULL_MESSAGES)))

    async def _ask(self, batch: int) -> None:
        try:
            body = {
                "batch": batch,
                "expires": int(PULL_EXPIRES_S * 1e9),
                "idle_heartbeat": int(IDLE_HEARTBEAT_S * 1e9),
                "max_bytes": PULL_BYTES,
            }
            self._outstanding += batch
            self._heard_at = time.monotonic()
            await self._nc.publish(self._next, json.dumps(body).encode(), f"{self._inbox}.{self._generation}")
        except nats.errors.Error:  # disconnected: the reconnect resets us
            self._outstanding = 0
        finally:
            self._asking = False

    async def _on_message(self, message: Msg) -> None:
        self._heard_at = time.monotonic()
        headers = message.headers
        if headers and not message.reply and (status := headers.get("Status")):
            await self._on_status(message.subject, status, headers)
            return
        if self._stopped:  # delivered before the server saw us leave: hand it to another worker at once
            await self._bus.respond(message.reply, b"-NAK")
            return
        self._outstanding = max(0, self._outstanding - 1)
        self._on_delivery(Delivery(self._bus, message))
        if self._outstanding <= PULL_MESSAGES // 2:
            self.poke()

    async def _on_status(self, subject: str, status: str, headers: dict[str, str]) -> None:
        if status == "100" or subject.rpartition(".")[2] != str(self._generation):
            return
        pending = headers.get("Nats-Pending-Messages")
        if status in ("408", "409") and pending is not None:  # this request is over, with so many not delivered
            self._outstanding = max(0, self._outstanding - int(pending))
            self.poke()
            return
        log.info("pull_interrupted", consumer=self._next, status=status, why=headers.get("Description", ""))
        self._generation += 1
        self._spawn(self._recover())

    async def _recover(self) -> None:
        await asyncio.sleep(random.uniform(0.2, 0.5))
        if self._on_lost:
            await self._on_lost()
        self.reset()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(IDLE_HEARTBEAT_S)
            silent = time.monotonic() - self._heard_at > 3 * IDLE_HEARTBEAT_S
            if silent and self._outstanding and self._nc.is_connected:
                log.info("pull_silent", consumer=self._next)
                if self._on_lost:
                    with contextlib.suppress(BusError):
                        await self._on_lost()
                self.reset()
            else:
                self.poke()


class Follower:
    """Every message of a filter, in order, without acks: for a reader whose file is its checkpoint."""

    def __init__(
        self,
        bus: Bus,
        stream: str,
        subject: str,
        start_sequence: int,
        *,
        buffer: int = 1024,
        headers_only: bool = False,
    ) -> None:
        self._bus, self._stream, self._subject, self._headers_only = bus, stream, subject, headers_only
        self._after = max(0, start_sequence - 1)
        self._buffer = buffer
        self._queue: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self._pull: Pull | None = None
        self._expected = 1
        self._consumer = ""
        self._broken = True

    async def batch(self, limit_s: float, most: int = 512) -> list[Delivery]:
        """Up to `most` messages; empty where none came within `limit_s` seconds.

        Raises:
            BusError: the consumer could not be (re)created.
        """
        if self._broken:
            await self._restart()
        if not self._queue:
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), limit_s)
        taken: list[Delivery] = []
        while self._queue and len(taken) < most:
            delivery = self._queue.popleft()
            if delivery.consumer_sequence != self._expected:  # a gap: something was sent that we did not get
                self._broken = True
                break
            self._expected += 1
            self._after = delivery.sequence
            taken.append(delivery)
        if self._pull:
            self._pull.poke()
        return taken

    async def pending(self) -> int:
        """How many messages of the filter lie behind the last one that `batch` returned."""
        if self._broken:
            await self._restart()
        info = await self._bus.consumer_info(self._stream, self._consumer)
        return int(info.num_pending or 0) + len(self._queue)

    def _on_delivery(self, delivery: Delivery) -> None:
        self._queue.append(delivery)
        self._arrived.set()

    async def _lost(self) -> None:
        self._broken = True
        self._arrived.set()

    async def _restart(self) -> None:
        if self._pull:
            await self._pull.stop()
        self._queue.clear()
        self._consumer = await self._bus.ephemeral_reader(
            self._stream, self._subject, self._after + 1, headers_only=self._headers_only
        )
        self._expected, self._broken = 1, False
        self._pull = Pull(
            self._bus,
            self._stream,
            self._consumer,
            self._on_delivery,
            lambda: self._buffer - len(self._queue),
            refill=self._buffer // 8,
            on_lost=self._lost,
        )
        await self._pull.start()

    async def close(self) -> None:
        """Stop reading."""
        if self._pull:
            await self._pull.stop()
        if self._consumer:
            with contextlib.suppress(Exception):
                await self._bus.js.delete_consumer(self._stream, self._consumer)
