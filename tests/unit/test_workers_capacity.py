"""How many workers a rate needs."""

from __future__ import annotations

import os
from typing import Any

import pytest

from gym_bus.config import AgentConfig, Config
from gym_bus.settings import Distribution, SimulatedConfig
from gym_bus.workers.bench import RoleUse, Stage, ideal_per_s, needs_of, report
from gym_bus.workers.capacity import Measured, needs
from gym_bus.workers.usage import AGENT, BROKER, MODEL, POOL, RUNNER, VERIFIER, Sample, Sampler, role_of

CHEAP = Measured(agent_cpu_s=0.00035, verifier_cpu_s=0.00007, pool_cpu_s=0.0, all_cpu_s=0.0007, held_s=2.0)


def test_cpu_time_or_slots_bound_the_agent_workers_whichever_is_less() -> None:
    slots = needs(CHEAP, 1000, concurrency=512)
    cpu = needs(CHEAP, 10_000, concurrency=16_384)

    assert (slots.in_flight, slots.agents) == (2000, 4)
    assert (cpu.in_flight, cpu.agents) == (20_000, 5)


def test_a_trickle_needs_one_worker_of_each_kind() -> None:
    least = needs(CHEAP, 0.5, concurrency=1024)

    assert (least.agents, least.verifiers, least.pool_cores) == (1, 1, 0)


def test_sandboxes_are_planned_in_cores() -> None:
    found = needs(Measured(agent_cpu_s=0, verifier_cpu_s=0, pool_cpu_s=0.0035, all_cpu_s=0.007, held_s=0), 1000, 1)

    assert found.pool_cores == pytest.approx(5)
    assert found.cores == pytest.approx(10)


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["/opt/bin/nats-server", "-c", "x"], BROKER),
        (["python", "-m", "gym_bus.cli.main", "worker", "agent", "--config", "-"], AGENT),
        (["python", "-m", "gym_bus.cli.main", "worker", "verifier", "--config", "-"], VERIFIER),
        (["python", "-m", "gym_bus.cli.main", "model", "serve", "--port", "0"], MODEL),
    ],
)
def test_a_process_is_known_by_its_command(command: list[str], role: str) -> None:
    assert role_of(command) == role


class Sampled(Sampler):
    def __init__(self, *samples: Sample, processes: dict[str, int]) -> None:
        super().__init__(lambda: 0)
        self.samples, self.processes = list(samples), processes


def steady_run() -> Sampled:
    """1,000 rollouts in 10 s after a start of 5 s; an agent that is busy for half of the time."""
    return Sampled(
        Sample(0, 0, {AGENT: 0.0}, {AGENT: 10**6}),
        *(Sample(5 + i, 100 * i, {AGENT: 4 + i / 2, MODEL: i / 10}, {AGENT: 10**8, MODEL: 10**9}) for i in range(11)),
        processes={AGENT: 1, MODEL: 1},
    )


def test_figures_are_taken_where_the_run_is_steady() -> None:
    found = report(steady_run(), 1000, 3, 15.0, {})

    assert found.rollouts_per_s == pytest.approx(100)
    assert found.cpu_ms_per_rollout == pytest.approx(5)
    assert found.model_cpu_ms_per_rollout == pytest.approx(1)
    assert found.peak_rss_mb == pytest.approx(100)
    assert found.roles[AGENT] == RoleUse(processes=1, cpu_ms_per_rollout=pytest.approx(5), peak_rss_mb=100)


@pytest.mark.parametrize(
    ("limits", "calls_per_s"),
    [
        ({}, None),
        ({"most_per_s": 100.0}, 100),
        ({"most_in_flight": 64}, 128),
        ({"most_in_flight": 64, "most_per_s": 100.0}, 100),
        ({"most_in_flight": 64, "latency_s": Distribution()}, None),
        ({"most_per_s": 100.0, "rate_limited": 0.25, "server_error": 0.25}, 50),
        ({"most_per_s": 100.0, "hang": 0.1}, None),
    ],
)
def test_a_limited_model_answers_so_many_calls_per_second(limits: dict[str, Any], calls_per_s: float | None) -> None:
    model = SimulatedConfig(**{"latency_s": Distribution(kind="lognormal", mean=0.5, spread=0.5), **limits})

    assert ideal_per_s(model) == calls_per_s


def test_what_a_busy_worker_adds_to_its_rollouts_is_not_planned_for() -> None:
    stages = {"agent_s": Stage(mean=4.0, p50=2.0, p99=9.0)}
    found = report(steady_run(), 1000, 0, 15.0, stages)
    config = Config(agent=AgentConfig(concurrency=1000))

    assert needs_of(found, 100, config).in_flight == 400

    busy = report(steady_run(), 1000, 0, 15.0, stages)
    busy.roles[AGENT].cpu_ms_per_rollout = 10
    assert needs_of(busy, 100, config).in_flight == 200


def test_the_own_process_is_the_runner_and_a_verifiers_children_are_its_pool() -> None:
    sampler = Sampler(lambda: 7)
    sampler._roles = {}

    sampler.sample()

    assert sampler.samples[0].done == 7
    assert sampler.samples[0].rss[RUNNER] > 10**6
    assert sampler._role(FakeProcess(2, 1), {1: VERIFIER}) == POOL
    assert sampler._role(FakeProcess(3, 2), {2: POOL}) == POOL
    assert sampler._role(FakeProcess(os.getpid(), 1), {1: VERIFIER}) == RUNNER


class FakeProcess:
    """The few words of a process that its role is found by."""

    def __init__(self, pid: int, parent: int) -> None:
        self.pid, self._parent = pid, parent

    def create_time(self) -> float:
        return 1.0

    def ppid(self) -> int:
        return self._parent
