"""`gym-bus eval report|export`: jobs as a page to read, as a table, and in experiment trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from gym_bus.cli import common
from gym_bus.errors import UsageError

MiB = 1 << 20
path_type = click.Path(path_type=Path)


@click.command("report")
@click.argument("jobs", nargs=-1, required=True, type=path_type, metavar="FOLDER_OR_FILE...")
@click.option("--html", is_flag=True, help="As an HTML page; there is no other form yet, so it may be left out.")
@click.option("--output", type=path_type, help="The page; default: report.html, in the folder of the job if it is one.")
@click.option(
    "--by", metavar="FIELD", help="Row field that divides the tasks into subsets, such as difficulty or meta.level."
)
@click.option(
    "--transcripts",
    type=click.IntRange(0),
    default=2000,
    show_default=True,
    help="Rollouts to show in full, at most; the most telling ones are chosen.",
)
@common.json_option
def report(
    jobs: tuple[Path, ...], html: bool, output: Path | None, by: str | None, transcripts: int, as_json: bool
) -> int:
    """Write one page about one job, or about several side by side; it needs no network and no other file.

    Scores with intervals, rewards and lengths, every task, failures and what to do about them, where the time went, and
    transcripts to search in. From the files alone: also of a job that is running, and of NeMo Gym's runs.
    """
    from gym_bus.results.report.page import write_report

    written = write_report(jobs, output or _beside(jobs), by=by, transcripts=transcripts)
    if as_json:
        common.print_json(written)
        return 0
    click.echo(f"{written.output}: {written.size_bytes / MiB:.1f} MiB, jobs: {written.jobs}")
    click.echo(f"{written.transcripts:,} of {written.rollouts:,} rollouts are shown in full")
    return 0


def _beside(jobs: tuple[Path, ...]) -> Path:
    if len(jobs) > 1:
        return Path("report.html")
    (job,) = jobs
    return job.parent / f"{job.stem}_report.html" if job.is_file() else job / "report.html"


@click.command("export")
@click.argument("jobs", nargs=-1, required=True, type=path_type, metavar="FOLDER_OR_FILE...")
@click.option("--parquet", type=path_type, metavar="FILE", help="Every rollout as a row of one Parquet file.")
@click.option("--wandb", "project", metavar="PROJECT", help="Every job as a run of a Weights & Biases project.")
@click.option("--offline", is_flag=True, help="With --wandb: into ./wandb, for `wandb sync` later.")
@click.option("--mlflow", "uri", metavar="URI", help="Every job as a run on an MLflow server.")
@click.option("--experiment", metavar="NAME", help="With --mlflow: the experiment; default: the benchmark's name.")
@click.option("--no-texts", is_flag=True, help="With --parquet: leave out what was said to the model and by it.")
@common.json_option
def export(
    jobs: tuple[Path, ...],
    parquet: Path | None,
    project: str | None,
    offline: bool,
    uri: str | None,
    experiment: str | None,
    no_texts: bool,
    as_json: bool,
) -> int:
    """Export jobs: rollouts to Parquet, scores and settings to Weights & Biases or MLflow.

    Where a tracker finds its key is its own business: `wandb login`, or MLflow's settings.
    """
    if parquet is None and project is None and uri is None:
        raise UsageError("say where to: --parquet FILE, --wandb PROJECT, or --mlflow URI")
    if offline and project is None:
        raise UsageError("--offline goes with --wandb")
    if experiment is not None and uri is None:
        raise UsageError("--experiment goes with --mlflow")
    from gym_bus.results.export import to_mlflow, to_parquet, to_wandb

    done: dict[str, object] = {}
    if parquet is not None:
        done["parquet"] = {"file": str(parquet), "rows": to_parquet(jobs, parquet, texts=not no_texts)}
    if project is not None:
        done["wandb"] = to_wandb(jobs, project, offline=offline)
    if uri is not None:
        done["mlflow"] = to_mlflow(jobs, uri, experiment)
    if as_json:
        common.print_json(done)
    else:
        for line in _export_words(done):
            click.echo(line)
    return 0


def _export_words(done: Mapping[str, Any]) -> Iterator[str]:
    for where, what in done.items():
        if where == "parquet":
            yield f"{what['file']}: {what['rows']:,} rows"
        else:
            yield from (f"{where}: {run}" for run in what)
