"""Clocks, in one place."""

from __future__ import annotations

import time


def since(epoch_s: float) -> float:
    """Seconds since a moment that another machine's clock took; never negative, clocks differ."""
    return max(0.0, time.time() - epoch_s)
