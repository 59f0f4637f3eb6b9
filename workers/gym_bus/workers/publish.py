"""From a job's materialized inputs to requests on the bus, in order, with a watermark for resumed runs."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.errors import BusError, DataError
from gym_bus.jobs import Issued, JobRecord
from gym_bus.logs import get_logger
from gym_bus.messages import Attempt, Request, RolloutId
from gym_bus.results.manifest import Manifest

log = get_logger(__name__)

T = TypeVar("T")

BATCH = 1024
BATCH_BYTES = 4 * 2**20
IN_FLIGHT = 256
"""Requests of a batch that are encoded at a time; the broker's window takes no more, the others wait as rows."""
_FIRST_INDEX = b'"_ng_task_index"'
_INDICES = re.compile(_FIRST_INDEX + rb':\s*(\d+),\s*"_ng_rollout_index":\s*(\d+)\s*\}\s*$')


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


def order_of(record: JobRecord, manifest: Manifest) -> Order:
    """The order of a job that is written down."""
    return Order(
        job=record.job,
        agent=manifest.agent,
        model=manifest.model,
        verifier=manifest.verifier,
        agent_options=msgspec.json.encode(manifest.agent_options, order="sorted"),
        verifier_options=msgspec.json.encode(manifest.verifier_options, order="sorted"),
        limit_s=record.limit_s,
        lane=record.lane,
    )


class InputRow(msgspec.Struct, frozen=True):
    """One line of the materialized inputs."""

    task_index: int
    rollout_index: int
    row: bytes
    """The row without the two index keys."""


def read_inputs(path: Path) -> Iterator[InputRow]:
    """The materialized inputs in order. Raises DataError for a line that is none, or a file that cannot be read."""
    try:
        with path.open("rb") as file:
            yield from _read(file, path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None


def _read(file: BinaryIO, path: Path) -> Iterator[InputRow]:
    for number, line in enumerate(file, 1):
        yield input_row(line, path, number)


def input_row(line: bytes, path: Path, number: int = 0) -> InputRow:
    """A line of the materialized inputs in its parts. Raises DataError where it is none."""
    at = line.rfind(_FIRST_INDEX)  # from the end: the row before it may be large
    found = _INDICES.match(line, at) if at >= 0 else None
    if not found:
        where = f"{path}:{number}" if number else f"{path}"
        raise DataError(f"{where}: not a materialized input: it does not end in its two index keys")
    return InputRow(int(found[1]), int(found[2]), line[:at].rstrip().removesuffix(b",") + b"}")


def message_id(rollout: RolloutId, number: int, issue: int = 0) -> str:
    """The id under which the broker drops repeats: another attempt, or another issue of one, is no repeat."""
    return f"{rollout}#{number}.{issue}" if issue else f"{rollout}#{number}"


def number_in(message_id: str) -> int:
    """The attempt's number in an id that `message_id` made, or that a failure of the bus's own made of one."""
    digits = re.match(r"[^#]*#(\d+)", message_id)
    return int(digits[1]) if digits else 1


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

    A full queue is waited for, and so is a broker that is away: the caller's cancellation is the only end. Before a
    further attempt the failed result of the one before is cleared from the stream.

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
    while batch := await asyncio.to_thread(take_batch, rows, lambda row: len(row.row)):
        behind += len(batch)
        requests = (
            (_request(order, row, number, group_size(row.task_index)), message_id(rollout, number, issue_of(rollout)))
            for row in batch
            if (number := number_of(rollout := RolloutId(order.job, row.task_index, row.rollout_index)))
        )
        published += sum(await asyncio.gather(*(_publish_each(bus, requests, order.lane) for _ in range(IN_FLIGHT))))
        batch.clear()  # or it would still be there when the next one is read
        if watermark:  # behind the acks: a crash in between orders a batch twice, never loses one
            await _persist(bus, order.job, behind)
        if on_progress:
            on_progress(behind)
        if await is_cancelled(bus, order.job):
            # Again: something went out since the queue was emptied.
            purge = partial(bus.streams.purge, subjects.REQUESTS, subjects.requests_of(order.job))
            await patiently(purge, order.job)
            break
    return published


async def is_cancelled(bus: Bus, job: str) -> bool:
    """Whether the job was cancelled, as far as the bus can be asked."""
    try:
        record = await bus.state.get(subjects.JOBS, job, JobRecord)
    except BusError:
        return False
    return record is not None and record.state == "cancelled"


def _skip(rows: Iterator[InputRow], count: int) -> None:
    next(itertools.islice(rows, count, count), None)


def take_batch(items: Iterator[T], size_of: Callable[[T], int]) -> list[T]:
    """The next items, as many as are read and published at a time, in count and bytes; none at the end."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
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


async def _publish_each(bus: Bus, requests: Iterator[tuple[Request, str]], lane: str) -> int:
    """Publish one after another what others have left of `requests`; returns how many the broker did not have yet."""
    return sum([await _publish(bus, request, name, lane) for request, name in requests])


async def _publish(bus: Bus, request: Request, name: str, lane: str) -> bool:
    if request.number > 1 and not await make_room(bus, request.rollout, request.number):
        return False
    return await publish_patiently(bus, request, name, lane)


async def make_room(bus: Bus, rollout: RolloutId, number: int) -> bool:
    """Clear a rollout's one place on the result stream for the result of attempt `number`; waits for a broker.

    Only an older failure goes. False where a reward is there, or a result of this attempt or of a newer one, which
    nobody has recorded yet: then there is nothing to order.
    """
    subject = subjects.result(rollout.job, rollout.task_index, rollout.rollout_index)
    found = await patiently(lambda: bus.streams.last(subjects.RESULTS, subject), str(rollout))
    if found is None:
        return True
    if found.failure is None or number_in(found.message_id) >= number:
        return False
    await patiently(lambda: bus.streams.delete(subjects.RESULTS, found.sequence), str(rollout))
    return True


async def publish_patiently(bus: Bus, message: Request | Attempt, name: str, lane: str = "batch") -> bool:
    """Publish, however long the queue is full or the broker away; False where the broker had it before."""
    return await patiently(lambda: bus.publish(message, name, lane=lane), name)


async def patiently(call: Callable[[], Awaitable[T]], name: str) -> T:
    """What `call` returns, made again while the broker is away or full; `name` is for the log."""
    while True:
        try:
            return await call()
        except BusError as e:
            if not e.retryable:
                raise
            log.warning("waiting_for_the_bus", what=name, error=str(e))
            await asyncio.sleep(1.0)


async def issued_count(bus: Bus, job: str) -> int:
    """How many of a job's requests, in the order of its inputs, the publisher knows to be taken. Raises BusError."""
    issued: Issued | None = await bus.state.get(subjects.JOBS, f"{job}.issued", Issued)
    return issued.count if issued else 0


async def _persist(bus: Bus, job: str, count: int) -> None:
    try:
        await bus.state.put(subjects.JOBS, f"{job}.issued", Issued(count))
    except BusError as e:  # the broker is away: the next batch moves the mark
        log.warning("watermark_not_stored", job=job, error=str(e))
