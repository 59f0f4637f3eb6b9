"""Configuration: YAML merged by OmegaConf, every key and type checked by msgspec once, at start-up.

The defaults are the structs of `settings.py`; YAML files, `env.yaml` and `key=value` arguments only override, in this
order. Environment variables configure nothing. Errors name the key, and the file and line where it was written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException
from yaml import YAMLError

from gym_bus.checking import check, check_keys
from gym_bus.errors import ConfigError, did_you_mean
from gym_bus.inherit import MISSING, apply_inheritance
from gym_bus.origins import Layer, Origins, Place, dotted, leaves, written_at
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
    RegistryConfig,
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
    "RegistryConfig",
    "Resolved",
    "ResultsConfig",
    "RetryConfig",
    "SimulatedConfig",
    "StreamConfig",
    "VerifierConfig",
    "check",
    "file_layers",
    "load_config",
    "merge_layers",
    "override_layers",
    "read_yaml",
    "resolve",
]

SERVER_KINDS = ("responses_api_models", "resources_servers", "responses_api_agents")
"""Keys by which a block is a server of a NeMo Gym configuration."""

FLAT = {
    "policy_base_url": "models.policy.base_url",
    "policy_model_name": "models.policy.model",
    "policy_api_key": "models.policy.api_key",
    "mlflow_tracking_uri": "registry.mlflow_tracking_uri",
    "mlflow_tracking_token": "registry.mlflow_tracking_token",
    "hf_token": "registry.hf_token",
    "hf_endpoint": "registry.hf_endpoint",
    "hf_organization": "registry.hf_organization",
    "hf_dataset_prefix": "registry.hf_dataset_prefix",
    "hf_collection": "registry.hf_collection",
    "responses_create_params": "job.sampling",
}
"""NeMo Gym's top-level keys, and the settings that they are. They may stand wherever a setting may."""

NEVER_SECRET = frozenset({"responses_create_params"})
"""Of them, those whose values may be shown wherever they stand."""

ENV_FILE = Path("env.yaml")
"""Variables and secrets, in the working directory."""

_NO_KEY = re.compile(r"Interpolation key '(?P<name>[^']*)' not found")
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations unresolved. ConfigError names the file, and the line where known."""
    try:
        node = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from None
    except GrammarParseError as e:
        key = str(getattr(e, "full_key", ""))
        raise ConfigError(
            f"{written_at(path, key)}: key {key!r}: `${{` starts an interpolation, which this is not; "
            "write `\\${` for the text itself"
        ) from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(e, 'problem', None) or e}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top")
    return _plain_values(node, str(path))


def _plain_values(node: Any, source: str) -> dict[str, Any]:
    values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
    check_keys(values, source)
    return values


def override_layers(overrides: Sequence[str]) -> list[Layer]:
    """One layer per `key=value` argument; values are read as YAML. Raises ConfigError for anything else.

    A `+` or `++` before the key, as Hydra wants it, changes nothing.
    """
    return [_override(text.lstrip("+")) for text in overrides]


def _override(text: str) -> Layer:
    key, equals, _ = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w\-]*(\.[\w\-]+)*", key):
        shown = repr(key) if re.fullmatch(r"[a-z_][\w.]*", key) else "without a key"  # it may hold a secret
        raise ConfigError(f"argument {shown}: expected key=value, such as agent.concurrency=64")
    if key == "config_paths":
        raise ConfigError("argument config_paths=...: files are given with --config FILE, once for each")
    try:
        node = OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException, RecursionError):
        raise ConfigError(f"argument {key}=...: the value is not valid YAML") from None
    return Layer(source := f"argument {key}=...", _plain_values(node, source))


def file_layers(paths: Sequence[Path]) -> list[Layer]:
    """The layers of YAML files: of each first those of its `config_paths`, in their order, then its own.

    A file that is included more than once counts once, before the first one that needs it.
    """
    layers: dict[Path, Layer] = {}
    for path in paths:
        _collect(path, (), layers)
    return list(layers.values())


def _collect(path: Path, trail: tuple[Path, ...], layers: dict[Path, Layer]) -> None:
    place = path.resolve()
    if place in trail:
        chain = " -> ".join(str(p) for p in (*trail, place))
        raise ConfigError(f"{path}: config_paths include each other: {chain}")
    if place in layers:
        return
    layer, included = _read(path)
    for other in included:
        _collect(other, (*trail, place), layers)
    layers[place] = layer


def _read(path: Path) -> tuple[Layer, list[Path]]:
    """A file's own layer, and the files that its `config_paths` name."""
    values = read_yaml(path)
    included = values.pop("config_paths", None) or []
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{written_at(path, 'config_paths')}: key 'config_paths': expected a list of file names")
    found = [find_file(name, path, written_at(path, f"config_paths[{i}]")) for i, name in enumerate(included)]
    return Layer(str(path), values, path), found


