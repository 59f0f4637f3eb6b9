"""`_inherit_from`, `_copy` and `_delete_key`: one block of the configuration made from another one, as in NeMo Gym.

    mine:
      _inherit_from: generic     # `generic` becomes `mine`; `_copy: generic` keeps both
      _delete_key: a, b          # keys that are not taken over
      c: 3                       # wins over what is taken over; lists are replaced

`${inherit_from:generic}` and `${copy:generic}` stand for a block that is taken over as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from gym_bus.errors import ConfigError, did_you_mean
from gym_bus.origins import Origins, join, parent

INHERIT, COPY, DELETE = "_inherit_from", "_copy", "_delete_key"
MISSING = "???"

_WHOLE = re.compile(r"\$\{(?P<how>inherit_from|copy):(?P<source>[^{}]+)\}")


def apply_inheritance(values: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """`values` without the directives: every block made from its source, sources that have moved away taken out.

    A source may itself inherit, in any order. `origins` learns where the inherited keys were written.

    Raises:
        ConfigError: a source that is not there, or that leads back to itself; a key to delete that is not there.
    """
    return _Inheritance(values, origins).run()


class _Inheritance:
    def __init__(self, values: dict[str, Any], origins: Origins) -> None:
        self._original = copy.deepcopy(values)
        self._origins = origins
        self._moved: set[str] = set()

    def run(self) -> dict[str, Any]:
        made: dict[str, Any] = self._made(self._original, "", ())
        for source in sorted(self._moved, key=len, reverse=True):
            around = _find(made, parent(source))
            if isinstance(around, dict):
                around.pop(source.rpartition(".")[2], None)
        return made

    def _made(self, value: Any, at: str, trail: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [self._made(item, f"{at}[{i}]", trail) for i, item in enumerate(value)]
        if isinstance(value, str) and (whole := _WHOLE.fullmatch(value)):
            return self._source(whole["source"].strip(), at, trail, move=whole["how"] == "inherit_from")
        if not isinstance(value, dict):
            return value
        own = {
            key: self._made(below, join(at, key), trail)
            for key, below in value.items()
            if key not in (INHERIT, COPY, DELETE)
        }
        taken: Any = {}
        for directive in (INHERIT, COPY):
            if directive in value:
                taken = self._source(value[directive], join(at, directive), trail, move=directive == INHERIT)
        if taken == MISSING:
            return MISSING
        if not isinstance(taken, dict):
            raise self._error(join(at, INHERIT), "it names no block of keys, so nothing can be set beside it")
        return merged(_without(taken, self._deleted(value, own, taken, at)), own)

    def _source(self, source: Any, at: str, trail: tuple[str, ...], *, move: bool) -> Any:
        """The block that `source` names, its own directives applied."""
        if not isinstance(source, str):
            raise self._error(at, "expected the dotted key of a block")
        if source in trail:
            raise self._error(at, f"blocks inherit from each other: {' -> '.join((*trail, source))}")
        found = self._lookup(source, at)
        if move:
            self._moved.add(source)
        made = self._made(copy.deepcopy(found), source, (*trail, source))
        if isinstance(made, dict):
            target = at.removesuffix(f".{INHERIT}").removesuffix(f".{COPY}")
            self._origins.borrow(self._origins, target, source, below=made)
        return made

    def _lookup(self, source: str, at: str) -> Any:
        value: Any = self._original
        for part in source.split("."):
            if value == MISSING:
                return MISSING
            if not isinstance(value, dict) or part not in value:
                known = value if isinstance(value, dict) else ()
                raise self._error(at, f"there is no block {source!r}: {did_you_mean(part, map(str, known))}")
            value = value[part]
        return value

    def _deleted(self, value: dict[str, Any], own: dict[str, Any], taken: dict[str, Any], at: str) -> set[str]:
        """The keys not to take over; those that the block itself has are taken out of `own`."""
        names = {name.strip() for name in str(value.get(DELETE, "")).split(",") if name.strip()}
        for name in names & own.keys():
            del own[name]
            names.remove(name)
        # A block that takes nothing over may be meant for another file's keys, as NeMo Gym's files of overrides are.
        for name in sorted(names - taken.keys()) if INHERIT in value or COPY in value else ():
            raise self._error(join(at, DELETE), f"there is no key {name!r}: {did_you_mean(name, {*own, *taken})}")
        return names

    def _error(self, at: str, what: str) -> ConfigError:
        return ConfigError(f"{self._origins.nearest(at)}: key {at!r}: {what}")


def _find(values: Any, key: str) -> Any:
    for part in key.split(".") if key else ():
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _without(values: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key; everything else, lists too, replaced."""
    made = dict(under)
    for key, value in over.items():
        below = made.get(key)
        made[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return made
