"""What the logs say, and how often."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from gym_bus import logs
from gym_bus.logs import MOST_ALIKE, WINDOW_S, configure_logs, get_logger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    yield now
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_one_event_of_every_rollout_is_told_a_few_times_and_counted(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("warning", json=True)
    log = get_logger("here")
    for task in range(1000):
        log.warning("bus_waits", task=task)
    log.warning("something_else")
    told = lines(capsys)

    clock[0] += WINDOW_S
    log.warning("bus_waits", task=1000)

    assert [line["event"] for line in told] == ["bus_waits"] * MOST_ALIKE + ["something_else"]
    assert [line.get("left_out") for line in lines(capsys)] == [1000 - MOST_ALIKE]


def test_what_is_below_the_level_counts_for_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", json=True)
    log = get_logger("here")
    for _ in range(100):
        log.info("bus_waits")

    log.warning("bus_waits")

    assert len(lines(capsys)) == 1
