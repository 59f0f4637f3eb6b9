"""What a trainer subscribes to: scored results or complete groups, acked when the trainer says so.

    async with RewardStream("nats://127.0.0.1:4222", job="gsm8k-1a2b", group_size=8, durable="learner") as stream:
        async for group in stream:
            learn(group.rewards)
            await group.ack()

A group is handed out when every rollout of its task has an outcome. What the trainer has not acked when it dies comes
again; what it has acked never does, even where it died between the acks of one group.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Pull, as_result
from gym_bus.errors import BusError, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.logs import get_logger
from gym_bus.messages import Failed, Result, Scored
from gym_bus.settings import BusConfig

log = get_logger(__name__)

T = TypeVar("T")

TRAINERS = "gym_trainers"


class Group:
    """The outcomes of one task's rollouts. Rewards are of scored rollouts only; failures stand beside them."""

    def __init__(self, stream: RewardStream, task_index: int, size: int, held: list[tuple[Delivery, Result]]) -> None:
        self._stream, self._held = stream, held
        self.task_index, self.size = task_index, size
        outcomes = sorted((result for _, result in held), key=lambda r: r.rollout.rollout_index)
        self.results: list[Scored] = [r for r in outcomes if isinstance(r, Scored)]
        self.failures: list[Failed] = [r for r in outcomes if isinstance(r, Failed)]

    @property
    def rewards(self) -> list[float]:
        """One reward per scored rollout, in the order of `results`; a failure contributes none."""
        return [r.reward for r in self.results]

    async def ack(self) -> None:
        """The trainer has used the group: it never comes again.

        Raises:
            BusError: the broker did not confirm; the group may come again.
        """
        await self._stream._commit(self.task_index, self._held)


