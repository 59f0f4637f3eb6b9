"""`gym-bus dataset`: prepare data sets, check them, bring them together, keep them in registries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gym_bus.cli import common
from gym_bus.config import Config
from gym_bus.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from gym_bus.benchmarks import prepare as preparing
    from gym_bus.benchmarks.collate import Part
    from gym_bus.benchmarks.spec import Benchmark
    from gym_bus.benchmarks.stores import Place
    from gym_bus.benchmarks.validate import Figures, Report

FAILURES = 1
SPLITS = ("train", "validation", "test")

data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where prepared data lies; default: data_dir of the settings."
)
mode_option = click.option(
    "--mode",
    type=common.Choice(["example_validation", "train_preparation"]),
    help="Look at the example rows, or at train, validation and benchmark rows.",
)
storage_option = click.option(
    "--storage",
    type=common.Choice(["gitlab", "mlflow", "hf", "huggingface"]),
    required=True,
    help="GitLab's model registry or an MLflow server, or Hugging Face.",
)
version_option = click.option(
    "--version", "--revision", "version", default="", help="GitLab: 1.2.3; Hugging Face: branch, tag or commit."
)
artifact_option = click.option("--artifact", default="", metavar="FILE", help="The file's name in the registry.")


@click.group("dataset")
def command() -> None:
    """Prepare, check, bring together, and keep data sets."""


@command.command("prepare")
@click.argument("benchmarks", nargs=-1, required=True, metavar="BENCHMARK...")
@click.option("--source", type=click.Path(path_type=Path), help="Folder that has the published files.")
@click.option("--split", help="The dataset, by type or name; default: the main one, and optional ones in --source.")
@data_dir_option
@common.config_option
@common.json_option
def prepare(
    benchmarks: tuple[str, ...],
    source: Path | None,
    split: str | None,
    data_dir: Path | None,
    config_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write each BENCHMARK's rows: from its public source, or from the files in --source DIR.

    A download that breaks off is kept: the same command goes on from there.
    """
    from gym_bus.benchmarks.prepare import prepare as prepare_one
    from gym_bus.benchmarks.spec import load_benchmark
    from gym_bus.workers.preparing import completed

    def say(text: str) -> None:
        click.echo(text, err=as_json)

    config = common.settings(config_files, ())
    target = data_dir or Path(config.data_dir)
    done = []
    for name in benchmarks:
        benchmark = load_benchmark(name)
        complete = partial(completed, verifier=benchmark.spec.verifier.name, say=say)
        for which in _splits(benchmark, split, source):
            with _download_bar(name) as progress:
                done.append(
                    prepare_one(
                        benchmark,
                        target,
                        which=which,
                        source_dir=source,
                        say=say,
                        progress=progress,
                        complete=complete,
                    )
                )
    if as_json:
        common.print_json([msgspec.to_builtins(p, builtin_types=(), enc_hook=str) for p in done])


def _splits(benchmark: Benchmark, split: str | None, source: Path | None) -> list[str]:
    from gym_bus.benchmarks.prepare import optional_in

    if split is not None:
        return [split]
    return [benchmark.main.name, *(optional_in(benchmark, source) if source else [])]


