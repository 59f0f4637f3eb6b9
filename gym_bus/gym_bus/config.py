"""Configuration: YAML merged by OmegaConf, every key and type checked by msgspec once, at start-up.

The defaults are the structs below; YAML files and `key=value` arguments only override. Environment variables configure
nothing. Errors name the key and the file it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

import msgspec
from msgspec import Meta
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gym_bus.errors import ConfigError, did_you_mean

PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]

MiB = 2**20
GiB = 2**30


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings."""


class StreamConfig(_Section, frozen=True):
    """Limits of one stream."""

    max_msgs: Annotated[int, Meta(ge=-1)] = 262_144
    """Messages the stream holds before it refuses publishers; -1 for no limit."""
    max_bytes: Annotated[int, Meta(ge=-1)] = 2 * GiB
    max_age_s: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds after which a message is dropped; 0 keeps it."""


class EmbeddedConfig(_Section, frozen=True):
    """The nats-server that a local run starts for itself."""

    store_dir: str | None = None
    """Folder of the JetStream store; by default inside the job's output folder."""
    sync_interval: str = "1s"
    """How often the store is fsynced; `always` before every ack."""
    max_file_bytes: Bytes = 64 * GiB
    start_limit_s: Seconds = 20.0


class BusConfig(_Section, frozen=True):
    """The NATS server and what is kept on it."""

    url: str | None = None
    """`nats://host:port` of a running server, version 2.11 or newer; null starts an embedded one."""
    credentials: str | None = None
    """Path of a NATS credentials file."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    storage: Literal["file", "memory"] = "file"
    inline_limit_bytes: Bytes = 4 * MiB
    """Larger bodies go to the object store; the message carries their key."""
    lanes: tuple[str, ...] = ("interactive", "batch")
    """Priority classes, first served first."""
    requests: StreamConfig = StreamConfig()
    attempts: StreamConfig = StreamConfig(max_bytes=16 * GiB)
    results: StreamConfig = StreamConfig(max_msgs=-1, max_bytes=32 * GiB, max_age_s=7 * 86400.0)
    advisories: StreamConfig = StreamConfig(max_msgs=1_000_000, max_bytes=GiB, max_age_s=7 * 86400.0)
    ack_wait_s: Seconds = 60.0
    """A worker that has not been heard of for so long loses what it holds."""
    heartbeat_s: Seconds = 20.0
    """How often a worker extends what it holds; well below `ack_wait_s`."""
    max_deliver: PositiveInt = 5
    """Deliveries of one message before it counts as poison."""
    connect_limit_s: Seconds = 5.0
    publish_limit_s: Seconds = 120.0
    """Seconds that one publish may take, waiting for a full stream included."""


class RetryConfig(_Section, frozen=True):
    """Retries of one model call, per kind of error, with jittered exponential waits."""

    unreachable: Count = 3
    rate_limited: Count = 20
    server_error: Count = 3
    timeout: Count = 1
    wait_s: Seconds = 0.5
    """The first wait; it doubles with every further try."""
    max_wait_s: Seconds = 30.0
    """Bound of one wait, `Retry-After` included."""
    budget_s: Seconds = 600.0
    """Bound of all waits and tries of one call."""


class Distribution(_Section, frozen=True):
    """A random non-negative quantity."""

    kind: Literal["constant", "uniform", "exponential", "lognormal"] = "constant"
    mean: Annotated[float, Meta(ge=0)] = 0.0
    """Mean, in the quantity's unit."""
    spread: Annotated[float, Meta(ge=0)] = 0.0
    """uniform: half-width; lognormal: sigma of the logarithm; ignored otherwise."""


class SimulatedConfig(_Section, frozen=True):
    """A model that needs no weights: for capacity planning, load tests and chaos."""

    seed: int = 0
    latency_s: Distribution = Distribution()
    output_tokens: Distribution = Distribution(mean=256)
    text: str = "\\boxed{A}"
    """Ends every answer; the words before it are filler of the drawn length."""
    rate_limited: Share = 0.0
    """Share of calls answered with 429."""
    server_error: Share = 0.0
    """Share of calls answered with 500."""
    hang: Share = 0.0
    """Share of calls never answered."""
    tokens: bool = False
    """Return token ids and log-probabilities."""


