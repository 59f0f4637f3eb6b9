"""`gym-bus sandbox doctor` and `gym-bus sandbox run`, with the real sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gym_bus.cli import sandbox as sandbox_cli
from gym_bus.errors import SandboxError, SandboxRefused, UsageError
from gym_bus.sandbox import hostile
from gym_bus.sandbox.api import Ended
from gym_bus.sandbox.hostile import Attack
from gym_bus.sandbox.slot import Slot


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(sandbox_cli.command, [str(one) for one in arguments], standalone_mode=False)


def run(tmp_path: Path, source: str, *arguments: str, name: str = "program.py") -> Result:
    file = tmp_path / name
    file.write_text(source)
    return invoke("run", file, *arguments)


@pytest.fixture(autouse=True)
def needs_a_sandbox(request: pytest.FixtureRequest, slot: Slot) -> None:
    """Skips where there is none."""


def test_the_doctor_lists_every_protection(slot: Slot) -> None:
    result = invoke("doctor", "--quick")

    assert result.return_value == 0
    assert result.stdout.startswith("protections: level namespaces\n")
    for protection in slot.protections():
        line = next(line for line in result.stdout.splitlines() if line.startswith(protection.name))
        assert line.split(protection.name)[1].split()[0] == ("yes" if protection.active else "no")
        assert protection.how in line


SOME = (
    Attack("look around", "files", "tries(lambda: open('/etc/shadow').read())"),
    Attack("count", "honest", "print(1)"),
)


def test_the_doctor_tries_hostile_programs_and_counts_them_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "ATTACKS", SOME)

    result = invoke("doctor")
    report = json.loads(invoke("doctor", "--json").stdout)

    assert result.return_value == 0
    assert [line.split() for line in result.stdout.splitlines()[-2:]] == [
        ["files", "1", "0", "0"],
        ["honest", "1", "0", "0"],
    ]
    assert (report["level"], report["lowered"]) == ("namespaces", "")
    assert [(one["name"], one["held"], one["ended"]) for one in report["programs"]] == [
        ("look around", True, "finished"),
        ("count", True, "finished"),
    ]
    assert all(set(one) == {"name", "active", "how"} for one in report["protections"])


def test_the_doctor_fails_where_a_program_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "ATTACKS", (*SOME, Attack("win", "files", "print('BROKEN', 42)")))

    result = invoke("doctor")

    assert result.return_value == 1
    assert "not held: files: win: BROKEN 42" in result.stdout


def test_a_program_prints_and_its_arguments_and_input_reach_it(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("4\n")

    result = run(tmp_path, "import sys; print(int(input()) * 2, sys.argv[1:])", "a", "--stdin", str(tmp_path / "in"))

    assert (result.return_value, result.stdout, result.stderr) == (0, "8 ['a']\n", "")


@pytest.mark.parametrize(
    ("source", "limits", "said"),
    [
        ("raise SystemExit(3)", [], "exit 3\n"),
        ("import time; time.sleep(60)", ["wall_s=0.1"], "wall_limit"),
        ("print('x' * 100)", ["output_bytes=10"], "output_limit\n"),
        ("import ctypes; ctypes.string_at(0)", [], "signalled (signal 11)\n"),
        ("def (", [], "compile_error\n"),
    ],
)
def test_a_program_that_fails_says_why_and_exits_with_1(
    tmp_path: Path, source: str, limits: list[str], said: str
) -> None:
    result = run(tmp_path, source, *(part for limit in limits for part in ("--limit", limit)))

    assert result.return_value == 1
    assert said in result.stderr


def test_json_has_the_whole_outcome(tmp_path: Path) -> None:
    result = run(tmp_path, "import sys; print('ö'); print('e', file=sys.stderr); sys.exit(2)", "--json")

    report = json.loads(result.stdout)
    assert result.return_value == 1
    assert {key: report[key] for key in ("ended", "exit_code", "signal", "stdout", "stderr")} == {
        "ended": "finished",
        "exit_code": 2,
        "signal": None,
        "stdout": "ö\n",
        "stderr": "e\n",
    }
    assert report["wall_s"] > 0 and report["cpu_s"] > 0 and report["max_rss_bytes"] > 2**20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "wall_s"], "--limit wall_s: expected KEY=VALUE"),
        (["--limit", "wal_s=1"], "--limit wal_s: no such limit: did you mean 'wall_s'"),
        (["--limit", "wall_s=soon"], "--limit: Expected `float`, got `str`"),
        (["--limit", "wall_s=0"], "--limit: Expected `float` > 0"),
        (["--limit", "processes=1.5"], "--limit: Expected `int`"),
        (["--stdin", "/no/such/file"], "/no/such/file: No such file or directory"),
        (["--language", "pearl"], "language 'pearl' is not supported: known: bash"),
    ],
)
def test_what_cannot_be_done_as_written_is_wrong_usage(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = run(tmp_path, "print(1)", *arguments)

    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    assert isinstance(invoke("run", tmp_path / "none.py").exception, UsageError)


@pytest.mark.parametrize(
    ("error", "ended"),
    [(SandboxError("the zygote is gone"), Ended.SANDBOX_LOST), (SandboxRefused("no node"), Ended.REFUSED)],
)
def test_a_program_that_could_not_be_run_has_its_cause_of_end_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: SandboxError, ended: Ended
) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(Slot, "run", fail)

    result = run(tmp_path, "", "--json")

    assert result.exception is error
    assert json.loads(result.stdout) == {"ended": ended, "detail": str(error)}


def test_the_language_is_taken_from_the_files_name(tmp_path: Path, slot: Slot) -> None:
    if slot._zygote.group is None or not Path("/usr/bin/bash").exists():
        pytest.skip("no bash in this sandbox")
    assert run(tmp_path, "echo $((6 * 7))", name="program.sh").stdout == "42\n"


def test_a_program_imports_the_packages_that_are_named(tmp_path: Path) -> None:
    source = "import numpy; print(numpy.arange(4).sum())"

    assert run(tmp_path, source, "--preload", "numpy").stdout == "6\n"
    unknown = run(tmp_path, source, "--preload", "nunpy")

    assert isinstance(unknown.exception, UsageError)
    assert "no installed package has a module 'nunpy'" in str(unknown.exception)
