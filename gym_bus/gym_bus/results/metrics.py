"""NeMo Gym's metrics over numbers: what its names mean, exactly, without data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gym_bus.results.statistics import Floats, Ints, task_pass_all_k, task_pass_at_k

NO_ANSWER = -1
"""In place of an answer's number: the rollout has none."""

Metrics = dict[str, Any]


def describe(groups: int, group: Ints, columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """`mean/<f>`, `max/<f>`, `min/<f>`, `median/<f>`, `std/<f>` of every column in every group.

    Args:
        groups: their number.
        group: shape [rows], which group each row belongs to.
        columns: by name, shape [rows]; NaN where a row has no such field, which no metric counts.

    Returns:
        By metric name, shape [groups]; NaN where a group has nothing to say. `std` divides by n - 1. Where that leaves
        a group without any `std`, it is 0 for those columns that every row of the group has.
    """
    size = np.bincount(group, minlength=groups)
    described = {name: _Column(groups, group, values) for name, values in columns.items()}
    if described:
        no_std = np.isnan([column.std for column in described.values()]).all(axis=0)
        for column in described.values():
            column.std[no_std & (column.count == size) & (size > 0)] = 0.0
    return {
        f"{metric}/{name}": getattr(column, metric)
        for metric in ("mean", "max", "min", "median", "std")
        for name, column in described.items()
    }


class _Column:
    """One column's metrics, each of shape [groups]."""

    def __init__(self, groups: int, group: Ints, values: Floats) -> None:
        present = ~np.isnan(values)
        group, values = group[present], values[present]
        order = np.lexsort((values, group))
        group, values = group[order], values[order]
        count = self.count = np.bincount(group, minlength=groups)
        first = np.cumsum(count) - count
        some = count > 0

        def pick(at: Ints) -> Floats:
            picked = np.full(groups, np.nan)
            picked[some] = values[at[some]]
            return picked

        self.mean = _divide(np.bincount(group, values, groups), count)
        self.min = pick(first)
        self.max = pick(first + count - 1)
        self.median = (pick(first + (count - 1) // 2) + pick(first + count // 2)) / 2
        self.std = np.sqrt(_divide(np.bincount(group, (values - self.mean[group]) ** 2, groups), count - 1))


def _divide(total: NDArray[Any], by: Ints) -> Floats:
    quotient = np.full(len(total), np.nan)
    np.divide(total, by, out=quotient, where=by > 0)
    return quotient


def compute_pass_majority_metrics(scores: Mapping[str, Floats], answers: Ints | None = None) -> Metrics:
    """NeMo Gym's pass@k and its kin, in per cent, for every k up to the longest task.

    Args:
        scores: by name, shape [tasks, rollouts]: each task's rollouts in their order, NaN behind its last.
        answers: the rollouts' answers, shape as the scores: equal numbers for equal answers, `NO_ANSWER` for none. Adds
            `majority@k` and the score `no_answer`.

    Returns:
        - `pass@{k}/{s}`: over the tasks with at least k rollouts; see `statistics.task_pass_at_k`.
        - `pass^{k}/{s}`, which NeMo Gym has not: likewise; see `statistics.task_pass_all_k`.
        - `pass@1[avg-of-{k}]/{s}`: the mean over tasks of the mean of the first k, or of all where there are fewer;
          from k = 2 with `/std_dev_across_runs`, `/std_err_across_runs`, and `/avg_sample_std_dev`: the mean over tasks
          of the standard deviation of the first k, not in per cent.
        - `majority@{k}/{s}`: the score of the most frequent (answer, score) among the first k; the mean of those
          that tie; 0 for a task without any answer.
        - `per_sample_aggregate`: by score, the mean of all tasks' first rollouts, second rollouts, ...
    """
    metrics: Metrics = {}
    if answers is not None:
        exists = ~np.isnan(next(iter(scores.values())))
        scores = {**scores, "no_answer": np.where(exists, (answers == NO_ANSWER).astype(float), np.nan)}
    per_sample: dict[str, list[float]] = {}
    for name in sorted(scores):
        per_sample[name] = _metrics_of(metrics, name, scores[name], answers)
    return {**metrics, "per_sample_aggregate": per_sample}


def _metrics_of(metrics: Metrics, name: str, score: Floats, answers: Ints | None) -> list[float]:
    present = ~np.isnan(score)
    count = present.sum(axis=1)
    longest = int(count.max(initial=0))
    running = np.where(present, score, 0.0).cumsum(axis=1)
    runs = [_per_cent(score[present[:, i], i]) for i in range(longest)]
    majority = _majority(score, answers) if answers is not None else None
    for k in range(1, longest + 1):
        metrics[f"pass@{k}/{name}"] = _per_cent(task_pass_at_k(score, k)[count >= k])
        metrics[f"pass^{k}/{name}"] = _per_cent(task_pass_all_k(score, k)[count >= k])
        averages = f"pass@1[avg-of-{k}]/{name}"
        metrics[averages] = _per_cent(running[:, k - 1] / np.minimum(count, k))
        if majority is not None:
            metrics[f"majority@{k}/{name}"] = _per_cent(majority[:, k - 1])
        if k > 1:
            spread = float(np.std(runs[:k], ddof=1))
            metrics[f"{averages}/std_dev_across_runs"] = spread
            metrics[f"{averages}/std_err_across_runs"] = spread / k**0.5
            metrics[f"{averages}/avg_sample_std_dev"] = float(np.nanstd(score[count > 1, :k], axis=1, ddof=1).mean())
    return runs


def _per_cent(values: Floats) -> float:
    return 100.0 * float(values.sum()) / len(values)  # in this order: to the last bit what NeMo Gym writes


def _majority(score: Floats, answers: Ints) -> Floats:
    """The majority's score among each task's first 1, 2, ... rollouts; shape as the scores."""
    voted = np.zeros(score.shape)
    for out, task_scores, task_answers in zip(voted, score.tolist(), answers.tolist(), strict=True):
        votes: dict[tuple[int, float], int] = {}
        value = 0.0
        for at, vote in enumerate(zip(task_answers, task_scores, strict=True)):
            if vote[0] != NO_ANSWER and vote[1] == vote[1]:
                votes[vote] = votes.get(vote, 0) + 1
                value = _mean_of_modes(votes)
            out[at] = value
    return voted


def _mean_of_modes(votes: Mapping[tuple[int, float], int]) -> float:
    most = max(votes.values())
    modes = [score for (_, score), count in votes.items() if count == most]
    return sum(modes) / len(modes)


def key_metrics(agent_metrics: Mapping[str, Any]) -> Metrics:
    """The headline: every `mean/*`, as in NeMo Gym, and pass@k, pass@1[avg-of-k] and majority@k of the largest k."""
    k = len(next(iter(agent_metrics.get("per_sample_aggregate", {}).values()), ()))
    headline = {
        f"pass@{k}/accuracy",
        f"pass@1[avg-of-{k}]/accuracy",
        f"majority@{k}/accuracy",
        f"pass@1[avg-of-{k}]/no_answer",
    }
    return {key: value for key, value in agent_metrics.items() if key.startswith("mean/") or key in headline}


def powers_of_two(up_to: int) -> list[int]:
    """1, 2, 4, ... and `up_to` itself; empty for 0."""
    return sorted({1 << n for n in range(up_to.bit_length())} | {up_to}) if up_to else []


def subset_metrics(subset: str, metrics: Metrics) -> Metrics:
    """A subset's metrics under NeMo Gym's names: `<subset>/pass@1/accuracy`."""
    return {f"{subset}/{name}": value for name, value in metrics.items() if name != "per_sample_aggregate"}


def align(tasks: int, task: Ints, values: Iterable[Sequence[float] | Floats], fill: float) -> list[Floats]:
    """Per-row values, rows sorted by task, as matrices of shape [tasks, longest task], `fill` behind each last."""
    count = np.bincount(task, minlength=tasks)
    place = np.arange(len(task)) - np.repeat(np.cumsum(count) - count, count)
    matrices = []
    for column in values:
        matrix = np.full((tasks, int(count.max(initial=0))), fill)
        matrix[task, place] = column
        matrices.append(matrix)
    return matrices