@contextmanager
def _download_bar(name: str) -> Iterator[preparing.Progress]:
    """A bar on a terminal, from the first byte on; nothing elsewhere."""
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=common.err, transient=True, disable=not common.err.is_terminal) as bar:
        task = bar.add_task(name, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


@command.command("validate")
@click.argument("targets", nargs=-1, metavar="[BENCHMARK|FILE]...")
@mode_option
@click.option("--prompt-config", type=click.Path(path_type=Path), help="FILE: the prompt that builds its rows' input.")
@click.option("--verifier", metavar="NAME", help="FILE: rows must have what this verifier needs.")
@click.option("--write-metrics", is_flag=True, help="Write the figures beside the data, in place of those there.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@data_dir_option
@common.config_option
@common.json_option
def validate(
    targets: tuple[str, ...],
    mode: str | None,
    prompt_config: Path | None,
    verifier: str | None,
    write_metrics: bool,
    strict: bool,
    data_dir: Path | None,
    config_files: tuple[str, ...],
    as_json: bool,
) -> int:
    """Check every row of benchmarks' data, or of FILEs, and the figures that are committed beside it.

    Of a benchmark, its example rows, unless --mode says otherwise; without an argument, of every built-in and installed
    benchmark. Exits with 1 where something is wrong.
    """
    from gym_bus.benchmarks.validate import Figures

    config = common.settings(config_files, ())
    folder = data_dir or Path(config.data_dir)
    figures = Figures.WRITE if write_metrics else Figures.CHECK
    reports = []
    for target in targets or _benchmarks_with_data(mode, folder):
        if _is_data_file(Path(target)):
            reports.append(_validate_file(Path(target), mode, prompt_config, verifier, figures))
        elif prompt_config or verifier:
            raise UsageError(f"--prompt-config and --verifier are for a FILE; {target!r} is none, it has its own")
        else:
            reports += _validate_benchmark(target, mode, folder, figures)
    if as_json:
        common.print_json([_plain(report) for report in reports])
    else:
        _print_reports(reports)
    return FAILURES if any(report.errors or (strict and report.warnings) for report in reports) else 0


def _benchmarks_with_data(mode: str | None, data_dir: Path) -> list[str]:
    """All built-in and installed benchmarks that have datasets of the mode's types."""
    from gym_bus.benchmarks.spec import list_benchmarks, load_benchmark
    from gym_bus.benchmarks.validate import Mode

    types = (Mode(mode) if mode else Mode.EXAMPLE_VALIDATION).types
    names = [info.name for info in list_benchmarks(data_dir)]
    return [name for name in names if any(d.type in types for d in load_benchmark(name).spec.datasets)]


def _is_data_file(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".yaml", ".yml")


def _validate_file(
    path: Path, mode: str | None, prompt_config: Path | None, verifier: str | None, figures: Figures
) -> Report:
    from gym_bus.benchmarks.prompt import read_prompt
    from gym_bus.benchmarks.validate import Mode, validate_file
    from gym_bus.verifiers.registry import VERIFIERS

    return validate_file(
        path,
        prompt=read_prompt(prompt_config) if prompt_config else None,
        required=VERIFIERS.load(verifier).required if verifier else (),
        mode=Mode(mode) if mode else None,
        figures=figures,
    )


def _validate_benchmark(name: str, mode: str | None, data_dir: Path, figures: Figures) -> list[Report]:
    from gym_bus.benchmarks.validate import Mode, validate_benchmark

    (part,) = _parts([name])
    wanted = Mode(mode) if mode else Mode.EXAMPLE_VALIDATION
    return validate_benchmark(part.benchmark, data_dir, mode=wanted, required=part.required, figures=figures)


def _parts(names: Sequence[str]) -> list[Part]:
    """The benchmarks with what their verifiers need; one that is not registered here needs nothing that is known."""
    from gym_bus.benchmarks.collate import Part
    from gym_bus.benchmarks.spec import load_benchmark
    from gym_bus.verifiers.registry import VERIFIERS

    def part(benchmark: Benchmark) -> Part:
        verifier = benchmark.spec.verifier.name
        if verifier not in VERIFIERS:
            click.echo(f"{benchmark.spec.name}: no verifier {verifier!r} here: its row keys are not checked", err=True)
            return Part(benchmark)
        return Part(benchmark, tuple(VERIFIERS.load(verifier).required))

    return [part(load_benchmark(name)) for name in names]


def _plain(report: Report) -> dict[str, Any]:
    return msgspec.to_builtins(report, builtin_types=(), enc_hook=str)  # type: ignore[no-any-return]


def _print_reports(reports: Sequence[Report]) -> None:
    shown = common.table("data", "dataset", "rows", "errors", "warnings", "file")
    for report in reports:
        shown.add_row(
            report.dataset or report.path.name,
            f"{report.rows:,}",
            f"{report.errors:,}",
            f"{report.warnings:,}",
            str(report.path),
        )
    common.out.print(shown, soft_wrap=True)
    for report in reports:
        for finding in report.findings:
            click.echo(f"{finding.level}: {finding.what}")
        if more := report.errors + report.warnings - len(report.findings):
            click.echo(f"{report.path}: {more:,} more")


@command.command("collate")
@click.argument("benchmarks", nargs=-1, required=True, metavar="BENCHMARK...")
@mode_option
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=common.Choice(["train", "validation", "benchmark", "example"]),
    help="Only data of this type; may be repeated.",
)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True, help="Folder of the collated files.")
@click.option("--download", is_flag=True, help="Fetch what is missing from the registries that the benchmarks name.")
@click.option(
    "--data-source",
    type=common.Choice(["gitlab", "huggingface"]),
    default="huggingface",
    show_default=True,
    help="Which registry, where a dataset names both.",
)
@click.option("--overwrite-metrics-conflicts", is_flag=True, help="Write new figures over those in conflict with them.")
@data_dir_option
@common.config_option
@common.json_option
def collate(
    benchmarks: tuple[str, ...],
    mode: str | None,
    splits: tuple[str, ...],
    output_dir: Path,
    download: bool,
    data_source: str,
    overwrite_metrics_conflicts: bool,
    data_dir: Path | None,
    config_files: tuple[str, ...],
    as_json: bool,
) -> int:
    """Check the data of BENCHMARKs and write one file per kind of it for a trainer: train.jsonl, validation.jsonl, ...

    Rows have their prompt applied, are repeated as their dataset says, and carry the agent that they belong to. Where
    a row is broken, nothing is written. The mode is train_preparation, unless --mode says otherwise.
    """
    from gym_bus.benchmarks.collate import collate as collate_all
    from gym_bus.benchmarks.validate import Mode

    config = common.settings(config_files, ())
    wanted = splits or (Mode(mode) if mode else Mode.TRAIN_PREPARATION).types
    folder = data_dir or Path(config.data_dir)
    parts = _parts(benchmarks)
    if download:
        _download_missing(parts, folder, wanted, data_source, config)
    files, reports = collate_all(parts, folder, output_dir, types=wanted, overwrite=overwrite_metrics_conflicts)
    if as_json:
        files_shown = [msgspec.to_builtins(file, builtin_types=(), enc_hook=str) for file in files]
        common.print_json({"files": files_shown, "reports": [_plain(report) for report in reports]})
    else:
        _print_reports(reports)
        for file in files:
            click.echo(f"{file.path}: {file.rows:,} rows; their figures are in {file.metrics}")
    return FAILURES if any(report.errors for report in reports) else 0


