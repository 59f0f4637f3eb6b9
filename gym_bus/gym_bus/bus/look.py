"""What the server says of streams and consumers, for whoever looks at a job from outside."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import nats.errors
import nats.js.errors

from gym_bus.bus.connection import API_LIMIT_S, Bus
from gym_bus.bus.publish import trouble
from gym_bus.bus.pull import ID_HEADER
from gym_bus.deadline import within


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


class ConsumerState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a work queue's consumer is."""

    name: str
    undelivered: int
    leased: int
    """Delivered and not acked."""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """A message where it lies."""

    message_id: str
    stored_at: float
    """Seconds since the epoch on the server's clock."""


async def stream_state(bus: Bus, name: str) -> StreamState:
    """Raises BusError where there is no such stream, or no answer."""
    info = await bus._api(bus.js.stream_info(name), f"stream {name}")
    return StreamState(
        name=name,
        messages=int(info.state.messages),
        size_bytes=int(info.state.bytes),
        max_messages=int(info.config.max_msgs or -1),
        max_bytes=int(info.config.max_bytes or -1),
        first_sequence=int(info.state.first_seq),
        last_sequence=int(info.state.last_seq),
    )


async def consumer_states(bus: Bus, stream: str) -> list[ConsumerState]:
    """The consumers of a stream. Raises BusError."""
    infos = await bus._api(bus.js.consumers_info(stream), f"consumers of {stream}")
    return [
        ConsumerState(
            name=str(info.name),
            undelivered=int(info.num_pending or 0),
            leased=int(info.num_ack_pending or 0),
        )
        for info in infos
    ]


async def subject_counts(bus: Bus, stream: str, subject: str) -> dict[str, int]:
    """Messages by subject, of those that `subject` (wildcards allowed) takes in. Raises BusError."""
    info = await bus._api(bus.js.stream_info(stream, subjects_filter=subject), f"stream {stream}")
    return dict(info.state.subjects or {})


async def count_from(bus: Bus, stream: str, subject: str, sequence: int) -> int:
    """Messages of `subject` at `sequence` or behind it. Raises BusError."""
    name = await bus.ephemeral_reader(stream, subject, sequence)
    info = await bus.consumer_info(stream, name)
    with contextlib.suppress(nats.errors.Error, TimeoutError):
        await within(API_LIMIT_S, bus.js.delete_consumer(stream, name))
    return int(info.num_pending or 0)


async def first_message(bus: Bus, stream: str, subject: str) -> Stored | None:
    """The oldest message of `subject` (wildcards allowed); None where there is none. Raises BusError."""
    return await _message(bus, stream, subject, seq=1, next=True)


async def last_message(bus: Bus, stream: str, subject: str) -> Stored | None:
    """The newest message of `subject` (wildcards allowed); None where there is none. Raises BusError."""
    return await _message(bus, stream, subject)


async def _message(bus: Bus, stream: str, subject: str, **more: Any) -> Stored | None:
    try:
        found = await within(API_LIMIT_S, bus.js.get_msg(stream, subject=subject, **more))
    except nats.js.errors.NotFoundError:
        return None
    except (TimeoutError, nats.errors.Error) as e:
        raise trouble(f"stream {stream}", e) from None
    return Stored(
        message_id=(found.headers or {}).get(ID_HEADER, ""),
        stored_at=found.time.timestamp() if found.time else 0.0,
    )
