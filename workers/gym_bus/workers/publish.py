"""From a job's materialized inputs to requests on the bus, in order, with a watermark for resumed runs."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import BusError, DataError
from gym_bus.jobs import Issued, JobRecord
from gym_bus.logs import get_logger
from gym_bus.messages import Attempt, Request, RolloutId

log = get_logger(__name__)

BATCH = 1024
BATCH_BYTES = 16 * 2**20
_INDICES = re.compile(rb',?\s*"_ng_task_index":\s*(\d+),\s*"_ng_rollout_index":\s*(\d+)\s*\}\s*$')


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What all requests of a job have in common."""

    job: str
    agent: str
    model: str
    verifier: str
    agent_options: bytes = b"{}"
    verifier_options: bytes = b"{}"
    limit_s: float = 3600.0
    lane: str = "batch"
    policy_version: int = 0


class InputRow(msgspec.Struct, frozen=True):
    """One line of the materialized inputs."""

    task_index: int
    rollout_index: int
    row: bytes
    """The row without the two index keys."""


def read_inputs(path: Path) -> Iterator[InputRow]:
    """The materialized inputs in order. Raises DataError for a line that is none."""
    with path.open("rb") as file:
        yield from _read(file, path)


def _read(file: BinaryIO, path: Path) -> Iterator[InputRow]:
    for number, line in enumerate(file, 1):
        found = _INDICES.search(line)
        if not found:
            raise DataError(f"{path}:{number}: not a materialized input: it does not end in its two index keys")
        yield InputRow(int(found[1]), int(found[2]), line[: found.start()] + b"}")


def message_id(rollout: RolloutId, number: int, issue: int = 0) -> str:
    """The id under which the broker drops repeats: another attempt, or another issue of one, is no repeat."""
    return f"{rollout}#{number}.{issue}" if issue else f"{rollout}#{number}"


async def publish_requests(
    bus: Bus,
    order: Order,
    inputs: Path,
    number_of: Callable[[RolloutId], int],
    group_size: Callable[[int], int],
    *,
    start: int = 0,
    issue_of: Callable[[RolloutId], int] = lambda _: 0,
    on_progress: Callable[[int], None] | None = None,
    watermark: bool = True,
) -> int:
    """Publish a request per input line from `start` on; returns how many the broker did not have yet.

    A full queue is waited for, and so is a broker that is away: the caller's cancellation is the only end.

    Args:
        bus: where to.
        order: what the requests have in common.
        inputs: the materialized inputs.
        number_of: the attempt to order for a rollout, 0 to skip it.
        group_size: rollouts of a task.
        start: input lines to pass over.
        issue_of: how often this attempt was ordered before and lost.
        on_progress: called with the number of input lines behind us.
        watermark: record on the bus how far the publishing is.
    """
    rows = read_inputs(inputs)
    await asyncio.to_thread(_skip, rows, start)
    behind, published = start, 0
    while batch := await asyncio.to_thread(_take, rows):
        requests = [
            (_request(order, row, number, group_size(row.task_index)), message_id(rollout, number, issue_of(rollout)))
            for row in batch
            if (number := number_of(rollout := RolloutId(order.job, row.task_index, row.rollout_index)))
        ]
        stored = await asyncio.gather(*(publish_patiently(bus, r, name, order.lane) for r, name in requests))
        behind += len(batch)
        published += sum(stored)
        if watermark:  # behind the acks: a crash in between orders a batch twice, never loses one
            await _persist(bus, order.job, behind)
        if on_progress:
            on_progress(behind)
        if await _cancelled(bus, order.job):
            break
    return published


async def _cancelled(bus: Bus, job: str) -> bool:
    try:
        record = await bus.get(subjects.JOBS, job, JobRecord)
    except BusError:
        return False
    return record is not None and record.state == "cancelled"


def _skip(rows: Iterator[InputRow], count: int) -> None:
    next(itertools.islice(rows, count, count), None)


def _take(rows: Iterator[InputRow]) -> list[InputRow]:
    batch: list[InputRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.row)
        if len(batch) >= BATCH or size >= BATCH_BYTES:
            break
    return batch


def _request(order: Order, row: InputRow, number: int, group_size: int) -> Request:
    return Request(
        rollout=RolloutId(order.job, row.task_index, row.rollout_index),
        number=number,
        agent=order.agent,
        model=order.model,
        verifier=order.verifier,
        row=row.row,
        agent_options=order.agent_options,
        verifier_options=order.verifier_options,
        group_size=group_size,
        policy_version=order.policy_version,
        limit_s=order.limit_s,
    )


async def publish_patiently(bus: Bus, message: Request | Attempt, name: str, lane: str = "batch") -> bool:
    """Publish, however long the queue is full or the broker away; False where the broker had it before."""
    while True:
        try:
            return await bus.publish(message, name, lane=lane)
        except BusError as e:
            if not e.retryable:
                raise
            log.warning("publishing_waits", rollout=name, error=str(e))
            await asyncio.sleep(1.0)


async def _persist(bus: Bus, job: str, count: int) -> None:
    try:
        await bus.put(subjects.JOBS, f"{job}.issued", Issued(count))
    except BusError as e:  # the broker is away: the next batch moves the mark
        log.warning("watermark_not_stored", job=job, error=str(e))
