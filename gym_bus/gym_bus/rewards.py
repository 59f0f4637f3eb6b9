"""What a trainer subscribes to: scored results or complete groups, acked when the trainer says so.

    async with RewardStream("nats://127.0.0.1:4222", job="gsm8k-1a2b", group_size=8, durable="learner") as stream:
        async for group in stream:
            learn(group.rewards)
            await group.ack()

    for group in RewardStream(...):  # without an event loop
        learn(group.rewards)
        group.ack()

A group is handed out when every rollout of its task has an outcome. What the trainer has not acked when it dies comes
again; what it has acked never does, whatever the trainer or the server forgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from itertools import chain
from typing import Any, TypeVar

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Pull, as_result
from gym_bus.deadline import within
from gym_bus.errors import BusError, FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.logs import get_logger
from gym_bus.messages import Failed, Failure, Result, RolloutId, Scored
from gym_bus.settings import BusConfig, MiB

log = get_logger(__name__)

T = TypeVar("T")

TRAINERS = subjects.TRAINERS
LOOK_S = 1.0
"""Seconds without an outcome before the trainer looks whether the job is over."""
SETTLE_S = 10.0
"""Seconds without an outcome after which a job that is over, but lacks results on the stream, gets no more of them: a
cancelled job's last failures are published after its state has changed, and old results expire."""
BODY_TRIES = 5
"""Tries to fetch a body while the server answers, before it is gone for good."""
BODY_WAIT_S = 1.0
"""Seconds between two of these tries."""
SAVE_TRIES = 20
SAVE_WAIT_S = 0.02
"""Seconds between two of these tries, at most, times their number: one of two streams of a name is through soon."""


class Committed(msgspec.Struct):
    """What one trainer has acked, under `<job>.<durable>` in the `gym_trainers` bucket.

    One small record per trainer: rollouts are acked nearly in order, so there are about as many spans as groups that
    wait for an outcome or for their ack while later ones are done.
    """

    spans: list[tuple[int, int]] = []
    """Sorted [first, end) pairs of rollout numbers, counted within the trainer's rank."""


class _Spans:
    """A set of integers that is mostly runs: sorted [first, end) pairs that neither overlap nor touch."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self.pairs = list(pairs)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self.pairs, number, key=lambda pair: pair[0])
        return at > 0 and number < self.pairs[at - 1][1]

    def add(self, first: int, end: int) -> None:
        """Add every number in [first, end)."""
        low = bisect_left(self.pairs, first, key=lambda pair: pair[1])
        high = bisect_right(self.pairs, end, key=lambda pair: pair[0])
        if low < high:  # these touch the new pair: one takes the place of all
            first, end = min(first, self.pairs[low][0]), max(end, self.pairs[high - 1][1])
        self.pairs[low:high] = [(first, end)]


class _Lease:
    """A held delivery, what its body takes, and whether the body is here."""

    __slots__ = ("delivery", "read", "size_bytes")

    def __init__(self, delivery: Delivery) -> None:
        self.delivery, self.size_bytes, self.read = delivery, delivery.size_bytes, False


class _Held:
    """The deliveries that a stream has leased, by message id, bounded in count and in bytes."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._max_bytes = max_count, max_bytes
        self._leases: dict[str, _Lease] = {}
        self._bytes = self._read_bytes = 0

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Delivery]:
        return iter([lease.delivery for lease in self._leases.values()])

    @property
    def room(self) -> int:
        """Messages that may still come."""
        return max(0, self._max_count - len(self))

    @property
    def room_bytes(self) -> int:
        """Bytes of bodies that may still come."""
        return max(0, self._max_bytes - self._bytes)

    @property
    def room_to_read(self) -> bool:
        """Whether one more body may be fetched. Not the same: more may have come than was asked for."""
        return self._read_bytes < self._max_bytes

    def add(self, delivery: Delivery) -> bool:
        """Hold a delivery. False where it is held already: a redelivery renews the lease."""
        if known := self._leases.get(delivery.message_id):
            known.delivery.reply = delivery.reply
            return False
        self._leases[delivery.message_id] = _Lease(delivery)
        self._bytes += delivery.size_bytes
        return True

    def read(self, delivery: Delivery) -> None:
        """The body is here."""
        lease = self._leases[delivery.message_id]
        self._read_bytes += lease.size_bytes
        lease.read = True

    def drop(self, delivery: Delivery) -> None:
        """Hold it no longer."""
        if lease := self._leases.pop(delivery.message_id, None):
            self._bytes -= lease.size_bytes
            self._read_bytes -= lease.size_bytes if lease.read else 0


