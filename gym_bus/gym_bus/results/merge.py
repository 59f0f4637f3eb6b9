"""Merging jobs that share one set of tasks: shards of a run, or copies of parts of it."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from gym_bus.errors import DataError, UsageError
from gym_bus.results.columns import Index
from gym_bus.results.disk import replace_file
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest, differences, new_job_id
from gym_bus.results.reader import BOM, decode_lines, decode_mended

PER_SHARD = ("dataset_digest", "rows", "shard")
"""What may differ between the manifests of shards: each has rows of its own."""


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """How a merge ended."""

    jobs: int
    rollouts: int
    """Scored rollouts written."""
    repeated: int
    """Lines left out, since another job has the very same."""
    missing_shards: list[str]
    """Shards that nobody has given, as `2/4`; known where the jobs were run with `--shard`."""


class _Key(msgspec.Struct, frozen=True):
    task: Index = msgspec.field(name="_ng_task_index")
    rollout: Index = msgspec.field(name="_ng_rollout_index")
    attempt: int = msgspec.field(default=0, name="_ng_attempt_index")


_key: msgspec.json.Decoder[_Key] = msgspec.json.Decoder(_Key)
_any: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def merge_jobs(jobs: Sequence[JobFiles], into: JobFiles) -> Merged:
    """Write the union of some jobs' files. A rollout that several of them have must be the same in all.

    Memory: about 200 bytes a line.

    Raises:
        UsageError: the jobs are not of one run (says what differs), or the files cannot be written.
        DataError: names file and line: two jobs say different things of one rollout, or a line is broken.
    """
    manifests = _manifests(jobs)
    try:
        into.folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"{into.folder}: cannot be created: {e.strerror or e}") from None
    inputs, rollouts = _Union("row"), _Union("result")
    failures = _Failures("failure")
    for files in jobs:
        if files.inputs.exists():
            inputs.add(files.inputs)
        rollouts.add(files.rollouts)
        if files.failures.exists():
            failures.add(files.failures)
    if inputs.lines:
        replace_file(into.inputs, inputs.content_in_order())
    replace_file(into.rollouts, rollouts.content())
    replace_file(into.failures, failures.content())
    if manifests:
        _merged_manifest(manifests, inputs).save(into.manifest)
    return Merged(
        jobs=len(jobs),
        rollouts=rollouts.lines,
        repeated=rollouts.repeated,
        missing_shards=_missing_shards(manifests),
    )


def _manifests(jobs: Sequence[JobFiles]) -> list[Manifest]:
    found = [(files, Manifest.load(files.manifest)) for files in jobs if files.manifest.exists()]
    if len(found) not in (0, len(jobs)):
        without = next(files.folder for files in jobs if not files.manifest.exists())
        raise UsageError(f"{without}: no job.json, so nobody can say whether it is of the same run as the others")
    manifests = [manifest for _, manifest in found]
    for files, manifest in found[1:]:
        alike = msgspec.structs.replace(manifest, **{key: getattr(manifests[0], key) for key in PER_SHARD})
        first = found[0][0].folder
        if different := differences(manifests[0], alike, (f"in {first}", f"in {files.folder}")):
            raise UsageError(f"{files.folder} is of another run than {first}; what differs: {'; '.join(different)}")
    return manifests


def _missing_shards(manifests: Sequence[Manifest]) -> list[str]:
    given = {manifest.shard for manifest in manifests if manifest.shard}
    counts = {int(shard.partition("/")[2]) for shard in given}
    return [f"{at}/{count}" for count in sorted(counts) for at in range(count) if f"{at}/{count}" not in given]


class _Union:
    """The lines of several files of one kind, one per rollout, by their places."""

    def __init__(self, what: str) -> None:
        self.repeated = 0
        self._what = what
        self._paths: list[Path] = []
        self._known: dict[tuple[int, ...], int] = {}
        self._joint, self._file, self._number, self._offset = array("q"), array("q"), array("q"), array("q")

    @property
    def lines(self) -> int:
        """Lines of the union."""
        return len(self._joint)

    @property
    def tasks(self) -> int:
        """Tasks of the union."""
        return len(set((np.array(self._joint) >> 31).tolist()))

    def add(self, path: Path) -> None:
        """The lines of one more file; a torn last one is passed over."""
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        self._paths.append(path)
        with ExitStack() as opened:
            files = [opened.enter_context(known.open("rb")) for known in self._paths]
            for line, key in decode_lines(path, _key, unended_ok=True):
                at = self._known.setdefault(self._identity(key), self.lines)
                if at == self.lines:
                    self._joint.append((key.task << 31) | key.rollout)
                    self._file.append(len(self._paths) - 1)
                    self._number.append(line.number)
                    self._offset.append(line.offset)
                elif _same(_line_at(files[self._file[at]], self._offset[at]), line.data):
                    self.repeated += 1
                else:
                    self._refuse(path, line.number, key, at)

    def _identity(self, key: _Key) -> tuple[int, ...]:
        return (key.task, key.rollout)

    def _refuse(self, path: Path, number: int, key: _Key, at: int) -> None:
        raise DataError(
            f"{path}:{number}: another {self._what} of task {key.task}, rollout {key.rollout} than in "
            f"{self._paths[self._file[at]]}:{self._number[at]}; leave one of the two out"
        )

    def content(self) -> Iterator[bytes]:
        """The lines as they were added."""
        return self._lines(range(self.lines))

    def content_in_order(self) -> Iterator[bytes]:
        """The lines by task and rollout."""
        return self._lines(np.argsort(np.array(self._joint), kind="stable").tolist())

    def _lines(self, order: Iterable[int]) -> Iterator[bytes]:
        with ExitStack() as opened:
            files = [opened.enter_context(path.open("rb")) for path in self._paths]
            for at in order:
                yield _line_at(files[self._file[at]], self._offset[at]) + b"\n"


class _Failures(_Union):
    """One line per attempt. Two jobs may have tried the same rollout: that is history, no contradiction."""

    def _identity(self, key: _Key) -> tuple[int, ...]:
        return (key.task, key.rollout, key.attempt)

    def _refuse(self, path: Path, number: int, key: _Key, at: int) -> None:
        """The first one stands."""


def _line_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.readline().removeprefix(BOM).strip()


def _same(one: bytes, other: bytes) -> bool:
    return one == other or bool(decode_mended(_any, one)[1] == decode_mended(_any, other)[1])


def _merged_manifest(manifests: Sequence[Manifest], inputs: _Union) -> Manifest:
    first = manifests[0]
    digest = hashlib.sha256()
    for line in inputs.content_in_order():
        digest.update(line)
    return msgspec.structs.replace(
        first,
        job=new_job_id(first.benchmark),
        created_at=time.time(),
        dataset_digest=digest.hexdigest(),
        rows=inputs.tasks,
        shard="",
        shard_of="" if digest.hexdigest() == first.shard_of else first.shard_of,
        merged=[manifest.job for manifest in manifests],
    )
