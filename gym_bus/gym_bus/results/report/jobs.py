"""What the report knows of a job: its table, its frame, its scores. Texts stay in the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gym_bus.errors import UsageError
from gym_bus.results.files import JobFiles
from gym_bus.results.frame import read_frame
from gym_bus.results.identity import manifest_of, model_told, task_identities
from gym_bus.results.manifest import Manifest
from gym_bus.results.metrics import compute_pass_majority_metrics, key_metrics, powers_of_two
from gym_bus.results.statistics import Estimate, Floats, Ints, pass_all_k, pass_at_1, pass_at_k
from gym_bus.results.table import Counts, Table, read_table

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

QUEUED = ("request_queue_s", "publish_s", "attempt_queue_s")
WORKED = ("agent_s", "verify_s")


@dataclass(frozen=True)
class Entry:
    """One job, or one agent's part of a job with several agents."""

    label: str
    """Tells it apart from the others of the report."""
    files: JobFiles
    manifest: Manifest | None
    """None for a run of NeMo Gym."""
    table: Table
    """The expected rollouts, and the rewards of those that have one."""
    frame: pd.DataFrame
    """The recorded rollouts, as `read_frame` gives them."""
    identities: dict[int, bytes] | None
    """What each task is, by task index; None where the files do not say."""
    sampling: dict[str, Any]
    """The sampling parameters of the first task."""

    @cached_property
    def counts(self) -> Counts:
        """The denominators."""
        return self.table.counts

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """pass@1, pass@2, pass@4, ... and pass^2, pass^4, ..., as fractions."""
        rewards = self.table.rewards()
        powers = powers_of_two(rewards.shape[1])
        best = {f"pass@{k}": pass_at_1(rewards) if k == 1 else pass_at_k(rewards, k) for k in powers}
        return best | {f"pass^{k}": pass_all_k(rewards, k) for k in powers if k > 1}

    @cached_property
    def votes(self) -> dict[str, float]:
        """`majority@k` at the largest k, from 2, and `no answer`, as fractions; empty without extracted answers."""
        if not len(self.table.row_at) or (votes := self.table.votes()) is None:
            return {}
        metrics = key_metrics(compute_pass_majority_metrics({"accuracy": self.table.rewards()}, votes))
        return {
            "no answer" if key.endswith("no_answer") else key.partition("/")[0]: value / 100
            for key, value in metrics.items()
            if (key.startswith("majority@") and not key.startswith("majority@1/")) or key.endswith("no_answer")
        }

    @cached_property
    def model(self) -> str:
        """The model's name, as well as the files know it."""
        return (self.manifest and self.manifest.model) or model_told(self.files, self.table)

    @property
    def benchmark(self) -> str:
        """Empty where the files do not say."""
        return self.manifest.benchmark if self.manifest else ""

    @cached_property
    def binary(self) -> bool:
        """Whether every reward is 0 or 1."""
        return bool(np.isin(self.rewards, (0.0, 1.0)).all())

    @property
    def rewards(self) -> Floats:
        """Of the scored rollouts, by task and rollout; shape [rows]."""
        return self.table.numbers["reward"]

    @cached_property
    def task_rewards(self) -> dict[int, dict[int, float | None]]:
        """By task index and rollout index, None for a rollout without one."""
        rewards: dict[int, dict[int, float | None]] = {task: {} for task in self.table.tasks.tolist()}
        reward = np.full(len(self.table.task), np.nan)
        reward[self.table.row_at] = self.rewards
        keys = zip(self.table.task.tolist(), self.table.rollout.tolist(), strict=True)
        for (task, rollout), value in zip(keys, reward.tolist(), strict=True):
            rewards[task][rollout] = None if value != value else value
        return rewards

    @cached_property
    def task_means(self) -> Floats:
        """Each task's mean reward, NaN where it has none; shape [tasks], by task index."""
        count = self.table.task_scored
        total = np.bincount(self.table.row_task, self.rewards, len(count))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    @property
    def scored_means(self) -> dict[int, float]:
        """Mean reward by task index, of the tasks that have any."""
        means = zip(self.table.tasks.tolist(), self.task_means.tolist(), strict=True)
        return {task: mean for task, mean in means if mean == mean}

    def identity(self, task: int) -> bytes | None:
        """What a task is; None where the files do not say."""
        return self.identities.get(task) if self.identities else None

    def bounds(self) -> tuple[float, float] | None:
        """What pass@1 would be if all rollouts without a reward were wrong, and if all were right.

        None where every rollout has one, or where rewards do not lie between 0 and 1.
        """
        if self.counts.scored in (0, self.counts.expected) or self.rewards.min() < 0 or self.rewards.max() > 1:
            return None
        expected = self.table.task_expected
        total = np.bincount(self.table.row_task, self.rewards, len(expected))
        missing = expected - self.table.task_scored
        return float((total / expected).mean()), float(((total + missing) / expected).mean())

    @cached_property
    def work_s(self) -> Floats:
        """Seconds that agent and verifier took, NaN where the files do not say; shape as the frame."""
        seconds: Floats = self.frame[list(WORKED)].sum(axis=1, min_count=1).to_numpy(float)
        return seconds

    @property
    def timed(self) -> bool:
        """Whether the files have any timings."""
        return bool((self.work_s > 0).any())

    @cached_property
    def lengths(self) -> tuple[Floats, str]:
        """Length of every output and its unit: tokens, or characters where no endpoint counted tokens."""
        tokens: Floats = self.frame["output_tokens"].to_numpy(float)
        if np.isfinite(tokens).any():
            return tokens, "tokens"
        return self.frame["output_chars"].to_numpy(float), "characters"


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """The jobs in folders, or below them, or in rollouts files, in their order.

    Raises:
        UsageError: no rollouts there, or one is given twice.
        DataError: names file and line.
    """
    files = [at for path in paths for at in JobFiles.all_at(path)]
    places = [_place(at) for at in files]
    for place, count in Counter(places).items():
        if count > 1:
            raise UsageError(f"{Path(*place)}: given {count} times")
    return [entry for at, label in zip(files, _labels(places), strict=True) for entry in _entries(at, label)]


