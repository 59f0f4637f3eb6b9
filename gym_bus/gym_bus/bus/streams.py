"""What lies on the streams: counted, looked at, removed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import nats.errors
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from gym_bus.bus.asking import API_LIMIT_S, answered, trouble
from gym_bus.bus.pull import FAILURE_HEADER, ID_HEADER, Follower
from gym_bus.deadline import within
from gym_bus.errors import BusError
from gym_bus.settings import MiB

if TYPE_CHECKING:
    from gym_bus.bus.connection import Bus

IDS_MESSAGES = 4096
IDS_BYTES = 8 * MiB
"""Of one request for stored messages: their bodies come along."""
MESSAGE_GONE = (10037, 10043, 10057)
"""err_codes of a deletion: nothing at this sequence, in two ways; it failed, for one of many reasons."""


class Outcome(NamedTuple):
    """What a result says without its body."""

    task_index: int
    rollout_index: int
    message_id: str
    failure: str | None
    """The failure's class, None where the rollout was scored."""


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """How full a stream is."""

    name: str
    messages: int
    size_bytes: int
    max_messages: int
    """-1 for no limit."""
    max_bytes: int
    """-1 for no limit."""
    first_sequence: int
    last_sequence: int

    @property
    def full(self) -> str:
        """The limit that the stream is at, in words; empty where it has room."""
        if 0 < self.max_messages <= self.messages:
            return f"{self.messages:,} messages, which is its bus.*.max_msgs"
        if self.max_bytes > 0 and self.size_bytes > 0.98 * self.max_bytes:  # it refuses what does not fit any more
            return f"{self.size_bytes / 2**20:,.0f} MiB of {self.max_bytes / 2**20:,.0f}"
        return ""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A message where it lies."""

    sequence: int
    subject: str
    message_id: str
    body: bytes
    stored_at: float
    """Seconds since the epoch on the server's clock."""
    failure: str | None = None
    """Of a result: the failure's class, None where the rollout was scored."""


