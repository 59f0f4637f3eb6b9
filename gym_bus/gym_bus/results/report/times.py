"""Where the time went: the stages of a rollout, the slowest ones, and how the job came along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gym_bus.results.report.choose import SLOWEST, slowest
from gym_bus.results.report.items import Json
from gym_bus.results.report.jobs import QUEUED, Entry
from gym_bus.results.report.plots import Figure, colour, figure, graph, name_of
from gym_bus.results.report.transcripts import outcome
from gym_bus.results.statistics import Floats

STAGES = {
    "request_queue_s": "waiting for an agent",
    "model_queue_s": "waiting for the model",
    "model_s": "model",
    "tools_s": "tools",
    "other_s": "rest of the agent",
    "publish_s": "publishing",
    "attempt_queue_s": "waiting for a verifier",
    "verify_s": "verifying",
}
"""In order of time."""

STAGE_COLOURS = {
    "request_queue_s": "#c3cad6",
    "model_queue_s": "#b9cdf5",
    "model_s": "#4c78f0",
    "tools_s": "#d99a12",
    "other_s": "#9aa1ad",
    "publish_s": "#b06fdd",
    "attempt_queue_s": "#e6c9a8",
    "verify_s": "#22a58b",
}
"""Where jobs stand side by side; those of the table of the slowest rollouts. Waiting is pale."""


SINCE = "mean seconds since the request"


def seconds(value: float) -> str:
    """A duration for people."""
    if value != value:
        return "–"
    if value < 0.001:
        return "< 1 ms" if value > 0 else "0"
    if value < 0.0995:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if value < 99.5 else f"{value:,.0f} s"


def stage_seconds(entry: Entry) -> dict[str, Floats]:
    """Seconds per stage of every scored rollout, stages in order of time; shape [scored rollouts with timings]."""
    frame = entry.frame[(entry.frame["outcome"] == "scored").to_numpy() & (entry.work_s > 0)]
    # Another tool's rows may lack some of the timings: they took no time that is known.
    taken = {name: np.nan_to_num(frame[name].to_numpy(float)) for name in (*STAGES, "agent_s") if name in frame}
    known = taken["model_queue_s"] + taken["model_s"] + taken["tools_s"]
    taken["other_s"] = np.maximum(0.0, taken["agent_s"] - known)
    return {name: taken[name] for name in STAGES}


def stages(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row per timed job and stage."""
    return [
        {
            "label": entry.label,
            "colour": colour(place),
            "stage": STAGES[name],
            "share": float(values.sum()) / total if (total := float(sum(map(np.sum, taken.values())))) else 0.0,
            **{key: seconds(value) for key, value in _spread(values).items()},
        }
        for place, entry in enumerate(entries)
        if len((taken := stage_seconds(entry))["verify_s"])
        for name, values in taken.items()
    ]


def _spread(values: Floats) -> dict[str, float]:
    middle, high, most = np.percentile(values, [50, 95, 100])
    return {"mean": float(values.mean()), "p50": float(middle), "p95": float(high), "most": float(most)}


def figures(entries: Sequence[Entry]) -> dict[str, Figure]:
    """The plots of time that have something to show, by name."""
    made = {"waterfall": waterfall(entries), "progress": progress(entries)}
    return {name: one for name, one in made.items() if one is not None}


def waterfall(entries: Sequence[Entry]) -> Figure | None:
    """Mean seconds per stage, each bar beginning where the one before ends; None where nothing was timed.

    Of one job a row per stage; of several a row per job, so that the page does not grow with stages times jobs.
    """
    timed = {
        place: means
        for place, entry in enumerate(entries)
        if (means := {name: float(values.mean()) for name, values in stage_seconds(entry).items() if len(values)})
    }
    if not timed:
        return None
    if len(timed) > 1:
        return _side_by_side([name_of(entries[place]) for place in timed], list(timed.values()))
    ((place, means),) = timed.items()
    return _one_by_one(name_of(entries[place]), colour(place), means)


