"""Reward profiling: NeMo Gym's statistics of a job per task and per agent, from the files alone.

Memory holds the numeric columns (8 bytes per number) and one line of text at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gym_bus.errors import UsageError
from gym_bus.results.columns import INDICES
from gym_bus.results.disk import replace_file
from gym_bus.results.files import JobFiles
from gym_bus.results.metrics import (
    Metrics,
    compute_pass_majority_metrics,
    describe,
    key_metrics,
    powers_of_two,
    subset_metrics,
)
from gym_bus.results.reader import read_row
from gym_bus.results.statistics import Estimate, Floats, pass_all_k, pass_at_1, pass_at_k
from gym_bus.results.subsets import task_subsets
from gym_bus.results.table import ANSWER_KEYS, Counts, Table, read_table

__all__ = ["AgentProfile", "Counts", "Options", "Profile", "SubsetProfile", "differences_of_profile", "profile_job"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile depends on beside the files; the aggregate file records it."""

    answer_key: str | None = None
    """The row field that majority votes are held over; None for the known one that most rollouts have."""
    by: str | None = None
    """The row field that divides the tasks into subsets."""


AUTOMATIC = Options()
TASKS_AT_A_TIME = 4096


class SubsetProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of one subset of an agent's tasks."""

    counts: Counts
    estimates: dict[str, Estimate]


class AgentProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of one agent's rollouts."""

    agent: str
    counts: Counts
    agent_metrics: Metrics
    """NeMo Gym's metrics; those with an @ are in per cent."""
    key_metrics: Metrics
    estimates: dict[str, Estimate]
    """pass@1, pass@2, pass@4, ... and pass^2, pass^4, ... as fractions, with their intervals."""
    subsets: dict[str, SubsetProfile] = {}
    """Their other metrics are among the agent's, under NeMo Gym's names: `<subset>/pass@1/accuracy`."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a job; those per task are in the files only."""

    counts: Counts
    agents: list[AgentProfile]


def profile_job(files: JobFiles, options: Options = AUTOMATIC, *, into: JobFiles | None = None) -> Profile:
    """Profile a job, finished or not, and write the profile, the aggregate and the agents' metrics beside its rollouts.

    The expected rollouts are those of the materialized inputs; without that file those of the manifest; without
    either, those that have a result. Failed and pending rollouts are counted and enter no other number.

    Args:
        files: the job's; also those of a NeMo Gym run.
        options: what to group and vote by.
        into: where the three files go instead.

    Raises:
        DataError: names file and line: not a result, a rollout recorded twice, or one that is not expected.
        UsageError: a file cannot be written, or no row has the field to divide the tasks or to vote by.
    """
    job = _Job(files, options)
    into = into or files
    replace_file(into.profile, job.profile_lines())
    replace_file(into.aggregate, job.aggregate())
    replace_file(into.agent_metrics, [job.agent_metrics()])
    return Profile(counts=job.table.counts, agents=job.agents)


def differences_of_profile(files: JobFiles) -> Iterator[str]:
    """What the profile and the aggregate file say, and the rollouts do not: file, line and number.

    Nothing where `profile_job` would write the same files, with the options that the aggregate was made with.

    Raises:
        DataError: as `profile_job`.
    """
    found = _read(files.aggregate)
    job = _Job(files, _options_of(found))
    yield from _differences_by_line(files.profile, job.profile_lines())
    expected = b"".join(job.aggregate())
    if found is None:
        yield f"{files.aggregate.name} is missing"
    elif found != expected:
        yield f"{files.aggregate.name}: {_difference(found, expected)}"


class _AggregateOurs(msgspec.Struct, frozen=True):
    options: Options = AUTOMATIC


class _AggregateEntry(msgspec.Struct, frozen=True):
    gym_bus: _AggregateOurs


def _options_of(aggregate: bytes | None) -> Options:
    try:
        entries = msgspec.json.decode(aggregate or b"[]", type=list[_AggregateEntry])
    except (msgspec.DecodeError, UnicodeDecodeError):
        entries = []
    return entries[0].gym_bus.options if entries else AUTOMATIC


def foreign_file(files: JobFiles) -> Path | None:
    """A file that NeMo Gym has written and `profile_job` would replace; None where there is none."""
    if _lacks(files.aggregate, "gym_bus", list[dict[str, msgspec.Raw]]):
        return files.aggregate
    return files.profile if _lacks(files.profile, "failed_num_rollouts", dict[str, msgspec.Raw]) else None


