"""The consumers of streams: made, asked how far they are, forgotten."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from nats.js import api
from nats.js.errors import NotFoundError

from gym_bus import subjects
from gym_bus.bus.asking import answered

if TYPE_CHECKING:
    from gym_bus.bus.connection import Bus

SECOND_LOOK_S = 0.5
"""An acked message leaves its stream a moment after the ack."""


class ConsumerState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a work queue's consumer is."""

    name: str
    undelivered: int
    leased: int
    """Delivered and not acked."""


class Consumers:
    """The consumers of a server. Every call raises BusError where the server fails."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._js = bus, bus.js

    async def ensure(self, stream: str, name: str, subject: str, *, max_ack_pending: int, max_deliver: int) -> None:
        """A durable pull consumer with explicit acks, created or left as it is."""
        config = api.ConsumerConfig(
            durable_name=name,
            filter_subject=subject,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=self._bus.config.ack_wait_s,
            max_ack_pending=max_ack_pending,
            max_deliver=max_deliver,
            max_waiting=4096,
        )
        await answered(self._js.add_consumer(stream, config), f"consumer {name}")

    async def reader(self, stream: str, subject: str, start_sequence: int, *, headers_only: bool = False) -> str:
        """A consumer without acks that vanishes when nobody reads; returns its name."""
        config = api.ConsumerConfig(
            filter_subject=subject,
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=max(1, start_sequence),
            ack_policy=api.AckPolicy.NONE,
            mem_storage=True,
            inactive_threshold=60.0,
            headers_only=headers_only,
            num_replicas=1,
        )
        info = await answered(self._js.add_consumer(stream, config), f"a reader of {subject}")
        return str(info.name)

    async def info(self, stream: str, name: str) -> Any:
        """What the server says of a consumer."""
        return await answered(self._js.consumer_info(stream, name), f"consumer {name}")

    async def _infos(self, stream: str) -> list[Any]:
        return list(await answered(self._js.consumers_info(stream), f"consumers of {stream}"))

    async def states(self, stream: str) -> list[ConsumerState]:
        """How far all consumers of a stream are."""
        return [
            ConsumerState(
                name=str(info.name), undelivered=int(info.num_pending or 0), leased=int(info.num_ack_pending or 0)
            )
            for info in await self._infos(stream)
        ]

    async def forget(self) -> None:
        """Delete the consumers of the work queues: every unacked message is delivered anew, at once."""
        for stream in (subjects.REQUESTS, subjects.ATTEMPTS):
            what = f"consumers of {stream}"
            for info in await answered(self._js.consumers_info(stream), what, none_for=NotFoundError) or ():
                await answered(self._js.delete_consumer(stream, str(info.name)), f"consumer {info.name}")

    async def stuck(self, stream: str, subject: str) -> list[int]:
        """Messages of `subject` (wildcards allowed) that their consumer will never deliver (again): their sequences.

        A message whose deliveries are used up stays in its work queue like that. Subjects that no consumer serves yet
        are not stuck: they wait for a worker. While a consumer waits for acks only what lies below all of them counts,
        so that a stuck message of a busy queue may be found later. Where there are any, the call takes half a second
        more for a second look.
        """
        first = await self._passed_by(stream, subject)
        if not first:
            return []
        await asyncio.sleep(SECOND_LOOK_S)
        return sorted(first & await self._passed_by(stream, subject))

    async def _passed_by(self, stream: str, subject: str) -> set[int]:
        """Sequences of what lies where its consumer has delivered all and waits for no ack."""
        # The consumers first: what they had settled by now cannot be a message that comes later.
        settled = await self._settled(stream)
        found: set[int] = set()
        for name in await self._bus.streams.counts(stream, subject):
            settled_up_to = settled.get(name.rpartition(".")[0], 0)
            async for message in self._bus.streams.messages(stream, name):
                if message.sequence > settled_up_to:
                    break
                found.add(message.sequence)
        return found

    async def _settled(self, stream: str) -> dict[str, int]:
        """By subject without its last token: the stream sequence up to which the consumer will do nothing more."""
        return {
            str(c.config.filter_subject).rpartition(".")[0]: int(
                (c.ack_floor if c.num_ack_pending else c.delivered).stream_seq or 0
            )
            for c in await self._infos(stream)
            if c.ack_floor and c.delivered
        }