def _one_by_one(name: str, colour: str, means: Mapping[str, float]) -> Figure:
    lengths = list(means.values())
    bar = graph().Bar(
        y=[STAGES[stage] for stage in means],
        x=lengths,
        base=np.cumsum([0.0, *lengths[:-1]]).tolist(),
        orientation="h",
        name=name,
        marker={"color": colour},
        text=[seconds(length) for length in lengths],
        textposition="outside",
        cliponaxis=False,
        customdata=[length / sum(lengths) if sum(lengths) else 0 for length in lengths],
        hovertemplate="%{y}: %{text}, %{customdata:.1%} of the whole<extra>%{fullData.name}</extra>",
    )
    return figure(
        [bar],
        300,
        margin={"l": 150, "r": 64, "t": 12, "b": 48},
        xaxis={"title": {"text": SINCE}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed"},
        showlegend=False,
    )


def _side_by_side(names: Sequence[str], means: Sequence[Mapping[str, float]]) -> Figure:
    bars = [
        graph().Bar(
            y=names,
            x=[of[stage] for of in means],
            orientation="h",
            name=said,
            marker={"color": STAGE_COLOURS[stage]},
            customdata=[[seconds(of[stage]), of[stage] / (sum(of.values()) or 1.0)] for of in means],
            hovertemplate=f"{said}: %{{customdata[0]}}, %{{customdata[1]:.1%}} of the whole<extra>%{{y}}</extra>",
        )
        for stage, said in STAGES.items()
        if any(of[stage] for of in means)
    ]
    return figure(
        bars,
        max(240, 120 + 32 * len(names)),
        barmode="stack",
        bargap=0.35,
        xaxis={"title": {"text": SINCE}, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "type": "category", "automargin": True},
        showlegend=True,
        legend={"traceorder": "normal"},
    )


def progress(entries: Sequence[Entry]) -> Figure | None:
    """Share of the expected rollouts that were recorded, over time; None where the files do not say when."""
    traces = []
    for place, entry in enumerate(entries):
        times = entry.frame["finished_at"].dropna()
        if len(times) < 2:
            continue
        ended = np.sort((times - times.min()).dt.total_seconds().to_numpy(float))
        at = np.unique(np.linspace(0, len(ended) - 1, min(len(ended), 400)).astype(int))
        traces.append(
            graph().Scatter(
                x=np.round(ended[at], 3).tolist(),
                y=((at + 1) / entry.counts.expected).tolist(),
                name=name_of(entry),
                mode="lines",
                line={"color": colour(place), "width": 2},
                hovertemplate="%{x:,.1f} s: %{y:.1%}<extra>%{fullData.name}</extra>",
            )
        )
    if not traces:
        return None
    return figure(
        traces,
        300,
        xaxis={"title": {"text": "seconds since the first result"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "share of the expected rollouts"}, "tickformat": ".0%", "rangemode": "tozero"},
        showlegend=len(traces) > 1,
    )


def slowest_rows(entries: Sequence[Entry], places: Mapping[tuple[int, int, int], int]) -> list[Json]:
    """The slowest rollouts of every job, with the parts of their time in per cent of the slowest of all."""
    found = [
        (float(entry.work_s[at]), place, entry.frame.iloc[at])
        for place, entry in enumerate(entries)
        for at in slowest(entry)[: max(5, SLOWEST // len(entries))]
    ]
    longest = max((work for work, _, _ in found), default=1.0)
    return [
        {
            "label": entries[place].label,
            "colour": colour(place),
            "task": (task := int(row["task_index"])),
            "rollout": (rollout := int(row["rollout_index"])),
            "work": seconds(work),
            "queued": seconds(float(row[list(QUEUED)].sum())),
            "parts": [(name, seconds(value), round(100 * value / longest, 2)) for name, value in _parts(row).items()],
            "tokens": None if row["output_tokens"] != row["output_tokens"] else int(row["output_tokens"]),
            "outcome": outcome(None if row["outcome"] == "failed" else float(row["reward"])),
            "at": places.get((place, task, rollout)),
        }
        for work, place, row in sorted(found, key=lambda one: -one[0])
    ]


def _parts(row: Any) -> dict[str, float]:
    wait, model, tools, agent = (float(row[name]) for name in ("model_queue_s", "model_s", "tools_s", "agent_s"))
    wait = 0.0 if wait != wait else wait  # rows of older versions do not say
    rest = max(0.0, agent - wait - model - tools)
    parts = {"wait": wait, "model": model, "tools": tools, "rest": rest, "verify": float(row["verify_s"])}
    return {name: value for name, value in parts.items() if value == value}
