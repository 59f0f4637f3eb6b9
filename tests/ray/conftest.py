"""An installed package with verifiers that misbehave, found through its entry points as any third party's would be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gym_bus.verifiers.registry import VERIFIERS

_MODULE = '''
import os, time
kept = []
from gym_bus.messages import Verdict
from gym_bus.errors import TaskError
from gym_bus.verifiers.base import Placement


class Scripted:
    """Does what the row says."""

    placement = Placement.CPU
    required = ("do",)

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def verify(self, task):
        do = task.row["do"]
        if do == "die":
            os._exit(9)
        if do == "die once":
            flag = task.row["flag"]
            if not os.path.exists(flag):
                open(flag, "w").close()
                os._exit(9)
        if do == "hang":
            while True:
                10 ** 10
        if do == "grow":
            kept.append(b"x" * task.row["bytes"])
        if do == "broken task":
            raise TaskError("no reference")
        if do == "broken verifier":
            raise ZeroDivisionError("oops")
        return Verdict(reward=self.factor * float(task.row["value"]), extra={"pid": os.getpid()})
'''


@pytest.fixture(scope="session")
def scripted_verifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a verifier that does what its row says."""
    folder: Path = tmp_path_factory.mktemp("plugin")
    (folder / "scripted_plugin.py").write_text(_MODULE)
    info = folder / "scripted_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gym_bus.verifiers]\nscripted = scripted_plugin:Scripted\n")
    sys.path.insert(0, str(folder))
    VERIFIERS.refresh()
    yield "scripted"
    sys.path.remove(str(folder))
