"""What the commands share: options, configuration, output for people and for programs."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from gym_bus.config import ENV_FILE, Config, Layer, ModelConfig, Resolved, override_layers, resolve
from gym_bus.errors import ConfigError, UsageError, did_you_mean
from gym_bus.logs import configure_logs
from gym_bus.masking import redact
from gym_bus.origins import Origins
from gym_bus.registry import Registry

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

BUILTIN = Layer("built-in models", {"models": {"simulated": {"kind": "simulated"}}})

config_option = click.option(
    "--config", "config_files", multiple=True, metavar="FILE", help="YAML settings; may be repeated, later ones win."
)
nats_option = click.option("--nats", metavar="URL", help="A running NATS server (nats://host:port).")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


class Choice(click.Choice[str]):
    """As click's, with suggestions."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What is wrong with the value, near misses, and all values."""
        return f"unknown {str(value)!r}: {did_you_mean(str(value), map(str, self.choices))}"


def names_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without and with a `=`."""
    names = [text for text in arguments if "=" not in text]
    return names, [text for text in arguments if "=" in text]


def settings(
    config_files: Sequence[str],
    overrides: Sequence[str],
    nats: str | None = None,
    base: Sequence[Layer] = (),
    over: Sequence[Layer] = (),
) -> Config:
    """The configuration of a command; `-` reads a whole configuration from standard input, as the local stack does."""
    if tuple(config_files) == ("-",):
        try:
            config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
        except msgspec.DecodeError as e:
            raise UsageError(f"--config -: not a configuration: {e}") from None
        config = with_folders(config)
    else:
        found = resolved(config_files, overrides, nats, base, over)
        config = with_folders(found.config())
        check_names(config, found.origins)
        check_sampling(config, found.origins)
    configure_logs(config.log_level)
    return config


def with_folders(config: Config, *more: Path) -> Config:
    """`config` with the benchmarks at its `benchmark_paths`, and at `more`, known here and to the workers it is for."""
    if not (paths := (*config.benchmark_paths, *map(str, more))):
        return config
    from gym_bus.benchmarks.spec import add_folders

    return msgspec.structs.replace(config, benchmark_paths=add_folders(dict.fromkeys(paths)))


def resolved(
    config_files: Sequence[str],
    overrides: Sequence[str],
    nats: str | None = None,
    base: Sequence[Layer] = (),
    over: Sequence[Layer] = (),
) -> Resolved:
    """The merged configuration of a command, unchecked, with where everything was written."""
    more = [f"bus.url={nats}"] if nats else []
    files = [Path(f) for f in config_files]
    return resolve(files, [*overrides, *more], env_file=ENV_FILE, base=[BUILTIN, *base], over=over)


def take_prefixed(prefix: str, overrides: Sequence[str]) -> tuple[list[str], tuple[Layer, ...]]:
    """Arguments without those whose key starts with `prefix.`, and the layers of those, their keys without it.

    Raises:
        ConfigError: one of those is not key=value.
    """
    own = [text for text in overrides if text.lstrip("+").startswith(f"{prefix}.")]
    layers = tuple(Layer(layer.name, layer.values[prefix]) for layer in override_layers(own))
    return [text for text in overrides if text not in own], layers


def prompt_layer(file: Path) -> Layer:
    """A benchmark's change: the prompt in this file."""
    if not file.is_file():
        raise UsageError(f"--prompt {file}: no such file")
    return Layer(f"--prompt {file}", {"prompt_config": str(file.resolve())})


def sampling_overrides(options: dict[str, Any]) -> list[str]:
    """The options of `sampling_options` as settings."""
    keys = {key: f"job.sampling.{key}" for key in ("temperature", "top_p", "max_output_tokens")} | {
        "seeds": "job.seeds"
    }
    return [f"{setting}={value}" for key, setting in keys.items() if (value := options[key]) is not None]