class _Outcomes:
    """The outcomes of one task's rollouts. Rewards are of scored rollouts only; failures stand beside them."""

    def __init__(self, task_index: int, size: int, outcomes: list[Result]) -> None:
        self.task_index, self.size = task_index, size
        self._outcomes = outcomes
        self.results: list[Scored] = [r for r in outcomes if isinstance(r, Scored)]
        self.failures: list[Failed] = [r for r in outcomes if isinstance(r, Failed)]

    @property
    def rewards(self) -> list[float]:
        """One reward per scored rollout, in the order of `results`; a failure contributes none."""
        return [r.reward for r in self.results]


class Group(_Outcomes):
    """The outcomes of one task's rollouts, of a stream in an event loop."""

    def __init__(self, stream: RewardStream, task_index: int, size: int, outcomes: Iterable[Result]) -> None:
        super().__init__(task_index, size, sorted(outcomes, key=lambda r: r.rollout.rollout_index))
        self._stream = stream

    async def ack(self) -> None:
        """The trainer has used the group: it never comes again.

        Raises:
            BusError: the broker did not confirm; the group may come again, and acking it once more can help.
        """
        await self._stream._commit(self.task_index, [r.rollout for r in self._outcomes])


class SyncGroup(_Outcomes):
    """The outcomes of one task's rollouts, for trainers without an event loop."""

    def __init__(self, stream: SyncRewardStream, group: Group) -> None:
        super().__init__(group.task_index, group.size, group._outcomes)
        self._stream, self._group = stream, group

    def ack(self) -> None:
        """As `Group.ack`. Raises UsageError where the stream was closed."""
        self._stream._do(self._group.ack())


