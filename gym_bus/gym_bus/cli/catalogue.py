"""`gym-bus list`: what there is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.cli import common
from gym_bus.config import Config
from gym_bus.errors import UsageError, did_you_mean
from gym_bus.masking import redact

Row = dict[str, Any]

KINDS = ("benchmarks", "agents", "verifiers", "environments", "models")

_LAST = ("options", "error", "description")
"""Columns that stand at the end, for they are wide."""

search_dir_option = click.option(
    "--search-dir",
    "search_dirs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Benchmarks in this folder too, at any depth; may be repeated.",
)


@click.command("list")
@click.argument("kind", type=common.Choice(KINDS))
@search_dir_option
@common.config_option
@common.json_option
@click.argument("arguments", nargs=-1, metavar="[NAME]... [KEY=VALUE]...")
def command(
    kind: str,
    search_dirs: tuple[Path, ...],
    config_files: tuple[str, ...],
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """List benchmarks, agents, verifiers, environments or models; all of them, or the NAMEd ones.

    An environment is a set of tools with its own state, and the benchmarks that use it.
    """
    names, overrides = common.names_and_overrides(arguments)
    config = common.settings(config_files, overrides)
    rows = _named(kind, LISTS[kind](config, search_dirs), names)
    if as_json:
        common.print_json(rows)
    else:
        print_rows(kind, rows)


def _named(kind: str, rows: list[Row], names: list[str]) -> list[Row]:
    known = {row["name"]: row for row in rows}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {kind.removesuffix('s')} {name!r}: {did_you_mean(name, known)}")
    return [known[name] for name in names] if names else rows


def print_rows(title: str, rows: list[Row]) -> None:
    """A table of them."""
    columns = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: key in _LAST)
    shown = common.table(title, *(column.replace("_", " ") for column in columns))
    for name, column in zip(columns, shown.columns, strict=True):
        column.no_wrap = name not in _LAST
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    common.out.print(shown, soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _benchmarks(config: Config, search_dirs: Iterable[Path]) -> list[Row]:
    from gym_bus.benchmarks.spec import list_benchmarks

    rows = [msgspec.structs.asdict(info) for info in list_benchmarks(Path(config.data_dir), search_dirs)]
    return [{key: value for key, value in row.items() if key != "error" or value} for row in rows]


def _agents(config: Config, search_dirs: Iterable[Path]) -> list[Row]:
    del config, search_dirs
    from gym_bus.agents.registry import AGENTS

    return [
        {"name": name, "options": _options(AGENTS.load(name)), "description": _first_line(AGENTS.load(name))}
        for name in AGENTS
    ]


def _verifiers(config: Config, search_dirs: Iterable[Path]) -> list[Row]:
    del config, search_dirs
    from gym_bus.verifiers.registry import VERIFIERS

    return [
        {
            "name": name,
            "runs": verifier.placement.value,
            "needs": list(verifier.required),
            "options": _options(verifier),
            "description": _first_line(verifier),
        }
        for name, verifier in ((name, VERIFIERS.load(name)) for name in VERIFIERS)
    ]


def _environments(config: Config, search_dirs: Iterable[Path]) -> list[Row]:
    from gym_bus.agents.registry import TOOLBOXES
    from gym_bus.benchmarks.spec import list_benchmarks

    infos = [info for info in list_benchmarks(Path(config.data_dir), search_dirs) if info.toolbox]
    return [
        {
            "name": name,
            "domain": ", ".join(sorted({info.domain for info in infos if info.toolbox == name})),
            "verifiers": sorted({info.verifier for info in infos if info.toolbox == name}),
            "benchmarks": [info.name for info in infos if info.toolbox == name],
            "description": _first_line(TOOLBOXES.load(name)),
        }
        for name in TOOLBOXES
    ]


def _models(config: Config, search_dirs: Iterable[Path]) -> list[Row]:
    del search_dirs
    return [
        {"name": name, "kind": model.kind, "api": model.api, "endpoint": redact(model.base_url) or model.file or ""}
        for name, model in sorted(config.models.items())
    ]


LISTS: dict[str, Callable[[Config, Iterable[Path]], list[Row]]] = {
    "benchmarks": _benchmarks,
    "agents": _agents,
    "verifiers": _verifiers,
    "environments": _environments,
    "models": _models,
}
"""What can be listed, and how."""


def _options(thing: type[Any]) -> list[str]:
    """The options that a job may set: a module's `Options` are those of its agent or verifier."""
    options = getattr(sys.modules[thing.__module__], "Options", None)
    return list(options.__struct_fields__) if options is not None else []


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]