def _download_missing(
    parts: Sequence[Part], data_dir: Path, types: Sequence[str], data_source: str, config: Config
) -> None:
    from gym_bus.benchmarks.collate import missing_data
    from gym_bus.benchmarks.stores import open_store, place_of

    for benchmark, dataset, path in missing_data(parts, data_dir, types):
        registries = dataset.registries
        if not registries:
            continue
        source = registries.get(data_source) or next(iter(registries.values()))
        storage, place = place_of(source, dataset.type)
        click.echo(f"{benchmark.spec.name}/{dataset.name}: fetching {place.name} from {storage}", err=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        open_store(storage, config.registry).download(place, path)


@command.command("render")
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="Rows without input.")
@click.option("--prompt-config", type=click.Path(path_type=Path), required=True, help="YAML with `user` and `system`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Rows with it.")
@common.json_option
def render(source: Path, prompt_config: Path, output: Path, as_json: bool) -> None:
    """Build each row's responses_create_params.input from a prompt; everything else in the row stays."""
    from gym_bus.benchmarks.render import render as render_file

    rows = render_file(source, prompt_config, output)
    if as_json:
        common.print_json({"file": str(output), "rows": rows})
    else:
        click.echo(f"{output}: {rows:,} rows")


@command.command("upload")
@storage_option
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="The rows (JSONL).")
@click.option("--name", "--repo-id", "name", default="", help="The data set; Hugging Face: owner/name.")
@click.option("--benchmark", help="Name it after this benchmark: PREFIX-DOMAIN-NAME.")
@version_option
@artifact_option
@click.option("--split", type=common.Choice(SPLITS), default="train", show_default=True, help="What the rows are for.")
@click.option("--create-pr", is_flag=True, help="Hugging Face: propose it in a pull request.")
@common.config_option
@common.json_option
def upload(
    storage: str,
    source: Path,
    name: str,
    benchmark: str | None,
    version: str,
    artifact: str,
    split: str,
    create_pr: bool,
    config_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Put a file of rows into a registry. Rows for training need responses_create_params."""
    from gym_bus.benchmarks.dataset import dataset_digest
    from gym_bus.benchmarks.stores import Place, Uploaded, check_rows, open_store

    config = common.settings(config_files, ())
    store = open_store(storage, config.registry)
    place = Place(name=name or _name_of(benchmark, config), version=version, file=artifact or source.name)
    rows = check_rows(source, train=split == "train")
    address = store.upload(source, place, create_pr=create_pr)
    done = Uploaded(
        name=place.name,
        version=version,
        file=place.file,
        rows=rows,
        sha256=dataset_digest(source),
        address=address,
    )
    if as_json:
        common.print_json(done)
    else:
        click.echo(f"{place.file}: {rows:,} rows, sha256 {done.sha256}, now at {address}")


def _name_of(benchmark: str | None, config: Config) -> str:
    if benchmark is None:
        raise UsageError("which data set? give --name, or --benchmark to name it after one")
    from gym_bus.benchmarks.spec import load_benchmark

    spec = load_benchmark(benchmark).spec
    return "-".join(part for part in (config.registry.hf_dataset_prefix, spec.domain, spec.name) if part)


@command.command("download")
@click.option(
    "--storage",
    type=common.Choice(["gitlab", "mlflow", "hf", "huggingface"]),
    help="GitLab's model registry or an MLflow server, or Hugging Face.",
)
@click.option("--name", "--repo-id", "name", default="", help="The data set; Hugging Face: owner/name.")
@click.option("--benchmark", help="The place that this benchmark's configuration names, into its data folder.")
@version_option
@artifact_option
@click.option("--split", help="Of --benchmark: the dataset, by type or name; else the file SPLIT.jsonl.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; default: the artifact's name.")
@click.option("--output-dir", type=click.Path(path_type=Path), help="The folder, where the name is to stay.")
@data_dir_option
@common.config_option
@common.json_option
def download(
    storage: str | None,
    name: str,
    benchmark: str | None,
    version: str,
    artifact: str,
    split: str | None,
    output: Path | None,
    output_dir: Path | None,
    data_dir: Path | None,
    config_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fetch a file of rows from a registry."""
    from gym_bus.benchmarks.dataset import dataset_digest
    from gym_bus.benchmarks.stores import Place, open_store

    config = common.settings(config_files, ())
    if benchmark is not None:
        storage, place, target = _configured(benchmark, split, storage, data_dir or Path(config.data_dir))
    elif storage is None or not name:
        raise UsageError("which data set? give --storage and --name, or --benchmark for the one that it names")
    else:
        place = Place(name=name, version=version, file=artifact or (f"{split}.jsonl" if split else ""))
        target = (output_dir or Path()) / (place.file or f"{name.rpartition('/')[2]}.jsonl")
    target = output or target
    target.parent.mkdir(parents=True, exist_ok=True)
    open_store(storage, config.registry).download(place, target)
    digest, rows = dataset_digest(target), _count(target)
    if as_json:
        common.print_json({"path": str(target), "rows": rows, "sha256": digest})
    else:
        click.echo(f"{target}: {rows:,} rows, sha256 {digest}")


def _configured(name: str, split: str | None, storage: str | None, data_dir: Path) -> tuple[str, Place, Path]:
    """The registry, the place in it and the local file of a benchmark's dataset."""
    from gym_bus.benchmarks.spec import data_path, load_benchmark
    from gym_bus.benchmarks.stores import STORAGES, place_of

    benchmark = load_benchmark(name)
    dataset = benchmark.dataset(split)
    registries = dataset.registries
    if not registries:
        raise UsageError(
            f"{benchmark.spec.name}/{dataset.name} names no registry (source, gitlab_identifier, "
            f"huggingface_identifier); is `gym-bus dataset prepare {name}` what you want?"
        )
    wanted = STORAGES[storage] if storage else next(iter(registries))
    if wanted not in registries:
        raise UsageError(f"{benchmark.spec.name}/{dataset.name} is not in {wanted}: {did_you_mean(wanted, registries)}")
    return *place_of(registries[wanted], dataset.type), data_path(benchmark, data_dir, dataset.name)


def _count(path: Path) -> int:
    from gym_bus.benchmarks.dataset import load_rows

    return sum(1 for _ in load_rows(path))


@command.command("rm")
@storage_option
@click.option("--name", "--repo-id", "name", required=True, help="The data set; Hugging Face: owner/name.")
@version_option
@artifact_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.config_option
@common.json_option
def rm(
    storage: str, name: str, version: str, artifact: str, yes: bool, config_files: tuple[str, ...], as_json: bool
) -> None:
    """Take a data set out of a registry; with --version or --artifact only that version or file of it."""
    from gym_bus.benchmarks.stores import Place, open_store

    config = common.settings(config_files, ())
    store = open_store(storage, config.registry)
    what = " ".join(part for part in (name, version, artifact) if part)
    if not yes and not sys.stdin.isatty():
        raise UsageError(f"{what} would be removed from {storage} for good: say --yes, for nobody can be asked here")
    if not yes and not click.confirm(f"remove {what} from {storage} for good?", err=True):
        click.echo("nothing is removed", err=as_json)
        return
    removed = store.remove(Place(name=name, version=version, file=artifact))
    if as_json:
        common.print_json({"storage": storage, "removed": removed})
    else:
        click.echo(f"{storage}: {removed} is removed")
