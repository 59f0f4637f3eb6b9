"""The report's plots of scores, rewards, lengths and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from gym_bus.results.report.jobs import Entry
from gym_bus.results.report.plots import Figure, colour, error, figure, graph, line, name_of
from gym_bus.results.statistics import Estimate, Floats, pass_at_1
from gym_bus.results.subsets import task_subsets

OUTCOMES = {"pass": "#1f9d8a", "partial": "#e0a526", "fail": "#d4526e"}
SCALE = ((0.0, "#d4526e"), (0.5, "#f0c05a"), (1.0, "#1f9d8a"))
"""Mean reward 0 to 1."""
MOST_CELLS = 20_000
"""Of one heat map; of more tasks, neighbours share a cell."""
MOST_SPACED = 60
"""Rows of cells with space in between."""
BINS = 40
"""Of lengths, at most."""
FEW = 12
"""Different rewards up to this number get a bar each; more are put into bins."""
TENTHS = 10


def figures(entries: Sequence[Entry], by: str | None = None) -> dict[str, Figure]:
    """Every plot that has something to show, by name; `by` is the field that divides the tasks into subsets."""
    made = {
        "pass-curve": pass_curve(entries),
        "subsets": subsets(entries, by) if by else None,
        "rewards": reward_histogram(entries),
        "task-rates": task_rate_histogram(entries),
        "lengths": length_histogram(entries),
        "reward-by-length": reward_by_length(entries),
    }
    made |= {f"heat-{place}": heat_map(entry) for place, entry in enumerate(entries)}
    return {name: one for name, one in made.items() if one is not None}


def pass_curve(entries: Sequence[Entry]) -> Figure | None:
    """pass@k and pass^k over k, with their intervals; None where no task has two rollouts."""
    traces, drawn = [], set[int]()
    for place, entry in enumerate(entries):
        best = {int(name[5:]): e for name, e in entry.estimates.items() if name.startswith("pass@")}
        worst = {int(name[5:]): e for name, e in entry.estimates.items() if name.startswith("pass^")}
        if len(best) < 2:
            continue
        of = f"{name_of(entry)}: " if len(entries) > 1 else ""
        said = {k: f"k = {k}" for k in best}
        drawn |= best.keys()
        traces.append(line(best, f"{of}pass@k", colour(place), "solid", said))
        traces.append(line({1: best[1]} | worst, f"{of}pass^k", colour(place), "dot", said))
    if not traces:
        return None
    return figure(
        traces,
        340,
        xaxis={"title": {"text": "k, rollouts drawn per task"}, "type": "log", "tickvals": sorted(drawn)},
        yaxis={
            "title": {"text": "share of tasks" if all(entry.binary for entry in entries) else "mean over tasks"},
            "tickformat": ".0%",
            "rangemode": "tozero",
        },
    )


def subsets(entries: Sequence[Entry], by: str) -> Figure | None:
    """pass@1 of every subset of the tasks, with its interval.

    Raises:
        UsageError: no task of a job has the field.
    """
    traces, names = [], set[str]()
    for place, entry in enumerate(entries):
        of = np.array(task_subsets(entry.files, entry.table, by), object)
        known = sorted({name for name in of if name is not None})
        estimates = {name: pass_at_1(entry.table.of_tasks(of == name).rewards()) for name in known}
        names |= estimates.keys()
        traces.append(_dots(estimates, name_of(entry), colour(place)))
    return figure(
        traces,
        max(240, 100 + (14 + 12 * len(traces)) * len(names)),
        scattermode="group",
        xaxis={"title": {"text": "pass@1"}, "tickformat": ".0%"},
        yaxis={"autorange": "reversed", "type": "category", "automargin": True},
        showlegend=len(traces) > 1,
    )


def _dots(estimates: Mapping[str, Estimate], name: str, colour: str) -> Any:
    known = {subset: (e.mean, e.low, e.high, e.tasks) for subset, e in estimates.items() if e.mean is not None}
    return graph().Scatter(
        y=[escape(subset, quote=False) for subset in known],
        x=[mean for mean, _, _, _ in known.values()],
        name=name,
        mode="markers",
        orientation="h",
        marker={"color": colour, "size": 9},
        error_x=error([(mean, low, high) for mean, low, high, _ in known.values()]),
        customdata=[[low, high, tasks] for _, low, high, tasks in known.values()],
        hovertemplate="%{y}: %{x:.2%}<br>95 %: %{customdata[0]:.2%} to %{customdata[1]:.2%}"
        "<br>%{customdata[2]:,} tasks<extra>%{fullData.name}</extra>",
    )


def reward_histogram(entries: Sequence[Entry]) -> Figure | None:
    """How many rollouts got which reward, in per cent of the scored ones."""
    return _shares(entries, [entry.rewards for entry in entries], "reward of a rollout", "scored rollouts")


def task_rate_histogram(entries: Sequence[Entry]) -> Figure | None:
    """How many tasks have which mean reward; None where tasks have one rollout only."""
    most = max(int(entry.table.task_scored.max(initial=0)) for entry in entries)
    if most < 2:
        return None
    steps = min(most, 20)  # means over fewer rollouts than most tasks have lie in between
    rates = [np.round(entry.task_means[~np.isnan(entry.task_means)] * steps) / steps for entry in entries]
    return _shares(entries, rates, "mean reward of a task", "tasks")


def _shares(entries: Sequence[Entry], values: Sequence[Floats], what: str, of: str) -> Figure | None:
    """Bars of the share of every value; of bins, where there are many values."""
    everything = np.concatenate(values)
    if not len(everything):
        return None
    centres = np.unique(everything)
    axis: dict[str, Any] = {"title": {"text": what}}
    if many := len(centres) > FEW:
        edges = np.histogram_bin_edges(everything, 20)
        centres = (edges[:-1] + edges[1:]) / 2
    else:
        names = [f"{value:.3g}" for value in centres]
        axis |= {"type": "category", "categoryorder": "array", "categoryarray": names}
    traces = []
    for place, (entry, own) in enumerate(zip(entries, values, strict=True)):
        count = np.histogram(own, edges)[0] if many else np.array([(own == value).sum() for value in centres])
        traces.append(
            graph().Bar(
                x=centres if many else names,
                y=count / max(1, len(own)),
                name=name_of(entry),
                marker={"color": colour(place)},
                customdata=count,
                hovertemplate=f"{'about %{x:.3g}' if many else '%{x}'}: %{{customdata:,}} {of}, %{{y:.1%}}"
                "<extra>%{fullData.name}</extra>",
            )
        )
    return figure(
        traces,
        300,
        barmode="group",
        bargap=0.06 if many else 0.25,
        xaxis=axis,
        yaxis={"title": {"text": f"share of {of}"}, "tickformat": ".0%"},
        showlegend=len(entries) > 1,
    )


def length_histogram(entries: Sequence[Entry]) -> Figure | None:
    """Output lengths on a logarithmic axis: of one job by outcome, of several side by side."""
    found = [_known_lengths(entry) for entry in entries]
    everything = np.concatenate([lengths for lengths, _ in found])
    if not len(everything):
        return None
    edges = np.linspace(*_log_range(everything), int(np.clip(len(everything) ** 0.5, 8, BINS)) + 1)
    middle, width = (edges[:-1] + edges[1:]) / 2, edges[1] - edges[0]
    traces = []
    if len(entries) == 1:
        lengths, rewards = found[0]
        for name, chosen in _by_outcome(rewards).items():
            count = np.histogram(np.log10(lengths[chosen]), edges)[0]
            if count.any():
                traces.append(_steps(middle, width, count, name, OUTCOMES[name]))
    else:
        for place, (entry, (lengths, _)) in enumerate(zip(entries, found, strict=True)):
            share = np.histogram(np.log10(lengths), edges)[0] / max(1, len(lengths))
            traces.append(_outline(middle, share, name_of(entry), colour(place)))
    return figure(
        traces,
        300,
        barmode="stack",
        bargap=0.04,
        xaxis={"title": {"text": f"length of the output, {_unit(entries)}"}, **_log_ticks(edges)},
        yaxis={"title": {"text": "share of scored rollouts"}, "tickformat": ".0%"}
        if len(entries) > 1
        else {"title": {"text": "scored rollouts"}},
        showlegend=True,
    )


def _known_lengths(entry: Entry) -> tuple[Floats, Floats]:
    """Lengths of the scored rollouts that have any, and their rewards."""
    lengths, reward = entry.lengths[0], entry.frame["reward"].to_numpy(float)
    known = (lengths > 0) & ~np.isnan(reward)
    return lengths[known], reward[known]


def _log_range(values: Floats) -> tuple[float, float]:
    low, high = np.log10(values.min()), np.log10(values.max())
    return (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high + 1e-9)


def _log_ticks(edges: Floats) -> dict[str, Any]:
    """Ticks for an axis of decimal logarithms: 1, 2, 5, 10, ... as numbers."""
    low, high = float(edges[0]), float(edges[-1])
    steps = (1, 2, 5) if high - low < 3 else (1,)
    values = [step * 10.0**power for power in range(int(low) - 1, int(high) + 2) for step in steps]
    shown = [value for value in values if low - 0.02 <= np.log10(value) <= high + 0.02]
    return {"tickvals": [float(np.log10(value)) for value in shown], "ticktext": [_short(value) for value in shown]}


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _by_outcome(rewards: Floats) -> dict[str, Any]:
    return {"pass": rewards >= 1, "partial": (rewards > 0) & (rewards < 1), "fail": rewards <= 0}


def _steps(middle: Floats, width: float, count: Any, name: str, colour: str) -> Any:
    return graph().Bar(
        x=middle,
        y=count,
        width=width,
        name=name,
        marker={"color": colour},
        customdata=10**middle,
        hovertemplate="about %{customdata:,.0f}: %{y:,}<extra>%{fullData.name}</extra>",
    )


def _outline(middle: Floats, share: Floats, name: str, colour: str) -> Any:
    return graph().Scatter(
        x=middle,
        y=share,
        name=name,
        mode="lines",
        line={"color": colour, "shape": "hvh", "width": 2},
        customdata=10**middle,
        hovertemplate="about %{customdata:,.0f}: %{y:.1%}<extra>%{fullData.name}</extra>",
    )


def reward_by_length(entries: Sequence[Entry]) -> Figure | None:
    """Mean reward of the shortest tenth of the outputs, the next, ...; None where there are few."""
    traces, seen = [], []
    for place, entry in enumerate(entries):
        lengths, rewards = _known_lengths(entry)
        if len(lengths) < 5 * TENTHS:
            continue
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, TENTHS + 1)))[1:-1]
        bins = np.digitize(lengths, edges, right=True)
        parts = [bins == at for at in np.unique(bins)]
        x = [float(np.log10(np.median(lengths[part]))) for part in parts]
        seen += x
        said = {at: f"about {10**at:,.0f}" for at in x}
        means = {at: pass_at_1(rewards[part][:, None]) for at, part in zip(x, parts, strict=True)}
        traces.append(line(means, name_of(entry), colour(place), "solid", said))
    if not traces:
        return None
    return figure(
        traces,
        300,
        xaxis={"title": {"text": f"length of the output, {_unit(entries)}, in tenths"}, **_log_ticks(np.sort(seen))},
        yaxis={"title": {"text": "mean reward"}, "rangemode": "tozero"},
        showlegend=len(entries) > 1,
    )


def _unit(entries: Sequence[Entry]) -> str:
    return " or ".join(dict.fromkeys(entry.lengths[1] for entry in entries))


def tasks_per_cell(entry: Entry) -> int:
    """How many tasks share a cell of the heat map."""
    return max(1, -(-len(entry.table.tasks) // MOST_CELLS))


def heat_map(entry: Entry) -> Figure | None:
    """A cell per task, in order of index, coloured by its mean reward; empty where it has none."""
    tasks, means = entry.table.tasks, entry.task_means
    if not len(tasks):
        return None
    shared = tasks_per_cell(entry)
    cells = -(-len(tasks) // shared)
    wide = int(np.clip(np.ceil(np.sqrt(cells * 6)), min(cells, 20), 100))
    high = -(-cells // wide)
    gap = 1 if high <= MOST_SPACED else 0
    value = np.full(high * wide, np.nan)
    value[:cells] = [_mean(means[at : at + shared]) for at in range(0, len(tasks), shared)]
    first = np.full(high * wide, -1, np.int64)
    first[:cells] = tasks[::shared]
    heat = graph().Heatmap(
        z=_rounded(value.reshape(high, wide)),
        customdata=first.reshape(high, wide).tolist(),
        zmin=0,
        zmax=1,
        colorscale=[list(stop) for stop in SCALE],
        xgap=gap,
        ygap=gap,
        hoverongaps=False,
        showscale=False,
        hovertemplate="task %{customdata}"
        + (f" and the {shared - 1} after it" if shared > 1 else "")
        + ": mean reward %{z:.3f}<extra></extra>",
    )
    axis = {"visible": False, "fixedrange": True}
    return figure(
        [heat],
        int(np.clip(high * 16, 40, 560)),
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        xaxis=axis,
        yaxis={**axis, "autorange": "reversed"},
    )


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _rounded(values: Floats) -> list[list[float | None]]:
    return [[None if value != value else round(value, 3) for value in row] for row in values.tolist()]
