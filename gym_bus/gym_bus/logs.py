"""Structured logs: events with fields, to standard error, as JSON lines or for people."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import structlog

MOST_ALIKE = 10
WINDOW_S = 10.0
MOST_NAMES = 256


class Flood:
    """A processor that lets `MOST_ALIKE` events of one name through in `WINDOW_S` seconds.

    What concerns one rollout concerns all of them when the broker is away, and 65,536 lines say no more than ten. The
    next event after the window tells how many were left out.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int]] = {}

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Raises DropEvent for one that is left out."""
        name, now = str(event.get("event")), time.monotonic()
        since, count = self._seen.get(name, (now, 0))
        if now - since >= WINDOW_S:
            if count > MOST_ALIKE:
                event["left_out"] = count - MOST_ALIKE
            since, count = now, 0
        if len(self._seen) >= MOST_NAMES:
            self._seen.clear()
        self._seen[name] = (since, count + 1)
        if count >= MOST_ALIKE:
            raise structlog.DropEvent
        return event


def configure_logs(level: str = "warning", *, json: bool = False, **fields: Any) -> None:
    """Set up logging for this process; `fields` are bound to every event."""
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            Flood(),
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(**fields)
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # it prints a traceback per reconnect; we log the event


def get_logger(name: str) -> Any:
    """A logger whose events carry the module's name."""
    return structlog.get_logger(module=name)
