"""A job's materialized inputs, row by row in any order."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from gym_bus.errors import DataError
from gym_bus.messages import RolloutId
from gym_bus.results.columns import read_inputs


class InputRows:
    """The inputs by rollout. The file is read through at the first question; from then on a row costs 16 bytes.

    Any thread may ask.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._asking = Lock()

    def line(self, rollout: RolloutId) -> bytes | None:
        """The rollout's line, None where the file has none of it.

        Raises:
            DataError: the file cannot be read, or is none of materialized inputs; names file and line.
        """
        with self._asking:
            file = self._file or self._open()
            wanted = (rollout.task_index << 31) | rollout.rollout_index
            at = int(np.searchsorted(self._joint, wanted))
            if at == len(self._joint) or self._joint[at] != wanted:
                return None
            file.seek(int(self._offset[at]))
            return file.readline()

    def _open(self) -> BinaryIO:
        keys = read_inputs(self._path, {})
        order = np.argsort(keys.joint(), kind="stable")
        self._joint, self._offset = keys.joint()[order], keys.offset[order]
        try:
            self._file = self._path.open("rb")
        except OSError as e:
            raise DataError(f"{self._path}: cannot be read: {e.strerror or e}") from None
        return self._file

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
