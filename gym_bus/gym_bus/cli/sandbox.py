"""`gym-bus sandbox`: what protects this machine from the programs that models write, and a program run under it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.cli import common
from gym_bus.deadline import within
from gym_bus.errors import SandboxError, UsageError, did_you_mean
from gym_bus.logs import configure_logs
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program

FAILURES = 1
SUFFIXES = {".py": "python", ".sh": "bash", ".cpp": "cpp", ".cc": "cpp", ".js": "javascript", ".sql": "sql"}
HELD = {True: "held", False: "not held", None: "not protected"}

least_option = click.option(
    "--least",
    type=common.Choice(["namespaces", "landlock"]),
    default="namespaces",
    show_default=True,
    help="The lowest level that will do, as verifier.sandbox_level.",
)


@click.group("sandbox")
def command() -> None:
    """Look at the sandbox, and run a program in it."""
    configure_logs()


@command.command("doctor")
@click.option("--quick", is_flag=True, help="Only the protections; leave the hostile programs out.")
@least_option
@common.json_option
def doctor(quick: bool, least: str, as_json: bool) -> int:
    """Show the protections of this machine, and try them with programs that want to get out.

    Exits with 1 where a program was not held, with 2 where this machine does not give the level.
    """
    report = common.run(_examine(quick, least, quiet=as_json))
    if as_json:
        common.print_json(report)
    else:
        _print_report(report)
    return FAILURES if any(one["held"] is False for one in report["programs"]) else 0


async def _examine(quick: bool, least: str, *, quiet: bool) -> dict[str, Any]:
    from gym_bus.sandbox.hostile import ATTACKS, examine
    from gym_bus.sandbox.protections import Level
    from gym_bus.sandbox.slot import Slot

    slot = await Slot.start(least=Level(least))
    try:
        protections = slot.protections()
        programs: list[dict[str, Any]] = []
        if not quick:
            with click.progressbar(length=len(ATTACKS), label="hostile programs", file=sys.stderr, hidden=quiet) as bar:
                async for held in examine(slot, protections, ATTACKS):
                    programs.append(msgspec.to_builtins(held))
                    bar.update(1)
    finally:
        await slot.close()
    return {
        "level": slot.level,
        "lowered": slot.lowered,
        "protections": msgspec.to_builtins(protections),
        "programs": programs,
    }


def _print_report(report: dict[str, Any]) -> None:
    shown = common.table(f"protections: level {report['level']}", "protection", "active", "how")
    for protection in report["protections"]:
        shown.add_row(protection["name"], "yes" if protection["active"] else "no", protection["how"])
    common.out.print(shown, soft_wrap=True)
    if report["lowered"]:
        click.echo(f"not level namespaces: {report['lowered']}")
    if not report["programs"]:
        return
    groups = common.table("hostile programs", "group", *HELD.values())
    names = dict.fromkeys(one["group"] for one in report["programs"])
    for name in names:
        own = [one["held"] for one in report["programs"] if one["group"] == name]
        groups.add_row(name, *(str(own.count(held)) for held in HELD))
    common.out.print(groups, soft_wrap=True)
    for one in report["programs"]:
        if not one["held"]:
            click.echo(f"{HELD[one['held']]}: {one['group']}: {one['name']}: {one['detail']}")


@command.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1)
@click.option("--language", type=str, help="Default: by the file's name.")
@click.option("--stdin", "stdin_file", type=click.Path(path_type=Path), help="File that the program reads.")
@click.option("--limit", "limits", multiple=True, metavar="KEY=VALUE", help="wall_s, cpu_s, memory_bytes, ...")
@click.option(
    "--preload",
    multiple=True,
    metavar="MODULE",
    help="Have it imported before; numpy and other installed packages are there only so. May be repeated.",
)
@least_option
@common.json_option
def run(
    file: Path,
    arguments: tuple[str, ...],
    language: str | None,
    stdin_file: Path | None,
    limits: tuple[str, ...],
    preload: tuple[str, ...],
    least: str,
    as_json: bool,
) -> int:
    """Run the program in FILE, isolated, and show what it printed and how it ended.

    Exits with 0 where the program exited with 0, with 1 where it did not, with 2 where it could not be run.
    """
    program = Program(source=_read(file), language=language or SUFFIXES.get(file.suffix, "python"), arguments=arguments)
    try:
        outcome = common.run(_run(program, _read(stdin_file) if stdin_file else b"", _limits(limits), preload, least))
    except SandboxError as e:
        if as_json:
            common.print_json({"ended": Ended.of(e), "detail": str(e)})
        raise
    if as_json:
        common.print_json(_shown(outcome))
    else:
        sys.stdout.buffer.write(outcome.stdout)
        sys.stdout.buffer.flush()
        sys.stderr.buffer.write(outcome.stderr)
        if not outcome.ok:
            click.echo(_said(outcome), err=True)
    return 0 if outcome.ok else FAILURES


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise UsageError(f"{file}: {e.strerror or e}") from None


def _limits(given: tuple[str, ...]) -> Limits:
    values: dict[str, Any] = {}
    known = [field.name for field in msgspec.structs.fields(Limits)]
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--limit {text}: expected KEY=VALUE")
        if key not in known:
            raise UsageError(f"--limit {key}: no such limit: {did_you_mean(key, known)}")
        values[key] = value
    try:
        return msgspec.convert(values, Limits, strict=False)
    except msgspec.ValidationError as e:
        raise UsageError(f"--limit: {e}") from None


async def _run(program: Program, stdin: bytes, limits: Limits, preload: tuple[str, ...], least: str) -> Outcome:
    from gym_bus.sandbox.protections import Level
    from gym_bus.sandbox.slot import Slot
    from gym_bus.sandbox.zygote import PRELOAD

    slot = await Slot.start(" ".join((PRELOAD, *preload)), least=Level(least))
    try:
        return await within(4 * limits.wall_s + 60, slot.run(program, stdin, limits))
    finally:
        await slot.close()


def _shown(outcome: Outcome) -> dict[str, Any]:
    values = msgspec.structs.asdict(outcome)
    for stream in ("stdout", "stderr"):
        values[stream] = values[stream].decode(errors="replace")
    return {**values, "ended": outcome.ended.value}


def _said(outcome: Outcome) -> str:
    if outcome.ended is Ended.FINISHED:
        return f"exit {outcome.exit_code}"
    return outcome.ended.value if outcome.signal is None else f"{outcome.ended.value} (signal {outcome.signal})"


@command.command("bench")
@click.option("--programs", type=click.IntRange(60), default=600, show_default=True)
@click.option("--no-pools", is_flag=True, help="Leave out what goes through child processes and Ray.")
@common.json_option
def bench(programs: int, no_pools: bool, as_json: bool) -> None:
    """Measure the sandbox on this machine, beside the ways without it."""
    from gym_bus.workers.sandbox_bench import measure_sandbox

    report = common.run(measure_sandbox(programs, pools=not no_pools))
    if as_json:
        common.print_json(report)
        return
    shown = common.table("sandbox", "way", "per second", "p50 ms", "p99 ms")
    for rate in report.rates:
        p50, p99 = ("" if value is None else f"{value:.2f}" for value in (rate.p50_ms, rate.p99_ms))
        shown.add_row(rate.name, f"{rate.per_s:,.0f}", p50, p99)
    common.out.print(shown, soft_wrap=True)
    click.echo(
        f"{report.times_plain:.1f} times a process each; "
        f"isolation adds {100 * report.isolation_share:.0f} % to the same slot without it; "
        f"a slot starts in {report.slot_start_ms:.0f} ms and takes {report.slot_mb:.0f} MB"
    )
