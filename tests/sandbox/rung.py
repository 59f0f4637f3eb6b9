"""Uses the sandbox that this process gets, whatever its level, and prints what came of it as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path

import msgspec
import psutil

from gym_bus.errors import SandboxRefused
from gym_bus.sandbox import hostile
from gym_bus.sandbox.api import Ended, Limits, Program
from gym_bus.sandbox.protections import Level
from gym_bus.sandbox.session import Session
from gym_bus.sandbox.slot import Slot
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.code_gen import CodeGen
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.runner import SANDBOX_MODULES, Check, Judged, VerifierRunner, decode_answers, encode_checks
from gym_bus.verifiers.service import require_sandbox

QUICK = [one for one in hostile.ATTACKS if one.ends == (Ended.FINISHED,) or one.group == "next program"]
LAID = Program(
    source=b"import sys; print(open('data/a').read(), sys.argv[1:])", arguments=("b",), files={"data/a": b"A"}
)
ASKS = Program(source=b"import os; os.write(3, b'what?'); print(os.read(3, 9))")
TELLS = Program(source=b"import os; print(os.read(3, 9)); os.write(3, b'that')")
ROW = {"verifier_metadata": {"unit_tests": {"inputs": ["1", "2"], "outputs": ["2", "4"]}}}
FUNCTION_ROW = {"verifier_metadata": {"unit_tests": ROW["verifier_metadata"]["unit_tests"] | {"fn_name": "f"}}}


class Demanding(CodeGen):
    """Does with nothing less."""

    sandbox_level = Level.NAMESPACES


async def used() -> dict[str, object]:
    slot = await Slot.start(modules=SANDBOX_MODULES, least=Level.LANDLOCK)
    try:
        protections = slot.protections()
        held = [one async for one in hostile.examine(slot, protections, QUICK)]
        limits = Limits(wall_s=30, cpu_s=20, memory_bytes=64 * 2**20)
        memory = await slot.run(Program(source=b"x = []\nwhile True: x.append(bytearray(2**20))"), limits=limits)
        cases = await slot.run_cases(Program(source=b"print(input())"), [b"1", b"2"], limits)
        pair = await slot.run_pair(ASKS, TELLS, limits)
        return {
            "level": slot.level,
            "lowered": slot.lowered,
            "absent": [one.name for one in protections if not one.active],
            "not held": [msgspec.to_builtins(one) for one in held if one.held is False],
            "not protected": [one.name for one in held if one.held is None],
            "held": sum(one.held is True for one in held),
            "memory": memory.ended,
            "laid": (await slot.run(LAID, limits=limits)).stdout.decode(),
            "cases": [outcome.stdout.decode() for outcome in cases],
            "pair": [outcome.stdout.decode() for outcome in pair],
        }
    finally:
        await slot.close()


async def numeric() -> str:
    slot = await Slot.start("numpy", least=Level.LANDLOCK)
    try:
        source = b"import numpy.polynomial\ntry: import msgspec\nexcept ImportError: print(numpy.arange(5).sum())"
        return (await slot.run(Program(source=source))).stdout.decode()
    finally:
        await slot.close()


async def session() -> list[str]:
    made = await Session.start(least=Level.LANDLOCK)
    try:
        return [(await made.call(code, 60.0)).result for code in ("x = 20", "x + 1")]
    finally:
        await made.close()


def judged() -> list[object]:
    """By verifiers: two that do with this level, and one that demands namespaces."""
    runner = VerifierRunner("landlock")
    checks = [
        Check(name, b"{}", msgspec.json.encode(row), msgspec.json.encode(response(code)))
        for name, row, code in (
            ("code_gen", ROW, "print(2 * int(input()))"),
            ("code_gen", FUNCTION_ROW, "def f(x): return 2 * x"),
            ("demanding", ROW, "print(2 * int(input()))"),
        )
    ]
    answers = decode_answers(runner.batch(encode_checks(checks))).answers
    runner.close()
    return [one.verdict.reward if isinstance(one, Judged) else one.detail for one in answers]


async def started() -> dict[str, str]:
    """What workers say that serve one verifier each."""
    told = {}
    for name, level in (("mcqa", "namespaces"), ("code_gen", "landlock"), ("demanding", "landlock")):
        try:
            told[name] = await require_sandbox(VerifierConfig(names=(name,), sandbox_level=level))
        except SandboxRefused as e:
            told[name] = f"refused: {e}"
    return told


def response(code: str) -> dict[str, object]:
    return {"output": [{"type": "message", "content": [{"type": "output_text", "text": f"```python\n{code}\n```"}]}]}


def left() -> list[str]:
    folders = Path(tempfile.gettempdir()).glob(f"gym-bus-sandbox-{os.getpid()}-*")
    return [*map(str, folders), *(str(child) for child in psutil.Process().children(recursive=True))]


if __name__ == "__main__":
    VERIFIERS.add("demanding", "__main__:Demanding")
    report = asyncio.run(used()) | {
        "numeric": asyncio.run(numeric()),
        "session": asyncio.run(session()),
        "judged": judged(),
        "started": asyncio.run(started()),
        "left": left(),
    }
    print("\n" + json.dumps(report))
