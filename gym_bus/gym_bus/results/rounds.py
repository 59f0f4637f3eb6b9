"""The plan of a job whose repeats are settled while it runs: `adaptive.json`, beside its manifest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from gym_bus.errors import DataError
from gym_bus.results.disk import replace_file
from gym_bus.results.sequence import Round


class Rounds(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds so far; the last one may still be running."""

    tasks: list[int]
    """Task indices; the lists of the rounds are in this order."""
    inputs_bytes: int
    """Size of the materialized inputs before anything was added: this much of the file the manifest's digest is of."""
    rounds: list[Round]

    @property
    def counts(self) -> dict[int, int]:
        """Rollouts by task index."""
        return dict(zip(self.tasks, np.sum([r.rollouts for r in self.rounds], axis=0).tolist(), strict=True))

    @classmethod
    def load(cls, path: Path) -> Rounds | None:
        """Read a plan, None where there is none. Raises DataError where the file is something else."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, OSError) as e:
            raise DataError(f"{path}: not a plan of rounds: {e}") from None

    def save(self, path: Path) -> None:
        """Write the plan; any reader finds the whole old one or the whole new one."""
        replace_file(path, [msgspec.json.encode(self), b"\n"])
