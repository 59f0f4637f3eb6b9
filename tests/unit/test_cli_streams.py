"""The command where its standard streams are not what it is used to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GYM_BUS = f"{sys.executable} -m gym_bus.cli.main"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": os.defpath}


def sh(command: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=100, check=False, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_a_command_works_where_standard_streams_are_closed(tmp_path: Path, closed: str) -> None:
    # What it opens must not get their numbers: the library of the event loop ends a process in which a pipe has.
    held = "import os, sys; from gym_bus.cli.main import *; hold_standard_streams(); sys.exit(os.pipe()[0] - 3)"
    assert sh(f"{sys.executable} -c '{held}' {closed}").returncode == 0
    assert sh(f"{GYM_BUS} list models {closed}", cwd=tmp_path).returncode == 0


def test_output_that_nobody_takes_is_told_in_a_line(tmp_path: Path) -> None:
    done = sh(f"{GYM_BUS} list models > /dev/full", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_json_is_utf_8_and_text_is_shown_whatever_the_locale() -> None:
    held = "from gym_bus.cli import main, common; main.hold_standard_streams(); "
    said = "common.out.print(chr(183)); common.print_json(chr(183))"
    done = sh(f"{sys.executable} -c '{held}{said}'", env=ASCII, encoding="utf-8")
    text, document = done.stdout.splitlines()
    assert text == r"\xb7"
    assert json.loads(document) == "\u00b7"