class Streams:
    """The streams of a server. Subjects may have wildcards. Every call raises BusError where the server fails."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._js = bus, bus.js

    # -- how much -----------------------------------------------------------------------------------------------------

    async def state(self, stream: str) -> StreamState:
        """How full it is."""
        info = await answered(self._js.stream_info(stream), f"stream {stream}")
        return StreamState(
            name=stream,
            messages=int(info.state.messages),
            size_bytes=int(info.state.bytes),
            max_messages=int(info.config.max_msgs or -1),
            max_bytes=int(info.config.max_bytes or -1),
            first_sequence=int(info.state.first_seq),
            last_sequence=int(info.state.last_seq),
        )

    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        """Messages by subject; for a few thousand subjects at the most."""
        info = await answered(self._js.stream_info(stream, subjects_filter=subject), f"stream {stream}")
        return dict(info.state.subjects or {})

    async def waiting(self, stream: str, subject: str) -> int:
        """Messages that a work queue holds, those in flight included."""
        return sum((await self.counts(stream, subject)).values())

    async def count(self, stream: str, subject: str, sequence: int = 1) -> int:
        """Messages at `sequence` or behind it, however many subjects there are."""
        name = await self._bus.consumers.reader(stream, subject, sequence)
        info = await self._bus.consumers.info(stream, name)
        with contextlib.suppress(BusError):
            await answered(self._js.delete_consumer(stream, name), f"a reader of {subject}")
        return int(info.num_pending or 0)

    # -- single messages ----------------------------------------------------------------------------------------------

    async def first(self, stream: str, subject: str, sequence: int = 1) -> Stored | None:
        """The oldest message at `sequence` or behind it; None where there is none."""
        return await self._message(stream, seq=sequence, subject=subject, next=True)

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message; None where there is none."""
        return await self._message(stream, subject=subject)

    async def at(self, stream: str, sequence: int) -> Stored | None:
        """The message at a sequence; None where there is nothing (any more)."""
        return await self._message(stream, seq=sequence)

    async def _message(self, stream: str, **which: Any) -> Stored | None:
        found = await answered(self._js.get_msg(stream, **which), f"stream {stream}", none_for=NotFoundError)
        if found is None:
            return None
        headers = found.headers or {}
        return Stored(
            sequence=int(found.seq or 0),
            subject=str(found.subject),
            message_id=headers.get(ID_HEADER, ""),
            body=found.data or b"",
            stored_at=found.time.timestamp() if found.time else 0.0,
            failure=headers.get(FAILURE_HEADER),
        )

    # -- all of a subject ---------------------------------------------------------------------------------------------

    async def messages(self, stream: str, subject: str) -> AsyncIterator[Stored]:
        """Every message, in order, each by a question of its own."""
        sequence = 1
        while found := await self.first(stream, subject, sequence):
            yield found
            sequence = found.sequence + 1

    async def ids(self, stream: str, subject: str) -> list[str]:
        """The message id of every message, in order.

        Far fewer round trips than `messages`, but a replica may answer, which can be a moment behind its leader.
        Raises BusError also where the connection broke off in between.
        """
        client = self._bus.client
        inbox = client.new_inbox()
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        subscription = await client.subscribe(inbox, cb=arrived.put, pending_bytes_limit=4 * IDS_BYTES)
        found: list[str] = []
        sequence: int | None = 1
        try:
            while sequence is not None:
                body = {"seq": sequence, "next_by_subj": subject, "batch": IDS_MESSAGES, "max_bytes": IDS_BYTES}
                await client.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body), inbox)
                sequence = await self._ids_of_batch(stream, arrived, found)
        except nats.errors.Error as e:
            raise trouble(f"stream {stream}", e) from None
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()
        return found

    async def _ids_of_batch(self, stream: str, arrived: asyncio.Queue[Msg], found: list[str]) -> int | None:
        """Take one batch into `found`; returns where the next one begins, None where there is none."""
        while True:
            headers = (await answered(arrived.get(), f"stream {stream}")).headers or {}
            status = headers.get("Status", "")
            if status == "204":
                return int(headers["Nats-Last-Sequence"]) + 1 if int(headers["Nats-Num-Pending"]) else None
            if status == "404":
                return None
            if status:
                raise BusError(f"stream {stream}: {headers.get('Description') or status}")
            found.append(headers.get(ID_HEADER, ""))

    async def outcomes(self, stream: str, subject: str) -> AsyncIterator[Outcome]:
        """What every stored result is; bodies are not transferred."""
        follower = Follower(self._bus, stream, subject, 1, headers_only=True)
        try:
            while await follower.pending():
                for delivery in await follower.batch(1.0):
                    task, rollout = delivery.subject.split(".")[3:5]
                    yield Outcome(int(task), int(rollout), delivery.message_id, delivery.headers.get(FAILURE_HEADER))
        finally:
            await follower.close()

    # -- removed ------------------------------------------------------------------------------------------------------

    async def delete(self, stream: str, sequence: int) -> None:
        """Remove one message; nothing happens where it is gone already."""
        # Without erasing: overwriting the message on disk makes the server 200 times slower, and hides nothing from us.
        order = msgspec.json.encode({"seq": sequence, "no_erase": True})
        try:
            call = self._js._api_request(f"$JS.API.STREAM.MSG.DELETE.{stream}", order, timeout=API_LIMIT_S)
            await within(API_LIMIT_S, call)
        except (TimeoutError, nats.errors.Error) as e:
            may_be_gone = getattr(e, "err_code", None) in MESSAGE_GONE
            if not may_be_gone or await self.at(stream, sequence) is not None:
                raise trouble(f"stream {stream}", e) from None

    async def purge(self, stream: str, subject: str) -> None:
        """Remove every message."""
        await answered(self._js.purge_stream(stream, subject=subject), f"stream {stream}")
