"""Files that survive a crash whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gym_bus.errors import UsageError


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Put new contents in the place of a file, atomically and durably: any reader finds all old or all new.

    Raises:
        UsageError: the file cannot be written; the old one stands.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as e:
        raise UsageError(f"{path}: cannot be written: {e.strerror or e}") from None


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable: without it a power cut may take the names of synced files away."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