def _lacks(path: Path, key: str, kind: Any) -> bool:
    """Whether the JSON in a file, or in the first line of a JSONL file, is of this kind and without a key of ours."""
    data = _read(path) or b""
    try:
        found = msgspec.json.decode(data.split(b"\n", 1)[0] if path.suffix == ".jsonl" else data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return any(key not in entry for entry in (found if isinstance(found, list) else [found]))


def _differences_by_line(path: Path, expected: Iterator[bytes]) -> Iterator[str]:
    if not path.exists():
        yield f"{path.name} is missing"
        return
    with path.open("rb") as file:
        for number, (found, wanted) in enumerate(zip_longest(file, expected, fillvalue=b"null"), start=1):
            if found != wanted:
                yield f"{path.name}:{number}: {_difference(found, wanted)}"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _difference(found: bytes, expected: bytes) -> str:
    """The first thing in which two JSON documents differ."""
    try:
        told = msgspec.json.decode(found)
    except msgspec.DecodeError as e:
        return f"not JSON: {e}"
    return _first_difference(told, msgspec.json.decode(expected), "") or "written in another way"


def _first_difference(found: Any, expected: Any, where: str) -> str:
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [(str(key), found.get(key), expected.get(key)) for key in {**expected, **found}]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(str(at), *both) for at, both in enumerate(zip(found, expected, strict=True))]
    elif found != expected:
        return f"{where or 'it'} is {_short(found)}, the rollouts say {_short(expected)}"
    for key, one, other in pairs:
        if difference := _first_difference(one, other, f"{where}.{key}" if where else key):
            return difference
    return ""


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:60]}.."


class _Job:
    """A job's table and what is made of it."""

    def __init__(self, files: JobFiles, options: Options) -> None:
        self._files, self._options = files, options
        self.table = read_table(files, (options.answer_key,) if options.answer_key else ANSWER_KEYS)
        if options.answer_key and len(self.table.row_at) and self.table.answer_key is None:
            raise UsageError(f"--answer-key {options.answer_key!r}: no rollout has this field")
        self._subsets = np.array(task_subsets(files, self.table, options.by) if options.by else [], object)
        self.agents = [self._agent_profile(name) for name in self._agents_by_first_rollout()]

    def _agents_by_first_rollout(self) -> list[str]:
        """In the order of tasks, as NeMo Gym's: the order of completion would be another one in every run."""
        numbers, first = np.unique(self.table.agent, return_index=True)
        return [self.table.agents[number] for number in numbers[np.argsort(first)].tolist()]

    def _agent_profile(self, name: str) -> AgentProfile:
        table = self.table.of_agent(name)
        subsets = dict(self._tables_by_subset(table))
        metrics = _numeric_metrics(table) | _pass_metrics(table)
        for subset, own in subsets.items():
            metrics |= subset_metrics(subset, _pass_metrics(own))
        return AgentProfile(
            agent=name,
            counts=table.counts,
            agent_metrics=metrics,
            key_metrics=key_metrics(metrics),
            estimates=_estimates(table.rewards()),
            subsets={
                subset: SubsetProfile(counts=own.counts, estimates=_estimates(own.rewards()))
                for subset, own in subsets.items()
            },
        )

    def _tables_by_subset(self, table: Table) -> Iterator[tuple[str, Table]]:
        if self._options.by is None:
            return
        subsets = self._subsets[np.searchsorted(self.table.tasks, table.tasks)]
        for subset in sorted({subset for subset in subsets if subset is not None}):
            yield subset, table.of_tasks(subsets == subset)

    def profile_lines(self) -> Iterator[bytes]:
        """The lines of the profile file, one per task, those without any reward included."""
        rows = _task_rows(self.table)
        if not self.table.has_inputs:
            for row in rows:
                yield msgspec.json.encode(row) + b"\n"
            return
        with self._files.inputs.open("rb") as inputs:
            for offset, row in zip(self.table.input_offset[self.table.task_first].tolist(), rows, strict=True):
                sample = read_row(inputs, offset)
                row["sample"] = {key: value for key, value in sample.items() if key not in INDICES}
                yield msgspec.json.encode(row) + b"\n"

    def aggregate(self) -> Iterator[bytes]:
        """The aggregate file: a JSON array, indented by 2, written piece by piece as its task rows may be many."""
        opening = b"["
        for agent in self.agents:
            ours: Metrics = {"counts": agent.counts, "estimates": agent.estimates}
            if agent.subsets:
                ours["subsets"] = agent.subsets
            head = {
                "agent_ref": {"name": agent.agent},
                "agent_metrics": agent.agent_metrics,
                "key_metrics": agent.key_metrics,
                "gym_bus": ours | {"options": self._options},
            }
            yield opening + b"\n  " + _indented(head, 2).removesuffix(b"\n  }") + b',\n    "group_level_metrics": ['
            before = b"\n      "
            for row in _task_rows(self.table.of_agent(agent.agent)):
                yield before + _indented(row | {"sample": {"agent_ref": {"name": agent.agent}}}, 6)
                before = b",\n      "
            yield b"\n    ]\n  }"
            opening = b","
        yield b"\n]\n" if self.agents else b"[]\n"

    def agent_metrics(self) -> bytes:
        """The file of the agents' numeric fields."""
        names = sorted(agent.agent for agent in self.agents)  # as NeMo Gym's are in this file
        entries = [_numeric_metrics(self.table.of_agent(name)) | {"agent_ref": {"name": name}} for name in names]
        return msgspec.json.encode(entries) + b"\n"


