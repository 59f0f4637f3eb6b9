"""Rows that are prepared, completed by what only a sandbox can compute: what a canonical solution gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gym_bus.errors import DataError, TaskError
from gym_bus.sandbox.slot import Slot
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.runner import SANDBOX_MODULES


def completed(rows: Iterable[dict[str, Any]], verifier: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows, those that their verifier finds incomplete completed by it; a sandbox starts with the first of these.

    Raises:
        DataError: a row cannot be completed.
        SandboxError: there is no sandbox on this machine, or it failed.
    """
    judge: Any = VERIFIERS.load(verifier)
    if not hasattr(judge, "complete"):
        yield from rows
        return
    with asyncio.Runner() as runner:
        slot: Slot | None = None
        try:
            for row in rows:
                if judge.incomplete(row):
                    if slot is None:
                        say("computing the expected outputs: the canonical solutions run in the sandbox")
                        slot = runner.run(Slot.start(modules=SANDBOX_MODULES))
                    row, left_out = runner.run(_complete(judge, row, slot))
                    if left_out:
                        say(f"{row.get('task_id')}: {left_out} tests left out: their output is no data, or too large")
                yield row
        finally:
            if slot is not None:
                runner.run(slot.close())


async def _complete(judge: Any, row: dict[str, Any], slot: Slot) -> tuple[dict[str, Any], int]:
    try:
        made: tuple[dict[str, Any], int] = await judge.complete(row, slot)
    except TaskError as e:
        raise DataError(str(e)) from None
    return made
