"""Names to code: one line registers one extension, and nothing is imported before it is used.

A name that arrives on the bus is looked up here and nowhere else, so a message can never make a worker import code.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from gym_bus.errors import UsageError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Built-in names plus those of installed packages (entry-point group `gym_bus.<plural>`)."""

    def __init__(self, what: str, group: str, builtin: Mapping[str, str]) -> None:
        self._what, self._group = what, group
        self._paths: dict[str, str] = dict(builtin)
        self._discovered = False

    def _discover(self) -> dict[str, str]:
        if not self._discovered:
            for entry in entry_points(group=self._group):
                self._paths.setdefault(entry.name, entry.value)
            self._discovered = True
        return self._paths

    def add(self, name: str, path: str) -> None:
        """Register `module:attribute` under `name` in this process."""
        self._paths[name] = path

    def refresh(self) -> None:
        """Look for installed packages again, at the next use."""
        self._discovered = False

    def __contains__(self, name: str) -> bool:
        return name in self._discover()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._discover()))

    def load(self, name: str) -> T:
        """The object registered under `name`. Raises UsageError with suggestions where there is none."""
        paths = self._discover()
        if name not in paths:
            raise UsageError(f"unknown {self._what} {name!r}: {did_you_mean(name, paths)}")
        module, _, attribute = paths[name].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
