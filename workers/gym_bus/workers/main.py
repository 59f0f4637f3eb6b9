"""One worker process: connect, serve one role, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
import structlog

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import BusError, UsageError
from gym_bus.logs import get_logger
from gym_bus.workers.loop import Doing, Handler, Loop

log = get_logger(__name__)

Role = Literal["agent", "verifier"]

REPORT_S = 5.0
DRAIN_S = 20.0
CONTROL_CANCEL = "gym.control.cancel"
GARBAGE_THRESHOLDS = (200_000, 20, 50)
"""Containers made between two looks for reference cycles, and how many looks before an older generation's turn.

Thousands of messages in flight are all alive, a hundred containers each: with Python's own 700 a third of an agent
worker's time went into looking at them in vain.
"""
FILES_KEPT_FREE = 256
"""Descriptors that are not for model connections: files, the bus, the pool's pipes."""


class WorkerReport(msgspec.Struct, kw_only=True):
    """What a worker says of itself every few seconds, in the `gym_workers` bucket. Small, however much it holds."""

    worker: str
    role: str
    host: str
    pid: int
    started_at: float
    """Seconds since the epoch."""
    reported_at: float
    in_flight: int
    buffered: int
    done: int
    serves: list[str] = []
    """The consumers it pulls from: `agent-<lane>-<agent>`, `verifier-<verifier>`; of a results worker, jobs."""
    oldest: list[Doing] = []
    """What has been in its hands longest: a few messages, and the oldest of a few further jobs."""


def worker_id(role: str) -> str:
    """A name that is unique on the bus and tells people where to look."""
    host = "".join(c if c.isalnum() or c in "_-" else "-" for c in socket.gethostname())
    return f"{role}-{host}-{os.getpid()}"


def clamp_to_descriptors(concurrency: int) -> int:
    """`concurrency`, or what the process may open connections for. A worker that runs out would fail rollouts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    room = concurrency if soft == resource.RLIM_INFINITY else max(1, soft - FILES_KEPT_FREE)
    if concurrency > room:
        remedy = "allow more open files (`ulimit -Hn`, LimitNOFILE=), or start more workers with less concurrency each"
        log.warning("concurrency_clamped", wanted=concurrency, open_files=soft, now=room, remedy=remedy)
    return min(concurrency, room)


async def run_worker(
    role: Role,
    config: Config,
    *,
    ready: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve `role` until SIGTERM or SIGINT, then drain.

    Args:
        role: what to serve.
        config: all settings.
        ready: called when it serves.
        tell: hears before that what the sandbox protects, where there is one.

    Raises:
        BusError: no NATS server.
        SandboxRefused: this machine does not give the isolation that the role's verifiers demand.
        UsageError: the configuration names what does not exist.
    """
    if role == "verifier":
        from gym_bus.verifiers.service import require_sandbox

        if protects := await require_sandbox(config.verifier):
            tell(protects)
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    worker = worker_id(role)
    structlog.contextvars.bind_contextvars(worker=worker)
    async with await Bus.connect(config.bus, name=worker) as bus:
        await bus.init()
        serving, handler, close = await _build(role, config, bus, worker)
        try:
            await _listen_for_cancellations(bus, serving, handler)
            await serving.start()
            reporter = asyncio.create_task(_report(bus, worker, role, serving), name="worker report")
            awake = asyncio.create_task(_stay_awake(2 * config.bus.ack_wait_s), name="watchdog")
            ready()
            await stop.wait()
            reporter.cancel()
            awake.cancel()
            await serving.drain(DRAIN_S)
            with contextlib.suppress(BusError):
                await bus.state.remove(subjects.WORKERS, worker)
        finally:
            await close()


async def _build(
    role: Role, config: Config, bus: Bus, worker: str
) -> tuple[Loop, Handler, Callable[[], Awaitable[None]]]:
    """The role's loop, its handler, and how to release what it holds."""
    if role == "agent":
        from gym_bus.models.registry import Models
        from gym_bus.workers.agent import AgentWorker
        from gym_bus.workers.limits import SharedLimits

        limits = SharedLimits(bus, worker)
        await limits.start()
        models = Models(config.models, limits)
        agent = AgentWorker(config.agent, models, worker)
        loop = Loop(
            bus,
            agent,
            agent.sources(config.bus.lanes),
            concurrency=clamp_to_descriptors(config.agent.concurrency),
            prefetch=config.agent.prefetch,
            max_ack_pending=65_536,
            worker=worker,
            full=lambda: models.crowded,
        )
        models.on_room = loop.fill

        async def close() -> None:
            await limits.close()
            await models.close()

        return loop, agent, close
    if role == "verifier":
        from gym_bus.verifiers.service import VerifierService
        from gym_bus.workers.verifier import VerifierWorker

        service = VerifierService(config.verifier)
        verifier = VerifierWorker(config.verifier, service, worker)
        loop = Loop(
            bus,
            verifier,
            verifier.sources(),
            concurrency=config.verifier.concurrency,
            prefetch=config.verifier.prefetch,
            max_ack_pending=16_384,
            worker=worker,
        )
        return loop, verifier, service.close
    raise UsageError(f"unknown role {role!r}: known: agent, verifier")


async def _stay_awake(limit_s: float) -> None:
    """Have the process end itself where the event loop does not come round for so long; its log says where it hung.

    Foreign code that blocks the loop stops the heartbeats: the leases are over, others do the work, and this process
    would hang for ever.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(limit_s, exit=True)
            await asyncio.sleep(limit_s / 8)
    finally:
        faulthandler.cancel_dump_traceback_later()


async def _listen_for_cancellations(bus: Bus, serving: Loop, handler: Handler) -> None:
    def on_cancel(subject: str, body: bytes) -> None:
        job = subject.rpartition(".")[2]
        handler.cancellations.add(job, float(body))
        serving.drop(job)

    await bus.listen(f"{CONTROL_CANCEL}.*", on_cancel)


async def _report(bus: Bus, worker: str, role: str, serving: Loop) -> None:
    started_at = time.time()
    while True:
        report = WorkerReport(
            worker=worker,
            role=role,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=started_at,
            reported_at=time.time(),
            in_flight=serving.in_flight,
            buffered=serving.buffered,
            done=serving.done,
            serves=serving.serves,
            oldest=serving.oldest(),
        )
        with contextlib.suppress(BusError):
            await bus.state.put(subjects.WORKERS, worker, report)
        await asyncio.sleep(REPORT_S)