def find_file(name: str, beside: Path, where: str) -> Path:
    """A file that a configuration names: beside it, in the working directory, or from a folder above it.

    The last is how NeMo Gym's files name each other: from the root of the checkout that they lie in.

    Raises:
        ConfigError: there is none; says where it was looked for.
    """
    above = beside.resolve().parent.parents
    places = [beside.parent / name, Path(name), *(folder / name for folder in above)]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"{where}: no file {name!r} in {beside.parent}, in the working directory or in a folder above; "
        "check the spelling, or write the whole path"
    )


def merge_layers(layers: Sequence[Layer], name: str = "configuration") -> tuple[dict[str, Any], Origins]:
    """All layers merged, later ones winning, and blocks inherited; interpolations are not resolved.

    Args:
        layers: in their order.
        name: what an error calls the whole.

    Raises:
        ConfigError: the layers do not fit together; names the key and its file.
    """
    origins = Origins(name)
    merged: Any = OmegaConf.create({})
    for layer in layers:
        origins.add(layer)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(layer.values))
        except (OmegaConfBaseException, TypeError, ValueError) as e:
            raise ConfigError(f"{layer.name}: cannot be merged with what was before it: {_first_line(e)}") from None
    plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=False))
    return apply_inheritance(plain, origins), origins


def interpolate(
    values: dict[str, Any],
    origins: Origins,
    *,
    remedy: str,
    lacking: Callable[[str], str],
    only: Iterable[str] | None = None,
) -> dict[str, Any]:
    """`values` with every `${...}` replaced by what it names.

    Args:
        values: unresolved, merged.
        origins: where they were written.
        remedy: how a value that is still `???` can be given.
        lacking: what to say of a name that no key has.
        only: the top-level keys that are wanted; nothing else is looked at or returned.

    Raises:
        ConfigError: names every value that is still `???`, or every interpolation that leads nowhere.
    """
    chosen = values if only is None else {key: values[key] for key in only}
    if missing := [dotted(place) for place, value in leaves(chosen) if value == MISSING]:
        raise ConfigError(
            "missing values: "
            + ", ".join(f"{key} ({origins.nearest(key)})" for key in missing)
            + f"; give {'it' if len(missing) == 1 else 'each'} {remedy}"
        )
    node = OmegaConf.create(values)
    problems = [
        f"{origins.nearest(dotted(place))}: key {dotted(place)!r}: {problem}"
        for place, text in leaves(chosen)
        if isinstance(text, str) and "${" in text and (problem := _problem(node, place, text, lacking))
    ]
    if problems:
        raise ConfigError("; ".join(problems))
    return {key: _plain(node[key]) for key in chosen}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _problem(node: Any, place: Place, text: str, lacking: Callable[[str], str]) -> str | None:
    """What is wrong with the interpolation `text` at `place`; None where nothing is."""
    if _ENVIRONMENT.search(text):
        return "environment variables configure nothing: write the value itself"
    try:
        for part in place:
            node = node[part]
    except InterpolationKeyError as e:
        found = _NO_KEY.search(str(e))
        return lacking(found["name"] if found else "?")
    except OmegaConfBaseException as e:
        return _first_line(e)
    return None


