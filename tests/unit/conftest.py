"""What unit tests share: the command line, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from gym_bus.cli import common
from gym_bus.cli.main import main


class Said(NamedTuple):
    code: int
    out: str
    err: str


GymBus = Callable[..., Said]


@pytest.fixture
def gym_bus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> GymBus:
    """`gym-bus ARGUMENTS`: its exit code and what it said."""

    # Loggers would go on printing to the stream that is captured for this test, which pytest closes.
    monkeypatch.setattr(common, "configure_logs", lambda level: None)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["gym-bus", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, *capsys.readouterr())

    return run
