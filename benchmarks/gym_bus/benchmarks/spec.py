"""Benchmarks by name: what a benchmark's `config.yaml` may say, where benchmarks are found, where their data lies."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gym_bus import subjects
from gym_bus.benchmarks.nemo_gym import NO_MODEL, is_nemo_gym, translate
from gym_bus.benchmarks.prompt import Prompt, check_prompt, read_prompt
from gym_bus.config import check, file_layers, find_file, interpolate, merge_layers
from gym_bus.errors import ConfigError, UsageError, did_you_mean
from gym_bus.inherit import merged
from gym_bus.origins import Layer, Origins
from gym_bus.registry import offer
from gym_bus.settings import Repeats

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

LICENSES = (
    "Apache 2.0",
    "MIT",
    "Creative Commons Attribution 4.0 International",
    "Creative Commons Attribution-ShareAlike 4.0 International",
    "CC BY-SA 4.0",
    "CC BY-NC 3.0",
    "NVIDIA Internal Use Only, Do Not Distribute",
    "NVIDIA Evaluation Dataset License Agreement",
    "GNU General Public License v3.0",
    "TBD",
    "BSD 3-Clause",
    "CC BY 4.0",
    "CC0 1.0",
    "ODC-BY 1.0",
)
"""What train and validation data may be licensed under: NeMo Gym's list, and four more that public data sets have."""

GROUP = "gym_bus.benchmarks"
"""Entry-point group of installed packages: name = the benchmark, value = the package that is its folder."""

CONFIG = "config.yaml"

FILE_ENDINGS = (".yaml", ".yml", ".json", ".jsonl", ".gz")
"""What ends so was meant as a file: that it is missing says more than that no benchmark is called so."""

DEFAULT_AGENT = "simple"

DatasetType = Literal["train", "validation", "example", "benchmark"]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of keys."""


class PartSpec(_Section, frozen=True, kw_only=True):
    """An agent or a verifier by its registered name, with the options it is made with."""

    name: str
    options: dict[str, Any] = {}
    code: str | None = None
    """`file.py:Class` in the benchmark's folder, where the benchmark brings it along; null for a registered one."""


class ToolboxSpec(_Section, frozen=True, kw_only=True):
    """The tools that the agent is given; the same as its option `toolbox`."""

    name: str
    code: str | None = None
    """`file.py:Class` in the benchmark's folder, where the benchmark brings it along; null for a registered one."""


class AuditSpec(_Section, frozen=True, kw_only=True):
    """What `gym-bus env audit` must know to attack the verifier."""

    gold: str | None = None
    """A perfect answer, with `{key}` for the row's keys; null to take the recorded answers that score 1."""
    accepted: dict[str, str] = {}
    """Cheats that the scoring rules allow, by name, each with the reason."""


class GitlabIdentifier(_Section, frozen=True, kw_only=True):
    """A file in a GitLab project's model registry, or in an MLflow server's."""

    dataset_name: str
    version: str
    artifact_fpath: str


class HuggingFaceIdentifier(_Section, frozen=True, kw_only=True):
    """A file of a data set on Hugging Face."""

    repo_id: str
    artifact_fpath: str | None = None
    """None for the only file of the split."""


class GitlabSource(GitlabIdentifier, frozen=True, kw_only=True, tag_field="type", tag="gitlab"):
    """As `GitlabIdentifier`, in the newer form."""


class HuggingFaceSource(HuggingFaceIdentifier, frozen=True, kw_only=True, tag_field="type", tag="huggingface"):
    """As `HuggingFaceIdentifier`, in the newer form."""


class DatasetSpec(_Section, frozen=True, kw_only=True):
    """One data file. The keys are NeMo Gym's."""

    name: str
    type: DatasetType
    jsonl_fpath: str
    """With a `prepare_script`: inside the benchmark's part of the data folder. Without: beside the config file."""
    prepare_script: str | None = None
    """Python file beside the config file, with `SOURCES` and `convert`."""
    num_repeats: Repeats = 1
    """Rollouts per task."""
    license: str = ""
    """Required for train and validation data, as NeMo Gym does."""
    source: str | GitlabSource | HuggingFaceSource = ""
    """Where the data set is published: an address for people, or the place in a registry that it is fetched from."""
    gitlab_identifier: GitlabIdentifier | None = None
    huggingface_identifier: HuggingFaceIdentifier | None = None
    prompt_config: str | None = None
    """As written in a NeMo Gym configuration; the benchmark's own says what is used."""
    optional: bool = False
    """Whether the benchmark can do without it: while it is not prepared, data checks pass it over. A key of our own."""

    @property
    def registries(self) -> dict[str, GitlabIdentifier | HuggingFaceIdentifier]:
        """The places in registries that the file can be fetched from, by the kind of registry."""
        given = (self.gitlab_identifier, self.huggingface_identifier, self.source)
        return {
            "gitlab" if isinstance(place, GitlabIdentifier) else "huggingface": place
            for place in given
            if isinstance(place, GitlabIdentifier | HuggingFaceIdentifier)
        }


