"""The closed set of failure classes, and what the code does with each."""

from __future__ import annotations

import msgspec
import pytest

from gym_bus.errors import RETRYABLE, TREATMENTS, FailureKind, GymBusError
from gym_bus.messages import RolloutId, decode
from gym_bus.results.ledger import FailedRollout, Ledger
from gym_bus.settings import Config, ModelConfig
from gym_bus.workers.results import worth_retrying


def value_of(path: str) -> object:
    value: object = Config()
    for name in path.split("."):
        value = ModelConfig() if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize("kind", FailureKind)
def test_every_class_says_what_is_repeated_and_what_to_do(kind: FailureKind) -> None:
    treatment = TREATMENTS[kind]

    assert treatment.advice
    for repeat in treatment.repeats:
        assert isinstance(value_of(repeat.limit), int), repeat.limit
        assert repeat.delay


@pytest.mark.parametrize("kind", FailureKind)
def test_a_run_tries_again_what_its_class_says(kind: FailureKind) -> None:
    ledger = Ledger("job", 1, 1)
    ledger.record_failed(RolloutId("job", 0, 0), FailedRollout(kind.value, 1, False))

    assert bool(worth_retrying(ledger, most_attempts=3)) is TREATMENTS[kind].again is (kind in RETRYABLE)


def test_every_error_with_a_class_repeats_a_delivery_only_where_its_class_says_so() -> None:
    def all_of(error: type[GymBusError]) -> list[type[GymBusError]]:
        return [error, *(inner for sub in error.__subclasses__() for inner in all_of(sub))]

    for error in all_of(GymBusError):
        if error.kind is not None and error.retryable:
            assert TREATMENTS[error.kind].repeats, error


def test_a_failure_of_an_older_worker_is_still_read() -> None:
    old = {
        "type": "failed.v1",
        "rollout": ["job", 3, 1],
        "failure": {"kind": "poison", "detail": "?"},
        "response": b"{}",
    }

    message = decode(msgspec.msgpack.encode(old))

    assert (message.rollout, message.extra, message.calls) == (RolloutId("job", 3, 1), b"{}", ())  # type: ignore[union-attr]
