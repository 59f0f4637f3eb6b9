"""The one writer of a job's results: appends, syncs, and knows after any crash from the files what is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from gym_bus.errors import DataError, FailureKind, UsageError
from gym_bus.logs import get_logger
from gym_bus.messages import Failed, Failure, Result, RolloutId, Scored, Usage
from gym_bus.results.appendfile import AppendFile, Torn, append_all
from gym_bus.results.disk import sync_folder
from gym_bus.results.files import JobFiles
from gym_bus.results.inputs import InputRows
from gym_bus.results.ledger import FailedRollout, Ledger, State
from gym_bus.results.lines import Past, failed_line, history_of, scored_line
from gym_bus.results.lock import FileLock

log = get_logger(__name__)


NO_ROW = b"{}"
"""The row of a failure that came from elsewhere than a worker that had read its message."""
AGENT_STAGE = "agent"


class _Ours(msgspec.Struct, frozen=True):
    job: str
    stream_seq: int = 0
    usage: Usage | None = None


class _Recorded(msgspec.Struct, frozen=True):
    """The keys of a line that say what is recorded; all others are skipped undecoded."""

    task: int = msgspec.field(name="_ng_task_index")
    rollout: int = msgspec.field(name="_ng_rollout_index")
    gym_bus: _Ours
    attempt: int = msgspec.field(default=0, name="_ng_attempt_index")


class _ScoredLine(_Recorded, frozen=True, kw_only=True):
    reward: float


class _FailedLine(_Recorded, frozen=True, kw_only=True):
    kind: str = msgspec.field(name="_ng_failure_class")
    terminal: bool = msgspec.field(default=False, name="_ng_failure_terminal")
    stage: str = msgspec.field(default="", name="_ng_failure_stage")
    response: msgspec.Raw = msgspec.Raw(b"null")


_NO_USAGE = Usage()
_scored_decoder = msgspec.json.Decoder(_ScoredLine)
_failed_decoder = msgspec.json.Decoder(_FailedLine)


class _Fresh(NamedTuple):
    sequence: int
    result: Result
    line: bytes


class ResultsWriter:
    """Appends results to a job's two files, once per rollout, durably before it returns.

    A crash at any moment, of the process or the machine, leaves files that the next writer goes on from: only the last
    line can be torn, and it is cut.

    Args:
        files: where; the folder is created.
        job: the job's id; lines and results of another job are not taken.
        tasks: number of tasks; their indices are 0 .. tasks - 1.
        repeats: rollouts per task; their indices are 0 .. repeats - 1.
        tokens: write token ids and log-probabilities.
        spans: the rollouts there are, where they do not fill the whole rectangle; see `Ledger.limit_to`.

    Raises:
        UsageError: another writer holds the folder, or it cannot be written.
        DataError: a file holds a line that is no result of this job; names file and line.
    """

    def __init__(
        self,
        files: JobFiles,
        job: str,
        tasks: int,
        repeats: int,
        *,
        tokens: bool = False,
        spans: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        self.ledger = Ledger(job, tasks, repeats)
        if spans is not None:
            self.ledger.limit_to(spans)
        self.torn: list[Torn] = []
        """The torn lines that were found and cut on opening."""
        self._tokens = tokens
        try:
            files.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UsageError(f"{files.folder}: cannot be created: {e.strerror or e}") from None
        with ExitStack() as undo:
            self._lock = FileLock(files.lock)
            undo.callback(self._lock.release)
            self._rollouts = AppendFile(files.rollouts)
            undo.callback(self._rollouts.close)
            self._failures = AppendFile(files.failures)
            undo.callback(self._failures.close)
            self._inputs = InputRows(files.inputs)
            undo.callback(self._inputs.close)
            sync_folder(files.folder)
            self._restore()
            self._held = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the files and the folder. Everything appended is on disk already."""
        self._held.close()

    def append(self, results: Sequence[tuple[int, Result]]) -> list[Result]:
        """Record results, each with its sequence in the stream; returns those that were not recorded before.

        One write per file and one sync for the whole batch. A rollout is scored once; a failed one may fail again or
        be scored by the same or a newer attempt. A result whose row or response is not JSON is recorded as failed
        (class `poison`), since it could never be read back. A failure that came without its row, as one of the bus has
        none, gets it from the materialized inputs; and every line carries the history of the failures before it.

        Raises:
            UsageError: the disk is full or failing. Nothing of the batch is recorded and the files are whole; the same
                batch may be appended again.
        """
        fresh = self._fresh(results)
        scored = b"".join(f.line for f in fresh if isinstance(f.result, Scored))
        failed = b"".join(f.line for f in fresh if isinstance(f.result, Failed))
        at = self._failures.size
        append_all((self._rollouts, scored), (self._failures, failed))
        for one in fresh:
            self._record(one, at)
            at += len(one.line) if isinstance(one.result, Failed) else 0
        return [f.result for f in fresh]

    def stored_line(self, rollout: RolloutId) -> bytes | None:
        """The line of the failures file that holds an attempt of this rollout to verify again; None where none does."""
        failed = self.ledger.failure(rollout)
        return self._failures.line_at(failed.stored_at) if failed and failed.stored_at >= 0 else None

    def input_line(self, rollout: RolloutId) -> bytes | None:
        """The rollout's materialized input, None where there is none. Raises DataError where they cannot be read."""
        return self._inputs.line(rollout)

    def _fresh(self, results: Sequence[tuple[int, Result]]) -> list[_Fresh]:
        fresh: list[_Fresh] = []
        batch: dict[RolloutId, _Fresh] = {}
        for sequence, result in results:
            earlier = batch.get(result.rollout)
            if not self.ledger.holds(result.rollout):
                self._refuse(result)
            elif not self._is_new(result, earlier.result if earlier else None):
                self.ledger.tally.repeats += 1
            else:
                batch[result.rollout] = one = self._compose(sequence, result, self._history(result.rollout, earlier))
                fresh.append(one)
        return fresh

    def _history(self, rollout: RolloutId, earlier: _Fresh | None) -> list[Past]:
        if earlier is not None:
            return history_of(earlier.line)
        failed = self.ledger.failure(rollout)
        return history_of(self._failures.line_at(failed.line_at)) if failed else []

    def _is_new(self, result: Result, earlier: Result | None) -> bool:
        if isinstance(earlier, Scored) or self.ledger.state(result.rollout) is State.SCORED:
            return False
        newest_failed = max(self.ledger.number(result.rollout), earlier.number if earlier else 0)
        return result.number >= newest_failed if isinstance(result, Scored) else result.number > newest_failed

    def _refuse(self, result: Result) -> None:
        self.ledger.tally.refused += 1
        if self.ledger.tally.refused == 1:  # the tally counts the rest: a flood of them must not flood the log
            log.warning("result_refused", rollout=str(result.rollout), job=self.ledger.job)

    def _compose(self, sequence: int, result: Result, before: list[Past]) -> _Fresh:
        try:
            if isinstance(result, Scored):
                line = scored_line(result, sequence, tokens=self._tokens, before=before)
                return _Fresh(sequence, result, line)
            return _Fresh(sequence, result, failed_line(self._with_row(result), sequence, before=before))
        except ValueError as e:
            poison = _poison(result, str(e))
            return _Fresh(sequence, poison, failed_line(self._with_row(poison), sequence, before=before))

    def _with_row(self, result: Failed) -> Failed:
        if result.row != NO_ROW:
            return result
        try:
            row = self._inputs.line(result.rollout)
        except DataError as e:  # the failure itself is worth more than its row
            log.warning("row_not_found", rollout=str(result.rollout), error=str(e))
            row = None
        return msgspec.structs.replace(result, row=row) if row else result

    def _record(self, one: _Fresh, at: int) -> None:
        result = one.result
        if isinstance(result, Scored):
            self.ledger.record_scored(result.rollout, result.reward)
        else:
            failure = result.failure
            stored_at = self._stored_at(result.rollout, at, failure.stage, answered=bool(result.response))
            failed = FailedRollout(failure.kind.value, result.number, failure.terminal, one.sequence, at, stored_at)
            self.ledger.record_failed(result.rollout, failed)
        self.ledger.record_line(result.rollout, one.sequence, result.usage)

    def _stored_at(self, rollout: RolloutId, at: int, stage: str, *, answered: bool) -> int:
        """Where the newest attempt is that can be verified again, after a failure that is written at `at`."""
        if answered:
            return at
        if stage == AGENT_STAGE:  # generation was made again and failed: the answer of before was given up
            return -1
        before = self.ledger.failure(rollout)
        return before.stored_at if before else -1

    def _restore(self) -> None:
        for line, scored in self._rollouts.read(_scored_decoder, self.torn):
            rollout = self._check(self._rollouts, line.number, scored)
            if self.ledger.state(rollout) is State.SCORED:
                raise DataError(f"{self._rollouts.path}:{line.number}: a second line for {_words(rollout)}")
            self.ledger.record_scored(rollout, scored.reward)
            self._restore_line(rollout, scored)
        for line, failed in self._failures.read(_failed_decoder, self.torn):
            rollout = self._check(self._failures, line.number, failed)
            attempt = failed.attempt + 1
            if self.ledger.state(rollout) is not State.SCORED and attempt > self.ledger.number(rollout):
                answered = bytes(failed.response) != b"null"
                stored_at = self._stored_at(rollout, line.offset, failed.stage, answered=answered)
                sequence = failed.gym_bus.stream_seq
                self.ledger.record_failed(
                    rollout,
                    FailedRollout(failed.kind, attempt, failed.terminal, sequence, line.offset, stored_at),
                )
            self._restore_line(rollout, failed)
        for path, number, size_bytes in self.torn:
            log.warning("torn_line_cut", file=str(path), line=number, size_bytes=size_bytes)

    def _check(self, file: AppendFile, number: int, line: _Recorded) -> RolloutId:
        rollout = RolloutId(line.gym_bus.job, line.task, line.rollout)
        if self.ledger.holds(rollout):
            return rollout
        ledger = self.ledger
        raise DataError(
            f"{file.path}:{number}: {_words(rollout)} of job {rollout.job!r} is not one of job {ledger.job!r} "
            f"({ledger.tasks} tasks x {ledger.repeats} rollouts); choose another output folder"
        )

    def _restore_line(self, rollout: RolloutId, line: _Recorded) -> None:
        self.ledger.record_line(rollout, line.gym_bus.stream_seq, line.gym_bus.usage or _NO_USAGE)


def _words(rollout: RolloutId) -> str:
    return f"task {rollout.task_index}, rollout {rollout.rollout_index}"


def _poison(result: Result, detail: str) -> Failed:
    return Failed(
        rollout=result.rollout,
        number=result.number,
        failure=Failure(kind=FailureKind.POISON, detail=detail, stage="results"),
        agent=result.agent,
        verifier=result.verifier,
        group_size=result.group_size,
        policy=result.policy,
        usage=result.usage,
        timings=result.timings,
        agent_worker=result.agent_worker,
        verifier_worker=result.verifier_worker,
        published_at=result.published_at,
    )