class BenchmarkSpec(_Section, frozen=True, kw_only=True):
    """A benchmark's `config.yaml`."""

    name: str
    domain: str
    """One of `DOMAINS`."""
    description: str = ""
    verified: bool = False
    """Whether its scores were compared with published ones."""
    agent: PartSpec = PartSpec(name=DEFAULT_AGENT)
    toolbox: ToolboxSpec | None = None
    verifier: PartSpec
    audit: AuditSpec = AuditSpec()
    prompt: Prompt | None = None
    """Builds the model's input; absent where the rows bring their own `responses_create_params.input`."""
    prompt_config: str | None = None
    """The same as a file of its own, found as `config_paths` are."""
    datasets: Annotated[tuple[DatasetSpec, ...], Meta(min_length=1)]


class PartChange(_Section, frozen=True, kw_only=True):
    """Another agent or verifier, or other options of the same."""

    name: str | None = None
    options: dict[str, Any] = {}


class BenchmarkChange(_Section, frozen=True, kw_only=True):
    """What one job may change in its benchmark's configuration: arguments `benchmark.KEY=value`, parts of a suite."""

    num_repeats: Repeats | None = None
    """Rollouts per task, of whichever dataset."""
    agent: PartChange = PartChange()
    verifier: PartChange = PartChange()
    prompt: Prompt | None = None
    prompt_config: str | None = None


class Benchmark(msgspec.Struct, frozen=True):
    """A benchmark that was found and checked."""

    spec: BenchmarkSpec
    folder: Path
    package: str | None = None
    """Name of the Python package that the folder is; None for a folder that the user pointed at."""
    root: Path | None = None
    """The folder that the paths in a NeMo Gym configuration start at; None for a configuration of ours."""
    instance: str = ""
    """What rows of it are stamped with as `agent_ref.name`; names of NeMo Gym's agents are kept."""
    origins: Origins = msgspec.field(default_factory=Origins)
    """Where each key of the specification was written."""
    config: str = CONFIG
    """Name of its configuration file in the folder."""
    num_repeats: int | None = None
    """Rollouts per task, where a change says so; None for the dataset's own."""

    @property
    def argument(self) -> str:
        """What stands for it in a command: its name, or where it lies if no name is known."""
        return (
            self.spec.name if self.package else str(self.folder if self.config == CONFIG else self.folder / self.config)
        )

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

    def datasets_of(self, types: Iterable[str], data_dir: Path) -> list[DatasetSpec]:
        """The datasets of these types; optional ones where they are prepared."""
        return [
            dataset
            for dataset in self.spec.datasets
            if dataset.type in types
            and not (dataset.optional and not data_path(self, data_dir, dataset.name).is_file())
        ]

    def prompt_of(self, dataset: DatasetSpec) -> Prompt | None:
        """What builds the input of its rows; of a NeMo Gym configuration, only of datasets that name a prompt."""
        return self.spec.prompt if self.root is None or dataset.prompt_config else None

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
    toolbox: str = ""
    """The tools that the agent is given."""
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
    if benchmark.root is not None:
        return benchmark.root / dataset.jsonl_fpath
    if dataset.prepare_script is None:
        return benchmark.folder / dataset.jsonl_fpath
    return data_dir / benchmark.spec.name / dataset.jsonl_fpath


def load_benchmark(name_or_path: str, changes: Sequence[Layer] = ()) -> Benchmark:
    """A built-in benchmark, one of an installed package, or the folder or `config.yaml` at a path.

    A name wins over a folder of that name in the working directory; `./name` means the folder.

    Args:
        name_or_path: which.
        changes: what a job wants otherwise, keys as in `BenchmarkChange`; later ones win.

    Raises:
        UsageError: there is none; close matches are named.
        ConfigError: its `config.yaml` is wrong, or a change is; the file and the key are named.
    """
    known = _found()
    if (added := _added.get(name_or_path)) and known[name_or_path] == (added.parent, None):
        return _with_code(_load(added.parent, config=added.name, changes=changes))
    if name_or_path in known:
        return _with_code(_load(*known[name_or_path], changes=changes))
    path = Path(name_or_path)
    if path.is_dir() and (path / CONFIG).is_file():
        return _with_code(_load(path, changes=changes))
    if path.is_file():
        return _with_code(_load(path.parent, config=path.name, changes=changes))
    if path.is_dir():
        raise UsageError(f"{path}: the folder has no {CONFIG}, so it is no benchmark")
    if "/" in name_or_path or path.suffix in FILE_ENDINGS:
        raise UsageError(f"{path}: no such folder or file; a benchmark is a name or a folder with a {CONFIG}")
    raise UsageError(f"unknown benchmark {name_or_path!r}: {did_you_mean(name_or_path, known)}")


