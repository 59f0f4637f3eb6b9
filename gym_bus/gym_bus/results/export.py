"""Jobs for other tools: rollouts as a Parquet file, scores and settings as runs of Weights & Biases or MLflow."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from gym_bus.errors import UsageError
from gym_bus.results.extras import need
from gym_bus.results.files import JobFiles
from gym_bus.results.frame import PLACE, join, read_frame, with_texts
from gym_bus.results.report.jobs import Entry, read_entries

MOST_ROWS = 10_000
"""Tasks in the table that Weights & Biases gets; of more, the first."""
ROWS = 4096
"""Written to a Parquet file at once."""
MLFLOW_PARAMS, MLFLOW_METRICS, MLFLOW_CHARS = 100, 1000, 6000
"""What one call takes, and one parameter's value."""


def to_parquet(paths: Sequence[Path], file: Path, *, texts: bool = True) -> int:
    """Write every recorded rollout as one row of a Parquet file, columns as `gym_bus.results.load` has them.

    Memory: the columns without the long texts, and those of `ROWS` rollouts.

    Args:
        paths: folders of jobs, or rollouts files.
        file: the Parquet file; it appears when it is whole.
        texts: also what the model was told and what it said.

    Returns:
        The number of rows.

    Raises:
        UsageError: no rollouts there, the file cannot be written, or pandas or pyarrow is not installed.
        DataError: names file and line.
    """
    arrow, parquet = need("pyarrow", "analysis"), need("pyarrow.parquet", "analysis")
    jobs = [at for path in paths for at in JobFiles.all_at(path)]
    frames = [read_frame(files) for files in jobs]
    whole, lengths = join(frames), [len(frame) for frame in frames]
    schema = arrow.Schema.from_pandas(whole.drop(columns=[PLACE]), preserve_index=False).remove_metadata()
    for name in ("input_text", "output_text") if texts else ():
        schema = schema.append(arrow.field(name, arrow.string()))
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for files, part in _parts(jobs, lengths, whole):
                shown = with_texts(files, part) if texts else part
                writer.write_table(arrow.Table.from_pandas(shown[schema.names], schema=schema, preserve_index=False))
        temporary.replace(file)
    except OSError as e:
        raise UsageError(f"{file}: cannot be written: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(whole)


def _parts(jobs: Sequence[JobFiles], lengths: Sequence[int], whole: Any) -> Iterator[tuple[JobFiles, Any]]:
    """The rows of every job, some at a time."""
    start = 0
    for files, length in zip(jobs, lengths, strict=True):
        for at in range(start, start + length, ROWS):
            yield files, whole.iloc[at : min(at + ROWS, start + length)]
        start += length


def metrics_of(entry: Entry) -> dict[str, float]:
    """A job's numbers by name: scores as fractions with the ends of their 95 % intervals, and what they are over.

    Names hold only what every tracker takes: pass@4 is `pass_at_4`, pass^4 is `pass_all_4`.
    """
    counts = entry.counts
    metrics: dict[str, float | None] = {
        "rollouts/expected": counts.expected,
        "rollouts/scored": counts.scored,
        "rollouts/failed": counts.failed,
        "rollouts/pending": counts.pending,
        **{_name(f"failed/{kind}"): count for kind, count in counts.failed_by_class.items()},
    }
    for name, estimate in entry.estimates.items():
        key = _name(name)
        metrics |= {key: estimate.mean, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
        metrics[f"{key}_tasks"] = estimate.tasks
    metrics |= {_name(name): value for name, value in entry.votes.items()}
    scored = entry.frame[entry.frame["outcome"] == "scored"]
    metrics |= {f"mean/{name}": scored[name].mean() for name in ("reward", "input_tokens", "output_tokens", "agent_s")}
    metrics["mean/verify_s"] = scored["verify_s"].mean()
    return {name: float(value) for name, value in metrics.items() if value is not None and value == value}


def _name(metric: str) -> str:
    return re.sub(r"[^\w.\-/]", "_", metric.replace("pass^", "pass_all_").replace("@", "_at_"))


def settings_of(entry: Entry) -> dict[str, Any]:
    """What a job is: its manifest and sampling parameters, or what a run of NeMo Gym tells."""
    manifest = msgspec.to_builtins(entry.manifest) if entry.manifest else {"model": entry.model}
    return {**manifest, "sampling": entry.sampling, "files": str(entry.files.rollouts)}


def to_wandb(paths: Sequence[Path], project: str, *, offline: bool = False, folder: Path | None = None) -> list[str]:
    """Log every job as a run of a Weights & Biases project: settings, scores, histograms, and a table of the tasks.

    Args:
        paths: folders of jobs, or rollouts files.
        project: its name; it is made where there is none.
        offline: write the runs to the disk only; `wandb sync` sends them.
        folder: where the folder `wandb` with the local copies goes; the working directory by default.

    Returns:
        Where every run is: its address, or its folder.

    Raises:
        UsageError: wandb is not installed, refuses, or has nobody logged in.
    """
    wandb = need("wandb", "export")
    try:
        return [_log_to_wandb(wandb, entry, project, offline, folder) for entry in read_entries(paths)]
    except (wandb.errors.Error, wandb.errors.UsageError) as e:
        raise UsageError(f"--wandb {project}: {e}") from None


def _log_to_wandb(wandb: Any, entry: Entry, project: str, offline: bool, folder: Path | None) -> str:
    run = wandb.init(
        project=project,
        name=entry.label,
        group=entry.benchmark or None,
        job_type="eval",
        config=settings_of(entry),
        mode="offline" if offline else "online",
        dir=folder,
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True),
        reinit="finish_previous",
    )
    with run:
        scored = entry.frame[entry.frame["outcome"] == "scored"]
        histograms = {
            name: wandb.Histogram(values)
            for name in ("reward", "output_tokens", "agent_s", "verify_s")
            if len(values := scored[name].dropna().to_numpy())
        }
        table = wandb.Table(columns=["task_index", "mean_reward", "scored", "expected"], data=list(_task_rows(entry)))
        run.log({**{f"histogram/{name}": histogram for name, histogram in histograms.items()}, "tasks": table})
        run.summary.update(metrics_of(entry))
        return str(Path(run.dir).parent) if offline else str(run.url)


def _task_rows(entry: Entry) -> Iterator[list[Any]]:
    table = entry.table
    columns = (table.tasks, entry.task_means, table.task_scored, table.task_expected)
    rows = zip(*(column[:MOST_ROWS].tolist() for column in columns), strict=True)
    return ([task, None if mean != mean else mean, scored, expected] for task, mean, scored, expected in rows)


def to_mlflow(paths: Sequence[Path], uri: str, experiment: str | None = None) -> list[str]:
    """Log every job as a run of an MLflow experiment: settings as parameters, scores as metrics.

    Args:
        paths: folders of jobs, or rollouts files.
        uri: of the tracking server, such as `http://127.0.0.1:5000`.
        experiment: its name; the benchmark's by default. It is made where there is none.

    Returns:
        The id of every run.

    Raises:
        UsageError: MLflow is not installed, cannot be reached, or refuses.
    """
    tracking = need("mlflow", "export")
    _reach(uri)
    try:
        client = tracking.MlflowClient(tracking_uri=uri)
        return [
            _log_to_mlflow(client, entry, experiment or entry.benchmark or "gym_bus") for entry in read_entries(paths)
        ]
    except tracking.exceptions.MlflowException as e:
        raise UsageError(f"--mlflow {uri}: {e}") from None


def _reach(uri: str) -> None:
    """Fail at once where nobody listens: MLflow's own client would try for minutes."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https") or not address.hostname:
        return
    try:
        socket.create_connection(
            (address.hostname, address.port or (443 if address.scheme == "https" else 80)), 10
        ).close()
    except OSError as e:
        raise UsageError(f"--mlflow {uri}: cannot be reached: {e.strerror or e}") from None


def _log_to_mlflow(client: Any, entry: Entry, experiment: str) -> str:
    entities = need("mlflow.entities", "export")
    known = client.get_experiment_by_name(experiment)
    where = known.experiment_id if known else client.create_experiment(experiment)
    run = client.create_run(
        where, run_name=entry.label, tags={"gym_bus.job": entry.manifest.job if entry.manifest else ""}
    )
    now = int(1000 * time.time())
    params = [entities.Param(key, _plain(value)) for key, value in settings_of(entry).items()]
    metrics = [entities.Metric(key, value, now, 0) for key, value in metrics_of(entry).items()]
    run_id = str(run.info.run_id)
    client.log_batch(run_id, params=params[:MLFLOW_PARAMS], metrics=metrics[:MLFLOW_METRICS])
    with redirect_stdout(sys.stderr):  # it greets
        client.set_terminated(run_id)
    return run_id


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text[:MLFLOW_CHARS]
