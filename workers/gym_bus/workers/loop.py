"""The consume loop of every leased role: N in flight, publish then ack, retries, dead letters, drain.

A slot that frees is refilled at once from a small buffer; messages are leased with heartbeats for as long as they are
held; what a handler returns is published, and acked upstream only when the broker has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from gym_bus import activity
from gym_bus.activity import Activity
from gym_bus.bus import Bus, Delivery, Pull
from gym_bus.deadline import within
from gym_bus.errors import BusError, FailureKind, GymBusError, PayloadTooLarge
from gym_bus.logs import get_logger
from gym_bus.messages import Attempt, Failed, Failure, Message, Policy, Request, Result
from gym_bus.workers.probation import Probation
from gym_bus.workers.publish import number_in, patiently

log = get_logger(__name__)

T = TypeVar("T")


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


class Doing(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message in the hands of a worker, as its report tells it."""

    rollout: str
    """`job.task.rollout`."""
    what: str
    """In a few words."""
    since: float
    """When it began to do this, seconds since the epoch on the worker's clock."""
    started_at: float
    """When the work on the message began; the same clock."""
    delivery: int = 1
    """How often the broker has delivered the message."""


OLDEST = 4
"""Messages that a report names, those that are in hand longest; once more as many where those are of other jobs."""
OLDEST_LOOKED_AT = 1024
URGENT_BUFFER = 16
URGENT_SLOTS = 16
"""Urgent messages that are begun though every slot is taken: they do not wait for a slow one to end."""
DELIVERIES_PER_DEATH = 200
"""The consumer's own bound is so much higher: it counts what was handed back too, and is there for our own faults."""
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
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            bus: where from and where to.
            handler: the role.
            sources: what to pull.
            concurrency: messages handled at a time.
            prefetch: messages held ready beside those.
            max_ack_pending: of all workers of a consumer together.
            worker: its name in failures.
            full: tells whether to begin no further message, urgent ones apart, though there are slots: what they need
                is not to be had. `fill` must be called when that changes.
        """
        self._full = full
        self._bus, self._handler, self._sources = bus, handler, tuple(sources)
        self._concurrency, self._prefetch = concurrency, min(prefetch, max(1, concurrency // 4))
        self._max_ack_pending, self._worker = max_ack_pending, worker
        self._pulls: list[Pull] = []
        self._urgent: deque[Delivery] = deque()
        self._ready: deque[Delivery] = deque()
        self._probation = Probation(bus.config.max_deliver)
        self._running: dict[asyncio.Task[None], Delivery] = {}
        self._held: dict[str, Delivery] = {}
        self._held_bytes = 0
        self._doing: dict[str, Activity] = {}
        self._answers: set[asyncio.Task[None]] = set()
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
        return len(self._ready) + len(self._urgent) + len(self._probation)

    @property
    def serves(self) -> list[str]:
        """The consumers that this loop pulls from."""
        return [source.consumer for source in self._sources]

    def oldest(self) -> list[Doing]:
        """What has been in hand longest: a few messages, and the oldest of a few further jobs."""
        found: list[Doing] = []
        jobs: set[str] = set()
        for name, doing in itertools.islice(self._doing.items(), OLDEST_LOOKED_AT):
            rollout = name.partition("#")[0]
            job = rollout.partition(".")[0]
            if (len(found) < OLDEST or (job not in jobs and len(found) < 2 * OLDEST)) and name in self._held:
                times = {"since": doing.since, "started_at": doing.started_at}
                found.append(Doing(rollout=rollout, what=doing.what, delivery=self._held[name].deliveries, **times))
                jobs.add(job)
        return found

    async def start(self) -> None:
        """Create the consumers where they are missing and begin to pull."""
        for source in self._sources:
            await patiently(partial(self._ensure, source), source.consumer)
            self._pulls.append(self._pull(source))
        for pull in self._pulls:
            await pull.start()
        self._heartbeat = asyncio.create_task(self._extend_leases(), name="lease heartbeat")

    def _pull(self, source: Source) -> Pull:
        common = partial(
            Pull, self._bus, source.stream, source.consumer, takes_late=True, on_lost=partial(self._ensure, source)
        )
        if source.urgent:
            return common(
                self._urgent_arrived, self._urgent_room, wanted_bytes=partial(self._room_bytes, len(self._pulls))
            )
        sharing = sum(not other.urgent for other in self._sources)
        # Together the sources ask idly for no more than the buffer holds: one that is busy can fill every slot.
        standing = max(1, self._prefetch // sharing) if sharing > 1 else None
        return common(
            self._arrived,
            partial(self._room, len(self._pulls)),
            wanted_bytes=partial(self._room_bytes, len(self._pulls)),
            refill=min(self._prefetch, standing or self._prefetch) // 2,
            standing=standing,
        )

    async def _ensure(self, source: Source) -> None:
        await self._bus.consumers.ensure(
            source.stream,
            source.consumer,
            source.subject,
            max_ack_pending=self._max_ack_pending,
            max_deliver=self._bus.config.max_deliver * DELIVERIES_PER_DEATH,
        )

    def _room(self, asking: int) -> int:
        """Messages there is room for beside what the other pulls have asked for."""
        slots = 0 if self._full() else self._concurrency - len(self._running)
        room = slots + self._prefetch - len(self._ready) - len(self._probation)
        others = [
            pull.outstanding
            for place, (pull, source) in enumerate(zip(self._pulls, self._sources, strict=True))
            if place != asking and not source.urgent
        ]
        # One message each is free: else a source that is empty could keep the last place from one that is not.
        left = room - sum(max(0, asked - 1) for asked in others)
        one_more = room > 0 and sum(others) < room + len(others)
        return max(left, 1) if one_more else left

    def _room_bytes(self, asking: int) -> int:
        asked = sum(pull.outstanding_bytes for place, pull in enumerate(self._pulls) if place != asking)
        room = self._bus.config.held_bytes - self._held_bytes
        return max(room - asked, min(room, 1))

    def _urgent_room(self) -> int:
        return URGENT_BUFFER - len(self._urgent)

    def _arrived(self, delivery: Delivery) -> None:
        self._take(delivery, self._ready)

    def _urgent_arrived(self, delivery: Delivery) -> None:
        self._take(delivery, self._urgent)

    def _take(self, delivery: Delivery, queue: deque[Delivery]) -> None:
        if held := self._held.get(delivery.message_id):
            held.came_again(delivery)  # a pause longer than the lease, or an order that was stored twice
            return
        self._held[delivery.message_id] = delivery
        self._held_bytes += delivery.size_bytes
        if self._probation.suspects(delivery):
            self._probation.add(delivery)
        else:
            queue.append(delivery)
        self.fill()

    def _next(self) -> tuple[Delivery, bool] | None:
        """What to begin now, and whether it is urgent."""
        slots = self._concurrency - len(self._running)
        if slots > 0 and (delivery := self._probation.next()):
            return delivery, False
        if self._urgent and slots > -URGENT_SLOTS:
            return self._urgent.popleft(), True
        if self._ready and slots > 0 and not self._full():
            return self._ready.popleft(), False
        return None

    def fill(self) -> None:
        """Begin what there is room for."""
        while not self._draining and (found := self._next()):
            delivery, urgent = found
            task = asyncio.create_task(self._work(delivery, urgent))
            self._running[task] = delivery
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        delivery = self._running.pop(task)
        self._let_go(delivery)
        self._probation.ended(delivery)
        self.done += 1
        if not task.cancelled() and (error := task.exception()):
            log.error("loop_fault", stage=self._handler.stage, message=delivery.message_id, error=repr(error))
        self.fill()
        for pull in self._pulls:
            pull.poke()
        if not self._running:
            self._idle.set()

    def _let_go(self, delivery: Delivery) -> None:
        self._doing.pop(delivery.message_id, None)
        if self._held.pop(delivery.message_id, None) is not None:
            self._held_bytes -= delivery.size_bytes

    async def _work(self, delivery: Delivery, urgent: bool) -> None:
        self._doing[delivery.message_id] = activity.begin(self._handler.stage, urgent=urgent)
        try:
            await self._step(delivery)
        except BusError as e:  # the broker will never take the outcome, or the handler could not reach it
            log.warning("not_published", stage=self._handler.stage, message=delivery.message_id, error=str(e))
            await delivery.nak(_retry_wait_s(delivery.deliveries))

    async def _step(self, delivery: Delivery) -> None:
        tries, most = await self._tries(delivery), self._bus.config.max_deliver
        if tries > most:  # not even its burial worked: do without its body
            await self._bury(delivery, None, FailureKind.POISON, _hopeless(tries))
            return
        try:
            message = await self._insist(delivery, delivery.message)
        except (msgspec.DecodeError, ValueError) as e:
            await self._bury(delivery, None, FailureKind.POISON, f"the message cannot be decoded: {e}")
            return
        if tries == most:
            await self._bury(delivery, message, FailureKind.POISON, _hopeless(tries))
        elif self._handler.cancellations.cover(message):
            await self._bury(delivery, message, FailureKind.CANCELLED, "the job was cancelled")
        else:
            await self._handle(delivery, message, last_try=tries + 1 >= most)

    async def _tries(self, delivery: Delivery) -> int:
        """How often work on the message began before and came to no end, as far as the worker knows who did it."""
        if not self._probation.suspects(delivery):
            return delivery.deliveries - 1
        tries = await self._insist(delivery, partial(self._bus.tries.before, delivery))
        await self._insist(delivery, partial(self._bus.tries.begin, delivery))
        return tries

    async def _handle(self, delivery: Delivery, message: Message, *, last_try: bool) -> None:
        try:
            outcome = await self._handler.handle(message, delivery.stored_at)
            activity.note("publishing the outcome")
            with self._holding(outcome):
                await self._insist(delivery, partial(self._bus.publish, outcome, delivery.message_id))
        except PayloadTooLarge as e:
            await self._bury(delivery, message, _fault_of(message), f"the outcome is too large: {e}")
        except BusError:
            raise
        except GymBusError as e:
            if e.kind is FailureKind.SANDBOX_LOST and not last_try:
                await delivery.nak(_retry_wait_s(delivery.deliveries))
                return
            await self._bury(delivery, message, e.kind or FailureKind.AGENT_ERROR, str(e))
        except Exception as e:  # the one place where any error of foreign code, or of what it returned, gets a class
            log.warning("handler_fault", stage=self._handler.stage, message=delivery.message_id, exc_info=True)
            await self._bury(delivery, message, _fault_of(message), f"{type(e).__name__}: {e}")
        else:
            await delivery.ack()  # only now: a crash in between repeats the work, never loses it

    @contextlib.contextmanager
    def _holding(self, outcome: Attempt | Result) -> Iterator[None]:
        """What waits for a full stream is held like what came from one; its row is that of the delivery."""
        size = len(outcome.response) + sum(len(c.token_ids) + len(c.logprobs) for c in outcome.calls)
        self._held_bytes += size
        try:
            yield
        finally:
            self._held_bytes -= size

    async def _insist(self, delivery: Delivery, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns, repeated while the trouble is the broker's; the lease is kept meanwhile.

        A full stream is such trouble: giving the message back would only have its work done, and paid, again.
        """
        while True:
            try:
                return await call()
            except BusError as e:
                if not e.retryable:
                    raise
                log.warning("bus_waits", stage=self._handler.stage, message=delivery.message_id, error=str(e))
                activity.note(f"waiting for the bus: {e}")
                await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _bury(self, delivery: Delivery, message: Message | None, kind: FailureKind, detail: str) -> None:
        words = detail[:4000].encode(errors="replace").decode()  # a lone surrogate would not encode
        failure = Failure(kind=kind, detail=words, stage=self._handler.stage)
        if message is not None:
            outcome: Failed | None = failed(message, failure, worker=self._worker)
        else:
            number = number_in(delivery.message_id)
            outcome = Failed(rollout=delivery.rollout, number=number, failure=failure) if delivery.rollout else None
        if outcome is None:
            log.error("unreadable_message", subject=delivery.subject, message=delivery.message_id)
        else:
            await self._insist(delivery, partial(self._bus.publish, outcome, delivery.message_id))
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
                task.add_done_callback(partial(self._give_up, delivery))
                task.cancel()

    def _give_up(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        # From outside: a task that is cancelled before its first step runs no code of its own.
        if task.cancelled():
            self._spawn(delivery.nak())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def drain(self, limit_s: float) -> None:
        """Stop pulling, finish what runs within `limit_s` seconds, hand the rest back.

        An outcome that a full stream did not take until then is lost: another worker makes it again.
        """
        self._draining = True
        await asyncio.gather(*(pull.stop() for pull in self._pulls))
        waiting = [*self._urgent, *self._ready, *self._probation.clear()]
        self._urgent.clear()
        self._ready.clear()
        await self._hand_back(waiting)
        deadline = time.monotonic() + limit_s
        while self._running and time.monotonic() < deadline:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await within(max(0.01, deadline - time.monotonic()), self._idle.wait())
        await self._interrupt()
        await asyncio.gather(*self._answers)
        if self._heartbeat:
            self._heartbeat.cancel()

    async def _interrupt(self) -> None:
        running = dict(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._hand_back([delivery for task, delivery in running.items() if task.cancelled()])

    async def _hand_back(self, deliveries: Iterable[Delivery]) -> None:
        """Another worker takes them at once, and nothing counts against them."""
        left = list(deliveries)
        await asyncio.gather(*(self._bus.tries.hand_back(delivery) for delivery in left))
        for delivery in left:
            self._let_go(delivery)


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
        version = message.policy_version
        policy = Policy(model=message.model, version_start=version, version_end=version)
        return Failed(**common, policy=policy, agent_worker=worker)
    return Failed(
        **common,
        response=message.response,
        extra=message.extra,
        policy=message.policy,
        usage=message.usage,
        calls=message.calls,
        timings=message.timings,
        agent_worker=message.agent_worker,
        verifier_worker=worker,
    )


def _fault_of(message: Message) -> FailureKind:
    return FailureKind.AGENT_ERROR if isinstance(message, Request) else FailureKind.VERIFIER_ERROR


def _hopeless(tries: int) -> str:
    return f"tried {tries} times without an outcome: it kills or hangs its workers"


def _retry_wait_s(deliveries: int) -> float:
    wait: float = min(RETRY_FIRST_S * 2 ** min(deliveries - 1, 10), RETRY_MOST_S)
    return wait * random.uniform(0.5, 1.5)
