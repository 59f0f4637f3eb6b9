"""What a worker is doing with one message, noted by whoever does it and read by its heartbeat."""

from __future__ import annotations

import time
from contextvars import ContextVar


class Activity:
    """One message in the hands of a worker."""

    __slots__ = ("since", "started_at", "urgent", "what")

    def __init__(self, what: str, urgent: bool) -> None:
        self.urgent = urgent
        """Whether it came from a lane that is served before others."""
        self.started_at = time.time()
        """Seconds since the epoch."""
        self.what = what
        self.since = self.started_at
        """When it began to do what it does now, seconds since the epoch."""

    def note(self, what: str) -> None:
        """From now on it does this."""
        self.what, self.since = what, time.time()


_current: ContextVar[Activity | None] = ContextVar("activity", default=None)


def begin(what: str, *, urgent: bool = False) -> Activity:
    """Start the account of a message; `note` adds to it from anywhere in the same task, or in those it starts."""
    activity = Activity(what, urgent)
    _current.set(activity)
    return activity


def note(what: str) -> None:
    """Say in a few words what the message's work is doing now. Costs next to nothing; outside a worker, nothing."""
    if activity := _current.get():
        activity.note(what)


def is_urgent() -> bool:
    """Whether the message at hand came from a lane that is served before others."""
    activity = _current.get()
    return activity is not None and activity.urgent
