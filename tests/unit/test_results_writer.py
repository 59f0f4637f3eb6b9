"""The results writer: once per rollout, durable, and never at a loss about what its own files say."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gym_bus.errors import DataError, FailureKind, UsageError
from gym_bus.messages import Call, Failed, Failure, Policy, Result, RolloutId, Scored, Usage
from gym_bus.results.files import JobFiles
from gym_bus.results.ledger import Anchor, State
from gym_bus.results.writer import ResultsWriter

JOB, TASKS, REPEATS = "job-1", 3, 2


def scored(task: int, index: int, reward: float = 1.0, **changes: Any) -> Scored:
    defaults: dict[str, Any] = {
        "rollout": RolloutId(JOB, task, index),
        "agent": "simple",
        "verifier": "mcqa",
        "reward": reward,
        "row": b'{"question": "\xc3\xa9?"}',
        "response": b'{"output": []}',
        "policy": Policy(model="small"),
        "usage": Usage(input_tokens=10, output_tokens=5),
    }
    return Scored(**(defaults | changes))


def failed(task: int, index: int, number: int = 1, **changes: Any) -> Failed:
    defaults: dict[str, Any] = {
        "rollout": RolloutId(JOB, task, index),
        "number": number,
        "failure": Failure(kind=FailureKind.MODEL_TIMEOUT, detail="late"),
        "row": b'{"question": "?"}',
        "usage": Usage(input_tokens=10),
    }
    return Failed(**(defaults | changes))


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    return JobFiles(tmp_path / "out")


def open_writer(files: JobFiles, **changes: Any) -> ResultsWriter:
    arguments: dict[str, Any] = {"job": JOB, "tasks": TASKS, "repeats": REPEATS}
    return ResultsWriter(files, **(arguments | changes))


def write(files: JobFiles, *results: Result) -> None:
    with open_writer(files) as writer:
        writer.append(list(enumerate(results, start=1)))


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def keys_of(path: Path) -> list[tuple[int, int]]:
    return [(line["_ng_task_index"], line["_ng_rollout_index"]) for line in lines_of(path)]


def test_scored_and_failed_results_go_to_their_files(files: JobFiles) -> None:
    results: list[Result] = [scored(0, 0), failed(0, 1), scored(2, 1, reward=0.0)]

    with open_writer(files) as writer:
        recorded = writer.append(list(enumerate(results, start=10)))

        assert recorded == results
        assert keys_of(files.rollouts) == [(0, 0), (2, 1)]
        assert keys_of(files.failures) == [(0, 1)]
        assert writer.ledger.anchor == Anchor(12, RolloutId(JOB, 2, 1))


def test_counters_follow_what_is_recorded(files: JobFiles) -> None:
    with open_writer(files) as writer:
        writer.append([(1, scored(0, 0, reward=0.5)), (2, failed(0, 1)), (3, scored(1, 0)), (4, scored(1, 0))])
        tally = writer.ledger.tally

        assert (tally.scored, dict(tally.failed), tally.reward_sum) == (2, {"model_timeout": 1}, 1.5)
        assert (tally.input_tokens, tally.output_tokens, tally.repeats) == (30, 10, 1)
        np.testing.assert_array_equal(writer.ledger.rewards(), [[0.5, np.nan], [1.0, np.nan], [np.nan, np.nan]])


def test_a_scored_rollout_stays_as_it_is(files: JobFiles) -> None:
    with open_writer(files) as writer:
        writer.append([(1, scored(0, 0, reward=1.0))])

        recorded = writer.append([(2, scored(0, 0, reward=0.0)), (3, scored(0, 0, number=9)), (4, failed(0, 0, 2))])

        assert recorded == []
        assert writer.ledger.tally.repeats == 3
    assert [line["reward"] for line in lines_of(files.rollouts)] == [1.0]
    assert lines_of(files.failures) == []


@pytest.mark.parametrize(
    ("later", "is_recorded"),
    [
        (scored(0, 0, number=1), False),
        (scored(0, 0, number=2), True),
        (scored(0, 0, number=3), True),
        (failed(0, 0, number=1), False),
        (failed(0, 0, number=2), False),
        (failed(0, 0, number=3), True),
    ],
)
@pytest.mark.parametrize("how", ["same batch", "next batch", "after a restart"])
def test_after_a_failure_only_what_is_not_older_counts(
    files: JobFiles, later: Result, is_recorded: bool, how: str
) -> None:
    first: tuple[int, Result] = (1, failed(0, 0, number=2))
    writer = open_writer(files)
    if how == "same batch":
        recorded = writer.append([first, (2, later)])[1:]
    else:
        writer.append([first])
        if how == "after a restart":
            writer.close()
            writer = open_writer(files)
        recorded = writer.append([(2, later)])
    state, tally = writer.ledger.state(later.rollout), writer.ledger.tally
    writer.close()

    assert recorded == ([later] if is_recorded else [])
    assert len(lines_of(files.failures)) == 1 + (is_recorded and isinstance(later, Failed))
    if is_recorded and isinstance(later, Scored):
        assert (state, tally.scored, dict(tally.failed)) == (State.SCORED, 1, {})
    else:
        assert (state, tally.scored, dict(tally.failed)) == (State.FAILED, 0, {"model_timeout": 1})


def test_the_class_of_a_failure_is_that_of_its_newest_attempt(files: JobFiles) -> None:
    lost = failed(0, 0, 2, failure=Failure(kind=FailureKind.SANDBOX_LOST, detail="died", terminal=True))
    write(files, failed(0, 0, 1), lost)

    with open_writer(files) as writer:
        assert dict(writer.ledger.tally.failed) == {"sandbox_lost": 1}
        assert [(r, f[:3]) for r, f in writer.ledger.failures()] == [(RolloutId(JOB, 0, 0), ("sandbox_lost", 2, True))]


@pytest.mark.parametrize(
    "stranger",
    [
        scored(TASKS, 0),
        scored(0, REPEATS),
        scored(-1, 0),
        failed(0, -1),
        scored(0, 0, rollout=RolloutId("job-2", 0, 0)),
    ],
)
def test_a_result_of_no_rollout_of_the_job_is_refused_and_counted(files: JobFiles, stranger: Result) -> None:
    ours = scored(0, 0)

    with open_writer(files) as writer:
        assert writer.append([(1, stranger), (2, ours), (3, stranger)]) == [ours]
        assert writer.ledger.tally.refused == 2
    assert keys_of(files.rollouts) == [(0, 0)]
    assert lines_of(files.failures) == []


def test_a_result_that_is_not_json_becomes_a_failure_and_the_others_are_recorded(files: JobFiles) -> None:
    with open_writer(files) as writer:
        recorded = writer.append([(1, scored(0, 0, response=b"{oops")), (2, scored(0, 1))])

        assert [type(result) for result in recorded] == [Failed, Scored]
        assert writer.ledger.state(RolloutId(JOB, 0, 0)) is State.FAILED
    (line,) = lines_of(files.failures)
    assert line["_ng_failure_class"] == "poison"
    assert "response is not JSON" in line["_ng_failure_detail"]
    assert "reward" not in line


def test_what_is_missing_can_be_listed(files: JobFiles) -> None:
    write(files, scored(0, 1), failed(1, 0), scored(2, 0))

    with open_writer(files) as writer:
        assert list(writer.ledger.missing()) == [RolloutId(JOB, *key) for key in [(0, 0), (1, 1), (2, 1)]]


def test_a_reopened_writer_knows_what_the_closed_one_knew(files: JobFiles) -> None:
    with open_writer(files) as writer:
        writer.append([(7, scored(0, 0, reward=0.25)), (9, failed(0, 1)), (8, scored(1, 1))])
        before = writer.ledger

    with open_writer(files) as writer:
        after = writer.ledger
        assert writer.torn == []
    assert after.tally == before.tally
    assert after.anchor == before.anchor == Anchor(9, RolloutId(JOB, 0, 1))
    np.testing.assert_array_equal(after.rewards(), before.rewards())
    assert list(after.missing()) == list(before.missing())


RESULTS: list[Result] = [scored(0, 0), scored(0, 1, reward=0.0), scored(1, 0), failed(1, 1), failed(2, 0), failed(2, 1)]


@pytest.mark.parametrize("name", ["rollouts", "failures"])
def test_a_file_cut_anywhere_is_mended_and_filled_up_again(files: JobFiles, tmp_path: Path, name: str) -> None:
    write(files, *RESULTS)
    path: Path = getattr(files, name)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]

    near = {end + by for end in ends for by in (-1, 0, 1)}
    for size in sorted(size for size in {*range(ends[0], len(whole), 7), *near} if ends[0] <= size <= len(whole)):
        copy = JobFiles(tmp_path / f"cut-{size}")
        shutil.copytree(files.folder, copy.folder)
        cut: Path = getattr(copy, name)
        os.truncate(cut, size)
        kept = sum(end <= size for end in ends)

        with open_writer(copy) as writer:
            rest = cut.read_bytes()
            torn_bytes = [torn.size_bytes for torn in writer.torn]
            recorded = writer.append(list(enumerate(RESULTS, start=1)))

        assert rest == whole[: ends[kept - 1]]
        assert torn_bytes == ([size - ends[kept - 1]] if size not in ends else [])
        assert len(recorded) == len(ends) - kept
        assert cut.read_bytes() == whole
        shutil.rmtree(copy.folder)


@pytest.mark.parametrize("tail", [b'{"_ng_task_index": 0\n', b"\x00" * 4096, b"{}", b'{"a": "\xff', b"garbage\n"])
def test_a_last_line_that_is_no_line_is_cut_and_reported(files: JobFiles, tail: bytes) -> None:
    write(files, scored(0, 0))
    whole = files.rollouts.read_bytes()
    files.rollouts.write_bytes(whole + tail)

    with open_writer(files) as writer:
        (torn,) = writer.torn

    assert torn == (files.rollouts, 2, len(tail))
    assert files.rollouts.read_bytes() == whole


def line_of(**fields: Any) -> bytes:
    line = {"_ng_task_index": 0, "_ng_rollout_index": 0, "reward": 1.0, "gym_bus": {"job": JOB}}
    return json.dumps({key: value for key, value in (line | fields).items() if value is not None}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{broken\n" + line_of(), "rollouts.jsonl:1: not valid JSON"),
        (line_of() + b"\n\nnope\n" + line_of(_ng_rollout_index=1), "rollouts.jsonl:4: not valid JSON"),
        (line_of(_ng_task_index=None), "rollouts.jsonl:1: .*_ng_task_index"),
        (line_of(reward=None), "rollouts.jsonl:1: .*reward"),
        (line_of(gym_bus=None), "rollouts.jsonl:1: .*gym_bus"),
        (line_of() + line_of(_ng_task_index=TASKS), "rollouts.jsonl:2: task 3, rollout 0 .* not one of job 'job-1'"),
        (line_of(gym_bus={"job": "job-2"}), "rollouts.jsonl:1: .*'job-2'.*another output folder"),
        (line_of() + line_of(), "rollouts.jsonl:2: a second line for task 0, rollout 0"),
        (b"[1]\n", "rollouts.jsonl:1: "),
    ],
)
def test_a_file_that_is_not_this_jobs_is_refused_by_line_and_left_alone(
    files: JobFiles, content: bytes, complaint: str
) -> None:
    files.folder.mkdir()
    files.rollouts.write_bytes(content)

    for _ in range(2):  # the second time shows that the lock was released
        with pytest.raises(DataError, match=complaint):
            open_writer(files)
    assert files.rollouts.read_bytes() == content


def test_a_second_writer_is_told_who_the_first_is(files: JobFiles) -> None:
    with open_writer(files), pytest.raises(UsageError, match=f"process {os.getpid()} on host .*choose another"):
        open_writer(files)
    open_writer(files).close()


def test_the_holder_of_a_lock_without_a_name_is_another_process(files: JobFiles) -> None:
    with open_writer(files):
        files.lock.write_bytes(b"")
        with pytest.raises(UsageError, match="another process"):
            open_writer(files)


@contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """The kernel lets no file grow beyond this size: as on a full disk, the first part of a write goes through."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("full", ["rollouts", "failures"])
def test_a_full_disk_records_nothing_and_tears_nothing(files: JobFiles, full: str) -> None:
    large = b'{"question": "%s"}' % (b"x" * 20_000)
    batch: list[tuple[int, Result]] = (
        [(3, scored(1, 0, row=large)), (4, failed(1, 1))]
        if full == "rollouts"
        else [(3, scored(1, 0)), (4, failed(1, 1, row=large))]
    )
    with open_writer(files) as writer:
        writer.append([(1, scored(0, 0)), (2, failed(0, 1))])
        before = files.rollouts.read_bytes(), files.failures.read_bytes()

        with files_limited_to(8192), pytest.raises(UsageError, match=f"{getattr(files, full).name}.*make room"):
            writer.append(batch)

        assert (files.rollouts.read_bytes(), files.failures.read_bytes()) == before
        assert writer.ledger.tally.scored == 1
        assert len(writer.append(batch)) == 2
    with open_writer(files) as writer:
        assert (writer.ledger.tally.scored, writer.torn) == (2, [])


