"""Jobs for other tools: Parquet files, Weights & Biases offline, MLflow's own client and store."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from jobfolder import write_job

from gym_bus.cli.eval import command as eval_command
from gym_bus.errors import FailureKind, UsageError
from gym_bus.results import export, load
from gym_bus.results.report.jobs import read_entries

REWARDS = [[1.0, 0.0], [1.0, 1.0], [0.0, FailureKind.MODEL_TIMEOUT]]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_job(tmp_path / "a", REWARDS)
    return tmp_path / "a"


def test_a_parquet_file_holds_what_the_frame_holds(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROWS", 4)  # of six: two parts
    write_job(tmp_path / "b", [[0.5]], model="other", row=lambda task: {"topic": "x"})

    rows = export.to_parquet([job, tmp_path / "b"], tmp_path / "all.parquet")

    read = pd.read_parquet(tmp_path / "all.parquet")
    frame = load([job, tmp_path / "b"], texts=True)
    assert rows == len(read) == 7
    assert set(read.columns) == set(frame.columns)
    pd.testing.assert_frame_equal(read[list(frame.columns)], frame, check_dtype=False, check_categorical=False)
    assert read["output_text"].tolist()[:2] == ["task 0 makes 0", "task 0 makes 1"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_parquet_file_can_do_without_texts(job: Path, tmp_path: Path) -> None:
    export.to_parquet([job], tmp_path / "a.parquet", texts=False)
    assert "output_text" not in pd.read_parquet(tmp_path / "a.parquet")


def test_a_parquet_file_that_cannot_be_written_is_an_error_that_names_it(job: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none/a\.parquet: cannot be written"):
        export.to_parquet([job], tmp_path / "none" / "a.parquet")


def test_the_numbers_for_trackers_are_scores_with_intervals_and_denominators(job: Path) -> None:
    (entry,) = read_entries([job])
    metrics = export.metrics_of(entry)
    assert metrics["pass_at_1"] == pytest.approx(0.5)
    assert metrics["pass_at_1_low"] < 0.5 < metrics["pass_at_1_high"]
    assert (metrics["pass_all_2"], metrics["pass_all_2_tasks"]) == (0.5, 2.0)
    assert (metrics["rollouts/expected"], metrics["rollouts/scored"]) == (6.0, 5.0)
    assert metrics["failed/model_timeout"] == 1.0
    assert metrics["mean/output_tokens"] == pytest.approx(10.8)


def records(file: Path) -> Iterator[bytes]:
    """What a `.wandb` file holds: seven bytes of heading, then the log format of LevelDB, blocks of 32 KiB."""
    data, at, held = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield held
            held = b""


def test_wandb_takes_a_job_offline(job: Path, tmp_path: Path) -> None:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = export.to_wandb([job], "project", offline=True, folder=tmp_path)
    wandb.teardown()  # its own process still writes; at the end of ours it would be waited for

    told: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for data in records(next(Path(folder).glob("*.wandb"))):
        record = Record.FromString(data)
        for item in (*record.summary.update, *record.history.item):
            told[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert told["pass_at_1"] == pytest.approx(0.5)
    assert told["rollouts/failed"] == 1
    assert (told["histogram/reward/_type"], sum(told["histogram/reward/values"])) == ("histogram", 5)
    assert told["tasks/nrows"] == 3
    assert (config["benchmark"], config["sampling"]) == ("arith", {"temperature": 0.5})


def test_mlflow_takes_a_job(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its servers are the usual place; this is its own store
    uri = (tmp_path / "store").as_uri()

    (first,) = export.to_mlflow([job], uri)
    export.to_mlflow([job], uri)

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("arith")
    assert len(client.search_runs([experiment.experiment_id])) == 2
    run = client.get_run(first)
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert run.data.metrics["pass_at_1"] == pytest.approx(0.5)
    assert run.data.metrics["failed/model_timeout"] == 1.0
    assert run.data.params["verifier"] == "math"


def test_an_mlflow_server_that_nobody_runs_is_an_error_at_once(job: Path) -> None:
    with pytest.raises(UsageError, match=r"--mlflow http://127\.0\.0\.1:9: cannot be reached: Connection refused"):
        export.to_mlflow([job], "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where to"),
        (["--parquet", "x", "--offline"], "--offline goes with --wandb"),
        (["--parquet", "x", "--experiment", "e"], "--experiment goes with --mlflow"),
    ],
)
def test_options_that_do_not_fit_are_refused(job: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(eval_command, ["export", str(job), *arguments])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)


def test_the_command_says_what_it_wrote(job: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(eval_command, ["export", str(job), "--parquet", str(tmp_path / "a.parquet"), "--json"])
    assert json.loads(done.stdout) == {"parquet": {"file": str(tmp_path / "a.parquet"), "rows": 6}}


def test_what_was_exported_is_told_in_words(job: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    done = CliRunner().invoke(eval_command, ["export", str(job), "--parquet", str(file)])
    assert done.stdout == f"{file}: 6 rows\n"
