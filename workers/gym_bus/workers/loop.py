"""The consume loop of every leased role: N in flight, publish then ack, retries, dead letters, drain.

A slot that frees is refilled at once from a small buffer; messages are leased with heartbeats for as long as they are
held; what a handler returns is published, and acked upstream only when the broker has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from gym_bus.bus import Bus, Delivery, Pull
from gym_bus.errors import BusError, FailureKind, GymBusError
from gym_bus.logs import get_logger
from gym_bus.messages import Attempt, Failed, Failure, Message, Request, Result

log = get_logger(__name__)


class Cancellations:
    """The jobs that were cancelled, and when: what was ordered later, by a resumed run, is not covered."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def add(self, job: str, at: float) -> None:
        """The job was cancelled at `at`, seconds since the epoch."""
        self._at[job] = at

    def cover(self, message: Message) -> bool:
        """Whether the message belongs to a cancelled run of its job."""
        return message.published_at <= self._at.get(message.rollout.job, 0.0)


class Handler(Protocol):
    """What a role does with one message."""

    stage: str
    """Its name in failures and logs."""

    async def handle(self, message: Message, stored_at: float) -> Attempt | Result:
        """The message for the next stage. What it raises becomes a retry or a failed result.

        `stored_at` is when the broker took the message, seconds since the epoch.
        """
        ...

    cancellations: Cancellations
    """Which jobs' messages are to be dropped."""


class Source(msgspec.Struct, frozen=True):
    """One consumer to pull from."""

    stream: str
    consumer: str
    subject: str
    urgent: bool = False
    """Served before sources that are not, and pulled even when the slots are full."""


URGENT_BUFFER = 16
RETRY_FIRST_S = 1.0
RETRY_MOST_S = 30.0


