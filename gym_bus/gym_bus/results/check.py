"""Whether a job's files add up by themselves: every line read back, nothing taken for granted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import msgspec
import numpy as np

from gym_bus.errors import DataError, FailureKind
from gym_bus.results.columns import read_inputs
from gym_bus.results.files import JobFiles
from gym_bus.results.lines import MOST_HISTORY, Past
from gym_bus.results.manifest import Manifest
from gym_bus.results.profile import differences_of_profile
from gym_bus.results.reader import iter_lines
from gym_bus.results.rounds import Rounds

MOST_EXAMPLES = 10


class Finding(msgspec.Struct, kw_only=True):
    """One kind of thing that does not add up."""

    check: str
    """The check that found it."""
    what: str
    count: int = 0
    examples: list[str] = []
    """The first few, each with its file and line, its rollout or its sequence."""


class Findings:
    """What a number of checks have found; bounded, however much it is."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Finding] = {}

    def add(self, check: str, what: str, example: str = "", count: int = 1) -> None:
        """One more (or `count` more) of a kind."""
        finding = self._found.setdefault((check, what), Finding(check=check, what=what))
        finding.count += count
        if example and len(finding.examples) < MOST_EXAMPLES:
            finding.examples.append(example)

    def all(self) -> list[Finding]:
        """In the order in which they were found first."""
        return list(self._found.values())


class Standing(IntEnum):
    """What the files say of a rollout."""

    NONE = 0
    """No rollout of the job."""
    MISSING = 1
    FAILED = 2
    SCORED = 3


class FileBook:
    """The last word of a job's files on every rollout, about 30 bytes each; rollouts that failed some more."""

    def __init__(self, job: str, tasks: int, repeats: int) -> None:
        self.job, self.tasks, self.repeats = job, tasks, repeats
        self.jobs = {job}
        """Whose results the files may hold: of merged files, the jobs that they were merged from."""
        size = tasks * repeats
        self.standing = np.zeros(size, np.uint8)
        self.number = np.zeros(size, np.int32)
        """Of the attempt that the last word is of."""
        self.sequence = np.zeros(size, np.int64)
        """Where the line says that its result was on the stream."""
        self.reward = np.full(size, np.nan)
        self.line = np.zeros(size, np.int64)
        """Of the file that has the last word."""
        self.kinds: dict[int, str] = {}
        """Failure class, by place."""

    def at(self, task: int, rollout: int) -> int | None:
        """The place of a rollout; None where the job has none such."""
        if not (0 <= task < self.tasks and 0 <= rollout < self.repeats):
            return None
        place = task * self.repeats + rollout
        return place if self.standing[place] else None

    def name(self, place: int) -> str:
        """`task/rollout`."""
        return "/".join(map(str, divmod(place, self.repeats)))

    def count(self, standing: Standing) -> int:
        """Rollouts of which the files say this."""
        return int(np.count_nonzero(self.standing == standing))

    def failed(self) -> dict[str, int]:
        """Failed rollouts by class."""
        counts: dict[str, int] = {}
        for kind in self.kinds.values():
            counts[kind] = counts.get(kind, 0) + 1
        return dict(sorted(counts.items()))


class _Ours(msgspec.Struct, frozen=True):
    job: str = ""
    attempt: int = 1
    stream_seq: int = 0
    history: list[Past] | None = None


class _Line(msgspec.Struct, frozen=True):
    task: int = msgspec.field(name="_ng_task_index")
    rollout: int = msgspec.field(name="_ng_rollout_index")
    gym_bus: _Ours
    kind: str | None = msgspec.field(default=None, name="_ng_failure_class")
    reward: float | msgspec.UnsetType = msgspec.UNSET


_line = msgspec.json.Decoder(_Line)


def check_files(files: JobFiles, manifest: Manifest, findings: Findings, *, being_written: bool) -> FileBook:
    """Read a job's files back and note what does not add up.

    Args:
        files: the job's.
        manifest: as it lies beside them.
        findings: gets what is found.
        being_written: a writer has them open: a line may be on its way, and the profile is of before.
    """
    book = _read_inputs(files, manifest, findings)
    book.jobs.update(manifest.merged)
    failures = _Failures(findings, book)
    for where, number, line in _lines(files.failures, "failures", findings, book, being_written=being_written):
        failures.take(where, number, line)
    for where, number, line in _lines(files.rollouts, "rollouts", findings, book, being_written=being_written):
        _take_scored(where, number, line, findings, book)
    if not being_written and not book.count(Standing.MISSING):
        _check_profile(files, findings)
    return book


def _read_inputs(files: JobFiles, manifest: Manifest, findings: Findings) -> FileBook:
    """An empty book of the rollouts that the materialized inputs name."""
    path = files.inputs
    try:
        keys = read_inputs(path, {})
        digest = _digest_of_first_rows(files)
    except DataError as e:
        findings.add("inputs", "cannot be read", str(e))
        book = FileBook(manifest.job, manifest.rows, manifest.num_repeats)
        book.standing[:] = Standing.MISSING
        return book
    if digest != manifest.dataset_digest:
        findings.add("inputs", "not those that the job was written down with", f"{path}: its SHA-256 is another one")
    task, rollout = keys.task, keys.rollout
    tasks = len(np.unique(task))
    if tasks != manifest.rows:
        findings.add("inputs", "incomplete", f"{path}: {tasks:,} tasks, {manifest.rows:,} in job.json")
    book = FileBook(manifest.job, int(task.max(initial=-1)) + 1, int(rollout.max(initial=-1)) + 1)
    book.standing[task * book.repeats + rollout] = Standing.MISSING
    _check_gaps(book, path, findings)
    return book


