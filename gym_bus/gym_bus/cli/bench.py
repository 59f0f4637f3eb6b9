"""`gym-bus bench`: measure the pipeline on this machine, and plan for a rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from gym_bus.cli import common, display

FAILURES = 1
KINDS = ("constant", "uniform", "exponential", "lognormal")


class DistributionText(click.ParamType[dict[str, Any]]):
    """`MEAN`, `KIND:MEAN` or `KIND:MEAN:SPREAD`; the value is what the settings of a distribution are."""

    name = "dist"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Raises what click shows as a usage error."""
        if isinstance(value, dict):
            return value
        kind, *numbers = value.split(":") if ":" in value else ("constant", value)
        try:
            mean, spread = (*map(float, numbers), 0.0)[:2]
        except ValueError:
            mean, spread = -1.0, 0.0
        if kind not in KINDS or not 1 <= len(numbers) <= 2 or not mean >= 0 or not spread >= 0:
            self.fail(f"{value!r} is no MEAN or KIND:MEAN[:SPREAD] with a KIND of {', '.join(KINDS)}", param, ctx)
        return {"kind": kind, "mean": mean, "spread": spread}


@click.command("bench")
@click.argument("arguments", nargs=-1, metavar="[BENCHMARK] [KEY=VALUE]...")
@click.option("--rollouts", type=click.IntRange(100), default=20_000, show_default=True)
@click.option("--split", help="The benchmark's dataset, by type or name; default: its main one.")
@click.option("--replay", type=click.Path(path_type=Path), help="Recorded answers (JSONL) for the benchmark.")
@click.option("--prompt-bytes", type=click.IntRange(16), default=1024, show_default=True, help="Size of a question.")
@click.option(
    "--api",
    type=common.Choice(["responses", "chat", "none"]),
    default="responses",
    show_default=True,
    help="none: no HTTP.",
)
@click.option("--latency", type=DistributionText(), help="Seconds of a model call: 2, or lognormal:2:0.5.")
@click.option("--answer-tokens", type=DistributionText(), help="Length of an answer: 256, or exponential:800.")
@click.option("--rate-limited", type=click.FloatRange(0, 1), help="Share of calls answered with 429.")
@click.option("--server-error", type=click.FloatRange(0, 1), help="Share of calls answered with 500.")
@click.option("--most-in-flight", type=click.IntRange(1), help="Calls at a time, beyond which the model says 429.")
@click.option(
    "--most-per-second",
    "most_per_s",
    type=click.FloatRange(0, min_open=True),
    help="Calls within a second, beyond which the model says 429.",
)
@click.option("--retry-after", "retry_after_s", type=click.FloatRange(0), help="Seconds that a 429 asks for; 0: none.")
@click.option("--tokens", is_flag=True, help="Have token ids and log-probabilities with every answer.")
@click.option("--concurrency", type=click.IntRange(1), help="Rollouts in flight per agent worker.")
@click.option("--agents", type=click.IntRange(1), help="Agent worker processes.")
@click.option("--verifiers", type=click.IntRange(1), help="Verifier worker processes.")
@click.option("--burst", is_flag=True, help="Publish every request before the first worker starts.")
@click.option("--target", type=click.FloatRange(0, min_open=True), help="Rollouts/s to say the needs of.")
@common.config_option
@common.nats_option
@common.json_option
def command(
    arguments: tuple[str, ...],
    rollouts: int,
    split: str | None,
    replay: Path | None,
    prompt_bytes: int,
    api: Literal["responses", "chat", "none"],
    concurrency: int | None,
    agents: int | None,
    verifiers: int | None,
    tokens: bool,
    burst: bool,
    target: float | None,
    config_files: tuple[str, ...],
    nats: str | None,
    as_json: bool,
    **model: Any,
) -> int:
    """Measure the whole pipeline on this machine: a simulated model over HTTP, the real bus, workers and verifiers.

    Without a BENCHMARK the work is multiple-choice questions. Reports rollouts per second, the time in each stage and
    queue, CPU time per rollout and peak memory by role, the calls that the model refused, and how many workers of each
    kind a rate needs.
    """
    from gym_bus.workers.bench import Load, measure

    names, overrides = common.names_and_overrides(arguments)
    if len(names) > 1:
        raise click.UsageError(f"one benchmark at a time, not {', '.join(names)}")
    if replay and not names:
        raise click.UsageError("--replay needs the BENCHMARK that it answers")
    wanted: dict[str, Any] = {"agent.concurrency": concurrency, "local.agents": agents, "local.verifiers": verifiers}
    if replay:
        wanted["models.replay.cycle"] = "true"
    more = [f"{key}={value}" for key, value in wanted.items() if value is not None]
    base = [common.replay_layer(replay)] if replay else []
    config = common.settings(config_files, [*more, *_simulated(tokens=tokens, **model), *overrides], nats, base)
    load = Load(
        rollouts=rollouts,
        benchmark=names[0] if names else None,
        split=split,
        prompt_bytes=prompt_bytes,
        model="replay" if replay else "simulated",
        api=api,
        tokens=tokens,
        burst=burst,
        target=target,
    )
    with display.live(quiet=as_json) as shown:
        report = common.run(measure(load, config, on_start=shown.begin))
    if as_json:
        common.print_json(report)
    else:
        display.print_bench(report)
    return FAILURES if report.failed else 0


def _simulated(
    *,
    latency: dict[str, Any] | None,
    answer_tokens: dict[str, Any] | None,
    rate_limited: float | None,
    server_error: float | None,
    most_in_flight: int | None,
    most_per_s: float | None,
    retry_after_s: float | None,
    tokens: bool,
) -> list[str]:
    """The options as settings of the simulated model; those that were not given leave what is configured."""
    settings: dict[str, Any] = {
        "rate_limited": rate_limited,
        "server_error": server_error,
        "most_in_flight": most_in_flight,
        "most_per_s": most_per_s,
        "retry_after_s": retry_after_s,
        "tokens": tokens or None,
    }
    for name, distribution in (("latency_s", latency), ("output_tokens", answer_tokens)):
        settings |= {f"{name}.{key}": value for key, value in (distribution or {}).items()}
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return [f"models.simulated.simulated.{key}={value}" for key, value in texts.items() if value is not None]
