"""Consuming: leased deliveries, a continuous pull on one inbox, and an in-order reader without acks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import nats.errors
from nats.aio.msg import Msg

from gym_bus.deadline import within
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
PULL_LEAST_BYTES = 9 * MiB
"""One pull request must let the largest message through, its headers included."""
HELD_BYTES = 64 * MiB
"""Bodies that one reader holds and has asked for."""
BATCH_BYTES = 16 * MiB
"""Bodies of one batch, unless a single one is larger."""
SIZE_GUESS_BYTES = 16 * 1024
"""Of a message, before one has come."""
PULL_EXPIRES_S = 30.0
PULL_SHARED_EXPIRES_S = 5.0
"""Where other pulls wait for the room that this one has asked for."""
STOP_LOOK_S = 0.1
STOP_LOOKS = 10
"""For what was asked for to be served, and as many for leaving."""
STOP_ANSWERS = 10
STOP_ANSWER_EVERY_S = 0.01
LAST = "last"
"""In the place of the generation: the request after which a pull leaves."""
IDLE_HEARTBEAT_S = 2.0

CLAIM_HEADER = "Gym-Claim"
CLAIM_BYTES_HEADER = "Gym-Claim-Bytes"
FAILURE_HEADER = "Gym-Failure"
"""On failed results, their class: whoever counts them needs no bodies."""
ID_HEADER = "Nats-Msg-Id"


class Delivery:
    """One leased message."""

    __slots__ = ("_bus", "_copies", "data", "headers", "message_id", "reply", "size_bytes", "subject")

    def __init__(self, bus: Bus, message: Msg) -> None:
        self._bus = bus
        self.subject, self.data, self.reply = message.subject, message.data, message.reply
        self.headers: dict[str, str] = message.headers or {}
        self.message_id = self.headers.get(ID_HEADER) or f"{self.subject}@{self.sequence}"
        self.size_bytes = len(self.data) + int(self.headers.get(CLAIM_BYTES_HEADER) or 0)
        """Of the body, wherever it is: in the message or behind its claim."""
        self._copies: dict[int, str] = {}

    def came_again(self, other: Delivery) -> None:
        """The same message was delivered again while it is held, or another one of the same id.

        Of the same one, the newest delivery is answered: the lease was over. A second one of the same id was stored by
        a broker that had forgotten the first when it was restarted: every answer goes for both.
        """
        if other.sequence == self.sequence:
            self.reply = other.reply
        else:
            self._copies[other.sequence] = other.reply

    async def _answer(self, body: bytes) -> None:
        for reply in (self.reply, *self._copies.values()):
            await self._bus.respond(reply, body)

    def _part(self, place: int) -> str:
        # $JS.ACK.[domain.account.]stream.consumer.deliveries.stream_seq.consumer_seq.time.pending[.token]
        parts = self.reply.split(".")
        return parts[(6 if len(parts) >= 11 else 4) + place]

    def _meta(self, place: int) -> int:
        return int(self._part(place))

    @property
    def stream(self) -> str:
        """The stream that holds the message."""
        return self._part(-2)

    @property
    def behind(self) -> int:
        """Messages that the consumer had not delivered yet when it delivered this one."""
        return self._meta(4)

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
        return self.stored_at_ns / 1e9

    @property
    def stored_at_ns(self) -> int:
        """The same in nanoseconds, exactly."""
        return self._meta(3)

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
            return decode(await self._bus.blobs.get(claim))
        return decode(self.data)

    async def ack(self) -> None:
        """The message is done."""
        await self._answer(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """Deliver it again, after `delay_s` seconds."""
        body = b'-NAK {"delay": %d}' % int(delay_s * 1e9) if delay_s > 0 else b"-NAK"
        await self._answer(body)

    async def extend(self) -> None:
        """Still working: keep the lease."""
        await self._answer(b"+WPI")


def _unbounded() -> int:
    return 1 << 62


class Pull:
    """A continuous pull of one consumer: as many messages are asked for as there is room for, in count and bytes."""

    def __init__(
        self,
        bus: Bus,
        stream: str,
        consumer: str,
        on_delivery: Callable[[Delivery], None],
        wanted: Callable[[], int],
        *,
        wanted_bytes: Callable[[], int] = _unbounded,
        refill: int = 1,
        standing: int | None = None,
        takes_late: bool = False,
        leases: bool = True,
        on_lost: Callable[[], Any] | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            bus: where from.
            stream: of the consumer.
            consumer: its name.
            on_delivery: called with every message; must not block.
            wanted: how many messages there is room for, those asked for and not here yet included.
            wanted_bytes: the same in bytes of bodies.
            refill: messages that are worth a request of their own.
            standing: messages asked for while the queue is empty, where other pulls share the room; None: all of it.
            takes_late: `on_delivery` takes what comes during `stop` too; else it is nak'd.
            leases: the consumer takes acks; of one that takes none, what is on its way at `stop` does not matter.
            on_lost: makes the consumer anew, called before asking again after trouble.
        """
        self._bus, self._nc = bus, bus.client
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._on_delivery, self._wanted, self._on_lost = on_delivery, wanted, on_lost
        self._wanted_bytes, self._standing = wanted_bytes, standing
        self._takes_late, self._leases = takes_late, leases
        self._refill = max(1, min(refill, PULL_MESSAGES // 2))
        self._inbox = self._nc.new_inbox()
        self._generation = 0
        self._outstanding = 0
        self._behind = 0
        self._size_bytes = float(SIZE_GUESS_BYTES)
        self._heard_at = time.monotonic()
        self._asking = 0
        """Messages of the request that is about to be sent."""
        self._stopped = False
        self._last_word: asyncio.Future[str] | None = None
        self._late: list[Delivery] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Any = None

    @property
    def outstanding(self) -> int:
        """Messages asked for and not here yet."""
        return self._outstanding

    @property
    def outstanding_bytes(self) -> int:
        """What those will take, by the largest of late."""
        return int(self._outstanding * self._size_bytes)

    async def start(self) -> None:
        """Begin to pull."""
        self._subscription = await self._nc.subscribe(
            f"{self._inbox}.*", cb=self._on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        self._bus.on_reconnect.append(self.reset)
        self._spawn(self._watch())
        self.poke()

    async def stop(self) -> None:
        """Ask for nothing more, take what is on its way, and leave; what was delivered stays leased.

        Takes a few round trips; 2 s where the server does not answer, not counting what this process itself stalls.
        """
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(ValueError):
            self._bus.on_reconnect.remove(self.reset)
        for task in self._tasks:
            task.cancel()
        self._outstanding -= self._asking
        self._asking = 0
        if self._subscription and not self._nc.is_closed:
            await self._leave()
        for delivery in self._late:
            if self._takes_late:
                self._on_delivery(delivery)
            else:
                await delivery.nak()
        self._late.clear()

    async def _leave(self) -> None:
        # What a server has leased and not yet written when it sees us leave, it gives at once to whoever asks next. Not
        # so where the one that leases is another of its cluster and learns of it a moment later. So first let it serve
        # what was asked for: nothing is given back meanwhile, or it would come again to us.
        try:
            if self._leases:
                with contextlib.suppress(TimeoutError):
                    await _looking(self._served())
            await _looking(self._subscription.drain())  # leaves, and takes what was sent before the server saw that
        except (nats.errors.Error, OSError):  # no connection: nobody else forgets the subscription
            self._nc._remove_sub(self._subscription._id)

    async def _served(self) -> None:
        """Return when all that was asked for has come, or nothing does any more.

        The server answers a request that does not wait behind all that it leased before: 404 where nothing is left, 408
        where earlier requests are about to get it, or with a message more. What it leases afterwards may still be lost
        to us, so only a few 404 in a row without a message between them say that messages have become rare.
        """
        body = json.dumps({"batch": 1, "no_wait": True}).encode()
        seen = rare = 0
        while self._outstanding and rare < STOP_ANSWERS:
            self._last_word = asyncio.get_running_loop().create_future()
            self._outstanding += 1
            await self._nc.publish(self._next, body, f"{self._inbox}.{LAST}")
            answered, _ = await asyncio.wait({self._last_word}, timeout=STOP_LOOK_S)
            nothing_left = bool(answered) and self._last_word.result() not in ("", "408")
            rare = rare + 1 if nothing_left and len(self._late) == seen else 0
            seen = len(self._late)
            await asyncio.sleep(STOP_ANSWER_EVERY_S)

    def _hear_last(self, status: str = "") -> None:
        if self._last_word and not self._last_word.done():
            self._last_word.set_result(status)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def reset(self) -> None:
        """Forget what was asked for and ask anew: after a reconnect, or when the server has gone silent."""
        self._generation += 1
        self._outstanding = self._behind = 0
        self._heard_at = time.monotonic()
        self.poke()

    def poke(self) -> None:
        """There may be room: ask for more if it is worth a request."""
        if self._stopped or self._asking or self._outstanding > PULL_MESSAGES // 2:
            return
        room = self._room()
        if room >= self._refill or (room > 0 and self._outstanding == 0):
            batch, room_bytes = min(room, PULL_MESSAGES), self._wanted_bytes() - self.outstanding_bytes
            self._asking = batch
            self._outstanding += batch  # at once: pulls that share the room count it
            self._spawn(self._ask(batch, max(PULL_LEAST_BYTES, min(PULL_BYTES, room_bytes))))

    def _room(self) -> int:
        """Messages to ask for now."""
        room = self._wanted() - self._outstanding
        if self._standing is not None:
            room = min(room, max(self._standing, self._behind) - self._outstanding)
        room_bytes = self._wanted_bytes() - self.outstanding_bytes
        if room <= 0 or room_bytes <= 0:
            return 0
        # One message may overrun the bytes: they are a guess, and it must come some day.
        return min(room, max(1, int(room_bytes / self._size_bytes)))

    async def _ask(self, batch: int, most_bytes: int) -> None:
        beyond = self._standing is not None and batch > self._standing
        try:
            body = {
                "batch": batch,
                "expires": int((PULL_SHARED_EXPIRES_S if beyond else PULL_EXPIRES_S) * 1e9),
                "idle_heartbeat": int(IDLE_HEARTBEAT_S * 1e9),
                "max_bytes": most_bytes,
            }
            self._heard_at = time.monotonic()
            await self._nc.publish(self._next, json.dumps(body).encode(), f"{self._inbox}.{self._generation}")
        except nats.errors.Error:  # disconnected: the reconnect resets us
            self._outstanding = 0
        finally:
            self._asking = 0

    async def _on_message(self, message: Msg) -> None:
        self._heard_at = time.monotonic()
        headers = message.headers
        if headers and not message.reply and (status := headers.get("Status")):
            await self._on_status(message.subject, status, headers)
            return
        self._outstanding = max(0, self._outstanding - 1)
        delivery = Delivery(self._bus, message)
        if self._stopped:
            self._late.append(delivery)
            if not self._outstanding:
                self._hear_last()
            return
        self._note(delivery)
        self._on_delivery(delivery)
        if self._outstanding <= PULL_MESSAGES // 2:
            self.poke()

    def _note(self, delivery: Delivery) -> None:
        # Up at once, down slowly: where sizes are mixed the large ones count.
        size = float(max(delivery.size_bytes, 1))
        self._size_bytes = max(size, self._size_bytes + (size - self._size_bytes) * 0.02)
        if self._standing is not None:
            self._behind = delivery.behind

    async def _on_status(self, subject: str, status: str, headers: dict[str, str]) -> None:
        if subject.endswith(f".{LAST}"):
            self._outstanding = max(0, self._outstanding - 1)
            self._hear_last(status)
            return
        if status == "100" or subject.rpartition(".")[2] != str(self._generation):
            return
        pending = headers.get("Nats-Pending-Messages")
        if status in ("408", "409") and pending is not None:  # this request is over, with so many not delivered
            self._outstanding = max(0, self._outstanding - int(pending))
            if status == "408":  # others were served what we waited for
                self._behind = 0
            self.poke()
            return
        why = headers.get("Description", "").partition("\n")[0]  # a bare status takes the next header for its words
        log.info("pull_interrupted", consumer=self._next, status=status, why=why)
        self._generation += 1
        if not self._stopped:
            self._spawn(self._recover())

    async def _recover(self) -> None:
        await asyncio.sleep(random.uniform(0.2, 0.5))
        if self._on_lost:
            with contextlib.suppress(BusError):  # asking again tells whether it is there
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


async def _looking(work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work`, for so many looks. Raises TimeoutError.

    Not for so many seconds: a process that stalls for longer than those still takes what has come meanwhile.
    """
    task = asyncio.ensure_future(work)
    try:
        for _ in range(STOP_LOOKS):
            if (await asyncio.wait({task}, timeout=STOP_LOOK_S))[0]:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


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
        self._queued_bytes = 0
        self._arrived = asyncio.Event()
        self._pull: Pull | None = None
        self._expected = 1
        self._consumer = ""
        self._broken = True

    async def batch(self, limit_s: float, most: int = 512) -> list[Delivery]:
        """Up to `most` messages, and about 16 MiB of bodies; empty where none came within `limit_s` seconds.

        Raises:
            BusError: the consumer could not be (re)created.
        """
        if self._broken:
            await self._restart()
        if not self._queue:
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await within(limit_s, self._arrived.wait())
        taken: list[Delivery] = []
        taken_bytes = 0
        while self._queue and len(taken) < most:
            taken_bytes += self._queue[0].size_bytes
            if taken and taken_bytes > BATCH_BYTES:
                break
            delivery = self._queue.popleft()
            self._queued_bytes -= delivery.size_bytes
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
        info = await self._bus.consumers.info(self._stream, self._consumer)
        sent = int(info.delivered.consumer_seq or 0) if info.delivered else 0
        return int(info.num_pending or 0) + max(0, sent - self._expected + 1)  # what was sent may still be on its way

    def _on_delivery(self, delivery: Delivery) -> None:
        self._queue.append(delivery)
        self._queued_bytes += delivery.size_bytes
        self._arrived.set()

    async def _lost(self) -> None:
        self._reconnected()

    def _reconnected(self) -> None:
        self._broken = True  # what was on its way does not come again, and no gap would show it at the end
        self._arrived.set()

    async def _restart(self) -> None:
        if self._pull:
            await self._pull.stop()
        elif self._reconnected not in self._bus.on_reconnect:
            self._bus.on_reconnect.append(self._reconnected)
        self._queue.clear()
        self._queued_bytes = 0
        self._consumer = await self._bus.consumers.reader(
            self._stream, self._subject, self._after + 1, headers_only=self._headers_only
        )
        self._expected, self._broken = 1, False
        self._pull = Pull(
            self._bus,
            self._stream,
            self._consumer,
            self._on_delivery,
            lambda: self._buffer - len(self._queue),
            wanted_bytes=lambda: HELD_BYTES - self._queued_bytes,
            refill=self._buffer // 8,
            leases=False,
            on_lost=self._lost,
        )
        await self._pull.start()

    async def close(self) -> None:
        """Stop reading."""
        with contextlib.suppress(ValueError):
            self._bus.on_reconnect.remove(self._reconnected)
        if self._pull:
            await self._pull.stop()
        if self._consumer:
            with contextlib.suppress(Exception):
                await self._bus.js.delete_consumer(self._stream, self._consumer)
