"""Structured logs: events with fields, to standard error, as JSON lines or for people."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure_logs(level: str = "warning", *, json: bool = False, **fields: Any) -> None:
    """Set up logging for this process; `fields` are bound to every event."""
    renderer: Any = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
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
