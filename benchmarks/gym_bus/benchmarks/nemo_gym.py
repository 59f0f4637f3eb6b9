"""NeMo Gym's configurations as benchmarks: a server block for the agent, one for the verifier, datasets on the agent.

What is read: the agent block that has datasets, the resources server that it names, and everything that these two
inherit. Other blocks (models, judges, other agents) belong to the servers that NeMo Gym would start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.config import SERVER_KINDS
from gym_bus.errors import ConfigError, did_you_mean
from gym_bus.origins import Layer, Origins, join

AGENTS = {"simple_agent": "simple"}
"""Our agent by the name of NeMo Gym's implementation; other names are the same."""

VERIFIERS = {"math_with_judge": "math"}
"""Our verifier by the name of NeMo Gym's resources server; other names are the same."""

TOOLBOXES = {"example_multi_step": "example_multi_step"}
"""Our toolbox by the name of the resources server that has the tools."""

_ABOUT = frozenset({"domain", "verified", "description"})
_SERVER_KEYS = frozenset(
    {
        "datasets",
        "entrypoint",
        "expose_tools_over_mcp",
        "host",
        "model_server",
        "num_workers",
        "port",
        "profiling_enabled",
        "profiling_results_dirpath",
        "resources_server",
        "value",
        "verified_url",
    }
)
"""What runs a server, and says nothing about how it judges."""

_WITHOUT_EFFECT = {
    "code_gen": frozenset({"num_processes", "debug"}),
    "math_with_judge": frozenset(
        {
            "judge_model_server",
            "judge_responses_create_params",
            "library_verifier_max_concurrency",
            "library_verifier_timeout_seconds",
            "should_use_judge",
        }
    ),
}
"""Options of a resources server that change no reward of ours, or belong to what its verifier here does not do."""

NO_MODEL = Layer("NeMo Gym", {"policy_model": {}})
"""Stands for the model that its configurations copy from, and that only a run names."""


class Translated(msgspec.Struct, frozen=True, kw_only=True):
    """A NeMo Gym configuration in the form of a benchmark's `config.yaml`."""

    values: dict[str, Any]
    origins: Origins
    root: Path
    """The folder that its paths start at."""
    instance: str
    """The name of its agent."""


def is_nemo_gym(values: Mapping[str, Any]) -> bool:
    """Whether there is a server block among the top-level keys."""
    return any(isinstance(block, Mapping) and block.keys() & set(SERVER_KINDS) for block in values.values())


def translate(
    values: dict[str, Any], origins: Origins, path: Path, resolve: Callable[..., dict[str, Any]]
) -> Translated:
    """The benchmark that a configuration describes.

    Args:
        values: merged, with interpolations unresolved.
        origins: where they were written.
        path: the configuration.
        resolve: `config.interpolate`, but for what it says of values that are not there.

    Raises:
        ConfigError: it has not exactly one agent with datasets, or names a server that is not there.
    """
    instance = _agent_with_datasets(values, origins, path)
    agent_name, agent_at = _implementation(values, instance, "responses_api_agents", origins)
    server = _resources_server(values, instance, agent_at, origins)
    server_name, server_at = _implementation(values, server, "resources_servers", origins)
    resolved = resolve(values, origins, only=(instance, server))
    agent = resolved[instance]["responses_api_agents"][agent_name]
    judge = resolved[server]["resources_servers"][server_name]
    if judge.get("should_use_judge") and server_name == "math_with_judge":
        raise ConfigError(
            f"{origins.nearest(join(server_at, 'should_use_judge'))}: the verifier 'math' has no judge: set it to false"
        )
    if not all(isinstance(dataset, dict) for dataset in agent["datasets"]):
        at = join(agent_at, "datasets")
        raise ConfigError(f"{origins.nearest(at)}: key {at!r}: expected datasets, each with its keys")
    root = _root(path, agent["datasets"])
    made = {
        "name": _name(path, agent["datasets"]),
        **{key: judge[key] for key in _ABOUT & judge.keys()},
        "agent": {"name": AGENTS.get(agent_name, agent_name), "options": _options(agent_name, agent)},
        "verifier": {"name": VERIFIERS.get(server_name, server_name), "options": _options(server_name, judge)},
        "datasets": agent["datasets"],
    }
    if server_name in TOOLBOXES:
        made["agent"]["options"] |= {"toolbox": TOOLBOXES[server_name]}
    if (prompt := _prompt_config(agent["datasets"])) is not None:
        made["prompt_config"] = str(root / prompt) if (root / prompt).is_file() else prompt
    return Translated(
        values=made, origins=_origins(origins, made, path, agent_at, server_at), root=root, instance=instance
    )


