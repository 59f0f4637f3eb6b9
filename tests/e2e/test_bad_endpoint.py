"""A whole run against an endpoint that does everything wrong."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_endpoint import FAULTS, BadEndpoint, Fault, bad_endpoint
from e2e.conftest import Cli, rows_of

ROLLOUTS = 300


def fault_of(task: int) -> Fault | None:
    """Every third task meets a fault."""
    faults = list(FAULTS.values())
    return faults[task // 3 % len(faults)] if task % 3 == 0 else None


@pytest.fixture
def endpoint() -> Iterator[BadEndpoint]:
    """In a thread of its own: the run is another process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    manager = bad_endpoint(fault_of)
    try:
        yield asyncio.run_coroutine_threadsafe(manager.__aenter__(), loop).result(60)
        asyncio.run_coroutine_threadsafe(manager.__aexit__(None, None, None), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


@pytest.mark.slow
def test_every_rollout_ends_in_one_result_of_the_right_class(cli: Cli, choices: Path, endpoint: BadEndpoint) -> None:
    settings = [
        f"models.policy.base_url=http://127.0.0.1:{endpoint.port}/v1",
        "models.policy.call_limit_s=2.5",  # of two calls one at least ends in time, however the machine stalls
        "models.policy.retry={unreachable: 1, rate_limited: 2, server_error: 1, timeout: 1, wait_s: 0.05}",
        "models.policy.retry.max_wait_s=0.2",
    ]
    summary = cli.json("eval", "run", str(choices), "--model", "policy", "--output", "out", *settings, code=1)

    faults = {task: fault for task in range(ROLLOUTS) if (fault := fault_of(task))}
    assert (summary["scored"], summary["failed"]) == (ROLLOUTS - len(faults), len(faults))
    assert summary["failed_by_class"] == Counter(str(fault.kind) for fault in faults.values())
    scored = {row["_ng_task_index"]: row["reward"] for row in rows_of(cli.folder / "out" / "rollouts.jsonl")}
    failed = {
        row["_ng_task_index"]: row["_ng_failure_class"]
        for row in rows_of(cli.folder / "out" / "rollouts_failures.jsonl")
    }
    assert failed == {task: str(fault.kind) for task, fault in faults.items()}
    assert scored == {task: float(task % 3 == 0) for task in range(ROLLOUTS) if task not in faults}
