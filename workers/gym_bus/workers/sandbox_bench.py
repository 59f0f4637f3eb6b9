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
from gym_bus.sandbox import zygote
from gym_bus.sandbox.api import Program
from gym_bus.sandbox.slot import Slot
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.service import VerifierService

SOURCE = "print(int(input()) + 1)"
STDIN, STDOUT = b"41\n", b"42\n"
CASES = 20
WARM_UP = 30
IN_FLIGHT = 128

_FORKS = """
import os, sys
for name in sys.argv[1].split():
    __import__(name)
source, count = sys.argv[2].encode(), int(sys.argv[3])
def once():
    stdin, stdout = os.memfd_create("in"), os.memfd_create("out")
    os.write(stdin, b"41\\n")
    os.lseek(stdin, 0, 0)
    pid = os.fork()
    if pid == 0:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        exec(compile(source, "main.py", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.pread(stdout, 10, 0) == b"42\\n"
    os.close(stdin)
    os.close(stdout)
import time
for _ in range(30): once()
started = time.monotonic()
for _ in range(count): once()
print(time.monotonic() - started)
"""


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
    """What isolation adds to the time of a program, over a warmed interpreter that forks without any."""


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


def forks(count: int) -> Rate:
    """A warmed interpreter that forks for each program and isolates nothing."""
    command = [_interpreter(), "-I", "-S", "-E", "-c", _FORKS, zygote.PRELOAD, SOURCE, str(count)]
    elapsed_s = float(subprocess.run(command, capture_output=True, check=True).stdout)
    return Rate(name="warmed fork without isolation", per_s=count / elapsed_s)


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


async def through_pool(count: int, executor: str) -> Rate:
    """Verifications of `code_gen` through the pool, as a verifier worker makes them."""
    config = VerifierConfig(executor="ray" if executor == "ray" else "local", ray=RayConfig(actors=os.cpu_count() or 1))
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
    rates: list[Rate] = [single, cases, await slots_at_once(count, os.cpu_count() or 1)]
    plain = [_interpreter(), "-I", "-S", "-E", "-c", SOURCE]
    rates.append(await asyncio.to_thread(subprocesses, "python -I -S -E, a process each", plain, count // 6))
    rates.append(
        await asyncio.to_thread(subprocesses, "python, a process each", [sys.executable, "-c", SOURCE], count // 20)
    )
    if bwrap := shutil.which("bwrap"):
        jail = [bwrap, "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", *plain]
        rates.append(await asyncio.to_thread(subprocesses, "bwrap and python -I -S -E", jail, count // 6))
    rates.append(await asyncio.to_thread(forks, count))
    forked = rates[-1]
    if pools:
        rates += [await through_pool(2 * count, "local"), await through_pool(2 * count, "ray")]
    return SandboxReport(
        rates=rates,
        slot_start_ms=start_ms,
        slot_mb=slot_mb,
        times_plain=single.per_s / rates[3].per_s,
        isolation_share=forked.per_s / single.per_s - 1.0,
    )
