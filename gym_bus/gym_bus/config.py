"""Configuration: YAML merged by OmegaConf, every key and type checked by msgspec once, at start-up.

The defaults are the structs of `settings.py`; YAML files and `key=value` arguments only override. Environment variables
configure nothing. Errors name the key and the file it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import msgspec
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gym_bus.errors import ConfigError, did_you_mean
from gym_bus.settings import (
    AgentConfig,
    BusConfig,
    Config,
    Distribution,
    EmbeddedConfig,
    GiB,
    JobConfig,
    LocalConfig,
    MiB,
    ModelConfig,
    RayConfig,
    ResultsConfig,
    RetryConfig,
    SimulatedConfig,
    StreamConfig,
    VerifierConfig,
)

__all__ = [
    "AgentConfig",
    "BusConfig",
    "Config",
    "Distribution",
    "EmbeddedConfig",
    "GiB",
    "JobConfig",
    "Layer",
    "LocalConfig",
    "MiB",
    "ModelConfig",
    "RayConfig",
    "ResultsConfig",
    "RetryConfig",
    "SimulatedConfig",
    "StreamConfig",
    "VerifierConfig",
    "check",
    "file_layers",
    "load_config",
    "override_layers",
    "read_yaml",
]

T = TypeVar("T")

_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations unresolved. ConfigError names the file, and the line where known."""
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(e, 'problem', None) or e}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top")
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))


def check(type_: type[T], data: Any, where: str | Mapping[str, str], at: str = "") -> T:
    """`data` as the struct `type_`, every key and type checked.

    Args:
        type_: a msgspec struct that forbids unknown fields.
        data: plain containers.
        where: the source of the data for error messages; or, by dotted key, where each key was set.
        at: the dotted key under which `data` stands in its source, empty for the top.

    Raises:
        ConfigError: names the key, its source, and near misses of a misspelt key.
    """
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as e:
        raise ConfigError(_explain(type_, str(e), where, at)) from None


def _explain(type_: Any, error: str, where: str | Mapping[str, str], at: str) -> str:
    found = _AT_PATH.match(error)
    what, raw_path = (found["what"], found["path"] or "$") if found else (error, "$")
    path = raw_path.removeprefix("$").removeprefix(".")
    full = ".".join(part for part in (at, path) if part)
    unknown = _UNKNOWN.match(what)
    if unknown:
        key = f"{full}.{unknown['field']}".lstrip(".")
        hint = did_you_mean(unknown["field"], _fields_at(type_, path))
        return f"{_source(key, where)}: unknown key {key!r}: {hint}"
    return f"{_source(full, where)}: key {full or 'at the top'!r}: {what[0].lower()}{what[1:]}"


def _source(key: str, where: str | Mapping[str, str]) -> str:
    if isinstance(where, str):
        return where
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        if (source := where.get(".".join(parts[:end]))) is not None:
            return source
    return "configuration"


def _fields_at(type_: Any, path: str) -> Iterable[str]:
    for part in [p for p in re.split(r"[.\[]", path) if p]:
        if isinstance(type_, type) and issubclass(type_, msgspec.Struct) and part in get_type_hints(type_):
            type_ = get_type_hints(type_)[part]
        else:  # a mapping's value or a list's item
            type_ = (get_args(type_) or (None,))[-1 if part == "...]" or part.startswith("..") else 0]
    options = [type_, *get_args(type_)]
    return [
        name for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct) for name in get_type_hints(o)
    ]


class Layer(msgspec.Struct, frozen=True):
    """One source of settings, for error messages and for `config resolve`."""

    name: str
    values: dict[str, Any]


def override_layers(overrides: Sequence[str]) -> list[Layer]:
    """One layer per `key=value` argument; values are read as YAML. Raises ConfigError for anything else."""
    layers = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w\-]*(\.[\w\-]+)*", key):
            shown = repr(key) if re.fullmatch(r"[a-z_][\w.]*", key) else "without a key"  # it may hold a secret
            raise ConfigError(f"argument {shown}: expected key=value, such as agent.concurrency=64")
        try:
            node = OmegaConf.from_dotlist([text])
        except (YAMLError, OmegaConfBaseException):
            raise ConfigError(f"argument {key}=...: the value is not valid YAML") from None
        values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
        layers.append(Layer(f"argument {key}=...", values))
    return layers


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a YAML file: those of its `config_paths`, in their order, then its own."""
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(p) for p in (*seen, resolved))
        raise ConfigError(f"{path}: config_paths include each other: {chain}")
    values = read_yaml(path)
    included = values.pop("config_paths", [])
    if not isinstance(included, list) or not all(isinstance(p, str) for p in included):
        raise ConfigError(f"{path}: key 'config_paths': expected a list of file names")
    layers = [layer for name in included for layer in file_layers(path.parent / name, (*seen, resolved))]
    return [*layers, Layer(str(path), values)]


def _dotted(values: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _dotted(value, f"{prefix}{key}.")


def load_config(
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    *,
    env_file: Path | None = None,
    base: Sequence[Layer] = (),
) -> Config:
    """The configuration: defaults, then `base`, the files in order, `env_file` where it exists, then `key=value`.

    Keys of `env_file` that are no settings are variables for `${...}` and nothing else.
    """
    layers = [*base, *(layer for path in files for layer in file_layers(path))]
    variables: set[str] = set()
    if env_file is not None and env_file.exists():
        env = Layer(str(env_file), read_yaml(env_file))
        variables = set(env.values) - set(Config.__struct_fields__)
        layers.append(env)
    layers += override_layers(overrides)
    where = {key: layer.name for layer in layers for key in _dotted(layer.values)}
    try:
        merged = (
            OmegaConf.merge(*(OmegaConf.create(layer.values) for layer in layers)) if layers else OmegaConf.create({})
        )
        plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True, throw_on_missing=False))
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", "") or ""
        raise ConfigError(f"{_source(key, where)}: key {key!r}: {str(e).splitlines()[0]}") from None
    settings = {key: value for key, value in plain.items() if key not in variables}
    if missing := [key for key in _dotted_leaves(settings) if key[1] == "???"]:
        raise ConfigError("missing values: " + ", ".join(f"{key} ({_source(key, where)})" for key, _ in missing))
    if isinstance(models := settings.get("models"), dict):
        for name, model in models.items():  # one by one: msgspec does not name the key of a mapping
            check(ModelConfig, model, where, at=f"models.{name}")
    return check(Config, settings, where)


def _dotted_leaves(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _dotted_leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), values
