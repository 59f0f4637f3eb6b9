"""`gym-bus dataset`: prepare data sets."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from gym_bus.cli import common


@click.group("dataset")
def command() -> None:
    """Prepare data sets."""


@command.command("prepare")
@click.argument("benchmarks", nargs=-1, required=True, metavar="BENCHMARK...")
@click.option("--source", type=click.Path(path_type=Path), help="Folder that has the published files.")
@click.option("--split", default="benchmark", show_default=True, help="The dataset, by type or name.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where to; default: data_dir of the configuration.")
@common.config_option
@common.json_option
def prepare(
    benchmarks: tuple[str, ...],
    source: Path | None,
    split: str,
    data_dir: Path | None,
    config_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write each BENCHMARK's rows: from its public source, or from the files in --source DIR."""
    from gym_bus.benchmarks.prepare import prepare as prepare_one
    from gym_bus.benchmarks.spec import load_benchmark

    config = common.settings(config_files, ())
    target = data_dir or Path(config.data_dir)
    done = [
        prepare_one(
            load_benchmark(name), target, which=split, source_dir=source, say=lambda text: click.echo(text, err=as_json)
        )
        for name in benchmarks
    ]
    if as_json:
        common.print_json([msgspec.to_builtins(p, builtin_types=(), enc_hook=str) for p in done])
