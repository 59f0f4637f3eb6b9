"""Names to code: one line registers one extension, and nothing is imported before it is used.

A name that arrives on the bus is looked up here and nowhere else, so a message can never make a worker import code.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

from gym_bus.errors import ConfigError, UsageError, did_you_mean

T = TypeVar("T")

Offers = dict[str, dict[str, str]]
"""By entry-point group and name: `/folder/file.py:attribute`."""

_OFFERED: Offers = {}
"""What the folders bring along that the user named; every registry of the group knows it."""


def offer(group: str, name: str, path: str) -> None:
    """Make the code of a folder that the user named known in this process; nothing is imported yet.

    Raises:
        UsageError: another folder has brought that name along.
    """
    known = _OFFERED.setdefault(group, {})
    if known.setdefault(name, path) != path:
        raise UsageError(f"{path}: {name!r} is the name of {known[name]} already: give one of them another name")


def offered() -> Offers:
    """Everything that was offered, for a process that is to find what this one finds."""
    return {group: dict(paths) for group, paths in _OFFERED.items()}


def take_over(offers: Offers) -> None:
    """Know what another process was offered."""
    for group, paths in offers.items():
        for name, path in paths.items():
            offer(group, name, path)


def import_file(path: Path) -> ModuleType:
    """A Python file of a folder that is no installed package; `from .other import x` finds the files beside it."""
    folder = path.parent
    package = f"gym_bus_folder_{folder.name}_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    if package not in sys.modules:
        spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{path.stem}")


def stumbled(error: BaseException) -> str:
    """What a file of an author's stumbled over as it was imported, and where."""
    if isinstance(error, ImportError | SyntaxError | AttributeError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


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
        # A name of ours, or of an installed package, cannot be taken over by a folder.
        return _OFFERED.get(self._group, {}) | self._paths

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
        if name in self._paths and (theirs := _OFFERED.get(self._group, {}).get(name)):
            raise ConfigError(f"{theirs}: {name!r} is the name of another {self._what}: choose one of its own")
        module, _, attribute = paths[name].rpartition(":")
        if not module.endswith(".py"):
            return cast(T, getattr(importlib.import_module(module), attribute))
        try:
            return cast(T, getattr(import_file(Path(module)), attribute))
        except (Exception, SystemExit) as e:  # as it is imported, an author's code may do anything
            raise ConfigError(f"{self._what} {name!r}: {module} does not load: {stumbled(e)}") from None