def _lacking(env: Layer | None) -> Callable[[str], str]:
    """What to say of an interpolation that names neither a setting nor a key of `env.yaml`."""

    def say(name: str) -> str:
        if env is None:
            return (
                f"${{{name}}} names no key, and there is no {ENV_FILE} in the working directory: make one with the "
                f"line `{name}: ...`, and keep it out of git"
            )
        known = did_you_mean(name, map(str, env.values))
        return f"${{{name}}} names no key: add the line `{name}: ...` to {env.name}; {known}"

    return say


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class Resolved(msgspec.Struct, frozen=True):
    """A configuration, merged, before its keys and types are checked."""

    values: dict[str, Any]
    """Settings, every `${...}` replaced by what it names."""
    written: dict[str, Any]
    """Settings and variables, every `${...}` as it was written."""
    variables: dict[str, Any]
    """What `env.yaml` has beside settings, and NeMo Gym's flat keys wherever they stand."""
    origins: Origins

    def config(self) -> Config:
        """The settings, checked. Raises ConfigError naming the key, and the file and line where it was written."""
        for key, value in self.values.items():
            if key not in Config.__struct_fields__ and isinstance(value, dict) and value.keys() & set(SERVER_KINDS):
                raise ConfigError(
                    f"{self.origins.nearest(key)}: key {key!r} is a server of NeMo Gym: here models stand under "
                    "`models`, and a benchmark is named by its folder or its file"
                )
        models = self.values.get("models")
        for name, model in models.items() if isinstance(models, dict) else ():
            check(ModelConfig, model, self.origins, at=f"models.{name}")  # msgspec does not name a mapping's key
        return check(Config, self.values, self.origins)


def load_config(
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    *,
    env_file: Path | None = None,
    base: Sequence[Layer] = (),
) -> Config:
    """The configuration: defaults, then `base`, the files in order, `env_file` where it exists, then `key=value`.

    Keys of `env_file` that are no settings are variables for `${...}` and nothing else. Its `config_paths` are read
    where no files are given.

    Raises:
        ConfigError: names the key, and the file and line where it was written.
    """
    return resolve(files, overrides, env_file=env_file, base=base).config()


def resolve(
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    *,
    env_file: Path | None = None,
    base: Sequence[Layer] = (),
    over: Sequence[Layer] = (),
) -> Resolved:
    """As `load_config`, before keys and types are checked; `over` wins over everything but `key=value`."""
    env, usual = _read(env_file) if env_file is not None and env_file.exists() else (None, [])
    named, given = file_layers(files or usual), override_layers(overrides)
    with_policy = any("policy_base_url" in layer.values for layer in (*base, *([env] if env else []), *named, *given))
    flat = [_flat(env, with_policy)] if env else []
    layers = [*_with_flat(base, with_policy), *flat, *_with_flat(named, with_policy)]
    layers += [env] if env else []
    layers += [*over, *_with_flat(given, with_policy)]
    written, origins = merge_layers(layers)
    remedy = "as key=value, or in a file that is read later"
    values = interpolate(written, origins, remedy=remedy, lacking=_lacking(env))
    names = (set(env.values if env else ()) - set(Config.__struct_fields__)) | FLAT.keys()
    variables = {key: value for key, value in values.items() if key in names - NEVER_SECRET}
    settings = {key: value for key, value in values.items() if key not in names}
    return Resolved(settings, written, variables, origins)


def _with_flat(layers: Iterable[Layer], with_policy: bool) -> Iterator[Layer]:
    for layer in layers:
        yield from (layer, _flat(layer, with_policy))


def _flat(layer: Layer, with_policy: bool) -> Layer:
    """NeMo Gym's top-level keys in a layer as the settings that they are."""
    written = {
        setting: key
        for key, setting in FLAT.items()
        if key in layer.values and (with_policy or not key.startswith("policy_"))
    }
    node = OmegaConf.create({})
    for setting, key in written.items():
        OmegaConf.update(node, setting, layer.values[key])
    values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
    return Layer(layer.name, values, layer.path, written)
