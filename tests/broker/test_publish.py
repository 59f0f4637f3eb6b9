"""Publishing a job's requests to a real server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gym_bus import subjects
from gym_bus.benchmarks.dataset import materialized_line
from gym_bus.bus import Bus
from gym_bus.messages import Request, RolloutId
from gym_bus.workers import publish
from gym_bus.workers.publish import Order, issued_count, publish_requests

ORDER = Order(job="job", agent="simple", model="m", verifier="v")
ROWS = 250


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.jsonl"
    path.write_bytes(b"".join(materialized_line(b'{"n":%d}' % i, i, 0) + b"\n" for i in range(ROWS)))
    return path


async def test_every_request_is_published_once_batch_by_batch(
    bus: Bus, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "BATCH", 100)
    progress: list[int] = []

    def all_but_one(rollout: RolloutId) -> int:
        return 0 if rollout.task_index == 7 else 1

    async def run() -> int:
        return await publish_requests(bus, ORDER, inputs, all_but_one, lambda _: 1, on_progress=progress.append)

    assert await run() == ROWS - 1
    assert await run() == 0, "the broker has them all"
    assert progress == [100, 200, 250] * 2
    assert await issued_count(bus, "job") == ROWS
    tasks = [int(name.split(".")[1]) for name in await bus.streams.ids(subjects.REQUESTS, subjects.requests_of("job"))]
    assert sorted(tasks) == [i for i in range(ROWS) if i != 7]


async def test_no_more_requests_are_encoded_at_a_time_than_the_broker_takes(
    bus: Bus, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "IN_FLIGHT", 8)
    in_hand, most = 0, 0
    really_publish = bus.publish

    async def counted(message: Request, message_id: str, *, lane: str) -> bool:
        nonlocal in_hand, most
        in_hand += 1
        most = max(most, in_hand)
        await asyncio.sleep(0)
        try:
            return await really_publish(message, message_id, lane=lane)
        finally:
            in_hand -= 1

    monkeypatch.setattr(bus, "publish", counted)

    assert await publish_requests(bus, ORDER, inputs, lambda _: 1, lambda _: 1) == ROWS
    assert most == 8
