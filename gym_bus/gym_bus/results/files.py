"""Where the files of one job lie; NeMo Gym's names, so that its tools find ours and ours find its."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gym_bus.errors import UsageError

SUFFIXES = ("_failures", "_materialized_inputs", "_reward_profiling", "_flips")
"""Of the stems of those JSONL files that are not the rollouts."""


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

    @classmethod
    def found_at(cls, path: Path) -> JobFiles:
        """The files of the job meant by a rollouts file, or by the folder it lies in.

        Raises:
            UsageError: no such path, no rollouts file in the folder, or several.
        """
        if path.is_file():
            return cls.beside(path)
        if not path.is_dir():
            raise UsageError(f"{path}: no such file or folder")
        if cls(path).rollouts.exists():
            return cls(path)
        found = [at for at in sorted(path.glob("*.jsonl")) if not at.stem.endswith(SUFFIXES)]
        if len(found) != 1:
            names = ", ".join(at.name for at in found)
            there = f"name one of its rollouts files: {names}" if found else "no rollouts file (rollouts.jsonl) in it"
            raise UsageError(f"{path}: {there}")
        return cls.beside(found[0])

    @classmethod
    def all_at(cls, path: Path) -> list[JobFiles]:
        """The files of the job at a path as `found_at` has it, or of all jobs below: those of a suite, or of a sweep.

        Raises:
            UsageError: neither is there.
        """
        try:
            return [cls.found_at(path)]
        except UsageError:
            below = sorted(at for depth in ("*", "*/*") for at in path.glob(f"{depth}/rollouts.jsonl"))
            if not below:
                raise
            return [cls.beside(at) for at in below]

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
    def agent_metrics(self) -> Path:
        """A JSON array: one entry per agent, of the numeric fields alone, as NeMo Gym's `eval profile` writes it."""
        return self.folder / f"{self.stem}_agent_metrics.json"

    @property
    def flips(self) -> Path:
        """One line per task whose rewards a re-verification has changed."""
        return self.folder / f"{self.stem}_flips.jsonl"

    @property
    def manifest(self) -> Path:
        """What the job is: the identity that a resumed run must share."""
        return self.folder / "job.json"

    @property
    def adaptive(self) -> Path:
        """The rounds of a job whose repeats are settled while it runs."""
        return self.folder / "adaptive.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes here."""
        return self.folder / ".lock"
