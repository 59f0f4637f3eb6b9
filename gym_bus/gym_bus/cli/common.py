"""What the commands share: options, configuration, output for people and for programs."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from gym_bus.config import Config, Layer, ModelConfig, load_config
from gym_bus.errors import UsageError, did_you_mean
from gym_bus.logs import configure_logs

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

ENV_FILE = Path("env.yaml")
BUILTIN = Layer("built-in models", {"models": {"simulated": {"kind": "simulated"}}})

config_option = click.option(
    "--config", "config_files", multiple=True, metavar="FILE", help="YAML settings; may be repeated, later ones win."
)
nats_option = click.option("--nats", metavar="URL", help="A running NATS server (nats://host:port).")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def settings(
    config_files: Sequence[str], overrides: Sequence[str], nats: str | None = None, base: Sequence[Layer] = ()
) -> Config:
    """The configuration of a command; `-` reads a whole configuration from standard input, as the local stack does."""
    if tuple(config_files) == ("-",):
        try:
            config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
        except msgspec.DecodeError as e:
            raise UsageError(f"--config -: not a configuration: {e}") from None
    else:
        more = [f"bus.url={nats}"] if nats else []
        layers = [BUILTIN, *_env_model(), *base]
        config = load_config([Path(f) for f in config_files], [*overrides, *more], env_file=ENV_FILE, base=layers)
    configure_logs(config.log_level)
    return config


def _env_model() -> list[Layer]:
    """NeMo Gym's `policy_*` keys of `env.yaml` make a model named `policy`."""
    from gym_bus.config import read_yaml

    if not ENV_FILE.exists():
        return []
    env = read_yaml(ENV_FILE)
    if "policy_base_url" not in env:
        return []
    policy = {"base_url": env["policy_base_url"]}
    if "policy_model_name" in env:
        policy["model"] = env["policy_model_name"]
    if "policy_api_key" in env:
        policy["api_key"] = env["policy_api_key"]
    return [Layer(str(ENV_FILE), {"models": {"policy": policy}})]


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
        raise UsageError(f"model {name!r}: base_url must be http(s)://host/v1, not {model.base_url!r}")
    if model.kind == "replay":
        if not model.file:
            raise UsageError(f"model {name!r}: a replay model needs `file`, the JSONL file of recorded answers")
        from gym_bus.models.replay import ReplayModel

        ReplayModel(model.file, name=name)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine on uvloop where it is installed. SIGTERM and SIGHUP end it as Ctrl-C does."""
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
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def table(title: str, *columns: str) -> Table:
    """A table in the house style."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column)
    return made