class _Partial:
    """A group that still waits for outcomes."""

    __slots__ = ("held", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: dict[int, tuple[Delivery, Result]] = {}


class RewardStream:
    """An async iterator over complete groups of one job (groups of one are single results).

    Args:
        nats: address of the NATS server, or a connected `Bus`.
        job: the job's id.
        group_size: outcomes that complete a group; None for as many as the job has rollouts of the task.
        durable: the trainer's name; the same name resumes where that trainer stopped.
        rank, world_size: this rank gets the tasks with `task_index % world_size == rank`, so ranks never overlap.
        max_held: outcomes held at most (handed out and not acked, and waiting for their group).
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
        self._arrived: asyncio.Queue[Delivery] = asyncio.Queue()
        self._leased: dict[str, Delivery] = {}
        self._partial: dict[int, _Partial] = {}
        self._complete: deque[Group] = deque()
        self._committed: set[int] = set()
        self._seen: set[str] = set()
        self._left: int | None = None
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def _consumer(self) -> str:
        return f"trainer-{self._job}-{self._durable}"

    @property
    def _open_bus(self) -> Bus:
        if self._bus is None:
            raise UsageError("the stream is not open: use `async with RewardStream(...) as stream`")
        return self._bus

    async def __aenter__(self) -> RewardStream:
        """Connect and resume.

        Raises:
            BusError: no server there.
            UsageError: no such job.
        """
        self._bus = self._nats if isinstance(self._nats, Bus) else await Bus.connect(BusConfig(), url=self._nats)
        record = await self._bus.get(subjects.JOBS, self._job, JobRecord)
        if record is None:
            raise UsageError(f"no job {self._job!r} on this server; `gym-bus eval status` lists the jobs")
        self._bucket = await self._bus.bucket(TRAINERS)
        for key in await self._bus.keys(TRAINERS):
            if key.startswith(f"{self._consumer}."):
                self._committed.add(int(key.rpartition(".")[2]))
        await self._ensure()
        self._pull = Pull(
            self._bus,
            subjects.RESULTS,
            self._consumer,
            self._on_delivery,
            lambda: self._max_held - len(self._leased),
            refill=max(1, self._max_held // 16),
            on_lost=self._ensure,
        )
        await self._pull.start()
        self._heartbeat = asyncio.create_task(self._extend(), name="trainer lease")
        return self

    async def _ensure(self) -> None:
        await self._open_bus.consumer(
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
        for delivery in self._leased.values():
            await delivery.nak()
        if self._bus and not isinstance(self._nats, Bus):
            await self._bus.close()
        self._bus = None

    def _on_delivery(self, delivery: Delivery) -> None:
        if held := self._leased.get(delivery.message_id):
            held.reply = delivery.reply
            return
        self._leased[delivery.message_id] = delivery
        self._arrived.put_nowait(delivery)  # bounded by max_held: the pull asks for no more

    async def _extend(self) -> None:
        while True:
            await asyncio.sleep(self._open_bus.config.heartbeat_s)
            for delivery in list(self._leased.values()):
                await delivery.extend()

    async def __aiter__(self) -> AsyncIterator[Group]:
        while (group := await self.next()) is not None:
            yield group

    async def next(self, limit_s: float | None = None) -> Group | None:
        """The next complete group; None when the job is over, or when none came within `limit_s` seconds."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while not self._complete:
            wait_s = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            try:
                delivery = await asyncio.wait_for(self._arrived.get(), wait_s)
            except TimeoutError:
                if not self._follow and await self._over():
                    return None
                continue
            await self._admit(delivery)
        return self._complete.popleft()

    async def _over(self) -> bool:
        """Whether nothing more can come: the job has ended and this durable was handed all of it."""
        bus = self._open_bus
        record = await bus.get(subjects.JOBS, self._job, JobRecord)
        if record is not None and not record.over:
            return False
        info = await bus.consumer_info(subjects.RESULTS, self._consumer)
        if info.num_pending or self._arrived.qsize():
            return False
        if (info.num_ack_pending or 0) > len(self._leased):
            return False  # leased by a stream of this name that died: they come when its lease runs out
        if self._partial:
            waiting = {task: f"{len(p.held)} of {p.size}" for task, p in list(self._partial.items())[:5]}
            log.warning("incomplete_groups", job=self._job, groups=len(self._partial), examples=waiting)
        return True

    async def _admit(self, delivery: Delivery) -> None:
        result = as_result(await delivery.message())
        task = result.rollout.task_index
        if task % self._world_size != self._rank or task in self._committed:
            self._leased.pop(delivery.message_id, None)
            await delivery.ack()
            return
        size = self._group_size or result.group_size
        partial = self._partial.setdefault(task, _Partial(size))
        partial.held[result.rollout.rollout_index] = (delivery, result)
        if len(partial.held) >= size:
            del self._partial[task]
            self._complete.append(Group(self, task, size, list(partial.held.values())))
        elif len(self._leased) >= self._max_held and not self._complete and self._arrived.empty():
            raise BusError(
                f"{self._max_held} outcomes are held and no group of {size} is complete: raise max_held, "
                "or check group_size against the job's repeats"
            )

    async def _commit(self, task: int, held: list[tuple[Delivery, Result]]) -> None:
        bus = self._open_bus
        if len(held) > 1:
            # The acks of a group are not one transaction: the record makes a group that was acked in part be dropped,
            # not delivered again with members missing.
            await bus.put(TRAINERS, f"{self._consumer}.{task}", True)
        await asyncio.gather(*(bus.ack_confirmed(delivery.reply) for delivery, _ in held))
        for delivery, _ in held:
            self._leased.pop(delivery.message_id, None)
        if len(held) > 1:
            await bus.remove(TRAINERS, f"{self._consumer}.{task}")
        if self._pull:
            self._pull.poke()


class SyncRewardStream:
    """`RewardStream` for trainers without an event loop: a plain iterator, the bus in a thread of its own.

    with SyncRewardStream("nats://127.0.0.1:4222", job=..., group_size=8, durable="learner") as stream:
        for group in stream:
            learn(group.rewards)
            stream.ack(group)
    """

    def __init__(self, nats: str, **options: Any) -> None:
        self._stream = RewardStream(nats, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SyncRewardStream:
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
            raise UsageError("the stream is not open: use `with SyncRewardStream(...) as stream`")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)

    def __iter__(self) -> Iterator[Group]:
        while (group := self._do(self._stream.next())) is not None:
            yield group

    def ack(self, group: Group) -> None:
        """The trainer has used the group."""
        self._do(group.ack())
