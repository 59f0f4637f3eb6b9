"""Measure the sandbox: programs and tests a second, beside the ways without it, all in one run on one machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec
import psutil

from gym_bus.messages import Verdict
from gym_bus.sandbox.api import Program
from gym_bus.sandbox.owner import Zygote
from gym_bus.sandbox.slot import Slot
from gym_bus.sandbox.zygote import PRELOAD
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.service import VerifierService

SOURCE = "print(int(input()) + 1)"
STDIN, STDOUT = b"41\n", b"42\n"
CASES = 20
WARM_UP = 30
IN_FLIGHT = 128
CORES = len(os.sched_getaffinity(0))

_BARE = """
import sys; sys.path.insert(0, sys.argv[3])
from gym_bus.sandbox import child, syscalls, zygote

def place(control, config):
    child.prepare("")
    return child.Place(None, "/")

clone = syscalls.clone
syscalls.clone = lambda flags=0: clone()
child._become_nobody = lambda user: None
zygote._namespaces, zygote._clean = place, lambda place: True
zygote.main()
"""

_MANAGED = """
import io, json, multiprocessing, sys, time
context = multiprocessing.get_context("fork")

def check(source, stdin, stdout, found):
    sys.stdin, sys.stdout = io.StringIO(stdin), io.StringIO()
    exec(source, {})
    found.append(sys.stdout.getvalue() == stdout)

times = []
for _ in range(int(sys.argv[1])):
    at = time.monotonic()
    with context.Manager() as manager:
        found = manager.list()
        process = context.Process(target=check, args=(*sys.argv[2:], found))
        process.start()
        process.join(60)
        assert list(found) == [True]
    times.append(time.monotonic() - at)
json.dump(times, sys.stdout)
"""
"""NeMo Gym's code_gen checks like this: a manager and a process of its own per check, forked from what is running."""


class Bare(Zygote):
    """The same zygote without namespaces, another user, dropped capabilities, filter and scratch folder."""

    boot = _BARE


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One way of running programs."""

    name: str
    per_s: float
    """Programs, or tests, a second."""
    p50_ms: float | None = None
    p99_ms: float | None = None


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of one run."""

    rates: list[Rate]
    slot_start_ms: float
    slot_mb: float
    """Proportional memory of one idle slot, 10^6 bytes."""
    times_plain: float
    """Programs a second of one slot, over those of `python -I -S -E` processes in the same run."""
    isolation_share: float
    """What isolation adds to the median time of a program, over the same slot without it."""


async def _timed(do: Callable[[], Awaitable[None]], count: int) -> tuple[float, list[float]]:
    for _ in range(WARM_UP):
        await do()
    times = []
    started = time.monotonic()
    for _ in range(count):
        at = time.monotonic()
        await do()
        times.append(time.monotonic() - at)
    return time.monotonic() - started, sorted(times)