def sampling_options(function: F) -> F:
    """The options that say how the model is asked."""
    options = [
        click.option("--temperature", type=click.FloatRange(0, 100), help="Sampling parameter of every request."),
        click.option("--top-p", type=click.FloatRange(0, 1), help="Sampling parameter of every request."),
        click.option("--max-output-tokens", type=click.IntRange(1), help="Limit of every model call."),
        click.option(
            "--seeds", type=click.IntRange(0), metavar="N", help="Rollout i of each task asks for seed N + i."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def check_names(config: Config, origins: Origins) -> None:
    """Raise ConfigError where the settings name an agent or a verifier that is not registered."""
    if config.agent.names:
        from gym_bus.agents.registry import AGENTS

        _check_known("agent", config.agent.names, AGENTS, origins)
    if config.verifier.names:
        from gym_bus.verifiers.registry import VERIFIERS

        _check_known("verifier", config.verifier.names, VERIFIERS, origins)


def check_sampling(config: Config, origins: Origins) -> None:
    """Raise DataError where the settings have sampling parameters that no endpoint would take."""
    if config.job.sampling:
        from gym_bus.models.schema import check_create_params

        for key, value in config.job.sampling.items():
            check_create_params({key: value}, origins.nearest(f"job.sampling.{key}"))


def _check_known(what: str, names: Sequence[str], known: Registry[Any], origins: Origins) -> None:
    key = f"{what}.names"
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{origins.nearest(key)}: key {key!r}: unknown {what} {name!r}: {did_you_mean(name, known)}"
            )


def choose_model(config: Config, name: str | None) -> str:
    """The model to use where the user may have named none."""
    if name is not None:
        if name not in config.models:
            raise UsageError(f"unknown model {name!r}: {did_you_mean(name, config.models)}")
        return name
    own = [key for key in config.models if key != "simulated"]
    if len(own) == 1:
        return own[0]
    if "policy" in own:
        return "policy"
    raise UsageError(
        "which model? name one with --model, replay recorded answers with --replay FILE, or set one up, such as "
        f"models.policy.base_url=http://host:8000/v1; known: {', '.join(sorted(config.models))}"
    )


def replay_layer(file: Path) -> Layer:
    """A model named `replay` from a file of recorded answers."""
    if not file.is_file():
        raise UsageError(f"--replay {file}: no such file")
    return Layer(f"--replay {file}", {"models": {"replay": {"kind": "replay", "file": str(file.resolve())}}})


def check_model(name: str, model: ModelConfig) -> None:
    """Raise what is wrong with a model before a job is started with it."""
    if model.kind == "openai" and not model.base_url.startswith(("http://", "https://")):
        raise UsageError(f"model {name!r}: base_url must be http(s)://host/v1, not {redact(model.base_url)!r}")
    if model.kind == "replay":
        if not model.file:
            raise UsageError(f"model {name!r}: a replay model needs `file`, the JSONL file of recorded answers")
        from gym_bus.models.replay import ReplayModel

        ReplayModel(model.file, name=name)


async def reach(config: Config) -> None:
    """Raise BusError where the configured server does not answer."""
    from gym_bus.bus import Bus

    async with await Bus.connect(config.bus):
        pass


GARBAGE_THRESHOLDS = (10_000, 20, 50)
"""Python's own 700 has a publisher of thousands of messages spend a fifth of its time on looking for cycles."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine on uvloop where it is installed. SIGTERM and SIGHUP end it as Ctrl-C does."""
    gc.freeze()  # what was imported stays
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_interruptible(work))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_interruptible(work))


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    interrupted: list[signal.Signals] = []

    def interrupt(sig: signal.Signals) -> None:
        interrupted.append(sig)
        task.cancel()

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(sig, interrupt, sig)
    try:
        return await task
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))  # bytes: UTF-8 whatever the locale


def table(title: str, *columns: str) -> Table:
    """A table in the house style."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column)
    return made
