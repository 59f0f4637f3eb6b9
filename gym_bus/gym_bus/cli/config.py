"""`gym-bus config`: the configuration as a command would see it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import yaml

from gym_bus.cli import common
from gym_bus.config import Config, Layer, Resolved
from gym_bus.errors import ConfigError, UsageError
from gym_bus.masking import Masking
from gym_bus.origins import Origins, Place, dotted, walk

if TYPE_CHECKING:
    from gym_bus.benchmarks.spec import Benchmark

COMMENT_COLUMN = 56
DEFAULT = "default"

_NAMED = re.compile(r"\$\{([\w.]+)\}")


@click.group("config")
def command() -> None:
    """Show the configuration, and where each value comes from."""


@command.command("resolve")
@common.config_option
@click.option("--all", "with_defaults", is_flag=True, help="The defaults too.")
@common.nats_option
@common.json_option
@click.argument("arguments", nargs=-1, metavar="[BENCHMARK] [KEY=VALUE]...")
def resolve(
    config_files: tuple[str, ...], with_defaults: bool, nats: str | None, as_json: bool, arguments: tuple[str, ...]
) -> None:
    """Print what the files, env.yaml and KEY=VALUE arguments come to, and where each value was written.

    Secrets are masked. With a BENCHMARK, what a job of it would use: its own configuration, with what job.* changes in
    it. Everything is checked as before a run: keys, types, and the names of agents, verifiers and toolboxes.
    """
    names, overrides = common.names_and_overrides(arguments)
    if len(names) > 1:
        raise UsageError(f"config resolve takes one benchmark, not {', '.join(names)}")
    overrides, changes = common.take_prefixed("benchmark", overrides)
    if changes and not names:
        raise UsageError(f"{changes[0].name}: a benchmark can only be changed where one is named")
    resolved = common.resolved(config_files, overrides, nats)
    config = resolved.config()
    common.check_names(config, resolved.origins)
    common.check_sampling(config, resolved.origins)
    shown = _Shown(Masking(resolved.variables))
    _add_settings(shown, resolved, config, with_defaults=with_defaults)
    if names:
        _add_benchmark(shown, names[0], changes, config, resolved.origins, with_defaults=with_defaults)
    if as_json:
        common.print_json({"values": _listed(shown.values), "sources": shown.sources})
    else:
        click.echo("\n".join(_aligned(_yaml(shown.values, shown.sources))))


class _Shown:
    """Values that are shown, nested, secrets masked; and by dotted key where each comes from."""

    def __init__(self, masking: Masking) -> None:
        self._masking = masking
        self.values: dict[str | int, Any] = {}
        """Lists of mappings are mappings from their indices."""
        self.sources: dict[str, str] = {}

    def add(self, place: Place, value: Any, source: str) -> None:
        """A value as `_entries` gives it."""
        inner = self.values
        for part in place[:-1]:
            inner = inner.setdefault(part, {})
        inner[place[-1]] = self._masking.shown(place, value)
        self.sources[dotted(place)] = source.replace(f"{Path.cwd()}/", "")


def _entries(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Place and value of everything within mappings and lists of mappings; any other list is one value."""
    if isinstance(value, Mapping) and (value or not place):
        for key, below in value.items():
            yield from _entries(below, (*place, key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, below in enumerate(value):
            yield from _entries(below, (*place, index))
    else:
        yield place, value


def _containers(struct: msgspec.Struct) -> Any:
    """A struct as mappings and lists, tuples too."""
    return msgspec.json.decode(msgspec.json.encode(struct))


def _listed(value: Any) -> Any:
    """`_Shown.values` with lists again."""
    if not isinstance(value, dict):
        return value
    inner = {key: _listed(below) for key, below in value.items()}
    return list(inner.values()) if inner and all(isinstance(key, int) for key in inner) else inner


def _add_settings(shown: _Shown, resolved: Resolved, config: Config, *, with_defaults: bool) -> None:
    written = {dotted(place): value for place, value in walk(resolved.written)}
    given = {place for place, _ in _entries(resolved.values)}
    for place, value in _entries(_containers(config) if with_defaults else resolved.values):
        key = dotted(place)
        source = _source(resolved.origins, key, written.get(key)) if place in given else DEFAULT
        shown.add(place, value, source)


def _source(origins: Origins, key: str, written: Any) -> str:
    """Where a value was written; with an interpolation, also where what it names was."""
    named = [name for name in _NAMED.findall(written) if name in origins] if isinstance(written, str) else []
    return ", ".join([origins.nearest(key), *(f"{name} from {origins.nearest(name)}" for name in named)])


def _add_benchmark(
    shown: _Shown, name: str, changes: Sequence[Layer], config: Config, settings: Origins, *, with_defaults: bool
) -> None:
    from gym_bus.benchmarks.spec import load_benchmark

    benchmark = load_benchmark(name, changes)
    _check_references(benchmark, config, settings)
    for place, value in _entries(_containers(benchmark.spec)):
        key = dotted(place)
        if key in benchmark.origins:
            shown.add(("benchmark", *place), value, benchmark.origins[key])
        elif benchmark.spec.prompt_config and place[0] == "prompt" and value is not None:
            shown.add(("benchmark", *place), value, benchmark.spec.prompt_config)
        elif with_defaults:
            shown.add(("benchmark", *place), value, DEFAULT)
    if benchmark.num_repeats:
        shown.add(("benchmark", "num_repeats"), benchmark.num_repeats, benchmark.origins["num_repeats"])
    for part, options in (("agent", config.job.agent_options), ("verifier", config.job.verifier_options)):
        for place, value in _entries(options):
            source = settings.nearest(dotted(("job", f"{part}_options", *place)))
            shown.add(("benchmark", part, "options", *place), value, source)


def _check_references(benchmark: Benchmark, config: Config, settings: Origins) -> None:
    """Look up everything that the benchmark and the job name. Raises ConfigError naming file and key."""
    from gym_bus.workers.plan import check_verifier, make_agent

    agent, verifier, job = benchmark.spec.agent, benchmark.spec.verifier, config.job
    where = benchmark.origins.nearest
    _checked("agent", where("agent.name"), make_agent, agent.name, agent.options)
    _checked("verifier", where("verifier.name"), check_verifier, verifier.name, verifier.options, config)
    where = settings.nearest
    _checked("job.agent_options", where("job.agent_options"), make_agent, agent.name, agent.options | job.agent_options)
    options = verifier.options | job.verifier_options
    _checked("job.verifier_options", where("job.verifier_options"), check_verifier, verifier.name, options, config)


def _checked(key: str, where: str, check: Callable[..., Any], *arguments: Any) -> None:
    try:
        check(*arguments)
    except UsageError as e:
        raise ConfigError(f"{where}: key {key!r}: {e}") from None


def _yaml(values: Mapping[str | int, Any], sources: Mapping[str, str], place: Place = ()) -> Iterator[str]:
    """YAML that could be read again, each value with its source behind it."""
    for key, value in values.items():
        name = "-" if isinstance(key, int) else f"{key}:"
        if isinstance(value, Mapping) and value:
            inner = list(_yaml(value, sources, (*place, key)))
            if isinstance(key, int):
                yield f"- {inner[0]}"
                yield from (f"  {line}" for line in inner[1:])
            else:
                yield name
                yield from (f"  {line}" for line in inner)
        else:
            yield f"{name} {_flow(value)}\t# {sources[dotted((*place, key))]}"


def _aligned(lines: Iterable[str]) -> Iterator[str]:
    """Lines with what stands after a tab in one column."""
    for line in lines:
        text, tab, comment = line.partition("\t")
        yield f"{text.ljust(COMMENT_COLUMN - 2)}  {comment}" if tab else text


def _flow(value: Any) -> str:
    """A value in one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text: str = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**9, sort_keys=False)
    return text.removesuffix("\n...\n").strip()
