"""`gym-bus search`: find things by words."""

from __future__ import annotations

from pathlib import Path

import click

from gym_bus.cli import common
from gym_bus.cli.catalogue import KINDS, LISTS, Row, print_rows, search_dir_option

LEAST_LIKENESS = 72.0
"""Per cent; what is less like the query is not shown."""


@click.command("search")
@click.argument("query", nargs=-1, required=True)
@click.option("--kind", type=common.Choice(KINDS))
@search_dir_option
@common.config_option
@common.json_option
def command(
    query: tuple[str, ...],
    kind: str | None,
    search_dirs: tuple[Path, ...],
    config_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Search everything that can be listed by name, domain and description; spelling mistakes are forgiven."""
    config = common.settings(config_files, ())
    text = " ".join(query)
    found = [
        {"kind": one.removesuffix("s"), **row, "likeness": round(likeness)}
        for one in ([kind] if kind else LISTS)
        for row in LISTS[one](config, search_dirs)
        if (likeness := _likeness(text, row)) >= LEAST_LIKENESS
    ]
    found.sort(key=lambda row: (-row["likeness"], row["kind"], row["name"]))
    if as_json:
        common.print_json(found)
    elif found:
        shown = ("kind", "name", "domain", "prepared", "rows", "description")
        print_rows(f"like {text!r}", [{key: row.get(key) for key in shown} for row in found])
    else:
        click.echo(f"nothing like {text!r}; gym-bus list benchmarks shows all there are")


def _likeness(query: str, row: Row) -> float:
    """Per cent: how well the best of the name, the domain and the words of the description fits the query."""
    from rapidfuzz import fuzz, utils

    name, domain = str(row["name"]), str(row.get("domain", ""))
    scores = [
        fuzz.WRatio(query, name, processor=utils.default_process),
        fuzz.ratio(query, domain, processor=utils.default_process),
        # Every word of the query must be like some word of the description.
        0.95 * min(_best_word(word, str(row.get("description", ""))) for word in query.split()),
    ]
    return max(scores)


def _best_word(word: str, text: str) -> float:
    from rapidfuzz import fuzz, process, utils

    best = process.extractOne(word, text.split(), scorer=fuzz.ratio, processor=utils.default_process)
    return best[1] if best else 0.0
