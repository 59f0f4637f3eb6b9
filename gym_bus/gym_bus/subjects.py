"""Names on the bus: subjects, streams, consumers. Pure text, no client."""

from __future__ import annotations

import re

from gym_bus.errors import UsageError

REQUESTS = "GYM_REQUESTS"
ATTEMPTS = "GYM_ATTEMPTS"
RESULTS = "GYM_RESULTS"
ADVISORIES = "GYM_ADVISORIES"
JOBS = "gym_jobs"
WORKERS = "gym_workers"
LIMITS = "gym_limits"
TRAINERS = "gym_trainers"
BLOBS = "gym_blobs"

_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


def token(name: str, what: str = "name") -> str:
    """`name` unchanged where it can be one token of a subject, else UsageError."""
    if not _TOKEN.fullmatch(name):
        raise UsageError(
            f"{what} {name!r} must be letters, digits, '_' and '-' (at most 128), starting with a letter or digit"
        )
    return name


def request(lane: str, agent: str, job: str) -> str:
    """Where a rollout request waits for an agent worker."""
    return f"gym.request.{lane}.{agent}.{job}"


def attempt(verifier: str, job: str) -> str:
    """Where an attempt waits for a verifier worker."""
    return f"gym.attempt.{verifier}.{job}"


def result(job: str, task_index: int, rollout_index: int) -> str:
    """Where the one result of a rollout lies."""
    return f"gym.result.{job}.{task_index}.{rollout_index}"


def requests_of(job: str) -> str:
    """Every waiting request of a job."""
    return f"gym.request.*.*.{job}"


def attempts_of(job: str) -> str:
    """Every waiting attempt of a job."""
    return f"gym.attempt.*.{job}"


def results_of(job: str) -> str:
    """Every result of a job."""
    return f"gym.result.{job}.>"