def _place(files: JobFiles) -> tuple[str, ...]:
    folder = files.folder.resolve().parts
    return folder if files.stem == "rollouts" else (*folder, files.rollouts.name)


def _labels(places: Sequence[tuple[str, ...]]) -> list[str]:
    """The last parts of every path, as many as tell it apart."""
    return ["/".join(place[-_distinct(place, places) :]) for place in places]


def _distinct(place: tuple[str, ...], places: Sequence[tuple[str, ...]]) -> int:
    ends = range(1, len(place))
    return next((n for n in ends if sum(other[-n:] == place[-n:] for other in places) == 1), len(place))


def _entries(files: JobFiles, label: str) -> Iterator[Entry]:
    table, frame, manifest = read_table(files), read_frame(files, fields=()), manifest_of(files)
    told = task_identities(files, table)
    rows = None if told is None else dict(zip(table.tasks.tolist(), (one.row for one in told), strict=True))
    agents = [name for at, name in enumerate(table.agents) if (table.agent == at).any()]
    for name in agents or [""]:
        own = table.of_agent(name) if len(agents) > 1 else table
        recorded = np.isin(_joint(frame["task_index"], frame["rollout_index"]), _joint(own.task, own.rollout))
        yield Entry(
            label=f"{label}: {name}" if len(agents) > 1 else label,
            files=files,
            manifest=manifest,
            table=own,
            frame=frame if recorded.all() else frame[recorded].reset_index(drop=True),
            identities=rows,
            sampling=told[0].sampling if told else {},
        )


def _joint(task: Ints, rollout: Ints) -> Ints:
    return (np.asarray(task, np.int64) << 31) | np.asarray(rollout, np.int64)
