"""`gym-bus model`: models without weights, over HTTP."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import click

from gym_bus.cli import common
from gym_bus.config import Config
from gym_bus.errors import UsageError


@click.group("model")
def command() -> None:
    """Serve recorded or simulated models over HTTP."""


@command.command("serve")
@click.option("--model", "name", metavar="NAME", help="A replay or simulated model of the configuration.")
@click.option("--replay", type=click.Path(path_type=Path), help="Recorded answers (JSONL).")
@click.option("--benchmark", help="Match requests to tasks of this benchmark by their prompt.")
@click.option("--split", help="The benchmark's dataset, by type or name; default: its main one.")
@click.option("--input", "input_file", type=click.Path(path_type=Path), help="The tasks of this file instead.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@common.config_option
@common.overrides_argument
def serve(
    name: str | None,
    replay: Path | None,
    benchmark: str | None,
    split: str | None,
    input_file: Path | None,
    host: str,
    port: int,
    config_files: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    """Offer a replay or simulated model as an OpenAI-compatible endpoint, Responses and Chat Completions API.

    A replay file that is keyed by task_index finds the task by the request's X-Gym-Rollout header, which gym-bus sends,
    or, for other clients, by its prompt, where --benchmark says which prompts there are.
    """
    base = [common.replay_layer(replay)] if replay else []
    config = common.settings(config_files, overrides, base=base)
    key = name or ("replay" if replay else "simulated")
    prompts = _prompts(config, benchmark, split, input_file) if benchmark else None
    common.run(_serve(config, key, prompts, host, port))


def _prompts(config: Config, name: str, split: str | None, input_file: Path | None) -> dict[str, int]:
    from gym_bus.benchmarks.dataset import materialize
    from gym_bus.benchmarks.prepare import find_convert
    from gym_bus.benchmarks.spec import data_path, load_benchmark
    from gym_bus.models.prompts import prompt_of

    benchmark = load_benchmark(name)
    split = split or benchmark.main.name
    path = input_file or data_path(benchmark, Path(config.data_dir), split)
    convert = find_convert(benchmark, split) if input_file else None
    tasks = materialize(
        path,
        agent=benchmark.spec.agent.name,
        prompt=benchmark.spec.prompt,
        convert=convert,
        own_input=input_file is not None,
    )
    return {prompt_of(task.row): task.task_index for task in tasks}


async def _serve(config: Config, name: str, prompts: dict[str, int] | None, host: str, port: int) -> None:
    from gym_bus.models.replay import ReplayModel
    from gym_bus.models.serve import make_app, serve
    from gym_bus.models.simulated import SimulatedModel

    common.choose_model(config, name)
    entry = config.models[name]
    model: Any
    if entry.kind == "replay":
        common.check_model(name, entry)
        model = ReplayModel(entry.file or "", name=name, cycle=entry.cycle)
    elif entry.kind == "simulated":
        model = SimulatedModel(entry.simulated, name=name)
    else:
        raise UsageError(f"model {name!r} is an endpoint already; only replay and simulated models are served")
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    try:
        runner, bound = await serve(make_app(model, prompts=prompts), host, port)
    except OSError as e:
        raise UsageError(f"cannot listen on {host}:{port}: {e.strerror or e}") from None
    click.echo(f"serving {name} at http://{host}:{bound}/v1")
    try:
        await stop.wait()
    finally:
        await runner.cleanup()
