"""Benchmarks by name: what a benchmark's `config.yaml` may say, where benchmarks are found, where their data lies."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gym_bus import subjects
from gym_bus.benchmarks.prompt import Prompt, check_prompt
from gym_bus.config import check, read_yaml
from gym_bus.errors import ConfigError, UsageError, did_you_mean

DOMAINS = (
    "agent",
    "coding",
    "e2e",
    "games",
    "instruction_following",
    "knowledge",
    "long_context",
    "math",
    "other",
    "rlhf",
    "safety",
    "translation",
)
"""NeMo Gym's list."""

GROUP = "gym_bus.benchmarks"
"""Entry-point group of installed packages: name = the benchmark, value = the package that is its folder."""

CONFIG = "config.yaml"

DatasetType = Literal["train", "validation", "example", "benchmark"]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of keys."""


class PartSpec(_Section, frozen=True, kw_only=True):
    """An agent or a verifier by its registered name, with the options it is made with."""

    name: str
    options: dict[str, Any] = {}


class DatasetSpec(_Section, frozen=True, kw_only=True):
    """One data file. The keys are NeMo Gym's."""

    name: str
    type: DatasetType
    jsonl_fpath: str
    """With a `prepare_script`: inside the benchmark's part of the data folder. Without: beside the config file."""
    prepare_script: str | None = None
    """Python file beside the config file, with `SOURCES` and `convert`."""
    num_repeats: Annotated[int, Meta(ge=1)] = 1
    """Rollouts per task."""
    license: str = ""
    """Required for train and validation data, as NeMo Gym does."""
    source: str = ""
    """Where the data set is published, for people."""


class BenchmarkSpec(_Section, frozen=True, kw_only=True):
    """A benchmark's `config.yaml`."""

    name: str
    domain: str
    """One of `DOMAINS`."""
    description: str = ""
    verified: bool = False
    """Whether its scores were compared with published ones."""
    agent: PartSpec = PartSpec(name="simple")
    verifier: PartSpec
    prompt: Prompt | None = None
    """Builds the model's input; absent where the rows bring their own `responses_create_params.input`."""
    datasets: Annotated[tuple[DatasetSpec, ...], Meta(min_length=1)]


class Benchmark(msgspec.Struct, frozen=True):
    """A benchmark that was found and checked."""

    spec: BenchmarkSpec
    folder: Path
    package: str | None = None
    """Name of the Python package that the folder is; None for a folder that the user pointed at."""

    def dataset(self, which: str | None = None) -> DatasetSpec:
        """The dataset of that type or of that name; without one, the main one.

        Raises:
            UsageError: there is none.
        """
        if which is None:
            return self.main
        for dataset in self.spec.datasets:
            if which in (dataset.type, dataset.name):
                return dataset
        known = {name for d in self.spec.datasets for name in (d.type, d.name)}
        raise UsageError(f"benchmark {self.spec.name!r} has no dataset {which!r}: {did_you_mean(which, known)}")

    @property
    def main(self) -> DatasetSpec:
        """The dataset that scores are published for; the first one where none is of type benchmark."""
        return next((d for d in self.spec.datasets if d.type == "benchmark"), self.spec.datasets[0])


class BenchmarkInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the catalogue."""

    name: str
    domain: str = ""
    description: str = ""
    verified: bool = False
    agent: str = ""
    verifier: str = ""
    num_repeats: int = 1
    prepared: bool = False
    """Whether the main dataset's file is there."""
    rows: int | None = None
    """Rows of the main dataset; None while it is not prepared."""
    error: str = ""
    """Why the benchmark cannot be used; the other fields say nothing then."""


def data_path(benchmark: Benchmark, data_dir: Path, which: str | None = None) -> Path:
    """Where the rows of a dataset lie, or will lie once they are prepared."""
    dataset = benchmark.dataset(which)
    if dataset.prepare_script is None:
        return benchmark.folder / dataset.jsonl_fpath
    return data_dir / benchmark.spec.name / dataset.jsonl_fpath


