"""Chaos: long runs by flag, short ones in CI."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.runner import SETTLE_LIMIT_S, Chaos
from e2e.conftest import choices, cli

__all__ = ["choices", "cli"]

SHORT = {"rollouts": 200, "minutes": 0.15, "period": 0.4, "latency_s": 0.2}
LONG = {"minutes": 20.0, "period": 1.0, "latency_s": 0.2}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes longer than a few seconds; run with --chaos-long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit_s = chaos_of(config).limit_s + 3 * SETTLE_LIMIT_S
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(limit_s))
            if item.get_closest_marker("long") and not config.getoption("--chaos-long"):
                item.add_marker(pytest.mark.skip(reason="takes long: run with --chaos-long"))


def chaos_of(config: pytest.Config) -> Chaos:
    """What the options ask for."""
    rollouts = config.getoption("--chaos-rollouts")
    default = LONG if rollouts else SHORT
    return Chaos(
        seed=config.getoption("--chaos-seed"),
        rollouts=rollouts or int(SHORT["rollouts"]),
        limit_s=60 * (config.getoption("--chaos-minutes") or default["minutes"]),
        period_s=config.getoption("--chaos-period") or default["period"],
        latency_s=default["latency_s"],
        executor=config.getoption("--chaos-executor"),
    )


@pytest.fixture
def chaos(request: pytest.FixtureRequest) -> Chaos:
    return chaos_of(request.config)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path."""
    made = Path(tempfile.mkdtemp(prefix="gym-chaos-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)