def test_a_file_that_somebody_else_changed_is_not_written(files: JobFiles) -> None:
    with open_writer(files) as writer:
        writer.append([(1, scored(0, 0))])
        with files.rollouts.open("ab") as other:
            other.write(b"half a li")

        with pytest.raises(UsageError, match="changed by somebody else"):
            writer.append([(2, scored(0, 1))])
    with open_writer(files) as writer:
        assert [torn.size_bytes for torn in writer.torn] == [9]


@pytest.mark.parametrize("blocked", ["folder", "lock", "rollouts", "failures"])
def test_an_output_that_cannot_be_opened_is_named(files: JobFiles, blocked: str) -> None:
    path: Path = getattr(files, blocked)
    if blocked == "folder":
        path.write_text("a file")
    else:
        path.mkdir(parents=True)

    for _ in range(2):
        with pytest.raises(UsageError, match=path.name):
            open_writer(files)


def test_tasks_may_differ_in_their_rollouts_and_leave_gaps(files: JobFiles) -> None:
    spans = [(1, 2, 2), (4, 1, 1)]  # tasks 1 and 2 with two rollouts each, task 4 with one
    expected = [(1, 0), (1, 1), (2, 0), (2, 1), (4, 0)]

    with open_writer(files, tasks=5, spans=spans) as writer:
        missing = list(writer.ledger.missing())
        assert writer.ledger.missing_count == 5
        assert len(writer.append([(1, scored(4, 1)), (2, scored(0, 0)), (3, scored(4, 0))])) == 1

    assert missing == [RolloutId(JOB, *key) for key in expected]
    assert keys_of(files.rollouts) == [(4, 0)]
    with pytest.raises(DataError, match=r"task 4, rollout 0 .* is not one of job"):
        open_writer(files, tasks=5, spans=[(0, 4, 2)])


