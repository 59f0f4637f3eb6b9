"""The page: words, plots and transcripts packed into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.results.disk import replace_file
from gym_bus.results.extras import need
from gym_bus.results.report import times, words
from gym_bus.results.report.choose import REASONS, choose
from gym_bus.results.report.figures import figures, tasks_per_cell
from gym_bus.results.report.items import Json
from gym_bus.results.report.jobs import Entry, read_entries
from gym_bus.results.report.plots import colour
from gym_bus.results.report.tasks import Family, TaskRow, excerpts, families, task_rows, telling
from gym_bus.results.report.transcripts import read_transcripts

TEMPLATES = Path(__file__).parent / "templates"
MOST_CHARS = 8_000_000
"""Of all transcripts together; packed, they take less than half of it."""
MOST_TASKS = 1500
"""Tasks in the table, all families together."""
MOST_DOTS = 64
"""Rollouts shown per task and job."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What a report holds."""

    output: str
    size_bytes: int
    jobs: int
    rollouts: int
    """Recorded in all jobs."""
    transcripts: int
    """Of these, shown in full."""


def write_report(paths: Sequence[Path], output: Path, *, by: str | None = None, transcripts: int = 2000) -> Written:
    """Write the report about the jobs in some folders or rollouts files, as one HTML page.

    Memory: the numbers of all rollouts, about 500 bytes each, and the texts of the transcripts.

    Args:
        paths: folders of jobs, or rollouts files.
        output: the page.
        by: a field of the rows that divides the tasks into subsets, each with its own pass@1.
        transcripts: how many rollouts to show in full, at most.

    Raises:
        UsageError: no rollouts there, no row has the field, or the page cannot be written.
        DataError: names file and line.
    """
    entries = read_entries(paths)
    grouped = families(entries)
    rows = [task_rows(entries, family) for family in grouped]
    shown = read_transcripts(entries, choose(entries, grouped, rows, transcripts), MOST_CHARS)
    page = _render(entries, grouped, rows, shown, by).encode("utf-8", "replace")
    replace_file(output, [page])
    recorded = sum(len(entry.frame) for entry in entries)
    return Written(
        output=str(output), size_bytes=len(page), jobs=len(entries), rollouts=recorded, transcripts=len(shown)
    )


def _render(
    entries: Sequence[Entry],
    grouped: Sequence[Family],
    rows: Sequence[Sequence[TaskRow]],
    shown: Sequence[Json],
    by: str | None,
) -> str:
    jinja2 = need("jinja2", "analysis")
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {"per_cent": words.per_cent}
    plots = figures(entries, by) | times.figures(entries)
    app, (library, library_hash) = (TEMPLATES / "report.js").read_text(), _library()
    places = {(one["job"], one["task"], one["rollout"]): at for at, one in enumerate(shown)}
    page: str = templates.get_template("report.html").render(
        title=words.title(entries),
        made_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=version("gym-bus"),
        entries=entries,
        colours=[colour(place) for place in range(len(entries))],
        recorded=sum(len(entry.frame) for entry in entries),
        expected=sum(entry.counts.expected for entry in entries),
        transcripts=len(shown),
        scale=words.scale(entries),
        rows=words.headline(entries, grouped),
        notes=words.notes(entries, grouped),
        settings=words.setup(entries),
        failures=words.failures(entries),
        recovered=words.recovered(entries),
        stages=times.stages(entries),
        slowest=times.slowest_rows(entries, places),
        kinds={
            place: words.kinds(own, member)
            for family, own in zip(grouped, rows, strict=True)
            for member, place in enumerate(family.members)
        },
        per_cell=[tasks_per_cell(entry) for entry in entries],
        plots=plots,
        by=by,
        style=(TEMPLATES / "report.css").read_text(),
        app=app,
        hashes=[_hash(app), library_hash],
        library=library,
        data=_packed(json.dumps(_data(entries, grouped, rows, shown, plots), separators=(",", ":"))),
    )
    return page


def _data(
    entries: Sequence[Entry],
    grouped: Sequence[Family],
    rows: Sequence[Sequence[TaskRow]],
    shown: Sequence[Json],
    plots: dict[str, Any],
) -> Json:
    return {
        "jobs": [{"label": entry.label, "colour": colour(place)} for place, entry in enumerate(entries)],
        "figures": plots,
        "reasons": REASONS,
        "families": [
            _tasks(entries, family, own, MOST_TASKS // len(grouped)) for family, own in zip(grouped, rows, strict=True)
        ],
        "transcripts": shown,
    }


def _tasks(entries: Sequence[Entry], family: Family, rows: Sequence[TaskRow], most: int) -> Json:
    taken = telling(rows, most)
    about = excerpts(entries, family, [row.task for row in taken])
    return {
        "members": family.members,
        "totals": Counter(row.kind for row in rows) | {"differ": sum(row.spread > 0 for row in rows), "all": len(rows)},
        "tasks": [
            {
                "task": row.task,
                "about": about.get(row.task, ""),
                "kind": row.kind,
                "spread": round(row.spread, 4),
                "rewards": [list(own.items())[:MOST_DOTS] for own in row.rewards],
                "means": [row.mean(member) for member in range(len(row.rewards))],
            }
            for row in taken
        ],
    }


@cache
def _library() -> tuple[str, str]:
    """The plotting library, packed, and its hash."""
    script = need("plotly.offline", "analysis").get_plotlyjs()
    return _packed(script), _hash(script)


def _packed(text: str) -> str:
    """Gzip, then base64: a quarter of the size, and nothing in it can end a script element or be taken for HTML."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    """As a content security policy names a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
