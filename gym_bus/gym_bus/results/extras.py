"""Packages that only some installs have, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gym_bus.errors import UsageError


def need(module: str, extra: str) -> Any:
    """An optional module. Raises UsageError, naming the extra that brings it, where it is not installed."""
    try:
        return import_module(module)
    except ImportError as e:
        package = module.partition(".")[0]
        raise UsageError(f"this needs {package} ({e}): pip install 'gym-bus[{extra}]'") from None
