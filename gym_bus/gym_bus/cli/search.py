"""`gym-bus search`: find things by words."""

from __future__ import annotations

from pathlib import Path

import click

from gym_bus.cli import common
from gym_bus.cli.catalogue import KINDS, LISTS, Row, print_rows, search_dir_option
from gym_bus.errors import UsageError

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
    text = " ".join(" ".join(query).split())
    if not text:
        raise UsageError("nothing to search for: give a word or two, such as `gym-bus search math`")
    found = [
        {**row, "kind": one.removesuffix("s"), "likeness": round(likeness)}
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

    name, domain, description = (str(row.get(key, "")) for key in ("name", "domain", "description"))
    return max(
        fuzz.WRatio(query, name, processor=utils.default_process),
        fuzz.ratio(query, domain, processor=utils.default_process),
        0.95 * _every_word(query, domain.replace("_", " ")),
        0.95 * _every_word(query, description),
    )


def _every_word(query: str, text: str) -> float:
    """Every word of the query must be like some word of the text; `grade-school` is two."""
    from rapidfuzz import utils

    wanted, words = (utils.default_process(one).split() for one in (query, text))
    return min((_best_word(word, words) for word in wanted), default=0.0)


def _best_word(word: str, words: list[str]) -> float:
    from rapidfuzz import fuzz, process

    best = process.extractOne(word, words, scorer=fuzz.ratio)
    return best[1] if best else 0.0
