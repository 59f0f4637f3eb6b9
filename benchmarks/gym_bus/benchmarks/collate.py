"""Bring the data of several benchmarks together for a trainer: one checked file per kind of data, with its figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import msgspec

from gym_bus.benchmarks.data_metrics import DataMetrics, about, conflict_path, differences, read_metrics, write_metrics
from gym_bus.benchmarks.dataset import Row
from gym_bus.benchmarks.spec import Benchmark, DatasetSpec, data_path
from gym_bus.benchmarks.validate import Each, Figures, Report, validate_dataset
from gym_bus.errors import DataError, UsageError

_encode = msgspec.json.Encoder().encode


class Part(msgspec.Struct, frozen=True):
    """One benchmark of several."""

    benchmark: Benchmark
    required: tuple[str, ...] = ()
    """Row keys that its verifier cannot do without."""


class Collated(msgspec.Struct, frozen=True, kw_only=True):
    """One file that was written."""

    type: str
    path: Path
    rows: int
    """Repeats counted."""
    metrics: Path


def missing_data(
    parts: Sequence[Part], data_dir: Path, types: Sequence[str]
) -> list[tuple[Benchmark, DatasetSpec, Path]]:
    """The datasets of these types that `collate` would not find."""
    return [
        (part.benchmark, dataset, path)
        for part in parts
        for dataset in part.benchmark.datasets_of(types, data_dir)
        if not (path := data_path(part.benchmark, data_dir, dataset.name)).is_file()
    ]


def collate(
    parts: Sequence[Part], data_dir: Path, output: Path, *, types: Sequence[str], overwrite: bool = False
) -> tuple[list[Collated], list[Report]]:
    """Write `<type>.jsonl` and `<type>_metrics.json` for every type of data that is wanted and that there is.

    A row is written as often as its dataset is repeated, prompt applied, stamped with the agent that it belongs to.
    Where a row is broken, nothing is written and nothing is lost: the reports say what is wrong.

    Args:
        parts: the benchmarks, in their order.
        data_dir: the data folder of all benchmarks.
        output: the folder.
        types: of datasets, such as those that a `Mode` is about.
        overwrite: replace figures that are in conflict with the present ones.

    Raises:
        UsageError: no benchmark has such data; the folder cannot be written; figures there are in conflict.
    """
    found = [t for t in types if any(part.benchmark.datasets_of((t,), data_dir) for part in parts)]
    if not found:
        raise UsageError(f"none of these benchmarks has a dataset of type {' or '.join(types)}")
    reports: list[Report] = []
    with ExitStack() as stack:
        files = [stack.enter_context(_TypeFile(output, type_, overwrite=overwrite)) for type_ in found]
        for file in files:
            for part in parts:
                reports += file.take(part, data_dir)
        if any(report.errors for report in reports):
            return [], reports
        for file in files:
            file.check()
        return [file.commit() for file in files], reports


class _TypeFile:
    """The file of one kind of data while it is written; it vanishes where it is not committed."""

    def __init__(self, output: Path, type_: str, *, overwrite: bool) -> None:
        self._type, self._overwrite = type_, overwrite
        self._path, self._metrics_path = output / f"{type_}.jsonl", output / f"{type_}_metrics.json"
        self._part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        self._metrics = DataMetrics()
        self._about: dict[str, Any] = {}
        self._out: IO[bytes]

    def __enter__(self) -> _TypeFile:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._out = self._part.open("wb")
        except OSError as e:
            raise UsageError(f"{self._part}: cannot be written: {e.strerror or e}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._out.close()
        self._part.unlink(missing_ok=True)

    def take(self, part: Part, data_dir: Path) -> list[Report]:
        """Add the rows of a benchmark's datasets of this kind."""
        return [self._take(part, d, data_dir) for d in part.benchmark.datasets_of((self._type,), data_dir)]

    def _take(self, part: Part, dataset: DatasetSpec, data_dir: Path) -> Report:
        self._about = self._about or about(dataset)
        try:
            return validate_dataset(
                part.benchmark,
                dataset,
                data_path(part.benchmark, data_dir, dataset.name),
                part.required,
                figures=Figures.WRITE if self._overwrite else Figures.ADD,
                totals=self._metrics,
                each=self._writer(part.benchmark.instance, dataset.num_repeats),
            )
        except OSError as e:
            raise UsageError(f"{self._part}: cannot be written: {e.strerror or e}") from None

    def _writer(self, agent: str, repeats: int) -> Each:
        agent_ref = msgspec.Raw(_encode({"type": "responses_api_agents", "name": agent}))

        def write(row: Row, params: Row) -> None:
            line = _encode({**row, "responses_create_params": params, "agent_ref": agent_ref}) + b"\n"
            self._out.write(line * repeats)

        return write

    @property
    def _figures(self) -> dict[str, Any]:
        return self._about | self._metrics.figures()

    def check(self) -> None:
        """Raise DataError where other figures are there already; the present ones are then written beside them."""
        if self._overwrite or not self._metrics_path.is_file():
            return
        if found := list(differences(read_metrics(self._metrics_path), self._figures)):
            conflict = conflict_path(self._metrics_path)
            write_metrics(conflict, self._figures)
            raise DataError(
                f"{self._metrics_path}: these figures are not those of the present data: {'; '.join(found)}. "
                f"The present ones are in {conflict}. Where the change is meant, run with --overwrite-metrics-conflicts"
            )

    def commit(self) -> Collated:
        """Put the rows and their figures in place."""
        self._out.flush()
        os.fsync(self._out.fileno())
        self._part.replace(self._path)
        write_metrics(self._metrics_path, self._figures)
        conflict_path(self._metrics_path).unlink(missing_ok=True)
        return Collated(type=self._type, path=self._path, rows=self._metrics.examples, metrics=self._metrics_path)