def _rate(name: str, elapsed_s: float, times: list[float]) -> Rate:
    return Rate(
        name=name,
        per_s=len(times) / elapsed_s,
        p50_ms=1000 * times[len(times) // 2],
        p99_ms=1000 * times[int(len(times) * 0.99)],
    )


async def one_slot(count: int) -> tuple[list[Rate], float, float]:
    """Single programs and programs of 20 tests in one slot; also the slot's start (ms) and memory (MB)."""
    started = time.monotonic()
    slot = await Slot.start()
    start_ms = 1000 * (time.monotonic() - started)
    program = Program(source=SOURCE.encode())

    async def single() -> None:
        assert (await slot.run(program, STDIN)).stdout == STDOUT

    async def cases() -> None:
        assert all(o.stdout == STDOUT for o in await slot.run_cases(program, [STDIN] * CASES))

    try:
        rates = [_rate("sandbox, one slot, one test", *await _timed(single, count))]
        elapsed_s, times = await _timed(cases, max(1, count // CASES))
        rates.append(Rate(name=f"sandbox, one slot, {CASES} tests a program", per_s=CASES * len(times) / elapsed_s))
        return rates, start_ms, _slot_mb(slot)
    finally:
        await slot.close()


def _slot_mb(slot: Slot) -> float:
    holder = psutil.Process(slot._zygote.pid)
    return float(sum(p.memory_full_info().pss for p in (holder, *holder.children(recursive=True)))) / 1e6


async def slots_at_once(count: int, slots: int) -> Rate:
    """Single programs in several slots at the same time."""
    made = [await Slot.start() for _ in range(slots)]
    program = Program(source=SOURCE.encode())

    async def serve(slot: Slot) -> None:
        for _ in range(count // slots):
            assert (await slot.run(program, STDIN)).stdout == STDOUT

    try:
        await asyncio.gather(*(serve(slot) for slot in made))  # warm
        started = time.monotonic()
        await asyncio.gather(*(serve(slot) for slot in made))
        return Rate(name=f"sandbox, {slots} slots, one test", per_s=count / (time.monotonic() - started))
    finally:
        for slot in made:
            await slot.close()


def subprocesses(name: str, command: list[str], count: int) -> Rate:
    """A new process per program."""
    times = []
    started = time.monotonic()
    for _ in range(count):
        at = time.monotonic()
        done = subprocess.run(command, input=STDIN, capture_output=True, check=True)
        assert done.stdout == STDOUT
        times.append(time.monotonic() - at)
    return _rate(name, time.monotonic() - started, sorted(times))


def managers(count: int) -> Rate:
    """A manager and a process per check, in the way of NeMo Gym's code_gen but without its imports."""
    command = [sys.executable, "-I", "-c", _MANAGED, str(count), SOURCE, STDIN.decode(), STDOUT.decode()]
    times = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return _rate("a process and a manager per check, as NeMo Gym's code_gen", sum(times), sorted(times))


async def without_isolation(count: int) -> Rate:
    """Single programs in a slot that isolates nothing; for comparison alone."""
    slot = Slot()
    slot._zygote = Bare(PRELOAD)
    await slot._zygote.start()
    program = Program(source=SOURCE.encode())

    async def single() -> None:
        assert (await slot.run(program, STDIN)).stdout == STDOUT

    try:
        return _rate("the same slot without isolation", *await _timed(single, count))
    finally:
        await slot.close()


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


async def through_pool(count: int, executor: str) -> Rate:
    """Verifications of `code_gen` through the pool, as a verifier worker makes them."""
    config = VerifierConfig(executor="ray" if executor == "ray" else "local", ray=RayConfig(actors=CORES))
    service = VerifierService(config)
    row = json.dumps({"verifier_metadata": {"unit_tests": {"inputs": ["41\n"], "outputs": ["42\n"]}}}).encode()
    part = {"type": "output_text", "text": f"```python\n{SOURCE}\n```"}
    response = json.dumps({"output": [{"type": "message", "role": "assistant", "content": [part]}]}).encode()
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def verify() -> Verdict:
        async with gate:
            return await service.verify("code_gen", b"{}", row, response)

    try:
        await asyncio.gather(*(verify() for _ in range(8 * WARM_UP)))
        started = time.monotonic()
        verdicts = await asyncio.gather(*(verify() for _ in range(count)))
        elapsed_s = time.monotonic() - started
        assert all(v.reward == 1.0 for v in verdicts)
        return Rate(
            name=f"verifications through the pool ({executor}, {config.ray.actors} workers)", per_s=count / elapsed_s
        )
    finally:
        await service.close()


async def measure_sandbox(count: int = 600, *, pools: bool = True) -> SandboxReport:
    """Every way, one after the other.

    Raises:
        SandboxError: this machine does not give the isolation.
    """
    (single, cases), start_ms, slot_mb = await one_slot(count)
    rates: list[Rate] = [single, cases, await slots_at_once(count, CORES)]
    plain = [_interpreter(), "-I", "-S", "-E", "-c", SOURCE]
    rates.append(await asyncio.to_thread(subprocesses, "python -I -S -E, a process each", plain, count // 6))
    rates.append(
        await asyncio.to_thread(subprocesses, "python, a process each", [sys.executable, "-c", SOURCE], count // 20)
    )
    if bwrap := shutil.which("bwrap"):
        jail = [bwrap, "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", *plain]
        rates.append(await asyncio.to_thread(subprocesses, "bwrap and python -I -S -E", jail, count // 6))
    rates.append(await asyncio.to_thread(managers, count // 20))
    rates.append(bare := await without_isolation(count))
    if pools:
        rates += [await through_pool(2 * count, "local"), await through_pool(2 * count, "ray")]
    return SandboxReport(
        rates=rates,
        slot_start_ms=start_ms,
        slot_mb=slot_mb,
        times_plain=single.per_s / rates[3].per_s,
        isolation_share=(single.p50_ms or 0.0) / (bare.p50_ms or 1.0) - 1.0,
    )
