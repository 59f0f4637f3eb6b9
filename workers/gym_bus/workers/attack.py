"""Audit a verifier: gold answers score 1, cheats and accidents 0 or a failure with a class, twice the same, in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from gym_bus.benchmarks.audit_cases import CASES, Case, Material, response
from gym_bus.benchmarks.dataset import load_rows, materialize
from gym_bus.benchmarks.prompt import Prompt, check_prompt
from gym_bus.benchmarks.spec import Benchmark, data_path
from gym_bus.errors import ConfigError, GymBusError, UsageError, did_you_mean
from gym_bus.models.prompts import prompt_text
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.base import Placement
from gym_bus.verifiers.local_pool import LocalPool
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.runner import Check, build
from gym_bus.verifiers.text import output_text

LIMIT_S = 10.0
"""Wall-clock seconds of one verification."""
PLACES = 2
GOLD = "gold"

State = Literal["holds", "accepted", "does not hold", "does not apply"]


class Outcome(msgspec.Struct, frozen=True):
    """What one verification came to."""

    reward: float | None
    """None where it failed with a class."""
    failure: str = ""
    """The class, empty where there is a reward."""
    seconds: float = 0.0
    timed_out: bool = False

    def __str__(self) -> str:
        return self.failure if self.reward is None else f"reward {self.reward:g}"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One case over all rows that it was tried on."""

    case: str
    what: str
    state: State
    rows: int
    """Rows that the case applies to."""
    why: str = ""
    """Where it does not hold: the first rows at fault; where it is accepted: the reason given."""
    slowest_s: float = 0.0


class _Row(msgspec.Struct):
    number: int
    row: bytes
    candidates: list[bytes]
    """Responses, one of which should score 1."""
    gold: bytes | None = None


async def attack(benchmark: Benchmark, data_dir: Path, *, split: str, limit: int) -> list[Finding]:
    """Try every case on the first rows of a dataset; child processes judge, as in a local run.

    Raises:
        UsageError: the data is not there, or there is no such dataset.
        ConfigError: the benchmark's `audit` names an unknown case.
        DataError: a row is broken.
    """
    _check_accepted(benchmark)
    rows = _rows_of(benchmark, data_dir, split, limit)
    config = VerifierConfig(executor="local", batch=1, limit_s=LIMIT_S, ray=RayConfig(actors=PLACES))
    judge = _Judge(benchmark, config)
    try:
        findings = [await _gold(judge, rows)]
        texts = {row.number: _text_of(row.gold) for row in rows}
        materials = [
            Material(
                row=(decoded := msgspec.json.decode(row.row)),
                prompt=prompt_text(decoded["responses_create_params"].get("input")),
                gold=texts[row.number],
                others=tuple(text for number, text in texts.items() if text and number != row.number),
            )
            for row in rows
        ]
        for case in CASES:
            findings.append(await _cheat(judge, case, rows, materials, benchmark.spec.audit.accepted.get(case.name)))
        return findings
    finally:
        await judge.close()


class _Judge:
    """Verifications, at most as many at once as there are processes: so that each one's time is its own."""

    def __init__(self, benchmark: Benchmark, config: VerifierConfig) -> None:
        verifier = benchmark.spec.verifier
        self._name, self._options = verifier.name, msgspec.json.encode(verifier.options, order="sorted")
        self._sandboxed = build(self._name, self._options).placement is Placement.SANDBOXED
        self._pool, self._free = LocalPool(config), asyncio.Semaphore(PLACES)

    async def __call__(self, row: bytes, answer: bytes) -> Outcome:
        async with self._free:
            started = time.monotonic()
            try:
                check = Check(self._name, self._options, row, answer)
                verdict = await self._pool.verify(check, sandboxed=self._sandboxed)
            except GymBusError as e:
                return Outcome(None, str(e.kind or type(e).__name__), time.monotonic() - started)
            timed_out = bool(verdict.extra.get("verifier_timeout"))
            return Outcome(verdict.reward, "", time.monotonic() - started, timed_out)

    async def close(self) -> None:
        await self._pool.close()


def _check_accepted(benchmark: Benchmark) -> None:
    known = [case.name for case in CASES]
    for name in benchmark.spec.audit.accepted:
        if name not in known:
            where = benchmark.origins.nearest(f"audit.accepted.{name}")
            raise ConfigError(f"{where}: key 'audit.accepted': unknown case {name!r}: {did_you_mean(name, known)}")


