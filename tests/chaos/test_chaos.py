"""Everything is killed and every connection broken, at random; afterwards everything adds up.

    pytest -s tests/chaos/test_chaos.py --chaos-rollouts 5000 --chaos-seed 7

The seed decides what is broken and in which order. When exactly a blow falls depends on the machine, so a failure comes
with its event log: the same seed deals the same blows, not always with the same luck.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.runner import Chaos, run_chaos

MOST_REPEATED = 0.5


async def test_nothing_is_lost_doubled_or_falsely_scored_while_everything_is_killed(
    chaos: Chaos, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = await run_chaos(chaos, folder)
    with capsys.disabled():
        print(f"\n{report}")
    events = "\n".join(report.events)
    assert not report.faults, f"seed {chaos.seed}: {report}\n{events}"
    assert report.samples > 0, events
    assert report.repeated_share < MOST_REPEATED, f"{report}\n{events}"