def _numeric_metrics(table: Table) -> Metrics:
    rows = len(table.row_at)
    described = describe(1, np.zeros(rows, np.int64), table.numbers) if rows else {}
    return _shown({metric: float(values[0]) for metric, values in described.items()}, table.whole)


def _pass_metrics(table: Table) -> Metrics:
    return compute_pass_majority_metrics({"accuracy": table.rewards()}, table.votes()) if len(table.row_at) else {}


def _shown(values: dict[str, float], whole: Set[str]) -> Metrics:
    """Metrics as the files show them: without those that say nothing, extremes of whole numbers as such."""
    shown: Metrics = {}
    for metric, value in values.items():
        kind, _, name = metric.partition("/")
        if value == value:
            shown[metric] = int(value) if kind in ("max", "min") and name in whole else value
    return shown


def _task_rows(table: Table) -> Iterator[Metrics]:
    """The statistics of every task; `sample` left out. Of some tasks at a time: each has fifty numbers and more."""
    expected, scored, failed = table.task_expected, table.task_scored, table.task_failed
    end = np.cumsum(scored)
    for first in range(0, len(end), TASKS_AT_A_TIME):
        part = slice(first, first + TASKS_AT_A_TIME)
        rows = slice(end[first] - scored[first], end[part][-1])
        numbers = {name: values[rows] for name, values in table.numbers.items()}
        described = describe(len(end[part]), table.row_task[rows] - first, numbers)
        columns = (values[part].tolist() for values in (table.tasks, expected, scored, failed, end))
        for at, (index, due, done, lost, behind) in enumerate(zip(*columns, strict=True)):
            yield {
                "_ng_task_index": index,
                **_shown({metric: float(values[at]) for metric, values in described.items()}, table.whole),
                "num_rollouts": done,
                "expected_num_rollouts": due,
                "missing_num_rollouts": due - done,
                "failed_num_rollouts": lost,
                "reward_profile_completion_pct": 100.0 * done / due,
                "rollout_infos": _infos(table, index, behind - done, behind),
            }


def _infos(table: Table, index: int, start: int, end: int) -> list[Metrics]:
    infos: list[Metrics] = [
        {"rollout_id": f"{index}:{rollout}", "_ng_task_index": index, "_ng_rollout_index": rollout}
        for rollout in table.row_rollout[start:end].tolist()
    ]
    for name, values in table.numbers.items():
        for info, value in zip(infos, values[start:end].tolist(), strict=True):
            if value == value:
                info[name] = int(value) if name in table.whole else value
    return infos


def _estimates(rewards: Floats) -> dict[str, Estimate]:
    powers = powers_of_two(rewards.shape[1])
    best = {f"pass@{k}": pass_at_1(rewards) if k == 1 else pass_at_k(rewards, k) for k in powers}
    return best | {f"pass^{k}": pass_all_k(rewards, k) for k in powers if k > 1}


def _indented(value: Any, by: int) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).replace(b"\n", b"\n" + b" " * by)
