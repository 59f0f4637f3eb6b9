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
from gym_bus.results.ledger import FailedRollout, Ledger, State
from gym_bus.results.lines import failed_line, scored_line
from gym_bus.results.lock import FileLock

log = get_logger(__name__)


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
        (class `poison`), since it could never be read back.

        Raises:
            UsageError: the disk is full or failing. Nothing of the batch is recorded and the files are whole; the same
                batch may be appended again.
        """
        fresh = self._fresh(results)
        scored = b"".join(f.line for f in fresh if isinstance(f.result, Scored))
        failed = b"".join(f.line for f in fresh if isinstance(f.result, Failed))
        append_all((self._rollouts, scored), (self._failures, failed))
        for sequence, result, _ in fresh:
            self._record(sequence, result)
        return [f.result for f in fresh]

    def _fresh(self, results: Sequence[tuple[int, Result]]) -> list[_Fresh]:
        fresh: list[_Fresh] = []
        batch: dict[RolloutId, Result] = {}
        for sequence, result in results:
            if not self.ledger.holds(result.rollout):
                self._refuse(result)
            elif not self._is_new(result, batch.get(result.rollout)):
                self.ledger.tally.repeats += 1
            else:
                batch[result.rollout] = result
                fresh.append(self._compose(sequence, result))
        return fresh

    def _is_new(self, result: Result, earlier: Result | None) -> bool:
        if isinstance(earlier, Scored) or self.ledger.state(result.rollout) is State.SCORED:
            return False
        newest_failed = max(self.ledger.number(result.rollout), earlier.number if earlier else 0)
        return result.number >= newest_failed if isinstance(result, Scored) else result.number > newest_failed

    def _refuse(self, result: Result) -> None:
        self.ledger.tally.refused += 1
        if self.ledger.tally.refused == 1:  # the tally counts the rest: a flood of them must not flood the log
            log.warning("result_refused", rollout=str(result.rollout), job=self.ledger.job)

    def _compose(self, sequence: int, result: Result) -> _Fresh:
        try:
            if isinstance(result, Scored):
                return _Fresh(sequence, result, scored_line(result, sequence, tokens=self._tokens))
            return _Fresh(sequence, result, failed_line(result, sequence))
        except ValueError as e:
            poison = _poison(result, str(e))
            return _Fresh(sequence, poison, failed_line(poison, sequence))

    def _record(self, sequence: int, result: Result) -> None:
        if isinstance(result, Scored):
            self.ledger.record_scored(result.rollout, result.reward)
        else:
            failure = result.failure
            failed = FailedRollout(failure.kind.value, result.number, failure.terminal)
            self.ledger.record_failed(result.rollout, failed)
        self.ledger.record_line(result.rollout, sequence, result.usage)

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
                self.ledger.record_failed(rollout, FailedRollout(failed.kind, attempt, failed.terminal))
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