def _blocks(values: Mapping[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    for name, block in values.items():
        if isinstance(block, dict) and isinstance(block.get(kind), dict):
            yield name, block[kind]


def _agent_with_datasets(values: Mapping[str, Any], origins: Origins, path: Path) -> str:
    found = {
        name: {d.get("type") for d in one["datasets"] if isinstance(d, dict)}
        for name, agents in _blocks(values, "responses_api_agents")
        for one in agents.values()
        if isinstance(one, dict) and isinstance(one.get("datasets"), list) and one["datasets"]
    }
    chosen = [name for name, types in found.items() if "benchmark" in types] or list(found)
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise ConfigError(f"{path}: no agent in it has datasets, so it is no benchmark")
    places = ", ".join(f"{name} ({origins.nearest(name)})" for name in chosen)
    raise ConfigError(f"{path}: {len(chosen)} agents in it have datasets: {places}; name the file of one of them")


def _implementation(values: Mapping[str, Any], block: str, kind: str, origins: Origins) -> tuple[str, str]:
    """The name of the one implementation in a block, and its dotted key."""
    inner = values[block][kind]
    if len(inner) != 1 or not isinstance(next(iter(inner.values())), dict):
        raise ConfigError(
            f"{origins.nearest(f'{block}.{kind}')}: key '{block}.{kind}': expected one implementation with its keys"
        )
    (name,) = inner
    return name, f"{block}.{kind}.{name}"


def _resources_server(values: Mapping[str, Any], instance: str, agent_at: str, origins: Origins) -> str:
    (agent,) = values[instance]["responses_api_agents"].values()
    reference = agent.get("resources_server")
    name = reference.get("name") if isinstance(reference, dict) else None
    key = join(agent_at, "resources_server.name")
    if not isinstance(name, str):
        raise ConfigError(
            f"{origins.nearest(key)}: key {key!r}: the agent names no resources server, so nothing judges"
        )
    known = dict(_blocks(values, "resources_servers"))
    if name not in known:
        raise ConfigError(
            f"{origins.nearest(key)}: key {key!r}: no resources server {name!r}: {did_you_mean(name, known)}"
        )
    return name


def _options(implementation: str, block: Mapping[str, Any]) -> dict[str, Any]:
    dropped = _ABOUT | _SERVER_KEYS | _WITHOUT_EFFECT.get(implementation, frozenset())
    return {key: value for key, value in block.items() if key not in dropped}


def _name(path: Path, datasets: list[dict[str, Any]]) -> str:
    """The dataset's name for a benchmark, which NeMo Gym keeps unique; the file's for an environment."""
    for dataset in datasets:
        if dataset.get("type") == "benchmark":
            return str(dataset.get("name", "")).replace(".", "_").replace("/", "_")
    return path.parent.name if path.name == "config.yaml" else path.stem


def _prompt_config(datasets: list[dict[str, Any]]) -> str | None:
    return next((d["prompt_config"] for d in datasets if d.get("type") == "benchmark" and d.get("prompt_config")), None)


def _root(path: Path, datasets: list[dict[str, Any]]) -> Path:
    """The folder that holds the dataset's script, prompt or data: one above the configuration, or the working one."""
    named = [str(d[key]) for d in datasets for key in ("prepare_script", "prompt_config", "jsonl_fpath") if d.get(key)]
    for folder in (*path.resolve().parents, Path.cwd()):
        if any((folder / name).is_file() for name in named):
            return folder
    for folder in (*path.resolve().parents, Path.cwd()):
        if any((folder / name).parent.is_dir() for name in named if "/" in name):
            return folder
    return path.parent


def _origins(origins: Origins, made: Mapping[str, Any], path: Path, agent_at: str, server_at: str) -> Origins:
    """Where the keys of the benchmark were written, in the blocks that they were taken from."""
    found = Origins(str(path))
    for target, source in (
        ("datasets", join(agent_at, "datasets")),
        ("agent.options", agent_at),
        ("verifier.options", server_at),
        *((key, join(server_at, key)) for key in _ABOUT),
        ("agent.name", agent_at),
        ("verifier.name", server_at),
        ("prompt_config", join(agent_at, "datasets")),
        ("name", join(agent_at, "datasets")),
    ):
        found.borrow(origins, target, source, below=_at(made, target))
    return found


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part, {}) if isinstance(values, Mapping) else {}
    return values
