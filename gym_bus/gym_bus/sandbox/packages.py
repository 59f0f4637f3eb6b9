"""Installed packages that programs may import: the files that each is made of, and what it requires."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from gym_bus.errors import UsageError

Distributions = dict[str, importlib.metadata.Distribution]


class Packages(NamedTuple):
    """What a zygote needs to import them, and its programs to use them."""

    modules: tuple[str, ...]
    """To be imported before any program."""
    folders: Mapping[str, Sequence[str]]
    """Entries of `sys.path`, and what programs may read of each: names of files and folders."""


@lru_cache(maxsize=64)
def find(preload: str, optional: str = "") -> Packages:
    """Packages with all that they require.

    Args:
        preload: modules, separated by spaces; those of the standard library are left out here.
        optional: distributions, separated by spaces, that are not imported before; what is not installed is left out.

    Raises:
        UsageError: no installed package has a module of `preload`.
    """
    modules = tuple(name for name in preload.split() if name.partition(".")[0] not in sys.stdlib_module_names)
    taken: Distributions = {}
    for name in optional.split():
        _take(name, taken)
    for name in {module.partition(".")[0] for module in modules}:
        for owner in _owners(name):
            _take(owner, taken)
    folders: dict[str, set[str]] = {}
    for distribution in taken.values():
        folders.setdefault(str(distribution.locate_file("")), set()).update(_entries(distribution))
    return Packages(modules, {folder: sorted(names) for folder, names in sorted(folders.items())})


def _owners(module: str) -> list[str]:
    """The distributions that a module comes from."""
    try:  # nearly always it has the module's name; to look through all takes longer than to start a sandbox
        if module in _entries(importlib.metadata.distribution(module)):
            return [module]
    except importlib.metadata.PackageNotFoundError:
        pass
    if owners := importlib.metadata.packages_distributions().get(module):
        return list(owners)
    raise UsageError(f"preload: no installed package has a module {module!r}: install it beside gym_bus")


def _take(name: str, taken: Distributions) -> None:
    """Add a distribution and what it requires, as far as that is installed."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    if taken.setdefault(distribution.name, distribution) is not distribution:
        return
    for text in distribution.requires or ():
        from packaging.requirements import Requirement  # not for packages that need none: it takes 40 ms

        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _take(requirement.name, taken)


def _entries(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """The files and folders at the top of a distribution's folder; scripts and the like lie elsewhere."""
    for first in {file.parts[0] for file in distribution.files or ()}:
        its_own = first not in ("/", "..", "__pycache__") and not first.endswith(".pth")
        if its_own and Path(str(distribution.locate_file(first))).exists():
            yield first
