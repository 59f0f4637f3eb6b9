"""What the repository promises about itself: one namespace, one wheel, settings that load, no package index named."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import msgspec
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gym_bus.benchmarks.spec import list_benchmarks
from gym_bus.cli import worker
from gym_bus.config import Config, Layer, load_config
from gym_bus.server import find_binary
from gym_bus.workers.suite import read_suite

ROOT = Path(__file__).parents[2]
SOURCES = ("gym_bus", "workers", "agents", "verifiers", "benchmarks")
SUITES = sorted((ROOT / "configs" / "suites").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*SUITES})

WITHOUT = """
import importlib, sys

lacking = set(sys.argv[1].split())

class Lacks:
    def find_spec(self, name, path=None, target=None):
        if name in lacking:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacks())
"""
"""The start of a program in whose environment the packages of its first argument are not installed."""

EVERY_VERIFIER = "from gym_bus.verifiers.registry import VERIFIERS as all; [all.load(name) for name in all]"
EVERY_AGENT = (
    "from gym_bus.agents.registry import AGENTS, TOOLBOXES; [r.load(n) for r in (AGENTS, TOOLBOXES) for n in r]"
)
EVERY_COMMAND = "from gym_bus.cli.main import COMMANDS; [importlib.import_module(m) for m, _ in COMMANDS.values()]"
WORKER = "import gym_bus.cli.worker, gym_bus.workers.main, gym_bus.workers"
ROLES = {
    "": "import gym_bus.messages, gym_bus.rewards",
    "agent": f"""{WORKER}.agent; {EVERY_AGENT}
import gym_bus.models.http, gym_bus.models.openai_client, gym_bus.models.replay, gym_bus.models.simulated""",
    "verifier": f"""{WORKER}.verifier; {EVERY_VERIFIER}
import gym_bus.cli.sandbox, gym_bus.verifiers.local_pool, gym_bus.verifiers.pool""",
    "results": f"{WORKER}.recorder, gym_bus.results.profile",
    "server": "import gym_bus.cli.bus, gym_bus.server; gym_bus.server.find_binary()",
    "registry": """import gym_bus.benchmarks.stores_huggingface, gym_bus.benchmarks.stores_mlflow
import huggingface_hub, mlflow""",
    "analysis": """import gym_bus.cli.eval, gym_bus.cli.report, gym_bus.results.report.page
import pandas, plotly, pyarrow, statsmodels""",
    "cli": EVERY_COMMAND,
}
"""What runs with one extra alone: the command line of its role, and all that the role does."""


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("source", SOURCES)
def test_the_namespace_has_no_init_file_in_any_part(source: str) -> None:
    assert (ROOT / source / "gym_bus").is_dir()
    assert not (ROOT / source / "__init__.py").exists()
    assert not (ROOT / source / "gym_bus" / "__init__.py").exists()


def test_every_package_of_the_namespace_says_that_it_is_typed() -> None:
    parts = [p for source in SOURCES for p in (ROOT / source / "gym_bus").iterdir() if (p / "__init__.py").exists()]
    assert parts
    assert [
        p for p in parts if p.name in ("workers", "agents", "verifiers", "benchmarks") if not (p / "py.typed").exists()
    ] == []


def test_the_wheel_holds_every_part_with_its_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "gym_bus/messages.py",
        "gym_bus/workers/loop.py",
        "gym_bus/agents/simple.py",
        "gym_bus/verifiers/math.py",
        "gym_bus/benchmarks/gsm8k/config.yaml",
        "gym_bus/benchmarks/gsm8k/data/example.jsonl",
        "gym_bus/benchmarks/templates/native/verifier.py.template",
        "gym_bus/benchmarks/templates/common/.gitignore.template",
        "gym_bus/results/report/templates/report.html",
    ):
        assert wanted in names
    assert "gym_bus/__init__.py" not in names


def installed_with(extra: str) -> set[str]:
    """Names of the packages that `gym-bus[extra]` brings, by what pyproject.toml and the packages declare."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen: set[tuple[str, str]] = set()
    todo = [("gym-bus", e) for e in {"", extra}]
    while todo:
        name, chosen = todo.pop()
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        if name == "gym-bus":
            declared = project["optional-dependencies"][chosen] if chosen else project["dependencies"]
        else:
            declared = distribution(name).requires or []
        for wanted in map(Requirement, declared):
            if wanted.marker is None or wanted.marker.evaluate({"extra": chosen}):
                todo += [(canonicalize_name(wanted.name), e) for e in {"", *wanted.extras}]
    return {name for name, _ in seen}


@pytest.mark.parametrize(("extra", "work"), ROLES.items(), ids=[extra or "base" for extra in ROLES])
def test_a_role_needs_no_more_than_its_extra_installs(extra: str, work: str) -> None:
    brought = installed_with(extra)
    lacking = [
        m for m, by in packages_distributions().items() if not brought & {canonicalize_name(name) for name in by}
    ]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT + work, " ".join(lacking)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_command_says_what_to_install_where_an_install_has_too_little() -> None:
    work = "sys.argv[1:] = ['list']; import gym_bus.cli; gym_bus.cli.start()"
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT + work, "click"], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: this needs click, which is not installed: pip install 'gym-bus[cli]'")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_configuration_loads(path: Path, tmp_path: Path) -> None:
    env = tmp_path / "env.yaml"
    env.write_text("policy_base_url: http://127.0.0.1:1/v1\npolicy_model_name: m\npolicy_api_key: k\n")
    config = load_config([path], [], env_file=env, base=[Layer("built-in", {})])
    assert isinstance(config, Config)
    assert msgspec.to_builtins(config) != msgspec.to_builtins(Config())


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.name)
def test_every_shipped_suite_names_benchmarks_and_models_that_there_are(path: Path) -> None:
    suite = read_suite(path)
    assert {part.benchmark for part in suite.parts} <= {info.name for info in list_benchmarks(ROOT)}
    assert {model for part in suite.parts for model in part.models} <= {"policy", "simulated"}


def test_the_shipped_server_configuration_is_valid() -> None:
    checked = subprocess.run(
        [find_binary(), "-t", "-c", str(ROOT / "deploy" / "nats.conf")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_every_command_in_the_compose_file_is_one_of_ours() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert set(services) == {"nats", "agent", "verifier", "results"}
    for name in ("agent", "verifier", "results"):
        assert services[name]["command"][:2] == ["worker", name]
        worker.command.make_context("worker", services[name]["command"][1:])  # raises for an option that is not there


def test_no_tracked_file_names_a_package_index() -> None:
    index = re.compile(rb"pypi\.org|pythonhosted|registry\.npmjs|--(extra-)?index-url|--find-links")
    guilty = [p for p in tracked() if p != Path(__file__) and index.search(p.read_bytes())]
    assert guilty == []


def test_the_lock_file_pins_every_requirement_with_a_hash() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    requirements = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(requirements) > 50
    assert [line for line in requirements if "==" not in line] == []
    assert lock.count("--hash=sha256:") >= len(requirements)
