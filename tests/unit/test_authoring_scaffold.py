"""New benchmarks: what `env init` makes, and what `env test` and `env validate` find wanting."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gym_bus.agents.registry import AGENTS
from gym_bus.benchmarks import scaffold
from gym_bus.benchmarks.spec import add_folders, load_benchmark
from gym_bus.errors import ConfigError, UsageError
from gym_bus.verifiers.registry import VERIFIERS


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_a_new_benchmark_lacks_nothing_and_has_its_own_name_everywhere(kind: str, tmp_path: Path) -> None:
    made = scaffold.init("fresh", kind, tmp_path)

    assert list(scaffold.missing_papers(made)) == []
    text = "".join(path.read_text() for path in made.folder.rglob("*") if path.is_file())
    assert "my_benchmark" not in text
    assert "MyBenchmark" not in text


def test_a_new_benchmark_passes_its_own_tests(tmp_path: Path) -> None:
    made = scaffold.init("fresh", "multi-turn", tmp_path)  # the tutorials follow the other kinds

    tested = scaffold.run_tests(made.folder)

    assert tested.enough, tested.output
    assert tested.coverage == 100.0
    assert not [path for path in made.folder.rglob("__pycache__") if path.parent.name == "tests"]


def test_lines_that_no_test_runs_are_named(tmp_path: Path) -> None:
    made = scaffold.init("fresh", "native", tmp_path)
    verifier = made.folder / "verifier.py"
    verifier.write_text(f"{verifier.read_text()}\n\ndef unused(a: int) -> int:\n    b = a\n    return b\n")

    tested = scaffold.run_tests(made.folder)

    last = len(verifier.read_text().splitlines())
    assert tested.passed
    assert not tested.enough
    assert tested.missing == {"verifier.py": [last - 1, last]}


def test_a_failing_test_is_told(tmp_path: Path) -> None:
    made = scaffold.init("fresh", "native", tmp_path)
    (made.folder / "tests" / "test_more.py").write_text("def test_no() -> None:\n    assert 1 == 2\n")

    tested = scaffold.run_tests(made.folder)

    assert not tested.passed
    assert "assert 1 == 2" in tested.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Upper", "small letters"),
        ("a-b", "small letters"),
        ("9lives", "a letter first"),
        ("gsm8k", "already"),
        ("there", "there"),
    ],
)
def test_a_name_that_will_not_do_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()

    with pytest.raises(UsageError, match=message):
        scaffold.init(name, "native", tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("README.md", "# fresh", "fresh", "begin with a heading"),
        ("config.yaml", "verified: false", "", "key 'verified' is missing"),
        ("config.yaml", "    license: CC0 1.0\n", "", r"key 'datasets\[0\].license' is missing"),
        ("config.yaml", "type: example", "type: test_only", "type"),
        ("config.yaml", "prepare_script: prepare.py", "prepare_script: gone.py", "no file 'gone.py'"),
        ("config.yaml", "description:", "# description:", "key 'description' is missing"),
        ("config.yaml", "verifier.py:Fresh", "verifier.py", "not file.py:Class"),
    ],
)
def test_what_a_benchmark_lacks_is_named(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    folder = scaffold.init("fresh", "native", tmp_path).folder
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))

    try:
        problems = list(scaffold.missing_papers(load_benchmark(str(folder))))
    except ConfigError as e:
        problems = [str(e)]

    assert any(re.search(message, problem) for problem in problems), problems


def test_a_folder_without_tests_is_told(tmp_path: Path) -> None:
    folder = scaffold.init("fresh", "native", tmp_path).folder
    (folder / "tests" / "test_fresh.py").unlink()

    assert [p for p in scaffold.missing_papers(load_benchmark(str(folder))) if "no test_" in p]
    with pytest.raises(UsageError, match="no test_"):
        scaffold.run_tests(folder)


def test_the_setting_makes_a_folders_benchmarks_known_by_name(tmp_path: Path) -> None:
    scaffold.init("fresh", "multi-turn", tmp_path)

    assert add_folders([str(tmp_path)]) == (str(tmp_path),)

    assert load_benchmark("fresh").folder == tmp_path / "fresh"
    assert AGENTS.load("fresh").__name__ == "FreshAgent"
    assert VERIFIERS.load("fresh").__name__ == "Fresh"


def test_two_folders_cannot_bring_the_same_name_along(tmp_path: Path) -> None:
    scaffold.init("fresh", "native", tmp_path / "one")

    with pytest.raises(UsageError, match="is the name of"):
        scaffold.init("fresh", "native", tmp_path / "two")


def test_a_folder_cannot_take_over_a_built_in_verifier(tmp_path: Path) -> None:
    config = scaffold.init("fresh", "native", tmp_path).folder / "config.yaml"
    config.write_text(config.read_text().replace("verifier:\n  name: fresh", "verifier:\n  name: math"))
    load_benchmark(str(config.parent))

    with pytest.raises(ConfigError, match="the name of another verifier"):
        VERIFIERS.load("math")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("class Other: ...", "has no attribute 'Fresh'"),
        ("def", r"invalid syntax \(verifier\.py, line 1\)"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("\n1 / 0", r"ZeroDivisionError: division by zero \(verifier\.py, line 2\)"),
        ("raise SystemExit(3)", r"SystemExit: 3 \(verifier\.py, line 1\)"),
    ],
)
def test_code_that_does_not_load_is_named(tmp_path: Path, code: str, what: str) -> None:
    folder = scaffold.init("fresh", "native", tmp_path).folder
    (folder / "verifier.py").write_text(f"{code}\n")

    with pytest.raises(ConfigError, match=rf"verifier\.py does not load: .*{what}"):
        VERIFIERS.load("fresh")


def test_a_path_without_a_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config"):
        add_folders([str(tmp_path)])
