"""What a job is: the identity that every run, resumed run and reader of its output must share."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.errors import DataError
from gym_bus.results.disk import replace_file
from gym_bus.subjects import token


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `job.json`. It names the model by its key and holds neither address nor secret."""

    job: str
    """The job's id, as on the bus."""
    created_at: float
    """Seconds since the epoch."""
    benchmark: str
    dataset_digest: str
    """SHA-256 over the dataset's rows, hex."""
    rows: int
    """Tasks: rows of the dataset that take part."""
    num_repeats: int
    """Rollouts per task."""
    agent: str
    agent_options: dict[str, Any] = {}
    model: str
    """The model's key in the configuration."""
    model_kind: str
    """openai, replay or simulated."""
    model_name: str
    """The name the endpoint knows; of a replay model, the file's."""
    verifier: str
    verifier_options: dict[str, Any] = {}
    verifier_digest: str = ""
    """Content hash of the verifier's code and options: equal digests judge alike."""
    config_digest: str
    """SHA-256 over the settings that change results (sampling parameters, limits), hex."""
    sampling: dict[str, Any] = {}
    """Create params that won over the rows' own."""
    seeds: int | None = None
    """Rollout i of each task asks for the seed `seeds + i`; null where none is asked for."""
    prompt: str = ""
    """SHA-256 over the templates that make the model's input, hex; empty where rows bring it."""
    limit_s: float = 3600.0
    """Wall-clock limit of one rollout's generation, seconds."""
    gym_bus_version: str
    shard: str = ""
    """`i/n`: only the tasks whose index leaves the remainder i when divided by n; empty for all."""
    shard_of: str = ""
    """Of a shard: SHA-256 over the rows of all shards, hex. Equal digests can be merged."""
    merged: list[str] = []
    """The jobs whose files were merged into these; empty for a job that was run."""

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest. Raises DataError naming the file and what is wrong in it."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as e:
            raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: not a job manifest: {e}") from None

    def save(self, path: Path) -> None:
        """Write the manifest so that any reader, after any crash, finds the whole old one or the whole new one.

        Raises:
            UsageError: the file cannot be written.
        """
        replace_file(path, [msgspec.json.format(msgspec.json.encode(self), indent=2), b"\n"])


_WORDS = {
    "benchmark": "benchmark",
    "dataset_digest": "dataset digest",
    "rows": "number of rows",
    "num_repeats": "rollouts per task",
    "agent": "agent",
    "agent_options": "agent options",
    "model": "model",
    "model_kind": "kind of model",
    "model_name": "the endpoint's model or file of recorded answers",
    "verifier": "verifier",
    "verifier_options": "verifier options",
    "verifier_digest": "verifier digest",
    "sampling": "sampling parameters",
    "seeds": "first seed",
    "prompt": "prompt",
    "limit_s": "wall-clock limit of a rollout",
    "shard": "shard",
    "shard_of": "digest of the rows of all shards",
    "config_digest": "digest of model settings, recorded answers, the model's sampling parameters and limits",
}
"""What must not differ between two runs of one job; its id, its date and the version of gym_bus may."""


def differences(old: Manifest, new: Manifest, where: tuple[str, str] = ("in job.json", "now")) -> list[str]:
    """One sentence part per thing that makes `new` another job than the recorded `old`; empty where it is the same."""
    return [
        f"{words}: {_show(before)} {where[0]}, {_show(now)} {where[1]}"
        for key, words in _WORDS.items()
        if (before := getattr(old, key)) != (now := getattr(new, key))
    ]


def _show(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:8]}.."
    if isinstance(value, dict):
        return msgspec.json.encode(value, order="sorted").decode()
    return "none" if value in ("", None) else str(value)


def new_job_id(benchmark: str) -> str:
    """A fresh id that tells benchmark and date, and can be one token of a subject: `aime24-20260131-9f3a6c`."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", benchmark).strip("-_")[:64] or "job"
    return token(f"{slug}-{time.strftime('%Y%m%d')}-{secrets.token_hex(3)}", "job id")
