"""`gym-bus bench`: measure the pipeline on this machine."""

from __future__ import annotations

import click

from gym_bus.cli import common, display

FAILURES = 1


@click.command("bench")
@click.option("--rollouts", type=click.IntRange(100), default=20_000, show_default=True)
@click.option("--prompt-bytes", type=click.IntRange(16), default=1024, show_default=True, help="Size of a question.")
@click.option("--api", type=click.Choice(["responses", "chat"]), default="responses", show_default=True)
@click.option("--latency", type=click.FloatRange(0), help="Mean seconds of one model call; default 0.")
@click.option("--concurrency", type=click.IntRange(1), help="Rollouts in flight per agent worker.")
@common.config_option
@common.nats_option
@common.json_option
@common.overrides_argument
def command(
    rollouts: int,
    prompt_bytes: int,
    api: str,
    latency: float | None,
    concurrency: int | None,
    config_files: tuple[str, ...],
    nats: str | None,
    as_json: bool,
    overrides: tuple[str, ...],
) -> int:
    """Run multiple-choice questions against a simulated model over HTTP, with everything on this machine.

    Reports rollouts per second, CPU time per rollout and peak memory by role, and the time in each stage. Further
    settings as KEY=VALUE: local.agents and local.verifiers for the number of processes, models.simulated.simulated.*
    for latencies, lengths and errors of the model.
    """
    from gym_bus.workers.bench import Load, measure

    more = [f"agent.concurrency={concurrency}"] if concurrency else []
    if latency is not None:
        more.append(f"models.simulated.simulated.latency_s.mean={latency}")
    config = common.settings(config_files, [*more, *overrides], nats)
    load = Load(rollouts=rollouts, prompt_bytes=prompt_bytes, api=api)
    with display.live(quiet=as_json) as shown:
        report = common.run(measure(load, config, on_start=shown.begin))
    if as_json:
        common.print_json(report)
    else:
        display.print_bench(report)
    return FAILURES if report.failed else 0