def load_benchmark(name_or_path: str) -> Benchmark:
    """A built-in benchmark, one of an installed package, or the folder or `config.yaml` at a path.

    A name wins over a folder of that name in the working directory; `./name` means the folder.

    Raises:
        UsageError: there is none; close matches are named.
        ConfigError: its `config.yaml` is wrong; the file and the key are named.
    """
    known = _found()
    if name_or_path in known:
        return _load(*known[name_or_path])
    path = Path(name_or_path)
    if path.is_dir() and (path / CONFIG).is_file():
        return _load(path)
    if path.is_file():
        return _load(path.parent, config=path.name)
    if path.is_dir():
        raise UsageError(f"{path}: the folder has no {CONFIG}, so it is no benchmark")
    if "/" in name_or_path:
        raise UsageError(f"{path}: no such folder or file; a benchmark is a name or a folder with a {CONFIG}")
    raise UsageError(f"unknown benchmark {name_or_path!r}: {did_you_mean(name_or_path, known)}")


def list_benchmarks(data_dir: Path) -> list[BenchmarkInfo]:
    """Every built-in and installed benchmark, by name; one whose configuration is broken says why."""
    return [_info(name, folder, package, data_dir) for name, (folder, package) in sorted(_found().items())]


def _info(name: str, folder: Path, package: str | None, data_dir: Path) -> BenchmarkInfo:
    try:
        benchmark = _load(folder, package)
    except ConfigError as e:
        return BenchmarkInfo(name=name, error=str(e))
    spec = benchmark.spec
    path = data_path(benchmark, data_dir)
    return BenchmarkInfo(
        name=name,
        domain=spec.domain,
        description=spec.description,
        verified=spec.verified,
        agent=spec.agent.name,
        verifier=spec.verifier.name,
        num_repeats=benchmark.main.num_repeats,
        prepared=path.is_file(),
        rows=_count_lines(path) if path.is_file() else None,
    )


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if not line.isspace())


def _found() -> dict[str, tuple[Path, str | None]]:
    """Folder and package by name; nothing is imported. A built-in name cannot be taken over."""
    found = {name: (folder, package) for name, folder, package in _installed()}
    builtin = Path(__file__).parent
    for config in builtin.glob(f"*/{CONFIG}"):
        found[config.parent.name] = (config.parent, f"{__package__}.{config.parent.name}")
    return found


def _installed() -> Iterator[tuple[str, Path, str | None]]:
    for entry in entry_points(group=GROUP):
        try:
            spec = importlib.util.find_spec(entry.value)
        except ModuleNotFoundError:
            spec = None
        places = spec.submodule_search_locations if spec else None
        # A package that is gone still has its line in the catalogue: loading it then says what is missing.
        yield entry.name, Path(next(iter(places or []), entry.value)), entry.value


def _load(folder: Path, package: str | None = None, *, config: str = CONFIG) -> Benchmark:
    path = folder / config
    spec = check(BenchmarkSpec, read_yaml(path), str(path))
    _check(spec, path)
    return Benchmark(spec=spec, folder=folder, package=package)


def _check(spec: BenchmarkSpec, path: Path) -> None:
    try:
        subjects.token(spec.name, "benchmark")
    except UsageError as e:
        raise ConfigError(f"{path}: key 'name': {e}") from None
    if spec.domain not in DOMAINS:
        raise ConfigError(f"{path}: key 'domain': unknown {spec.domain!r}: {did_you_mean(spec.domain, DOMAINS)}")
    if spec.prompt is not None:
        check_prompt(spec.prompt, str(path))
    names = [dataset.name for dataset in spec.datasets]
    for i, dataset in enumerate(spec.datasets):
        at = f"{path}: key 'datasets[{i}]"
        if dataset.name in names[:i]:
            raise ConfigError(f"{at}.name': {dataset.name!r} is taken by an earlier dataset")
        if dataset.type in ("train", "validation") and not dataset.license:
            raise ConfigError(f"{at}.license': {dataset.type} data needs a licence")
    if sum(dataset.type == "benchmark" for dataset in spec.datasets) > 1:
        raise ConfigError(f"{path}: key 'datasets': at most one may be of type benchmark")