def _with_code(benchmark: Benchmark) -> Benchmark:
    """Have the registries know the agent, the tools and the verifier that the benchmark brings along."""
    for kind, group in (("agent", "agents"), ("toolbox", "toolboxes"), ("verifier", "verifiers")):
        part: PartSpec | ToolboxSpec | None = getattr(benchmark.spec, kind)
        if part is None or part.code is None:
            continue
        file, _, attribute = part.code.partition(":")
        path, where = (benchmark.folder / file).resolve(), benchmark.origins.nearest(f"{kind}.code")
        if not (file.endswith(".py") and attribute.isidentifier() and path.is_file()):
            raise ConfigError(
                f"{where}: key '{kind}.code': {part.code!r} is not file.py:Class of a file in {benchmark.folder}"
            )
        offer(f"gym_bus.{group}", subjects.token(part.name, kind), f"{path}:{attribute}")
    return benchmark


def brings_code(spec: BenchmarkSpec) -> bool:
    """Whether the benchmark's own code must run on the workers."""
    return any(part is not None and part.code is not None for part in (spec.agent, spec.toolbox, spec.verifier))


def known_benchmarks() -> tuple[str, ...]:
    """The names that `load_benchmark` knows."""
    return tuple(_found())


def add_folders(paths: Iterable[str]) -> tuple[str, ...]:
    """Make benchmarks in folders known in this process, by name, with the code that they bring along.

    Args:
        paths: each the folder of a benchmark, its configuration file, or a folder whose folders are benchmarks.

    Returns:
        The paths, absolute.

    Raises:
        UsageError: there is no benchmark at a path, or its name is taken.
        ConfigError: a `config.yaml` is wrong.
    """
    absolute = [Path(path).absolute() for path in paths]
    for path in absolute:
        files = [path] if path.is_file() else sorted(path.glob(CONFIG)) or sorted(path.glob(f"*/{CONFIG}"))
        if not files:
            raise UsageError(f"benchmark_paths: {path}: no {CONFIG} in it, nor in a folder of it")
        for file in files:
            name = _with_code(_load(file.parent, config=file.name)).spec.name
            if _added.setdefault(name, file) != file:
                raise UsageError(f"benchmark_paths: {file}: {name!r} is the name of {_added[name]} already")
    return tuple(map(str, absolute))


_added: dict[str, Path] = {}
"""Configuration files by the benchmark's name, as the setting `benchmark_paths` leads to them."""


def list_benchmarks(data_dir: Path, search_dirs: Iterable[Path] = ()) -> list[BenchmarkInfo]:
    """Every built-in and installed benchmark, by name, then those in folders; a broken configuration says why.

    Raises:
        UsageError: a folder to search is none.
    """
    listed = [_info(name, folder, package, data_dir) for name, (folder, package) in sorted(_found().items())]
    return listed + [info for folder in search_dirs for info in _in_folder(folder, data_dir)]


def _in_folder(folder: Path, data_dir: Path) -> Iterator[BenchmarkInfo]:
    if not folder.is_dir():
        raise UsageError(f"--search-dir {folder}: no such folder")
    for config in sorted(folder.rglob(CONFIG)):
        name = str(config.parent.relative_to(folder)) if config.parent != folder else folder.name
        yield _info(name, config.parent, None, data_dir)


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
        toolbox=str(spec.agent.options.get("toolbox") or ""),
        num_repeats=benchmark.main.num_repeats,
        prepared=path.is_file(),
        rows=_count_lines(path) if path.is_file() else None,
    )


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if not line.isspace())


def _found() -> dict[str, tuple[Path, str | None]]:
    """Folder and package by name; nothing is imported. A built-in name cannot be taken over."""
    found: dict[str, tuple[Path, str | None]] = {name: (file.parent, None) for name, file in _added.items()}
    found |= {name: (folder, package) for name, folder, package in _installed()}
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


