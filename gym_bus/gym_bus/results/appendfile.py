"""A JSONL file that grows by whole lines or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from gym_bus.errors import UsageError
from gym_bus.results.reader import Line, decode_lines

T = TypeVar("T")


class Torn(NamedTuple):
    """A last line that was not completely written, and was cut off."""

    path: Path
    number: int
    """Of the line, from 1."""
    size_bytes: int


class AppendFile:
    """One file, opened for appending, created where it is missing. Raises UsageError where that cannot be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise UsageError(f"{path}: cannot be written: {e.strerror or e}") from None
        self._size = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Release the file. Nothing waits to be written."""
        os.close(self._fd)

    @property
    def size(self) -> int:
        """Bytes of whole lines: where the next line will begin."""
        return self._size

    def line_at(self, offset: int) -> bytes:
        """The line that begins at `offset`, as it was found or written there. Raises UsageError where it is gone."""
        parts: list[bytes] = []
        while not parts or b"\n" not in parts[-1]:
            part = os.pread(self._fd, 1 << 16, offset + sum(map(len, parts)))
            if not part:
                raise UsageError(f"{self.path}: changed by somebody else; run the same command again")
            parts.append(part)
        return b"".join(parts).partition(b"\n")[0]

    def read(self, decoder: msgspec.json.Decoder[T], torn: list[Torn]) -> Iterator[tuple[Line, T]]:
        """Every line and its content; a torn last line is cut off and reported in `torn`.

        Raises:
            DataError: names file and line: a line before the last is no JSON, or any is of the wrong kind.
        """
        bad = yield from decode_lines(self.path, decoder, unended_ok=False)
        if bad:
            torn.append(Torn(self.path, bad.number, self._size - bad.offset))
            self._cut(bad.offset)

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        except OSError as e:
            raise UsageError(f"{self.path}: its torn last line cannot be cut: {e.strerror or e}") from None
        self._size = size

    def _write(self, data: bytes) -> None:
        if os.fstat(self._fd).st_size != self._size:
            raise UsageError(
                f"{self.path}: changed by somebody else, or not mended after a failed write; "
                "run the same command again to go on from what it holds"
            )
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fdatasync(self._fd)

    def _cut_back(self) -> None:
        try:
            if os.fstat(self._fd).st_size > self._size:
                os.ftruncate(self._fd, self._size)
        except OSError:
            pass  # the next write sees the wrong size and refuses; the next opening cuts what is torn


def append_all(*parts: tuple[AppendFile, bytes]) -> None:
    """Append to several files and sync them; on any error none of them has grown.

    Raises:
        UsageError: the disk is full or failing; the message names the file.
    """
    parts = tuple((file, data) for file, data in parts if data)
    for done, (file, data) in enumerate(parts):
        try:
            file._write(data)
        except OSError as e:
            for written, _ in parts[: done + 1]:
                written._cut_back()
            raise UsageError(
                f"{file.path}: cannot be written: {e.strerror or e}; "
                "what was recorded before is safe: make room and run the same command again"
            ) from None
    for file, data in parts:
        file._size += len(data)
