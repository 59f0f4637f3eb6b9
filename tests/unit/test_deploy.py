"""What deploy/ holds is valid, and fits the code: commands, settings, names on the bus, versions."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import pytest
import yaml

from gym_bus.agents.registry import AGENTS
from gym_bus.cli.main import cli
from gym_bus.config import Config, load_config
from gym_bus.models.registry import Models
from gym_bus.registry import Registry
from gym_bus.server import find_binary
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.service import VerifierService
from gym_bus.workers.agent import AgentWorker
from gym_bus.workers.main import DRAIN_S
from gym_bus.workers.verifier import VerifierWorker

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
BASE = KUBERNETES / "base"
SBATCH = DEPLOY / "slurm" / "gym-bus.sbatch"
KUSTOMIZATIONS = sorted(KUBERNETES.rglob("kustomization.yaml"))
SETTINGS = ("bus.yaml", "models.yaml")
VARIABLES = {"${settings[@]}": ["--config", "settings.yaml"], "$@": ["gsm8k", "--split", "example"]}
"""What those of the Slurm script stand for."""


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


MANIFESTS = [
    document
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if path.name not in ("kustomization.yaml", *SETTINGS)
    for document in documents(path)
]


def manifest(kind: str, name: str) -> dict[str, Any]:
    """The first of that name: of the base, not the patch of a component."""
    return next(m for m in MANIFESTS if (m["kind"], m["metadata"]["name"]) == (kind, name))


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Every container, at whatever depth: a RayCluster has its pods deeper than a Deployment."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in ("containers", "initContainers"):
            yield from value
        else:
            yield from containers(value)


def parsed(words: list[str]) -> click.Context:
    """Our command line of these words. Raises click.UsageError for a command or an option that there is not."""
    command, rest = cast(click.Command, cli), [*words]
    while isinstance(command, click.Group):
        name = rest.pop(0)
        found = command.get_command(click.Context(command), name)
        if found is None:
            raise click.UsageError(f"no command {name!r}")
        command = found
    return command.make_context(command.name, rest)


def in_the_script() -> list[list[str]]:
    """The Slurm script's command lines of ours, its variables replaced."""
    lines = re.findall(r"^[^#\n]*\bgym-bus ((?:worker|eval|bus) .+?)(?: &)?$", SBATCH.read_text(), re.MULTILINE)
    return [[w for word in shlex.split(line) for w in VARIABLES.get(word, [word])] for line in lines]


def in_the_image() -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"docker run gym-bus (.+)", (DEPLOY / "Dockerfile").read_text())]


def in_the_docs() -> list[list[str]]:
    shown = (ROOT / "docs" / "how-to" / "deploy.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"-- gym-bus (.+)", shown)]


def in_pods() -> list[list[str]]:
    return [c["args"] for m in MANIFESTS for c in containers(m) if c.get("args", [""])[0] == "worker"]


def in_compose() -> list[list[str]]:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    return [services[name]["command"] for name in services if name != "nats"]


def settings_of(tmp_path: Path, overrides: list[str] | None = None) -> Config:
    env = tmp_path / "env.yaml"
    env.write_text("{nats_password: s, policy_base_url: http://m/v1, policy_model_name: m, policy_api_key: k}")
    return load_config([BASE / name for name in SETTINGS], overrides or [], env_file=env)


def built_in(known: Registry[Any]) -> list[str]:
    """Without the plug-ins of other tests."""
    return [name for name in known if known._paths.get(name, "").startswith("gym_bus.")]


@pytest.mark.parametrize(
    ("commands", "roles"),
    [
        (in_the_image, {"agent"}),
        (in_compose, {"agent", "verifier", "results"}),
        (in_pods, {"agent", "verifier", "results"}),
        (in_the_script, {"agent", "verifier", "run"}),
        (in_the_docs, {"submit", "status"}),
    ],
)
def test_every_command_that_is_deployed_is_one_of_ours(commands: Any, roles: set[str], tmp_path: Path) -> None:
    found = commands()
    assert {words[1] for words in found} == roles
    for words in found:
        context = parsed(words)
        settings_of(tmp_path, list(context.params["overrides"]))


def test_a_command_that_is_not_ours_is_found() -> None:
    for words in (["worker", "agent", "--no-such-option"], ["eval", "no-such-command"], ["worker", "no-such-role"]):
        with pytest.raises(click.UsageError):
            parsed(words)


def test_the_workers_settings_load_and_name_the_servers_that_there_are(tmp_path: Path) -> None:
    config = settings_of(tmp_path)
    servers = manifest("StatefulSet", "nats")["spec"]
    names = [f"nats-{i}.{servers['serviceName']}" for i in range(servers["replicas"])]
    assert config.bus.url is not None
    assert [url.strip() for url in config.bus.url.split(",")] == [f"nats://gym:s@{name}:4222" for name in names]
    assert config.bus.replicas == servers["replicas"]
    routes = re.findall(r'"nats://(\S+?):6222"', (BASE / "nats.conf").read_text())
    assert routes == names


def test_programs_at_a_time_are_the_cores_that_a_verifier_asks_for(tmp_path: Path) -> None:
    (container,) = containers(manifest("Deployment", "verifier"))
    assert str(settings_of(tmp_path).verifier.ray.actors) == container["resources"]["requests"]["cpu"]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: p.parent.name)
