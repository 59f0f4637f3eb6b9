"""What the processes of a local run use: CPU time and memory by role, sampled from outside."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import msgspec
import psutil

RUNNER, AGENT, VERIFIER, BROKER, MODEL = "runner", "agent", "verifier", "nats-server", "model server"
POOL = "pool"
"""What verifier workers start: pool workers, their sandboxes and Ray."""
OTHER = "other"
ROLES = (RUNNER, AGENT, VERIFIER, POOL, BROKER, OTHER, MODEL)
SAMPLE_S = 0.2


class Sample(msgspec.Struct, frozen=True):
    """One look at all processes."""

    at_s: float
    """On the monotonic clock."""
    done: int
    """Results until then."""
    cpu_s: dict[str, float]
    """By role, since the processes began; those that have ended and those of ended children included."""
    rss: dict[str, int]
    """Bytes by role; shared pages count in each process."""


class Sampler(threading.Thread):
    """Looks at this process and its children five times a second, from a thread."""

    def __init__(self, done: Callable[[], int]) -> None:
        super().__init__(name="usage sampler", daemon=True)
        self._done = done
        self._ended = threading.Event()
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self._roles: dict[tuple[int, float], str] = {}
        self.samples: list[Sample] = []
        self.processes: dict[str, int] = {}
        """The most that there were of each role."""

    def run(self) -> None:
        """Sample until `end`."""
        while not self._ended.wait(SAMPLE_S):
            self.sample()

    def end(self) -> None:
        """Take a last sample and stop."""
        self._ended.set()
        self.join()
        self.sample()

    def sample(self) -> None:
        """One look at every process; what a dead one used stays counted."""
        done, now = self._done(), time.monotonic()
        rss: dict[str, int] = {}
        count: dict[str, int] = {}
        by_pid: dict[int, str] = {}
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):  # parents before their children
            with contextlib.suppress(psutil.Error):
                role = by_pid[process.pid] = self._role(process, by_pid)
                times = process.cpu_times()
                used = times.user + times.system + times.children_user + times.children_system
                self._cpu[process.pid, process.create_time()] = (role, used)
                rss[role] = rss.get(role, 0) + process.memory_info().rss
                count[role] = count.get(role, 0) + 1
        cpu: dict[str, float] = {}
        for role, used in self._cpu.values():
            cpu[role] = cpu.get(role, 0.0) + used
        self.processes = {role: max(n, self.processes.get(role, 0)) for role, n in (self.processes | count).items()}
        self.samples.append(Sample(now, done, cpu, rss))

    def _role(self, process: psutil.Process, by_pid: dict[int, str]) -> str:
        key = (process.pid, process.create_time())
        if key not in self._roles:
            if process.pid == os.getpid():
                self._roles[key] = RUNNER
            elif by_pid.get(process.ppid()) in (VERIFIER, POOL):
                self._roles[key] = POOL
            else:
                self._roles[key] = role_of(process.cmdline())
        return self._roles[key]


def role_of(command: list[str]) -> str:
    """The role of a child process by its command line."""
    if command and command[0].endswith("nats-server"):
        return BROKER
    for role in (AGENT, VERIFIER):
        if command[-4:-2] == ["worker", role]:
            return role
    return MODEL if "serve" in command else OTHER
