"""A new benchmark's folder, which runs and passes its tests as it is made; and what tests and papers it must have."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec

from gym_bus.benchmarks.prepare import load_prepare_module
from gym_bus.benchmarks.spec import Benchmark, known_benchmarks, load_benchmark
from gym_bus.benchmarks.validate import Figures, Mode, validate_benchmark
from gym_bus.errors import ConfigError, UsageError

KINDS = ("native", "external", "multi-turn")
"""A `verify` of its own; a third-party library behind the agent; an agent that is told what the verifier finds."""

LEAST_COVERAGE = 95.0
"""Percent of a benchmark's lines and branches that its own tests run."""
TESTS_LIMIT_S = 600.0

_ASYNC = (
    ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    if importlib.util.find_spec("pytest_asyncio")
    else []
)
_SUFFIX = ".template"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


def init(name: str, kind: str, parent: Path) -> Benchmark:
    """Write the folder `parent/name`.

    Args:
        name: of the benchmark, its verifier and its agent: small letters, digits and underscores.
        kind: one of `KINDS`.
        parent: made where it is missing.

    Raises:
        UsageError: the name will not do or is taken, or the folder is there already.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r}: a benchmark's name is small letters, digits and underscores, at most 48 and a letter first, "
            "such as my_benchmark"
        )
    if name in known_benchmarks():
        raise UsageError(f"{name!r} is a benchmark already: choose another name")
    folder = parent / name
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: there is something already: choose another name, or --folder")
    templates = files("gym_bus.benchmarks").joinpath("templates")
    try:
        for part in ("common", kind.replace("-", "_")):
            for place, text in _texts(templates.joinpath(part), name):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                (folder / place).write_text(text, encoding="utf-8")
        benchmark = load_benchmark(f"{folder.absolute()}")
        validate_benchmark(benchmark, folder, mode=Mode.EXAMPLE_VALIDATION, figures=Figures.ADD)
    except OSError as e:
        raise UsageError(f"{folder}: cannot be written: {e.strerror or e}") from None
    return benchmark


def _texts(folder: Traversable, name: str, place: str = "") -> Iterator[tuple[str, str]]:
    """Files below a folder of templates, by their place in the new one."""
    words = {"my_benchmark": name, "MyBenchmark": "".join(part.capitalize() for part in name.split("_"))}
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry, name, f"{place}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            text, target = entry.read_text(encoding="utf-8"), f"{place}{entry.name.removesuffix(_SUFFIX)}"
            for word, own in words.items():
                text, target = text.replace(word, own), target.replace(word, own)
            yield target, text


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark's own tests came to."""

    passed: bool
    coverage: float
    """Percent of its code's lines and branches, its tests left out; 100 where it has no code."""
    missing: dict[str, list[int]]
    """Lines that no test runs, by file of the folder."""
    output: str
    """What pytest said."""

    @property
    def enough(self) -> bool:
        """Whether the tests pass and leave out little."""
        return self.passed and self.coverage >= LEAST_COVERAGE


class _Summary(msgspec.Struct):
    percent_covered: float


class _File(msgspec.Struct):
    missing_lines: list[int]


class _Coverage(msgspec.Struct):
    totals: _Summary
    files: dict[str, _File]


def run_tests(folder: Path) -> Tested:
    """Run the tests in `folder/tests` in a process of their own, with coverage; nothing is left in the folder.

    Settings of the project around the folder do not count: the same folder passes anywhere.

    Raises:
        UsageError: there are no tests, pytest or pytest-cov is missing, or they take too long.
    """
    tests = folder / "tests"
    if not any(tests.glob("test_*.py")):
        raise UsageError(f"{tests}: no test_*.py in it")
    if not all(map(importlib.util.find_spec, ("pytest", "pytest_cov"))):
        raise UsageError("tests are run by pytest and pytest-cov, which are not here: pip install pytest pytest-cov")
    with tempfile.TemporaryDirectory(prefix="gym-bus-test-") as scratch:
        settings, report = Path(scratch, "coveragerc"), Path(scratch, "coverage.json")
        settings.write_text(f"[run]\nbranch = true\ndata_file = {scratch}/.coverage\nomit =\n    {tests}/*\n")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={folder}", "-p"]
        command += ["no:cacheprovider", "--import-mode=importlib", f"--cov={folder}", f"--cov-config={settings}"]
        command += [f"--cov-report=json:{report}", *_ASYNC, str(tests)]
        # No bytecode beside the user's files.
        own = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=own, capture_output=True, text=True, timeout=TESTS_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"{tests}: not done after {TESTS_LIMIT_S:g} s") from None
        found = msgspec.json.decode(report.read_bytes(), type=_Coverage) if report.is_file() else None
    return Tested(
        passed=done.returncode == 0,
        coverage=found.totals.percent_covered if found else 100.0,
        missing={name: file.missing_lines for name, file in found.files.items() if file.missing_lines} if found else {},
        output=done.stdout + done.stderr,
    )


def missing_papers(benchmark: Benchmark) -> Iterator[str]:
    """What a benchmark that is handed in lacks beside its data, in sentences that name file and key."""
    spec, folder, where = benchmark.spec, benchmark.folder, benchmark.origins.nearest
    readme = folder / "README.md"
    if not readme.is_file() or not readme.read_text(encoding="utf-8", errors="replace").startswith("# "):
        yield f"{readme}: must be there and begin with a heading (`# {spec.name}`)"
    if not any((folder / "tests").glob("test_*.py")):
        yield f"{folder / 'tests'}: no test_*.py in it"
    if not spec.description:
        yield f"{where('description')}: key 'description' is missing: one sentence, for the catalogue"
    if benchmark.root is None and "verified" not in benchmark.origins:
        yield f"{where('verified')}: key 'verified' is missing: false, until its scores were compared with others'"
    if not any(dataset.type == "example" for dataset in spec.datasets):
        yield f"{where('datasets')}: no dataset of type example: five rows, in data/example.jsonl"
    for i, dataset in enumerate(spec.datasets):
        if not dataset.license:
            yield f"{where(f'datasets[{i}]')}: key 'datasets[{i}].license' is missing"
        if dataset.prepare_script is not None:
            try:
                load_prepare_module(benchmark, dataset)
            except ConfigError as e:
                yield str(e)