def _rows_of(benchmark: Benchmark, data_dir: Path, split: str, limit: int) -> list[_Row]:
    spec, path = benchmark.spec, data_path(benchmark, data_dir, split)
    if not path.is_file():
        raise UsageError(f"{path}: no such file: prepare it, or audit --split example")
    required = tuple(VERIFIERS.load(spec.verifier.name).required)
    tasks = list(materialize(path, agent=spec.agent.name, prompt=spec.prompt, required=required, limit=limit))
    recorded = _recorded(path.with_name(f"{path.stem}_replay.jsonl")) if spec.audit.gold is None else {}
    rows = []
    for task in tasks:
        candidates = recorded.get(task.task_index, [])
        if spec.audit.gold is not None:
            gold = Prompt(user=spec.audit.gold)
            check_prompt(gold, lambda role: benchmark.origins.nearest("audit.gold"))
            rendered = gold.render(msgspec.json.decode(task.row), f"{path}:{task.line}: audit.gold")
            candidates = [response(rendered[0]["content"])]
        rows.append(_Row(task.task_index, task.row, candidates))
    return rows


def _recorded(path: Path) -> dict[int, list[bytes]]:
    """Recorded answers by task, each as the response that an agent would hand on."""
    if not path.is_file():
        return {}
    found: dict[int, list[bytes]] = {}
    for _, line in load_rows(path):
        decoded = {key: msgspec.json.decode(value) for key, value in line.items()}
        if isinstance(task := decoded.get("task_index"), int):
            texts = [response(text) for text in decoded.get("completions") or []]
            found[task] = texts + [body for one in decoded.get("responses") or [] for body in _handed_on(one)]
    return found


def _handed_on(recorded: Any) -> Iterator[bytes]:
    """Of a conversation, its last response alone, as a refining agent hands it on, and one with the items of all."""
    steps = recorded if isinstance(recorded, list) else [recorded]
    yield msgspec.json.encode(steps[-1])
    if len(steps) > 1:
        yield msgspec.json.encode(steps[-1] | {"output": [item for step in steps for item in step["output"]]})


async def _gold(judge: _Judge, rows: Sequence[_Row]) -> Finding:
    """Find an answer that scores 1 for each row."""
    faults, slowest = [], 0.0
    for row in rows:
        outcomes = await asyncio.gather(*(judge(row.row, answer) for answer in row.candidates))
        again = await asyncio.gather(*(judge(row.row, answer) for answer in row.candidates))
        slowest = max([slowest, *(outcome.seconds for outcome in (*outcomes, *again))])
        for answer, *both in zip(row.candidates, outcomes, again, strict=True):
            if all(outcome.reward == 1.0 for outcome in both):
                row.gold = answer
        if row.gold is None:
            said = ", ".join(map(str, outcomes)) or "none is known: give the key audit.gold, or recorded answers"
            faults.append(f"row {row.number}: {said}")
    return Finding(
        case=GOLD,
        what="a right answer scores 1",
        state="does not hold" if faults else "holds",
        rows=len(rows),
        why="; ".join(faults[:3]),
        slowest_s=slowest,
    )


async def _cheat(
    judge: _Judge, case: Case, rows: Sequence[_Row], materials: Sequence[Material], accepted: str | None
) -> Finding:
    made = [(row, answer) for row, m in zip(rows, materials, strict=True) if (answer := case.make(m)) is not None]
    twice = [answer for answer in made for _ in range(2)]
    outcomes = await asyncio.gather(*(judge(row.row, answer) for row, answer in twice))
    faults = [
        f"row {row.number}: {fault}"
        for (row, _), first, second in zip(made, outcomes[::2], outcomes[1::2], strict=True)
        if (fault := _fault(first, second))
    ]
    state: State = "does not apply" if not made else "holds"
    if faults:
        state = "accepted" if accepted else "does not hold"
    return Finding(
        case=case.name,
        what=case.what,
        state=state,
        rows=len(made),
        why=accepted if faults and accepted else "; ".join(faults[:3]),
        slowest_s=max((outcome.seconds for outcome in outcomes), default=0.0),
    )


def _fault(first: Outcome, second: Outcome) -> str:
    """What is wrong with the two outcomes of one answer; empty where nothing is."""
    if (first.reward, first.failure) != (second.reward, second.failure):
        return f"not the same twice: {first}, then {second}"
    if first.timed_out or second.timed_out:
        return f"not judged within {LIMIT_S:g} s"
    return str(first) if first.reward else ""


def _text_of(answer: bytes | None) -> str | None:
    """The gold answer's text; None where it calls tools or says nothing."""
    if answer is None:
        return None
    decoded = msgspec.json.decode(answer)
    only_text = all(item.get("type") in ("message", "reasoning") for item in decoded["output"])
    return (output_text(decoded) or None) if only_text else None
