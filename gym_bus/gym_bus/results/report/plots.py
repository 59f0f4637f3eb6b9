"""What all plots of the report share: data and layout for plotly.js, colours of jobs, points with intervals.

Colours of text and grid are the page's business, by its theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gym_bus.results.extras import need
from gym_bus.results.report.jobs import Entry
from gym_bus.results.statistics import Estimate

COLOURS = ("#4c78f0", "#ef7f51", "#22a58b", "#b06fdd", "#d99a12", "#e0588a", "#6b9e3c", "#7f8ba0")
"""One per job; for light and for dark ground."""

NAMES_IN_A_ROW = 3
NAMES_HEIGHT = 20
"""Pixels of a row of the legend; one row fits into any plot."""

Figure = dict[str, Any]


def colour(place: int) -> str:
    """The colour of the job at a place in the report."""
    return COLOURS[place % len(COLOURS)]


def figure(traces: Sequence[Any], height: int, **layout: Any) -> Figure:
    """A plot of some traces, `height` pixels high; higher where the names of many need room above it."""
    rows_of_names = -(-len(traces) // NAMES_IN_A_ROW) if layout.get("showlegend", True) else 0
    height += NAMES_HEIGHT * max(0, rows_of_names - 1)
    layout = {"height": height, "margin": {"l": 56, "r": 16, "t": 12, "b": 48}, "template": None, **layout}
    made: Figure = graph().Figure(traces, layout).to_plotly_json()
    made["layout"].pop("template", None)
    return made


def name_of(entry: Entry) -> str:
    """The job's label as plotly.js shows it as it is: it takes `<a href=...>` and the like for markup."""
    return escape(entry.label, quote=False)


def graph() -> Any:
    """Traces and figures; a package that takes its time to import."""
    return need("plotly.graph_objects", "analysis")


def line(estimates: Mapping[Any, Estimate], name: str, colour: str, dash: str, said: Mapping[Any, str]) -> Any:
    """Estimates over x with their intervals; `said` begins the words at every point, by x."""
    known = {x: (e.mean, e.low, e.high, e.tasks) for x, e in estimates.items() if e.mean is not None}
    return graph().Scatter(
        x=list(known),
        y=[mean for mean, _, _, _ in known.values()],
        name=name,
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2},
        error_y=error([(mean, low, high) for mean, low, high, _ in known.values()]),
        customdata=[[said[x], low, high, number] for x, (_, low, high, number) in known.items()],
        hovertemplate="%{customdata[0]}: %{y:.4f}<br>95 %: %{customdata[1]:.4f} to %{customdata[2]:.4f}"
        "<br>n = %{customdata[3]:,}<extra>%{fullData.name}</extra>",
    )


def error(intervals: Sequence[tuple[float, float | None, float | None]]) -> dict[str, Any]:
    """Error bars of points given as (value, low, high)."""
    return {
        "type": "data",
        "array": [0.0 if high is None else high - mean for mean, _, high in intervals],
        "arrayminus": [0.0 if low is None else mean - low for mean, low, _ in intervals],
        "thickness": 1,
        "width": 3,
    }