def test_a_kustomization_names_the_files_of_its_folder(path: Path) -> None:
    (made,) = documents(path)
    patches = [patch["path"] for patch in made.get("patches", []) if "path" in patch]
    generated = [name for generator in made.get("configMapGenerator", []) for name in generator["files"]]
    named = {*made.get("resources", []), *patches, *generated}
    assert {name for name in named if not (path.parent / name).exists()} == set()
    files = {f.name for f in path.parent.iterdir() if f.is_file()} - {path.name}
    assert files <= named


def test_pods_mount_the_settings_that_they_are_told_to_read() -> None:
    generators = {g["name"]: g["files"] for g in documents(BASE / "kustomization.yaml")[0]["configMapGenerator"]}
    for words in in_pods():
        assert set(parsed(words).params["config_files"]) <= set(generators["gym-bus"])


def test_the_clusters_server_configuration_is_valid(tmp_path: Path) -> None:
    shutil.copy(BASE / "nats.conf", tmp_path)
    (tmp_path / "auth.conf").write_text('authorization { user: gym, password: "s" }\n')
    checked = subprocess.run(
        [find_binary(), "-t", "-c", tmp_path / "nats.conf", "--name", "nats-0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_keda_looks_at_every_consumer_that_the_workers_make(tmp_path: Path) -> None:
    ours = [
        f"{role}.names=[{','.join(built_in(known))}]" for role, known in (("agent", AGENTS), ("verifier", VERIFIERS))
    ]
    config = settings_of(tmp_path, ours)
    made = {
        "agent": AgentWorker(config.agent, Models(config.models), "w").sources(config.bus.lanes),
        "verifier": VerifierWorker(config.verifier, VerifierService(config.verifier), "w").sources(),
    }
    held = {"agent": config.agent.concurrency, "verifier": config.verifier.concurrency}
    for name, sources in made.items():
        scaled = manifest("ScaledObject", name)["spec"]
        assert scaled["scaleTargetRef"] == {"name": manifest("Deployment", name)["metadata"]["name"]}
        looked_at = [trigger["metadata"] for trigger in scaled["triggers"]]
        assert {(m["stream"], m["consumer"]) for m in looked_at} == {(s.stream, s.consumer) for s in sources}
        assert {m["lagThreshold"] for m in looked_at} == {str(held[name])}
        assert {m["natsServerMonitoringEndpoint"] for m in looked_at} == {"nats.gym-bus.svc.cluster.local:8222"}


def test_every_image_is_of_the_version_that_compose_has() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    images = {container["image"] for m in MANIFESTS for container in containers(m) if "image" in container}
    assert images == {service["image"] for service in services.values()}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"gym-bus:{version}" in images


def test_the_ray_cluster_is_of_the_version_that_is_locked() -> None:
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert manifest("RayCluster", "gym-bus-ray")["spec"]["rayVersion"] == locked[1]


def test_verifiers_join_the_ray_cluster_that_there_is() -> None:
    cluster = manifest("RayCluster", "gym-bus-ray")["metadata"]["name"]
    patch = next(m for m in reversed(MANIFESTS) if m["metadata"]["name"] == "verifier" and m["kind"] == "Deployment")
    sidecar, worker = containers(patch["spec"]["template"]["spec"])
    head = f"{cluster}-head-svc:6379"
    assert f"--address={head}" in sidecar["command"]
    assert f"verifier.ray.address={head}" in worker["args"]


@pytest.mark.parametrize(
    ("kind", "name"), [("Deployment", "agent"), ("Deployment", "verifier"), ("StatefulSet", "results")]
)
def test_workers_are_given_the_time_that_they_take_to_leave(kind: str, name: str) -> None:
    pod = manifest(kind, name)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 2 * DRAIN_S


def test_the_slurm_script_is_valid_bash() -> None:
    checked = subprocess.run(["bash", "-n", SBATCH], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_builds_the_base_with_all_components(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    top = tmp_path / "kubernetes" / "kustomization.yaml"
    top.write_text(top.read_text().replace("components: []", "components: [keda, kuberay]"))
    built = subprocess.run(["kubectl", "kustomize", top.parent], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    made = list(yaml.safe_load_all(built.stdout))
    (verifier,) = (m for m in made if (m["kind"], m["metadata"]["name"]) == ("Deployment", "verifier"))
    assert "replicas" not in verifier["spec"]
    assert [c["name"] for c in containers(verifier["spec"]["template"]["spec"])] == ["verifier", "ray"]
