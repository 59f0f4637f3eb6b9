"""`gym-bus sandbox`: what protects this machine from the programs that models write, and a program run under it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.cli import common
from gym_bus.errors import UsageError, did_you_mean
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program

FAILURES = 1
SUFFIXES = {".py": "python", ".sh": "bash", ".cpp": "cpp", ".cc": "cpp", ".js": "javascript", ".sql": "sql"}


@click.group("sandbox")
def command() -> None:
    """Look at the sandbox, and run a program in it."""


@command.command("doctor")
@click.option("--quick", is_flag=True, help="Only the protections; leave the hostile programs out.")
@common.json_option
def doctor(quick: bool, as_json: bool) -> int:
    """Show the protections of this machine, and try them with programs that want to get out.

    Exits with 1 where a program was not held, with 2 where this machine allows no sandbox at all.
    """
    report = common.run(_examine(quick, quiet=as_json))
    failed = [held for held in report["programs"] if not held["held"]]
    if as_json:
        common.print_json(report)
    else:
        _print_report(report, failed)
    return FAILURES if failed else 0


async def _examine(quick: bool, *, quiet: bool) -> dict[str, Any]:
    from gym_bus.sandbox.hostile import ATTACKS, examine
    from gym_bus.sandbox.slot import Slot

    slot = await Slot.start()
    try:
        protections = [msgspec.to_builtins(p) for p in slot.protections()]
        programs: list[dict[str, Any]] = []
        if not quick:
            with click.progressbar(length=len(ATTACKS), label="hostile programs", file=sys.stderr, hidden=quiet) as bar:
                async for held in examine(slot):
                    programs.append(msgspec.to_builtins(held))
                    bar.update(1)
    finally:
        await slot.close()
    return {"level": slot.level, "protections": protections, "programs": programs}


def _print_report(report: dict[str, Any], failed: list[dict[str, Any]]) -> None:
    shown = common.table(f"protections: level {report['level']}", "protection", "active", "how")
    for protection in report["protections"]:
        shown.add_row(protection["name"], "yes" if protection["active"] else "no", protection["how"])
    common.out.print(shown, soft_wrap=True)
    if not report["programs"]:
        return
    groups = common.table("hostile programs", "group", "held", "of")
    names = dict.fromkeys(held["group"] for held in report["programs"])
    for name in names:
        own = [held for held in report["programs"] if held["group"] == name]
        groups.add_row(name, str(sum(held["held"] for held in own)), str(len(own)))
    common.out.print(groups, soft_wrap=True)
    for held in failed:
        click.echo(f"not held: {held['group']}: {held['name']}: {held['detail']}")


@command.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1)
@click.option("--language", type=str, help="Default: by the file's name.")
@click.option("--stdin", "stdin_file", type=click.Path(path_type=Path), help="File that the program reads.")
@click.option("--limit", "limits", multiple=True, metavar="KEY=VALUE", help="wall_s, cpu_s, memory_bytes, ...")
@common.json_option
def run(
    file: Path,
    arguments: tuple[str, ...],
    language: str | None,
    stdin_file: Path | None,
    limits: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run the program in FILE, isolated, and show what it printed and how it ended.

    Exits with 0 where the program exited with 0, with 1 where it did not.
    """
    program = Program(source=_read(file), language=language or SUFFIXES.get(file.suffix, "python"), arguments=arguments)
    outcome = common.run(_run(program, _read(stdin_file) if stdin_file else b"", _limits(limits)))
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


async def _run(program: Program, stdin: bytes, limits: Limits) -> Outcome:
    from gym_bus.sandbox.slot import Slot

    slot = await Slot.start()
    try:
        return await asyncio.wait_for(slot.run(program, stdin, limits), 4 * limits.wall_s + 60)
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
