"""Check data before a job, a training run or a pull request depends on it: every row, and what is known about the file.

Everything that is wrong is found in one pass; nothing is raised for bad rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from gym_bus.benchmarks.data_metrics import (
    ABOUT,
    DataMetrics,
    about,
    conflict_path,
    differences,
    metrics_path,
    read_metrics,
    write_metrics,
)
from gym_bus.benchmarks.dataset import Examined, Row, examine, load_rows
from gym_bus.benchmarks.prompt import Prompt
from gym_bus.benchmarks.spec import Benchmark, DatasetSpec, data_path
from gym_bus.errors import DataError, UsageError

EXAMPLE_ROWS = 5
"""What an example file has, neither more nor less."""

MAX_FINDINGS = 100
"""Errors, and warnings, that are kept of one file; the others are counted."""


class Mode(enum.StrEnum):
    """What the data is wanted for. The words are NeMo Gym's."""

    EXAMPLE_VALIDATION = "example_validation"
    """A benchmark is handed in: its example rows."""
    TRAIN_PREPARATION = "train_preparation"
    """Data is used: train, validation and benchmark rows."""

    @property
    def types(self) -> tuple[str, ...]:
        """The dataset types that are looked at."""
        return ("example",) if self is Mode.EXAMPLE_VALIDATION else ("train", "validation", "benchmark")


class Figures(enum.Enum):
    """What to do with the figures that are committed beside a data file."""

    CHECK = enum.auto()
    """They must be there beside example data, and right wherever they are."""
    ADD = enum.auto()
    """As `CHECK`, but written where they are not there."""
    WRITE = enum.auto()
    """Written anew."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not as it should be."""

    level: Literal["error", "warning"]
    what: str
    """Names the file, and the line or the key, and says what to do."""


class Report(msgspec.Struct, kw_only=True):
    """What was found in one data file."""

    path: Path
    dataset: str = ""
    """`benchmark/dataset`; empty for a file on its own."""
    rows: int = 0
    errors: int = 0
    warnings: int = 0
    findings: list[Finding] = []
    """The first `MAX_FINDINGS` errors and as many warnings, in the order of the file."""
    metrics: dict[str, Any] = {}

    def error(self, what: str) -> None:
        """Note what must be mended."""
        self.errors += 1
        if self.errors <= MAX_FINDINGS:
            self.findings.append(Finding("error", what))

    def warning(self, what: str) -> None:
        """Note what may be meant."""
        self.warnings += 1
        if self.warnings <= MAX_FINDINGS:
            self.findings.append(Finding("warning", what))


Each = Callable[[Row, Row], None]
"""Gets every good row and its create params, in the order of the file."""


def validate_benchmark(
    benchmark: Benchmark,
    data_dir: Path,
    *,
    mode: Mode,
    required: Sequence[str] = (),
    figures: Figures = Figures.CHECK,
) -> list[Report]:
    """Check the data files of a benchmark that a mode is about.

    Args:
        benchmark: whose data.
        data_dir: the data folder of all benchmarks.
        mode: which of its datasets.
        required: row keys that the verifier cannot do without.
        figures: what to do with those beside each file.

    Raises:
        UsageError: it has no dataset of that kind; or the figures cannot be written.
    """
    wanted = benchmark.datasets_of(mode.types, data_dir)
    if not wanted:
        raise UsageError(f"{benchmark.folder}: no dataset of type {' or '.join(mode.types)}, which {mode} looks at")
    return [
        validate_dataset(benchmark, dataset, data_path(benchmark, data_dir, dataset.name), required, figures=figures)
        for dataset in wanted
    ]


def validate_dataset(
    benchmark: Benchmark,
    dataset: DatasetSpec,
    path: Path,
    required: Sequence[str] = (),
    *,
    figures: Figures = Figures.CHECK,
    totals: DataMetrics | None = None,
    each: Each | None = None,
) -> Report:
    """Check one data file of a benchmark; see `validate_benchmark`. `totals` and `each` get its good rows."""
    report = Report(path=path, dataset=f"{benchmark.spec.name}/{dataset.name}")
    if not path.is_file():
        report.error(f"{path}: no such file: {_how_to_get(benchmark, dataset)}")
        return report
    metrics = DataMetrics()
    counted = [metrics, totals] if totals is not None else [metrics]
    _examine_rows(report, benchmark.prompt_of(dataset), required, counted, dataset.num_repeats, each)
    report.metrics = about(dataset) | metrics.figures()
    if dataset.type == "example":
        _check_examples(report)
    if dataset.license == "TBD":
        report.warning(f"{path}: its licence is still to be decided: {_licence_key(benchmark, dataset)}")
    _check_metrics(report, needed=dataset.type == "example", figures=figures)
    return report


