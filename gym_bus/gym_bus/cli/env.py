"""`gym-bus env`: make a benchmark, test it, check its papers, and audit its verifier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.cli import common
from gym_bus.errors import UsageError

FAILURES = 1

_KINDS = ("native", "external", "multi-turn")
"""Those of `gym_bus.benchmarks.scaffold`, which help must not import."""

benchmark_argument = click.argument("benchmark", metavar="BENCHMARK")


@click.group("env")
def command() -> None:
    """Author benchmarks: init, test, validate, audit. BENCHMARK is a name or a folder."""


@command.command("init")
@click.argument("name")
@click.option(
    "--kind",
    type=common.Choice(_KINDS),
    default="native",
    show_default=True,
    help="Its own verify; a third-party library behind the agent; an agent that is told what the verifier finds.",
)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path(), help="Where the folder NAME is made; default: here."
)
@common.json_option
def init(name: str, kind: str, folder: Path, as_json: bool) -> None:
    """Make the folder of a new benchmark, which runs and passes its tests at once."""
    from gym_bus.benchmarks import scaffold

    made = scaffold.init(name, kind, folder)
    place = folder / name
    shown = f"{place}" if place.is_absolute() else f"./{place}"
    files = sorted(path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file())
    if as_json:
        common.print_json({"name": name, "kind": kind, "folder": str(place), "files": [str(place / f) for f in files]})
        return
    for file in files:
        click.echo(f"{place / file}")
    click.echo(f"\nnext:\n  gym-bus env test {shown}\n  gym-bus env audit {shown}")
    click.echo(f"  gym-bus eval run {shown} --split example --replay {place}/data/example_replay.jsonl")


@command.command("test")
@benchmark_argument
@common.config_option
@common.json_option
def test(benchmark: str, config_files: tuple[str, ...], as_json: bool) -> int:
    """Run BENCHMARK's own tests with coverage, and check its example data; exit 1 where either is wanting."""
    from gym_bus.benchmarks.scaffold import LEAST_COVERAGE, run_tests
    from gym_bus.benchmarks.spec import load_benchmark

    common.settings(config_files, ())
    found = load_benchmark(benchmark)
    tested = run_tests(found.folder.resolve())
    problems = list(_data_problems(benchmark, config_files))
    if as_json:
        common.print_json(
            {
                "benchmark": found.spec.name,
                "passed": tested.passed,
                "coverage": round(tested.coverage, 2),
                "missing": tested.missing,
                "problems": problems,
                "output": tested.output,
            }
        )
    else:
        click.echo(tested.output.strip())
        click.echo(f"coverage of {found.folder}: {tested.coverage:.1f} %, at least {LEAST_COVERAGE:g} % is wanted")
        for name, lines in tested.missing.items():
            click.echo(f"not run by any test: {name}: {_ranges(lines)}")
        _print_problems(problems)
    return 0 if tested.enough and not problems else FAILURES


def _ranges(lines: list[int]) -> str:
    """As `1-3, 7`."""
    found: list[list[int]] = []
    for line in lines:
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


@command.command("validate")
@benchmark_argument
@common.config_option
@common.json_option
def validate(benchmark: str, config_files: tuple[str, ...], as_json: bool) -> int:
    """Check BENCHMARK as it would be handed in: configuration, agent, verifier, rows, licences, README, tests."""
    from gym_bus.benchmarks.scaffold import missing_papers
    from gym_bus.benchmarks.spec import load_benchmark
    from gym_bus.workers.plan import check_verifier, make_agent

    config = common.settings(config_files, ())
    problems: list[str] = []
    try:
        found = load_benchmark(benchmark)
        agent, verifier = found.spec.agent, found.spec.verifier
        problems += missing_papers(found)
        make_agent(agent.name, agent.options)
        check_verifier(verifier.name, verifier.options, config)
        problems += _data_problems(benchmark, config_files)
    except UsageError as e:
        problems.append(str(e))
    if as_json:
        common.print_json({"benchmark": benchmark, "problems": problems})
    else:
        _print_problems(problems)
        found_wrong = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        click.echo(f"{benchmark}: {found_wrong if problems else 'fit to be handed in'}")
    return FAILURES if problems else 0


def _data_problems(name: str, config_files: tuple[str, ...]) -> Iterator[str]:
    from gym_bus.benchmarks.spec import load_benchmark
    from gym_bus.benchmarks.validate import Mode, validate_benchmark
    from gym_bus.verifiers.registry import VERIFIERS

    config, benchmark = common.settings(config_files, ()), load_benchmark(name)
    required = tuple(VERIFIERS.load(benchmark.spec.verifier.name).required)
    try:
        reports = validate_benchmark(benchmark, Path(config.data_dir), mode=Mode.EXAMPLE_VALIDATION, required=required)
    except UsageError as e:
        yield str(e)
        return
    for report in reports:
        yield from (finding.what for finding in report.findings if finding.level == "error")


def _print_problems(problems: list[str]) -> None:
    for problem in problems:
        click.echo(f"error: {problem}")


@command.command("audit")
@benchmark_argument
@click.option("--split", default="example", show_default=True, help="The dataset whose rows are used, by type or name.")
@click.option("--limit", type=click.IntRange(1), default=5, show_default=True, help="Only the first so many tasks.")
@common.config_option
@common.json_option
def audit(benchmark: str, split: str, limit: int, config_files: tuple[str, ...], as_json: bool) -> int:
    """Attack BENCHMARK's verifier: a right answer must score 1, cheats and accidents 0 or a failure with a class.

    Everything is judged twice, in child processes, and must come out the same, in time. Exit 1 where a case does not
    hold, unless the benchmark's `audit.accepted` gives a reason for it.
    """
    from gym_bus.benchmarks.spec import load_benchmark
    from gym_bus.workers.attack import attack

    config = common.settings(config_files, ())
    found = load_benchmark(benchmark)
    findings = common.run(attack(found, Path(config.data_dir), split=split, limit=limit))
    if as_json:
        common.print_json({"benchmark": found.spec.name, "findings": [msgspec.to_builtins(f) for f in findings]})
    else:
        _print_findings(found.spec.name, findings)
    return FAILURES if any(finding.state == "does not hold" for finding in findings) else 0


def _print_findings(name: str, findings: list[Any]) -> None:
    shown = common.table(f"audit of {name}", "case", "state", "rows", "slowest", "what")
    for finding in findings:
        time = f"{finding.slowest_s * 1000:,.0f} ms" if finding.rows else ""
        shown.add_row(finding.case, finding.state, str(finding.rows), time, finding.what)
    common.out.print(shown, soft_wrap=True)
    for finding in findings:
        if finding.why:
            click.echo(f"{finding.case} {finding.state}: {finding.why}")
    states = [finding.state for finding in findings]
    click.echo(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
