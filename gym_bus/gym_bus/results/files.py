"""Where the files of one job lie; NeMo Gym's names, so that its tools find ours and ours find its."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class JobFiles:
    """The files of one job, all in one folder, all named after the rollouts file."""

    folder: Path
    stem: str = "rollouts"
    """NeMo Gym lets its users choose it; ours is always `rollouts`."""

    @classmethod
    def beside(cls, rollouts: Path) -> JobFiles:
        """The files that belong to the rollouts file `rollouts`, whatever its name."""
        return cls(rollouts.parent, rollouts.stem)

    @property
    def rollouts(self) -> Path:
        """One line per scored rollout, in order of completion."""
        return self.folder / f"{self.stem}.jsonl"

    @property
    def failures(self) -> Path:
        """One line per failed attempt; no line of it has a reward."""
        return self.folder / f"{self.stem}_failures.jsonl"

    @property
    def inputs(self) -> Path:
        """One materialized row per expected rollout, written before anything runs."""
        return self.folder / f"{self.stem}_materialized_inputs.jsonl"

    @property
    def profile(self) -> Path:
        """One line of statistics per task."""
        return self.folder / f"{self.stem}_reward_profiling.jsonl"

    @property
    def aggregate(self) -> Path:
        """A JSON array: one entry of statistics per agent."""
        return self.folder / f"{self.stem}_aggregate_metrics.json"

    @property
    def manifest(self) -> Path:
        """What the job is: the identity that a resumed run must share."""
        return self.folder / "job.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes here."""
        return self.folder / ".lock"