def unable(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def test_a_torn_line_that_cannot_be_cut_is_named(files: JobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    write(files, scored(0, 0))
    with files.rollouts.open("ab") as file:
        file.write(b"torn")

    with monkeypatch.context() as broken, pytest.raises(UsageError, match=r"rollouts\.jsonl: its torn last line"):
        broken.setattr("gym_bus.results.appendfile.os.ftruncate", fail_on(files.rollouts))
        open_writer(files)
    with open_writer(files) as writer:
        assert len(writer.torn) == 1


def fail_on(path: Path) -> Any:
    """An `ftruncate` that fails for one file."""
    real = os.ftruncate

    def ftruncate(fd: int, size: int) -> None:
        if os.path.samestat(os.fstat(fd), path.stat()):
            unable()
        real(fd, size)

    return ftruncate


def test_after_a_write_that_could_not_be_taken_back_nothing_more_is_written(
    files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = scored(0, 0, row=b'{"question": "%s"}' % (b"x" * 20_000))
    with open_writer(files) as writer:
        with monkeypatch.context() as broken, files_limited_to(8192), pytest.raises(UsageError, match="make room"):
            broken.setattr("gym_bus.results.appendfile.os.ftruncate", unable)
            writer.append([(1, large)])

        with pytest.raises(UsageError, match="not mended after a failed write"):
            writer.append([(1, large)])
    with open_writer(files) as writer:
        assert [torn.size_bytes for torn in writer.torn] == [8192]
        assert len(writer.append([(1, large)])) == 1


def test_a_sync_that_fails_takes_the_whole_batch_back(files: JobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(files) as writer:
        with monkeypatch.context() as broken, pytest.raises(UsageError, match="Input/output error"):
            broken.setattr("gym_bus.results.appendfile.os.fdatasync", unable)
            writer.append([(1, scored(0, 0)), (2, failed(0, 1))])

        assert (files.rollouts.read_bytes(), files.failures.read_bytes()) == (b"", b"")
        assert len(writer.append([(1, scored(0, 0)), (2, failed(0, 1))])) == 2


def test_a_file_system_without_locks_is_named(files: JobFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_bus.results.lock.fcntl.flock", unable)

    with pytest.raises(UsageError, match=r"\.lock: cannot be locked: Input/output error"):
        open_writer(files)


@pytest.mark.parametrize("how", ["one batch", "two batches", "after a restart"])
def test_every_failed_line_carries_the_history_of_its_rollout(files: JobFiles, how: str) -> None:
    first, second, last = failed(0, 0), failed(0, 0, 2, published_at=9.0), scored(0, 0, number=3)
    batches = (
        [[(1, first), (2, second), (3, last)]] if how == "one batch" else [[(1, first)], [(2, second)], [(3, last)]]
    )
    writer = open_writer(files)
    for batch in batches:
        writer.append(batch)
        if how == "after a restart":
            writer.close()
            writer = open_writer(files)
    writer.close()

    told = [[past["attempt"] for past in line["gym_bus"]["history"]] for line in lines_of(files.failures)]
    assert told == [[1], [1, 2]]
    (line,) = lines_of(files.rollouts)
    assert [(past["attempt"], past["class"]) for past in line["gym_bus"]["history"]] == [
        (1, "model_timeout"),
        (2, "model_timeout"),
    ]


def test_a_failure_without_its_row_gets_it_from_the_inputs(files: JobFiles) -> None:
    files.folder.mkdir()
    rows = [b'{"question":"%d","_ng_task_index":%d,"_ng_rollout_index":0}\n' % (i, i) for i in range(2)]
    files.inputs.write_bytes(b"".join(rows))

    write(files, failed(1, 0, row=b"{}"), failed(2, 0, row=b"{}"), failed(0, 0))

    assert [line.get("question") for line in lines_of(files.failures)] == ["1", None, "?"]


def test_an_answer_stays_at_hand_until_generation_is_made_again(files: JobFiles) -> None:
    lost = Failure(kind=FailureKind.SANDBOX_LOST, detail="gone", stage="verifier")
    cancelled = Failure(kind=FailureKind.CANCELLED, detail="by hand", stage="bus")
    refused = Failure(kind=FailureKind.MODEL_ERROR, detail="500", stage="agent")
    answer = b'{"output":["' + b"x" * 100_000 + b'"]}'
    write(
        files,
        failed(0, 0, failure=lost, response=answer),
        failed(0, 0, 2, failure=cancelled),
        failed(1, 0, failure=lost, response=answer),
        failed(1, 0, 2, failure=refused),
        failed(2, 0, failure=refused),
    )

    with open_writer(files) as writer:
        kept = [writer.stored_line(RolloutId(JOB, task, 0)) for task in range(3)]
        writer.append([(9, failed(2, 0, 2, failure=lost, response=answer)), (10, scored(2, 0, number=3))])
        scored_since = writer.stored_line(RolloutId(JOB, 2, 0))

    assert kept[0] is not None
    assert json.loads(kept[0])["gym_bus"]["attempt"] == 1
    assert (kept[1:], scored_since) == ([None, None], None)


def test_an_empty_batch_writes_nothing(files: JobFiles) -> None:
    with open_writer(files) as writer:
        assert writer.append([]) == []
    assert files.rollouts.read_bytes() == b""


def test_tokens_are_written_where_they_are_asked_for(files: JobFiles) -> None:
    call = Call(prompt_token_ids=b"\1\0\0\0", token_ids=b"\2\0\0\0", logprobs=b"\0\0\0\0")
    with open_writer(files, tokens=True) as writer:
        writer.append([(1, scored(0, 0, response=b'{"output": [{"type": "message"}]}', calls=(call,)))])

    (line,) = lines_of(files.rollouts)
    assert line["response"]["output"][0]["generation_token_ids"] == [2]


ENDLESS = """
import sys
from pathlib import Path
from gym_bus.messages import Policy, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.writer import ResultsWriter

row = b'{"question": "' + b"x" * 3000 + b'"}'
with ResultsWriter(JobFiles(Path(sys.argv[1])), "job-1", 100_000, 1) as writer:
    for start in range(0, 100_000, 16):
        rollouts = [RolloutId("job-1", start + i, 0) for i in range(16)]
        policy = Policy(model="m")
        writer.append([
            (at, Scored(rollout=r, agent="a", verifier="v", reward=1.0, row=row, response=b"{}", policy=policy))
            for at, r in enumerate(rollouts, start)
        ])
        print(start + 16, flush=True)
"""


def test_what_was_appended_before_kill_9_is_there_after_it(files: JobFiles) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(files.folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        acknowledged = 0
        while acknowledged < 160:
            acknowledged = int(process.stdout.readline())
        process.kill()
        acknowledged = max(acknowledged, *(int(line) for line in process.stdout.read().split()), 0)

    with open_writer(files, tasks=100_000, repeats=1) as writer:
        assert writer.ledger.tally.scored >= acknowledged
        assert next(writer.ledger.missing()).task_index == writer.ledger.tally.scored
