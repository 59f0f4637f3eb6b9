"""`gym-bus list`: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from gym_bus.cli import common
from gym_bus.config import Config

KINDS = ("benchmarks", "agents", "verifiers", "models")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@common.config_option
@common.json_option
@common.overrides_argument
def command(kind: str, config_files: tuple[str, ...], as_json: bool, overrides: tuple[str, ...]) -> None:
    """List benchmarks, agents, verifiers or models."""
    config = common.settings(config_files, overrides)
    rows = _rows(kind, config)
    if as_json:
        common.print_json(rows)
        return
    columns = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: key == "description")
    shown = common.table(kind, *(column.replace("_", " ") for column in columns))
    for column in shown.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    common.out.print(shown, soft_wrap=True)


def _rows(kind: str, config: Config) -> list[dict[str, Any]]:
    if kind == "benchmarks":
        return _benchmarks(Path(config.data_dir))
    if kind == "agents":
        return _agents()
    if kind == "verifiers":
        return _verifiers()
    return [
        {"name": name, "kind": model.kind, "api": model.api, "endpoint": model.base_url or model.file or ""}
        for name, model in sorted(config.models.items())
    ]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _benchmarks(data_dir: Path) -> list[dict[str, Any]]:
    from gym_bus.benchmarks.spec import list_benchmarks

    rows = [msgspec.structs.asdict(info) for info in list_benchmarks(data_dir)]
    for row in rows:
        if not row["error"]:
            del row["error"]
    return rows


def _agents() -> list[dict[str, Any]]:
    from gym_bus.agents.registry import AGENTS

    return [{"name": name, "description": _first_line(AGENTS.load(name))} for name in AGENTS]


def _verifiers() -> list[dict[str, Any]]:
    from gym_bus.verifiers.registry import VERIFIERS

    return [
        {
            "name": name,
            "runs": VERIFIERS.load(name).placement.value,
            "needs": ", ".join(VERIFIERS.load(name).required),
            "description": _first_line(VERIFIERS.load(name)),
        }
        for name in VERIFIERS
    ]


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]