def _load(
    folder: Path, package: str | None = None, *, config: str = CONFIG, changes: Sequence[Layer] = ()
) -> Benchmark:
    path = folder / config
    layers = file_layers([path])
    resolve = partial(
        interpolate,
        remedy=f"in a file of your own that starts with `config_paths: [{path}]`",
        lacking="${{{}}} names no key of the benchmark; secrets have no place here, its options are in all jobs".format,
    )
    if any(is_nemo_gym(layer.values) for layer in layers):
        found = translate(*merge_layers([NO_MODEL, *layers], str(path)), path, resolve)
        root, instance, values, origins = found.root, found.instance, found.values, found.origins
    else:
        root, instance = None, ""
        written, origins = merge_layers(layers, str(path))
        values = resolve(written, origins)
    num_repeats = None
    for layer in changes:
        change = check(BenchmarkChange, layer.values, _origins_of(layer))
        num_repeats = change.num_repeats or num_repeats
        values = _changed(values, layer.values, change)
        origins.add(layer)
    spec = _with_toolbox(_with_prompt(check(BenchmarkSpec, values, origins), path, origins))
    _check(spec, origins)
    return Benchmark(
        spec=spec,
        folder=folder,
        package=package,
        root=root,
        instance=instance or f"{spec.name}_{spec.agent.name}_agent",
        origins=origins,
        config=config,
        num_repeats=num_repeats,
    )


def _origins_of(layer: Layer) -> Origins:
    origins = Origins(layer.name)
    origins.add(layer)
    return origins


def _changed(values: dict[str, Any], given: dict[str, Any], change: BenchmarkChange) -> dict[str, Any]:
    """The benchmark's values with a change. What another agent, verifier or prompt takes the place of goes."""
    under = {"agent": {"name": DEFAULT_AGENT}, **values}
    for kind, part in (("agent", change.agent), ("verifier", change.verifier)):
        if isinstance(below := under.get(kind), dict) and part.name not in (None, below.get("name")):
            del under[kind]
            if kind == "agent":
                under.pop("toolbox", None)
    if "prompt" in given or "prompt_config" in given:
        under.pop("prompt", None)
        under.pop("prompt_config", None)
    return merged(under, {key: value for key, value in given.items() if key != "num_repeats"})


def _with_toolbox(spec: BenchmarkSpec) -> BenchmarkSpec:
    """`spec` with its toolbox as the agent's option, where none is named there."""
    if spec.toolbox is None:
        return spec
    options = {"toolbox": spec.toolbox.name} | spec.agent.options
    return msgspec.structs.replace(spec, agent=msgspec.structs.replace(spec.agent, options=options))


def _with_prompt(spec: BenchmarkSpec, path: Path, origins: Origins) -> BenchmarkSpec:
    if spec.prompt_config is None:
        if spec.prompt is not None:
            check_prompt(spec.prompt, lambda role: origins.nearest(f"prompt.{role}"))
        return spec
    where = origins.nearest("prompt_config")
    if spec.prompt is not None:
        raise ConfigError(f"{where}: keys 'prompt' and 'prompt_config': give one of them")
    return msgspec.structs.replace(spec, prompt=read_prompt(find_file(spec.prompt_config, path, where)))


def _check(spec: BenchmarkSpec, origins: Origins) -> None:
    def wrong(key: str, what: str) -> ConfigError:
        return ConfigError(f"{origins.nearest(key)}: key {key!r}: {what}")

    try:
        subjects.token(spec.name, "benchmark")
    except UsageError as e:
        raise wrong("name", str(e)) from None
    if spec.domain not in DOMAINS:
        raise wrong("domain", f"unknown {spec.domain!r}: {did_you_mean(spec.domain, DOMAINS)}")
    names = [dataset.name for dataset in spec.datasets]
    for i, dataset in enumerate(spec.datasets):
        if dataset.name in names[:i]:
            raise wrong(f"datasets[{i}].name", f"{dataset.name!r} is taken by an earlier dataset")
        if dataset.type in ("train", "validation"):
            _check_license(dataset, f"datasets[{i}].license", wrong)
    if sum(dataset.type == "benchmark" for dataset in spec.datasets) > 1:
        raise wrong("datasets", "at most one may be of type benchmark")


def _check_license(dataset: DatasetSpec, key: str, wrong: Callable[[str, str], ConfigError]) -> None:
    if not dataset.license:
        raise wrong(key, f"{dataset.type} data needs a licence; known: {', '.join(LICENSES)}")
    if dataset.license not in LICENSES:
        raise wrong(key, f"unknown licence {dataset.license!r}: {did_you_mean(dataset.license, LICENSES)}")