def _digest_of_first_rows(files: JobFiles) -> str:
    """Of the materialized inputs as they were written down; rows that the job got while it ran lie behind them."""
    rounds = Rounds.load(files.adaptive)
    left = rounds.inputs_bytes if rounds else files.inputs.stat().st_size
    sha = hashlib.sha256()
    with files.inputs.open("rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            sha.update(chunk)
            left -= len(chunk)
    return sha.hexdigest()


def _check_gaps(book: FileBook, path: Path, findings: Findings) -> None:
    """Rollouts of a task are numbered from 0 without a gap."""
    there = (book.standing > 0).reshape(book.tasks, book.repeats) if book.tasks else np.zeros((0, 0), bool)
    count = there.sum(axis=1)
    expected = np.arange(book.repeats) < count[:, None]
    for task, rollout in np.argwhere(expected & ~there):
        findings.add("inputs", "incomplete", f"{path}: no line for {task}/{rollout}")


def _lines(
    path: Path, check: str, findings: Findings, book: FileBook, *, being_written: bool
) -> Iterator[tuple[str, int, _Line]]:
    """The lines that are results of this job, each with its address and its number."""
    if not path.exists():
        return
    for line in iter_lines(path):
        where = f"{path.name}:{line.number}"
        if not line.ended:
            if not being_written:
                findings.add(check, "a torn last line; the next run cuts it", where)
            return
        try:
            content = _line.decode(line.data)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            findings.add(check, "not a result", f"{where}: {e}")
            continue
        if content.gym_bus.job not in book.jobs:
            findings.add(check, "a result of another job", f"{where}: {content.gym_bus.job}")
        elif book.at(content.task, content.rollout) is None:
            findings.add(check, "no rollout of this job", f"{where}: {content.task}/{content.rollout}")
        else:
            yield where, line.number, content


def _take_scored(where: str, number: int, line: _Line, findings: Findings, book: FileBook) -> None:
    place = book.at(line.task, line.rollout)
    assert place is not None
    name, attempt = book.name(place), line.gym_bus.attempt
    if line.kind is not None or line.reward is msgspec.UNSET:
        findings.add("rollouts", "a line that is no scored rollout", f"{where}: {name}")
        return
    if book.standing[place] == Standing.SCORED:
        findings.add("rollouts", "a second line", f"{where}: {name}, first on line {book.line[place]}")
        return
    if book.standing[place] == Standing.FAILED and book.number[place] > attempt:
        text = f"{where}: {name}, scored by attempt {attempt}, failed by attempt {book.number[place]}"
        findings.add("rollouts", "scored by an older attempt than one that failed", text)
    book.kinds.pop(place, None)
    book.standing[place], book.reward[place] = Standing.SCORED, line.reward
    _note(book, place, number, line)


def _note(book: FileBook, place: int, number: int, line: _Line) -> None:
    book.number[place], book.line[place] = line.gym_bus.attempt, number
    book.sequence[place] = line.gym_bus.stream_seq


class _Failures:
    """The failures file, line by line."""

    def __init__(self, findings: Findings, book: FileBook) -> None:
        self._findings, self._book = findings, book
        self._attempts: dict[int, list[int]] = {}

    def take(self, where: str, number: int, line: _Line) -> None:
        """One more line."""
        book, findings = self._book, self._findings
        place = book.at(line.task, line.rollout)
        assert place is not None
        name, attempt = book.name(place), line.gym_bus.attempt
        if line.kind not in set(FailureKind):
            findings.add("failures", "an unknown failure class", f"{where}: {name}, {line.kind!r}")
            return
        if line.reward is not msgspec.UNSET:
            findings.add("failures", "a failure with a reward", f"{where}: {name}")
        earlier = self._attempts.setdefault(place, [])
        if earlier and attempt <= earlier[-1]:
            findings.add("failures", "a second line for an attempt", f"{where}: {name}, attempt {attempt}")
            return
        earlier.append(attempt)
        history = line.gym_bus.history
        if history is not None and [past.attempt for past in history] != earlier[-MOST_HISTORY:]:
            told = ", ".join(str(past.attempt) for past in history)
            text = f"{where}: {name}, attempts {told}; the file has {', '.join(map(str, earlier))}"
            findings.add("failures", "a history that is not the file's", text)
        book.standing[place], book.kinds[place] = Standing.FAILED, line.kind
        _note(book, place, number, line)


def _check_profile(files: JobFiles, findings: Findings) -> None:
    try:
        for difference in differences_of_profile(files):
            findings.add("profile", "not what the rollouts say", difference)
    except DataError as e:
        findings.add("profile", "cannot be recomputed", str(e))
