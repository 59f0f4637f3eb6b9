"""From what one run used to the workers that a rate needs."""

from __future__ import annotations

import math

import msgspec

BUSY = 0.7
"""Share of a core up to which a process is planned: beyond it, what comes in bunches waits."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a run showed, per rollout."""

    agent_cpu_s: float
    verifier_cpu_s: float
    pool_cpu_s: float
    """Of sandboxes and of CPU-heavy verifiers; 0 where there is no pool."""
    all_cpu_s: float
    """Of all processes but the model's."""
    held_s: float
    """Seconds that an agent worker has a rollout in flight, mean."""


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes to do a rate of rollouts on machines like this one."""

    rollouts_per_s: float
    in_flight: int
    """Rollouts in the hands of all agent workers together, and so calls at the model's endpoint."""
    agents: int
    verifiers: int
    pool_cores: float
    """Cores for sandboxes and other work of the pool; 0 where there is none."""
    cores: float
    """In all, pool included, the model not: the CPU time that is used, planned at `BUSY`."""


def needs(measured: Measured, rollouts_per_s: float, concurrency: int) -> Needs:
    """Workers and cores for so many rollouts per second.

    A worker process is one thread, so its CPU time bounds it; agent workers are bounded by their slots, too: a rate r
    with s seconds each has r * s in flight (Little's law).

    Args:
        measured: a run with the same model, benchmark and settings.
        rollouts_per_s: the target.
        concurrency: rollouts in flight of one agent worker.
    """
    in_flight = math.ceil(rollouts_per_s * measured.held_s)
    agents = max(_processes(measured.agent_cpu_s, rollouts_per_s), math.ceil(in_flight / concurrency))
    return Needs(
        rollouts_per_s=rollouts_per_s,
        in_flight=in_flight,
        agents=agents,
        verifiers=_processes(measured.verifier_cpu_s, rollouts_per_s),
        pool_cores=rollouts_per_s * measured.pool_cpu_s / BUSY,
        cores=rollouts_per_s * measured.all_cpu_s / BUSY,
    )


def _processes(cpu_s: float, rollouts_per_s: float) -> int:
    return max(1, math.ceil(rollouts_per_s * cpu_s / BUSY))