def validate_file(
    path: Path,
    *,
    prompt: Prompt | None = None,
    required: Sequence[str] = (),
    mode: Mode | None = None,
    figures: Figures = Figures.CHECK,
) -> Report:
    """Check a data file on its own; with `example_validation` it must have five rows.

    With a `prompt` its figures are compared with none: those beside it may be of another prompt.
    """
    report = Report(path=path)
    metrics = DataMetrics()
    _examine_rows(report, prompt, required, [metrics])
    report.metrics = metrics.figures()
    if mode is Mode.EXAMPLE_VALIDATION:
        _check_examples(report)
    if prompt is None or figures is not Figures.CHECK:
        _check_metrics(report, needed=mode is Mode.EXAMPLE_VALIDATION, figures=figures)
    return report


def _how_to_get(benchmark: Benchmark, dataset: DatasetSpec) -> str:
    name = benchmark.argument
    if dataset.prepare_script is not None:
        return f"run `gym-bus dataset prepare {name} --split {dataset.name}`"
    if dataset.registries:
        return f"run `gym-bus dataset collate {name} --download`, which fetches it from its registry"
    return "put it there, or correct jsonl_fpath"


def _licence_key(benchmark: Benchmark, dataset: DatasetSpec) -> str:
    key = f"datasets[{benchmark.spec.datasets.index(dataset)}].license"
    return f"{benchmark.origins.nearest(key)}: key {key!r}"


def _examine_rows(
    report: Report,
    prompt: Prompt | None,
    required: Sequence[str],
    metrics: Sequence[DataMetrics],
    repeats: int = 1,
    each: Each | None = None,
) -> None:
    try:
        for one in examine(report.path, prompt=prompt, required=required):
            report.rows += 1
            _note(report, one)
            if not one.problem:
                row, params = _decoded(one.row), _decoded(one.params)
                for counted in metrics:
                    counted.observe(row, params, repeats)
                if each is not None:
                    each(one.row, one.params)
    except DataError as e:
        report.error(str(e))
    if not report.rows and not report.errors:
        report.error(f"{report.path}: no rows in it")


def _note(report: Report, one: Examined) -> None:
    if one.problem:
        report.error(one.problem)
    if one.same_as is not None:
        report.warning(
            f"{report.path}:{one.line}: the same row as in line {one.same_as}: the two are rollouts of one task; "
            "leave one out, or give each a _ng_task_index of its own",
        )


def _decoded(row: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    return {key: msgspec.json.decode(value) for key, value in row.items()}


def _check_examples(report: Report) -> None:
    """NeMo Gym's rules for what is handed in with a benchmark."""
    if report.rows != EXAMPLE_ROWS:
        report.error(f"{report.path}: {report.rows} rows, but example data has exactly {EXAMPLE_ROWS}")
    rollouts = report.path.with_name(f"{report.path.stem}_rollouts.jsonl")
    if rollouts.is_file() and (rows := sum(1 for _ in _rows(report, rollouts))) != EXAMPLE_ROWS:
        report.error(f"{rollouts}: {rows} rows, but it has one for each of the {EXAMPLE_ROWS} example rows")


def _rows(report: Report, path: Path) -> Iterator[object]:
    try:
        yield from load_rows(path)
    except DataError as e:
        report.error(str(e))


def _check_metrics(report: Report, *, needed: bool, figures: Figures) -> None:
    """Compare the file's figures with those committed beside it; other ones are written into a `_conflict.json`."""
    path = metrics_path(report.path)
    conflict = conflict_path(path)
    if figures is Figures.WRITE or (figures is Figures.ADD and not path.is_file()):
        if not report.errors:  # figures of the good rows alone would be no one's
            write_metrics(path, report.metrics)
            conflict.unlink(missing_ok=True)
        return
    if not path.is_file():
        if needed:
            report.error(f"{path}: no such file: write it with --write-metrics, and commit it")
        return
    try:
        committed = read_metrics(path)
        if not report.dataset:  # what is said there of the dataset cannot be known of a file on its own
            committed = {key: value for key, value in committed.items() if key not in ABOUT}
        found = list(differences(committed, report.metrics))
    except DataError as e:
        report.error(str(e))
        return
    if found:
        _report_conflict(report, path, conflict, found)
    elif conflict.exists():
        report.error(f"{conflict}: left from an earlier conflict, which is over: delete it")


def _report_conflict(report: Report, path: Path, conflict: Path, found: list[str]) -> None:
    written = f"the present figures are in {conflict}"
    try:
        write_metrics(conflict, report.metrics)
    except UsageError as e:
        written = str(e)
    for difference in found:
        report.error(f"{path}: {difference}")
    report.error(
        f"{path}: these figures are not those of {report.path.name}: {written}. Correct the data, or, where the change "
        "is meant, write them with --write-metrics",
    )
