"""Time for whoever leaves: on a machine that stalls, what a lease of nobody holds would come a minute later."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def patient_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stops pulling or hands a message back waits for the server until it has answered."""
    monkeypatch.setattr("gym_bus.bus.pull.STOP_LOOKS", 600)
    monkeypatch.setattr("gym_bus.bus.tries.HAND_BACK_LIMIT_S", 60.0)
