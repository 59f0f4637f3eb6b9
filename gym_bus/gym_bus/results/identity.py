"""What a job's tasks are and what was done to them, from its files: what must be alike for two jobs to be compared."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import msgspec

from gym_bus.errors import DataError
from gym_bus.results.files import JobFiles
from gym_bus.results.lines import COMPOSED, Fields
from gym_bus.results.manifest import Manifest
from gym_bus.results.reader import read_row
from gym_bus.results.table import Table

PROMPT_KEYS = frozenset(
    {"input", "instructions", "prompt", "previous_response_id", "tools", "tool_choice", "parallel_tool_calls", "text"}
)
"""Create params that are what the model is told; the others are how it is sampled."""
PER_JOB = frozenset({"responses_create_params", "agent_ref", "skills_ref", "prompt_config_used"}) | COMPOSED
"""Keys of a materialized row that say how the task is run, not what it is."""


class TaskIdentity(msgspec.Struct, frozen=True):
    """One task's row in parts, as its first materialized input has it."""

    row: bytes
    """Digest of what the task is: equal in any two jobs that run it, however they run it."""
    prompt: bytes
    """Digest of what the model is told."""
    sampling: dict[str, Any]
    """The other create params."""


class _Parts(msgspec.Struct, frozen=True):
    model: str | None = None


class _Told(msgspec.Struct, frozen=True):
    response: _Parts | None = None


def task_identities(files: JobFiles, table: Table) -> list[TaskIdentity] | None:
    """Of every task of the table, in its order; None where the job has no materialized inputs."""
    if not table.has_inputs:
        return None
    with files.inputs.open("rb") as inputs:
        return [_identity(read_row(inputs, offset)) for offset in table.input_offset[table.task_first].tolist()]


def _identity(row: Fields) -> TaskIdentity:
    content = {key: value for key, value in row.items() if key not in PER_JOB and not key.startswith("_ng_")}
    params = msgspec.json.decode(row.get("responses_create_params", msgspec.Raw(b"{}")), type=dict[str, Any])
    return TaskIdentity(
        row=_digest({key: msgspec.json.decode(value) for key, value in content.items()}),
        prompt=_digest({key: value for key, value in params.items() if key in PROMPT_KEYS}),
        sampling={key: value for key, value in params.items() if key not in PROMPT_KEYS and key != "model"},
    )


def _digest(value: Any) -> bytes:
    return blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=16).digest()


def model_told(files: JobFiles, table: Table) -> str:
    """The model that the first response names; empty where there is none."""
    if not len(table.row_offset):
        return ""
    with files.rollouts.open("rb") as rollouts:
        rollouts.seek(int(table.row_offset[0]))
        try:
            told = msgspec.json.decode(rollouts.readline(), type=_Told)
        except msgspec.DecodeError:
            return ""
    return (told.response and told.response.model) or ""


def manifest_of(files: JobFiles) -> Manifest | None:
    """The job's manifest; None where there is none, as NeMo Gym writes none."""
    try:
        return Manifest.load(files.manifest)
    except DataError:
        if files.manifest.exists():
            raise
        return None
