"""`gym-bus eval run --until-ci`: repeats as they are needed."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import click
import msgspec

from gym_bus.cli import common, display
from gym_bus.config import Config
from gym_bus.errors import UsageError
from gym_bus.results.sequence import Limits
from gym_bus.workers.adaptive import Adapted, Aim, Step, run_until
from gym_bus.workers.plan import Job

NORMAL_95 = NormalDist().inv_cdf(0.975)
"""Standard deviations from the middle of a normal 95 % interval to its end."""


def until_options(function: common.F) -> common.F:
    """The options of a run that gets repeats as it needs them."""
    options = [
        click.option(
            "--until-ci",
            type=click.FloatRange(0, 0.5, min_open=True, max_open=True),
            metavar="HALF_WIDTH",
            help="Further repeats, where they help, until pass@1 over these tasks is known to +- so much; 0.01 is one "
            "percentage point.",
        ),
        click.option(
            "--until-variance",
            type=click.FloatRange(0, 0.06, min_open=True, max_open=True),
            metavar="VARIANCE",
            help="The same by the variance of pass@1, of 1: until the interval is as narrow as the usual 95 % interval "
            "of that variance, +- 1.96 of its square root.",
        ),
        click.option("--budget", type=click.IntRange(1), help="With --until-...: rollouts in all, at most."),
        click.option("--max-repeats", type=click.IntRange(1), help="With --until-...: rollouts per task, at most."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def take_aim(options: dict[str, Any]) -> Aim | None:
    """Take these options out of all options; None for a run with a fixed number of repeats."""
    half_width, variance, budget, most = (
        options.pop(key) for key in ("until_ci", "until_variance", "budget", "max_repeats")
    )
    if half_width is not None and variance is not None:
        raise UsageError("--until-ci and --until-variance are two ways to say one thing; give one of them")
    if variance is not None:
        half_width = NORMAL_95 * variance**0.5
    if half_width is None:
        if budget is not None or most is not None:
            raise UsageError("--budget and --max-repeats are the limits of --until-ci; a fixed number is --num-repeats")
        return None
    return Aim(half_width=half_width, most=Limits(rollouts=budget, per_task=most))


def run_adaptively(job: Job, config: Config, aim: Aim, *, workers: bool, quiet: bool) -> Adapted:
    """Run the job, and tell after every round what is known."""
    aim = msgspec.structs.replace(aim, seeds=config.job.seeds)
    with display.live(quiet=quiet) as shown:

        def tell(step: Step) -> None:
            if not quiet:
                click.echo(_round_words(step, aim), err=True)

        return common.run(run_until(job, config, aim, workers=workers, on_start=shown.begin, on_round=tell))


def _round_words(step: Step, aim: Aim) -> str:
    known = step.bounds
    words = (
        f"round {known.rounds}: pass@1 over these tasks is {100 * known.low:.2f} to {100 * known.high:.2f} %, "
        f"half-width {100 * known.half_width:.2f}, wanted {100 * aim.half_width:.4g}"
    )
    if step.next is None:
        return words
    tasks = sum(count > 0 for count in step.next.rollouts)
    return f"{words}; {step.next.total:,} further rollouts of {tasks:,} tasks"


def until_ci(adapted: Adapted, aim: Aim) -> dict[str, Any]:
    """How it ended, for the summary."""
    known = adapted.bounds
    return {
        "target": aim.half_width,
        "half_width": known.half_width,
        "ended": adapted.ended,
        **msgspec.to_builtins(known),
    }
