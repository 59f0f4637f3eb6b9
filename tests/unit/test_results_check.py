"""Reading a job's files back: whole ones pass, and whatever was done to them is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gym_bus.errors import FailureKind
from gym_bus.messages import Failed, Failure, Policy, RolloutId, Scored
from gym_bus.results.check import Findings, Standing, check_files
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest
from gym_bus.results.profile import profile_job
from gym_bus.results.writer import ResultsWriter

JOB, TASKS, REPEATS = "job-1", 3, 2


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    """A complete job: 0/0 was scored by its second attempt, 2/1 failed twice."""
    files = JobFiles(tmp_path)
    inputs = [
        b'{"q":%d,"_ng_task_index":%d,"_ng_rollout_index":%d}\n' % (task, task, rollout)
        for task in range(TASKS)
        for rollout in range(REPEATS)
    ]
    files.inputs.write_bytes(b"".join(inputs))
    with ResultsWriter(files, JOB, TASKS, REPEATS) as writer:
        writer.append([(1, failed(0, 0)), (2, failed(2, 1)), (3, scored(0, 0, number=2))])
        rest = [scored(*divmod(place, REPEATS)) for place in range(1, 5)]
        writer.append([*enumerate(rest, start=4), (9, failed(2, 1, 2))])
    manifest(files).save(files.manifest)
    profile_job(files)
    return files


def manifest(files: JobFiles) -> Manifest:
    return Manifest(
        job=JOB,
        created_at=0.0,
        benchmark="b",
        dataset_digest=hashlib.sha256(files.inputs.read_bytes()).hexdigest(),
        rows=TASKS,
        num_repeats=REPEATS,
        agent="simple",
        model="m",
        model_kind="simulated",
        model_name="m",
        verifier="mcqa",
        config_digest="c",
        gym_bus_version="0",
    )


def scored(task: int, rollout: int, number: int = 1) -> Scored:
    return Scored(
        rollout=RolloutId(JOB, task, rollout),
        number=number,
        agent="simple",
        verifier="mcqa",
        reward=0.5,
        row=b'{"q":1}',
        response=b'{"output":[]}',
        policy=Policy(model="m"),
    )


def failed(task: int, rollout: int, number: int = 1) -> Failed:
    failure = Failure(kind=FailureKind.MODEL_ERROR, detail="500", stage="agent")
    return Failed(rollout=RolloutId(JOB, task, rollout), number=number, failure=failure, row=b'{"q":1}')


def found_in(files: JobFiles, *, being_written: bool = False) -> list[tuple[str, str, list[str]]]:
    findings = Findings()
    check_files(files, Manifest.load(files.manifest), findings, being_written=being_written)
    return [(finding.check, finding.what, finding.examples) for finding in findings.all()]


def test_whole_files_add_up(files: JobFiles) -> None:
    findings = Findings()
    book = check_files(files, Manifest.load(files.manifest), findings, being_written=False)

    assert findings.all() == []
    assert [book.count(standing) for standing in (Standing.SCORED, Standing.FAILED, Standing.MISSING)] == [5, 1, 0]
    assert (book.failed(), int(book.number[0]), int(book.sequence[0])) == ({"model_error": 1}, 2, 3)


def rewritten(path: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def with_first(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda rows: [{**rows[0], **changes}, *rows[1:]]


def with_ours(place: int, **changes: Any) -> Callable[[list[Any]], list[Any]]:
    def change(rows: list[Any]) -> list[Any]:
        rows[place]["gym_bus"] |= changes
        return rows

    return change


@pytest.mark.parametrize(
    ("file", "change", "check", "what", "example"),
    [
        ("inputs", lambda rows: rows[:-1], "inputs", "not those that the job was", "SHA-256"),
        ("inputs", lambda rows: [*rows[:2], *rows[3:]], "inputs", "incomplete", "no line for 1/0"),
        ("inputs", lambda rows: [*rows, rows[0]], "inputs", "cannot be read", ":7: a second line"),
        (
            "rollouts",
            lambda rows: [*rows, rows[1]],
            "rollouts",
            "a second line",
            "rollouts.jsonl:6: 0/1, first on line 2",
        ),
        ("rollouts", with_first(_ng_task_index=7), "rollouts", "no rollout of this job", "rollouts.jsonl:1: 7/0"),
        ("rollouts", with_first(reward=None), "rollouts", "not a result", "rollouts.jsonl:1"),
        ("rollouts", with_first(_ng_failure_class="poison"), "rollouts", "no scored rollout", "rollouts.jsonl:1: 0/0"),
        ("rollouts", with_ours(0, job="other"), "rollouts", "another job", "rollouts.jsonl:1: other"),
        ("rollouts", with_ours(0, attempt=0), "rollouts", "scored by an older attempt", "0/0, scored by attempt 0"),
        ("failures", with_first(reward=0.0), "failures", "a failure with a reward", "failures.jsonl:1: 0/0"),
        ("failures", with_first(_ng_failure_class="bad"), "failures", "unknown failure class", "0/0, 'bad'"),
        ("failures", with_ours(2, attempt=1), "failures", "a second line for an attempt", "2/1, attempt 1"),
        ("failures", with_ours(2, history=[]), "failures", "a history that is not the file's", "has 1, 2"),
        ("profile", with_first(num_rollouts=1), "profile", "not what the rollouts say", ":1: num_rollouts is 1"),
        ("profile", lambda rows: rows[:-1], "profile", "not what the rollouts say", ":3: it is null"),
    ],
)
def test_what_does_not_add_up_is_named(
    files: JobFiles, file: str, change: Callable[[list[Any]], list[Any]], check: str, what: str, example: str
) -> None:
    rewritten(getattr(files, file), change)

    found = found_in(files)

    assert any(check == c and what in w and any(example in e for e in examples) for c, w, examples in found), found


def test_a_wrong_metric_is_named(files: JobFiles) -> None:
    metrics = json.loads(files.aggregate.read_text())
    metrics[0]["agent_metrics"]["mean/reward"] = 0.75
    files.aggregate.write_text(json.dumps(metrics))

    ((_, _, (example,)),) = found_in(files)

    assert "0.agent_metrics.mean/reward is 0.75, the rollouts say 0.5" in example


def test_many_findings_of_a_kind_are_one_with_the_first_few(files: JobFiles) -> None:
    rewritten(files.rollouts, lambda rows: rows * 20)
    findings = Findings()

    check_files(files, Manifest.load(files.manifest), findings, being_written=False)

    doubles = next(finding for finding in findings.all() if finding.what == "a second line")
    assert (doubles.count, len(doubles.examples)) == (95, 10)


def test_a_line_on_its_way_is_nothing_to_complain_of(files: JobFiles) -> None:
    with files.rollouts.open("ab") as file:
        file.write(b'{"half a li')

    assert found_in(files, being_written=True) == []
    ((check, what, _),) = found_in(files)
    assert (check, what) == ("rollouts", "a torn last line; the next run cuts it")