class ModelConfig(_Section, frozen=True):
    """One named model."""

    kind: Literal["openai", "replay", "simulated"] = "openai"
    base_url: str = ""
    """With the `/v1`; openai only."""
    model: str = ""
    """The name the endpoint knows; defaults to the key of this entry."""
    api: Literal["responses", "chat"] = "responses"
    api_key: str = ""
    """From `env.yaml`, as `${policy_api_key}`; never leaves the worker."""
    headers: dict[str, str] = {}
    rollout_header: str | None = "X-Gym-Rollout"
    """Request header that carries `job/task/rollout/attempt`, for sticky routing and tracing; null sends none."""
    sampling: dict[str, Any] = {}
    """Create params that this model always gets, such as `temperature`; they win over the job's."""
    extra_body: dict[str, Any] = {}
    """Further keys of the request body, as vLLM's `chat_template_kwargs`."""
    return_tokens: bool = False
    """Ask for token ids and log-probabilities, vLLM style."""
    connect_limit_s: Seconds = 10.0
    read_limit_s: Seconds = 600.0
    """Seconds without a byte."""
    call_limit_s: Seconds = 1800.0
    """Seconds of one HTTP call."""
    retry: RetryConfig = RetryConfig()
    file: str | None = None
    """Replay only: the JSONL file of recorded answers."""
    simulated: SimulatedConfig = SimulatedConfig()


class AgentConfig(_Section, frozen=True):
    """Agent workers."""

    concurrency: Annotated[int, Meta(ge=1, le=16_384)] = 1024
    """Rollouts in flight per process."""
    prefetch: Annotated[int, Meta(ge=0, le=4096)] = 256
    """Requests held ready beside those in flight, at most a quarter of the concurrency."""
    names: tuple[str, ...] = ()
    """Agents that this worker serves; empty for all it knows."""
    limit_s: Seconds = 3600.0
    """Wall-clock seconds of one rollout's generation."""


class RayConfig(_Section, frozen=True):
    """Ray, for the verifiers that need a pool."""

    address: str | None = None
    """Of a running cluster; null starts a small local one on demand."""
    actors: Annotated[int, Meta(ge=0)] = 0
    """Actors per verifier worker; 0 for one per local core."""
    cpus_per_actor: Annotated[float, Meta(ge=0)] = 1.0
    memory_bytes_per_actor: Annotated[int, Meta(ge=0)] = 0
    object_store_bytes: Annotated[int, Meta(ge=75 * MiB)] = 80 * MiB


class VerifierConfig(_Section, frozen=True):
    """Verifier workers."""

    concurrency: PositiveInt = 256
    """Attempts in flight per process."""
    prefetch: Annotated[int, Meta(ge=0, le=4096)] = 128
    names: tuple[str, ...] = ()
    """Verifiers that this worker serves; empty for all it knows."""
    executor: Literal["ray", "local"] = "ray"
    """Where CPU-heavy and sandboxed verifiers run: Ray actors, or child processes of the worker."""
    limit_s: Seconds = 30.0
    """Wall-clock seconds of one verification on the pool, beyond the sandbox's own limits for its programs."""
    batch: PositiveInt = 16
    """Verifications per call of a pool worker."""
    tries: PositiveInt = 3
    """Tries of a check whose sandbox or pool worker was lost."""
    ray: RayConfig = RayConfig()


class ResultsConfig(_Section, frozen=True):
    """The results consumer."""

    tokens: bool = False
    """Write token ids and log-probabilities into the rollouts file."""
    max_attempts: PositiveInt = 3
    """Attempts at one rollout over all runs of the same command."""
    idle_s: Seconds = 5.0
    """Seconds without progress after which the job is reconciled with the bus."""
    issue_limit: PositiveInt = 3
    """Times that a rollout lost by the bus is issued before it counts as lost."""
    compat: Literal["gym_bus", "nemo_gym"] = "gym_bus"
    """Whose way to follow where NeMo Gym's is disputed."""


class LocalConfig(_Section, frozen=True):
    """The worker processes of a local run."""

    agents: Count = 1
    verifiers: Count = 1
    keep_bus: bool = False
    """Keep the embedded server's store after the job is complete."""


class Config(_Section, frozen=True):
    """Everything that can be set."""

    bus: BusConfig = BusConfig()
    models: dict[str, ModelConfig] = {}
    agent: AgentConfig = AgentConfig()
    verifier: VerifierConfig = VerifierConfig()
    results: ResultsConfig = ResultsConfig()
    local: LocalConfig = LocalConfig()
    data_dir: str = ".gym_bus/data"
    """Where prepared data sets lie."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"


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
            raise ConfigError(f"argument {text!r}: expected key=value, such as agent.concurrency=64")
        try:
            node = OmegaConf.from_dotlist([text])
        except (YAMLError, OmegaConfBaseException) as e:
            raise ConfigError(f"argument {text!r}: the value is not valid YAML: {e}") from None
        values = cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))
        layers.append(Layer(f"argument {text!r}" if "key" not in key else f"argument {key}=...", values))
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