class _Partial:
    """A group that still waits for outcomes."""

    __slots__ = ("held", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: dict[int, tuple[Delivery, Result]] = {}


class RewardStream:
    """An async iterator over complete groups of one job (groups of one are single results).

    A rollout is delivered once per durable. Where a failed rollout is run again after its group was handed out, its new
    outcome is dropped (and logged): it is in the files of the run, and a new durable gets it in its group. An outcome
    whose body is gone from the server is a failure of class `lost` in its group.

    Args:
        nats: address of the NATS server, or a connected `Bus`.
        job: the job's id.
        group_size: outcomes that complete a group; None for as many as the job has rollouts of the task.
        durable: the trainer's name; the same name resumes where that trainer stopped.
        rank, world_size: this rank gets the tasks with `task_index % world_size == rank`, so ranks never overlap.
        max_held: outcomes held at most (handed out and not acked, and waiting for their group).
        max_held_bytes: bytes of these outcomes above which no more are asked for; what is on its way then still comes.
        follow: go on waiting for ever; otherwise the iteration ends when every rollout of the job was handed out.
    """

    def __init__(
        self,
        nats: str | Bus,
        *,
        job: str,
        group_size: int | None = None,
        durable: str,
        rank: int = 0,
        world_size: int = 1,
        max_held: int = 8192,
        max_held_bytes: int = 256 * MiB,
        follow: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not in 0..{world_size - 1}")
        if group_size is not None and not 1 <= group_size <= max_held:
            raise UsageError(f"group_size {group_size} is not in 1..{max_held} (max_held)")
        self._nats, self._job, self._group_size = nats, subjects.token(job, "job"), group_size
        name = subjects.token(durable, "durable")
        self._durable = f"{name}-{rank}of{world_size}" if world_size > 1 else name
        self._rank, self._world_size, self._max_held, self._follow = rank, world_size, max_held, follow
        self._bus: Bus | None = None
        self._pull: Pull | None = None
        self._record = JobRecord(job=job, spans=[])
        self._repeats = 1
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self._held = _Held(max_held, max_held_bytes)
        self._partial: dict[int, _Partial] = {}
        self._complete: deque[Group] = deque()
        self._unacked: dict[RolloutId, Delivery] = {}
        """The rollouts of complete groups that the trainer has not acked, each with the delivery to ack for it."""
        self._committed = _Spans()
        self._revision = 0
        self._unsaved: dict[int, list[tuple[int, int]]] = {}
        self._saving = asyncio.Lock()
        self._tries: dict[str, int] = {}
        self._moved_at: float | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._opened = False

    @property
    def _consumer(self) -> str:
        return f"trainer-{self._job}-{self._durable}"

    @property
    def _key(self) -> str:
        return f"{self._job}.{self._durable}"

    @property
    def _open_bus(self) -> Bus:
        if self._bus is None:
            raise UsageError("the stream is not open: use `async with RewardStream(...) as stream`")
        return self._bus

    async def __aenter__(self) -> RewardStream:
        """Connect and resume.

        Raises:
            BusError: no server there.
            UsageError: no such job, or the stream was opened before.
        """
        self._check_unopened()
        self._opened = True
        try:
            self._bus = self._nats if isinstance(self._nats, Bus) else await Bus.connect(BusConfig(), url=self._nats)
            await self._open(self._bus)
        except BaseException:
            await self.close()
            self._opened = False  # the server or the job may be there later
            raise
        return self

    def _check_unopened(self) -> None:
        if self._opened:
            raise UsageError("the stream was opened before: make another with the same `durable`, which resumes")

    def _check_without_loop(self) -> None:
        """Raise UsageError where it cannot be opened in a thread of its own."""
        self._check_unopened()
        if isinstance(self._nats, Bus):
            raise UsageError("a Bus serves its own event loop only: give the address of the NATS server")

    async def _open(self, bus: Bus) -> None:
        record: JobRecord | None = await bus.state.get(subjects.JOBS, self._job, JobRecord)
        if record is None:
            raise UsageError(f"no job {self._job!r} on this server; `gym-bus eval status` lists the jobs")
        self._record = record
        self._repeats = max((rollouts for _, _, rollouts in record.spans), default=1)
        await self._load()
        await self._ensure()
        self._pull = Pull(
            bus,
            subjects.RESULTS,
            self._consumer,
            self._on_delivery,
            lambda: self._held.room,
            wanted_bytes=lambda: self._held.room_bytes,
            refill=max(1, self._max_held // 16),
            on_lost=self._ensure,
        )
        await self._pull.start()
        self._heartbeat = asyncio.create_task(self._extend(), name="trainer lease")

    async def _ensure(self) -> None:
        await self._open_bus.consumers.ensure(
            subjects.RESULTS,
            self._consumer,
            subjects.results_of(self._job),
            max_ack_pending=self._max_held,
            max_deliver=-1,
        )

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop; what was not acked comes again to the next stream of this name."""
        if self._heartbeat:
            self._heartbeat.cancel()
        if self._pull:
            await self._pull.stop()
        for delivery in self._held:
            await delivery.nak()
        if self._bus and not isinstance(self._nats, Bus):
            await self._bus.close()
        self._bus = None

    def _on_delivery(self, delivery: Delivery) -> None:
        if self._held.add(delivery):
            self._arrived.put_nowait(delivery)  # bounded by what is held: the pull asks for no more

    async def _extend(self) -> None:
        while True:
            await asyncio.sleep(self._open_bus.config.heartbeat_s)
            for delivery in self._held:
                await delivery.extend()

    async def __aiter__(self) -> AsyncIterator[Group]:
        while (group := await self.next()) is not None:
            yield group

    def __iter__(self) -> Iterator[SyncGroup]:
        """For trainers without an event loop: opens the stream, and closes it when the loop over it is left.

        A group is acked within the loop; `SyncRewardStream` stays open for later.

        Raises:
            UsageError: an event loop is running, the stream was opened before, or it is one over a `Bus`.
        """
        if _in_event_loop():  # a slip for `async for`; who means to block a loop, as in a notebook, has the other class
            raise UsageError("an event loop is running: use `async with RewardStream(...) as stream` and `async for`")
        with SyncRewardStream(self) as stream:
            yield from stream

    async def next(self, limit_s: float | None = None) -> Group | None:
        """The next complete group; None when the job is over, or when none came within `limit_s` seconds.

        Waits while the server is away.

        Raises:
            BusError: as much is held as may be, and no group of it is complete.
        """
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while not self._complete:
            wait_s = LOOK_S if deadline is None else min(LOOK_S, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            try:
                delivery = await within(wait_s, self._arrived.get())
            except TimeoutError:
                self._check_room()
                if not self._follow and await self._over():
                    return None
                continue
            await self._take(delivery)
        return self._complete.popleft()

    def _check_room(self) -> None:
        if (self._held.room and self._held.room_bytes) or self._unacked:  # groups that were handed out make room
            return
        raise BusError(
            f"{len(self._held)} outcomes are held and no group is complete: raise "
            f"{'max_held_bytes' if self._held.room else 'max_held'}, or check group_size against the job's repeats"
        )

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _over(self) -> bool:
        """Whether nothing more can come; not while the server is away."""
        try:
            over = await self._settled() and not await self._pending()
        except BusError as e:
            log.info("server_away", job=self._job, error=str(e))
            return False
        if over and self._partial:
            waiting = {task: f"{len(p.held)} of {p.size}" for task, p in list(self._partial.items())[:5]}
            log.warning("incomplete_groups", job=self._job, groups=len(self._partial), examples=waiting)
        return over

    async def _settled(self) -> bool:
        """Whether the job has ended and every result it will have is on the stream."""
        bus = self._open_bus
        record: JobRecord | None = await bus.state.get(subjects.JOBS, self._job, JobRecord)
        if record is not None and not record.over:
            self._moved_at = None
            return False
        if self._moved_at is None:
            self._moved_at = time.monotonic()
        if await bus.streams.count(subjects.RESULTS, subjects.results_of(self._job)) >= self._record.total:
            return True
        return time.monotonic() - self._moved_at > SETTLE_S

    async def _pending(self) -> bool:
        """Whether this durable was not handed all of what is on the stream."""
        info = await self._open_bus.consumers.info(subjects.RESULTS, self._consumer)
        if info.num_pending or self._arrived.qsize():
            return True
        # More than we hold: put back for later, or leased by a stream of this name that died, until its lease runs out.
        return (info.num_ack_pending or 0) > len(self._held)

    # -- from outcomes to groups --------------------------------------------------------------------------------------

    async def _take(self, delivery: Delivery) -> None:
        try:
            await self._admit(delivery, RolloutId.parse(delivery.subject.removeprefix("gym.result.")))
        except asyncio.CancelledError:  # the caller's own deadline: the next call takes it up
            self._arrived.put_nowait(delivery)
            raise

    async def _admit(self, delivery: Delivery, rollout: RolloutId) -> None:
        if self._moved_at is not None:
            self._moved_at = time.monotonic()
        if rollout.task_index % self._world_size != self._rank:
            await self._drop(delivery)
        elif rollout.rollout_index >= self._repeats:
            log.warning("unknown_rollout_dropped", rollout=str(rollout))
            await self._drop(delivery)
        elif self._number(rollout) in self._committed:
            log.info("outcome_after_its_group_dropped", rollout=str(rollout), message_id=delivery.message_id)
            await self._drop(delivery)
        elif replaced := self._unacked.get(rollout):
            # A retry took its place on the stream: should the trainer die, the group comes again with this outcome.
            self._unacked[rollout] = delivery
            await self._drop(replaced)
        elif result := await self._read(delivery, rollout):
            await self._join(delivery, result)

    async def _drop(self, delivery: Delivery) -> None:
        self._held.drop(delivery)
        await delivery.ack()
        if self._pull:
            self._pull.poke()

    async def _read(self, delivery: Delivery, rollout: RolloutId) -> Result | None:
        """The outcome; None where its body cannot be had now: then it comes again."""
        if not delivery.data and not self._held.room_to_read:  # the body lies in the object store
            await self._put_back(delivery)
            return None
        try:
            result = as_result(await delivery.message())
        except (BusError, msgspec.DecodeError) as e:
            if not await self._gone(delivery):
                log.info("body_not_fetched", rollout=str(rollout), error=str(e))
                await self._put_back(delivery)
                return None
            log.warning("body_lost", rollout=str(rollout), error=str(e))
            result = self._lost(rollout, str(e))
        self._tries.pop(delivery.message_id, None)
        self._held.read(delivery)
        delivery.data = b""  # the outcome itself is held from here on
        return result

    async def _put_back(self, delivery: Delivery) -> None:
        self._held.drop(delivery)
        await delivery.nak(BODY_WAIT_S)

    async def _gone(self, delivery: Delivery) -> bool:
        """Whether the body could not be had for the last time. Tries do not count while the server is away."""
        try:
            await self._open_bus.consumers.info(subjects.RESULTS, self._consumer)
        except BusError:
            return False
        self._tries[delivery.message_id] = self._tries.get(delivery.message_id, 0) + 1
        return self._tries[delivery.message_id] >= BODY_TRIES

    def _lost(self, rollout: RolloutId, why: str) -> Failed:
        return Failed(
            rollout=rollout,
            failure=Failure(kind=FailureKind.LOST, detail=f"the result's body cannot be read: {why}", stage="bus"),
            agent=self._record.agent,
            verifier=self._record.verifier,
            group_size=self._size(rollout.task_index) or 1,
        )

    def _size(self, task: int) -> int:
        """Outcomes of a whole group. From the job: a result that the bus made does not know its group."""
        return self._group_size or self._record.group_size(task)

    async def _join(self, delivery: Delivery, result: Result) -> None:
        task, index = result.rollout.task_index, result.rollout.rollout_index
        if task not in self._partial:
            self._partial[task] = _Partial(self._size(task) or result.group_size)
        partial = self._partial[task]
        replaced = partial.held.get(index)
        partial.held[index] = (delivery, result)
        if len(partial.held) >= partial.size:
            del self._partial[task]
            self._unacked |= {outcome.rollout: held for held, outcome in partial.held.values()}
            self._complete.append(Group(self, task, partial.size, [outcome for _, outcome in partial.held.values()]))
        if replaced:  # a retry took its place on the stream
            await self._drop(replaced[0])

    # -- what was acked -----------------------------------------------------------------------------------------------

    def _number(self, rollout: RolloutId) -> int:
        """Counts the rollouts of this rank without gaps, so that acked ones are few spans."""
        return rollout.task_index // self._world_size * self._repeats + rollout.rollout_index

    def _spans_of(self, task: int, rollouts: list[RolloutId]) -> list[tuple[int, int]]:
        if len(rollouts) >= self._record.group_size(task):
            first = self._number(RolloutId(self._job, task, 0))
            return [(first, first + self._repeats)]  # to the next task, where this one has fewer than the most
        return [(number, number + 1) for number in map(self._number, rollouts)]

    async def _commit(self, task: int, rollouts: list[RolloutId]) -> None:
        await self._save(self._spans_of(task, rollouts))
        # The record counts, not the acks: they are no transaction, and a killed server forgets acks that it confirmed.
        # What it delivers again is dropped.
        for rollout in rollouts:
            if delivery := self._unacked.pop(rollout, None):
                await self._drop(delivery)

    async def _save(self, spans: list[tuple[int, int]]) -> None:
        """Have the broker note rollouts as acked; groups that are acked at the same time share one write."""
        first = spans[0][0]
        self._unsaved[first] = spans
        try:
            async with self._saving:
                for tried in range(SAVE_TRIES):
                    if first in self._committed or await self._write(spans):
                        return
                    # Written by a write of ours whose ack was lost, or by another stream of this name.
                    await asyncio.sleep(random.uniform(0, tried * SAVE_WAIT_S))
                    await self._load()
            raise BusError(f"{TRAINERS}/{self._key} is written by others all the time: is the durable name used twice?")
        finally:
            self._unsaved.pop(first, None)

    async def _write(self, spans: list[tuple[int, int]]) -> bool:
        """Write what is acked, and what others wait to write. False where the record is not the one that was read."""
        grown = _Spans(self._committed.pairs)
        for first, end in chain(spans, *self._unsaved.values()):
            grown.add(first, end)
        revision = await self._open_bus.state.swap(TRAINERS, self._key, Committed(grown.pairs), self._revision)
        if revision is None:
            return False
        self._committed, self._revision = grown, revision
        return True

    async def _load(self) -> None:
        """Join what the broker noted to what is known here."""
        found = await self._open_bus.state.get_entry(TRAINERS, self._key, Committed)
        record, self._revision = found or (Committed(), 0)
        for first, end in record.spans:
            self._committed.add(first, end)


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class SyncRewardStream:
    """`RewardStream` for trainers without an event loop: a plain iterator, the bus in a thread of its own.

    with SyncRewardStream("nats://127.0.0.1:4222", job=..., group_size=8, durable="learner") as stream:
        for group in stream:
            learn(group.rewards)
            group.ack()

    Iterating a `RewardStream` without `async` does the same; this one says when it is closed.
    """

    def __init__(self, nats: str | RewardStream, **options: Any) -> None:
        """As a RewardStream of the same arguments, or over one that was not opened yet."""
        self._stream = nats if isinstance(nats, RewardStream) else RewardStream(nats, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SyncRewardStream:
        """Open the stream, in a thread.

        Raises:
            BusError: no server there.
            UsageError: no such job; the stream was opened before, or it is one over a `Bus`.
        """
        self._stream._check_without_loop()
        ready: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()

        def run() -> None:
            loop = asyncio.new_event_loop()
            ready.put(loop)
            loop.run_forever()
            loop.close()

        self._thread = threading.Thread(target=run, name="reward stream", daemon=True)
        self._thread.start()
        self._loop = ready.get(timeout=10)
        try:
            self._do(self._stream.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BusError):
            self._do(self._stream.close())
        self._stop()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise UsageError("the stream is not open: use `with SyncRewardStream(...) as stream`, and ack within it")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)
            self._loop = None

    def __iter__(self) -> Iterator[SyncGroup]:
        while (group := self._do(self._stream.next())) is not None:
            yield SyncGroup(self, group)

    def ack(self, group: SyncGroup) -> None:
        """The trainer has used the group."""
        group.ack()
