"""One writer per folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

import msgspec

from gym_bus.errors import UsageError

ASKED_S = 0.02


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lock."""

    pid: int
    host: str


class FileLock:
    """An exclusive lock on a file, held until `release` or until the process dies, however it dies.

    Raises:
        UsageError: somebody else holds it (the message names who), or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as e:
            raise UsageError(f"{path}: cannot be written: {e.strerror or e}") from None
        try:
            self._take(path)
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, path: Path) -> None:
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # perhaps somebody has only asked, in this very moment: see `is_locked`
                time.sleep(ASKED_S)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{path.parent}: already being written by {_holder(self._fd)}; "
                "stop that process first, or choose another output folder"
            ) from None
        except OSError as e:
            raise UsageError(f"{path}: cannot be locked: {e.strerror or e}") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, msgspec.json.encode(Holder(os.getpid(), socket.gethostname())), 0)

    def release(self) -> None:
        """Let the next writer in. The file stays: removing it could split the lock between two writers."""
        os.close(self._fd)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock now; asking leaves no trace."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(fd)
    return False


def _holder(fd: int) -> str:
    try:
        holder = msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except (OSError, msgspec.DecodeError):  # its holder has not written its name yet
        return "another process"
    return f"process {holder.pid} on host {holder.host}"