class Loop:
    """Pulls from its sources, runs the handler on up to `concurrency` messages at a time."""

    def __init__(
        self,
        bus: Bus,
        handler: Handler,
        sources: Sequence[Source],
        *,
        concurrency: int,
        prefetch: int,
        max_ack_pending: int,
        worker: str,
    ) -> None:
        self._bus, self._handler, self._sources = bus, handler, tuple(sources)
        self._concurrency, self._prefetch = concurrency, min(prefetch, max(1, concurrency // 4))
        self._max_ack_pending, self._worker = max_ack_pending, worker
        self._pulls: list[Pull] = []
        self._urgent: deque[Delivery] = deque()
        self._ready: deque[Delivery] = deque()
        self._running: dict[asyncio.Task[None], Delivery] = {}
        self._held: dict[str, Delivery] = {}
        self._draining = False
        self._idle = asyncio.Event()
        self._heartbeat: asyncio.Task[None] | None = None
        self.done = 0
        """Messages handled since the start."""

    @property
    def in_flight(self) -> int:
        """Messages being handled now."""
        return len(self._running)

    @property
    def buffered(self) -> int:
        """Messages leased and waiting for a slot."""
        return len(self._ready) + len(self._urgent)

    async def start(self) -> None:
        """Create the consumers where they are missing and begin to pull."""
        for source in self._sources:
            await self._ensure(source)
            pull = Pull(
                self._bus,
                source.stream,
                source.consumer,
                self._urgent_arrived if source.urgent else self._arrived,
                self._urgent_room if source.urgent else self._room,
                refill=1 if source.urgent else self._prefetch // 2,
                on_lost=partial(self._ensure, source),
            )
            self._pulls.append(pull)
        for pull in self._pulls:
            await pull.start()
        self._heartbeat = asyncio.create_task(self._extend_leases(), name="lease heartbeat")

    async def _ensure(self, source: Source) -> None:
        await self._bus.consumer(
            source.stream,
            source.consumer,
            source.subject,
            max_ack_pending=self._max_ack_pending,
            max_deliver=self._bus.config.max_deliver,
        )

    def _room(self) -> int:
        return self._concurrency + self._prefetch - len(self._running) - len(self._ready)

    def _urgent_room(self) -> int:
        return URGENT_BUFFER - len(self._urgent)

    def _arrived(self, delivery: Delivery) -> None:
        self._take(delivery, self._ready)

    def _urgent_arrived(self, delivery: Delivery) -> None:
        self._take(delivery, self._urgent)

    def _take(self, delivery: Delivery, queue: deque[Delivery]) -> None:
        if held := self._held.get(delivery.message_id):
            # Delivered again while we still work on it (a pause longer than the lease): answer the newest delivery.
            held.reply = delivery.reply
            return
        self._held[delivery.message_id] = delivery
        queue.append(delivery)
        self._fill()

    def _fill(self) -> None:
        while len(self._running) < self._concurrency and not self._draining:
            queue = self._urgent or self._ready
            if not queue:
                return
            delivery = queue.popleft()
            task = asyncio.create_task(self._work(delivery))
            self._running[task] = delivery
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        delivery = self._running.pop(task)
        self._held.pop(delivery.message_id, None)
        self.done += 1
        if not task.cancelled() and (error := task.exception()):
            log.error("loop_fault", stage=self._handler.stage, message=delivery.message_id, error=repr(error))
        self._fill()
        for pull in self._pulls:
            pull.poke()
        if not self._running:
            self._idle.set()

    async def _work(self, delivery: Delivery) -> None:
        try:
            await self._step(delivery)
        except asyncio.CancelledError:  # drained before it was done: another worker takes it at once
            await delivery.nak()
            raise
        except BusError as e:  # the broker did not take the outcome: the lease runs out or another worker repeats it
            log.warning("not_published", stage=self._handler.stage, message=delivery.message_id, error=str(e))
            await delivery.nak(_retry_wait_s(delivery.deliveries))

    async def _step(self, delivery: Delivery) -> None:
        try:
            message = await delivery.message()
        except (msgspec.DecodeError, ValueError) as e:
            await self._bury(delivery, None, FailureKind.POISON, f"the message cannot be decoded: {e}")
            return
        if delivery.deliveries >= self._bus.config.max_deliver:
            why = f"delivered {delivery.deliveries} times without an outcome: it kills or hangs its workers"
            await self._bury(delivery, message, FailureKind.POISON, why)
            return
        if self._handler.cancellations.cover(message):
            await self._bury(delivery, message, FailureKind.CANCELLED, "the job was cancelled")
            return
        try:
            outcome = await self._handler.handle(message, delivery.stored_at)
        except BusError:
            raise
        except GymBusError as e:
            if e.kind is FailureKind.SANDBOX_LOST and delivery.deliveries < self._bus.config.max_deliver - 1:
                await delivery.nak(_retry_wait_s(delivery.deliveries))
                return
            await self._bury(delivery, message, e.kind or FailureKind.AGENT_ERROR, str(e))
            return
        except Exception as e:  # the one place where any error of foreign code becomes a failure with a class
            log.warning("handler_fault", stage=self._handler.stage, message=delivery.message_id, exc_info=True)
            kind = FailureKind.AGENT_ERROR if isinstance(message, Request) else FailureKind.VERIFIER_ERROR
            await self._bury(delivery, message, kind, f"{type(e).__name__}: {e}")
            return
        await self._bus.publish(outcome, delivery.message_id)
        await delivery.ack()  # only now: a crash in between repeats the work, never loses it

    async def _bury(self, delivery: Delivery, message: Message | None, kind: FailureKind, detail: str) -> None:
        failure = Failure(kind=kind, detail=detail[:4000], stage=self._handler.stage)
        if message is not None:
            await self._bus.publish(failed(message, failure, worker=self._worker), delivery.message_id)
        elif rollout := delivery.rollout:
            await self._bus.publish(Failed(rollout=rollout, failure=failure), delivery.message_id)
        else:
            log.error("unreadable_message", subject=delivery.subject, message=delivery.message_id)
        await delivery.ack()

    async def _extend_leases(self) -> None:
        while True:
            await asyncio.sleep(self._bus.config.heartbeat_s)
            for delivery in list(self._held.values()):
                await delivery.extend()

    def drop(self, job: str) -> None:
        """Stop working on a job that was cancelled; the queue itself is emptied by whoever cancelled it."""
        for task, delivery in list(self._running.items()):
            if (rollout := delivery.rollout) and rollout.job == job:
                task.cancel()

    async def drain(self, limit_s: float) -> None:
        """Stop pulling, finish what runs within `limit_s` seconds, hand the rest back."""
        self._draining = True
        for pull in self._pulls:
            await pull.stop()
        for queue in (self._urgent, self._ready):
            while queue:
                await queue.popleft().nak()
        deadline = time.monotonic() + limit_s
        while self._running and time.monotonic() < deadline:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), max(0.01, deadline - time.monotonic()))
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._heartbeat:
            self._heartbeat.cancel()


def failed(message: Message, failure: Failure, *, worker: str = "") -> Failed:
    """The failed result of whatever stage `message` is at, with everything known so far."""
    if isinstance(message, Failed):
        return message
    common: dict[str, Any] = {
        "rollout": message.rollout,
        "number": message.number,
        "failure": failure,
        "agent": message.agent,
        "verifier": message.verifier,
        "row": message.row,
        "group_size": message.group_size,
    }
    if isinstance(message, Request):
        return Failed(**common, agent_worker=worker)
    return Failed(
        **common,
        response=message.response,
        policy=message.policy,
        usage=message.usage,
        timings=message.timings,
        agent_worker=message.agent_worker,
        verifier_worker=worker,
    )


def _retry_wait_s(deliveries: int) -> float:
    wait: float = min(RETRY_FIRST_S * 2 ** (deliveries - 1), RETRY_MOST_S)
    return wait * random.uniform(0.5, 1.5)
