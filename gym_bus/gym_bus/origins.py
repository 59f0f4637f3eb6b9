"""Where a value of the configuration was written: the file and the line, for error messages and `config resolve`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import yaml

Place = tuple[str | int, ...]
"""A place in nested mappings and lists."""


class Layer(msgspec.Struct, frozen=True):
    """One source of settings; later layers win over earlier ones, key by key."""

    name: str
    """What an error message calls it: a file's path, an argument."""
    values: dict[str, Any]
    path: Path | None = None
    """The YAML file that it was read from."""
    written: Mapping[str, str] = {}
    """The key as it stands in the file, by the dotted key that it sets, where the two differ; with what lies within."""

    def origin(self, key: str) -> str:
        """`file:line` of a dotted key; the layer's name where no line is known."""
        return self.name if self.path is None else written_at(self.path, self.as_written(key))

    def as_written(self, key: str) -> str:
        """The key as it stands in the file."""
        above = key
        while above and above not in self.written:
            above = parent(above)
        return self.written[above] + key[len(above) :] if above else key


def written_at(path: Path, key: str) -> str:
    """`file:line` of a dotted key, or of what stands around it, in a YAML file; the file alone where there is none."""
    lines = key_lines(path)
    while key and key not in lines:
        key = parent(key)
    return f"{path}:{lines[key]}" if key else str(path)


class Origins(Mapping[str, str]):
    """By dotted key of the merged configuration: where it was last set, as `Layer.origin` says it."""

    def __init__(self, top: str = "configuration") -> None:
        self._top = top
        self._at: dict[str, tuple[Layer, str]] = {}

    def add(self, layer: Layer) -> None:
        """A layer was merged over what there was."""
        for place, _ in walk(layer.values):
            key = dotted(place)
            self._at[key] = (layer, key)

    def borrow(self, other: Origins, target: str, source: str, *, below: Any) -> None:
        """What stands in `below`, taken from `source`, now stands at `target`, except for what is set there already."""
        for place in ((), *(place for place, _ in walk(below))):
            tail = dotted(place)
            if (was := other._at.get(join(source, tail))) is not None:
                self._at.setdefault(join(target, tail), was)

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def __getitem__(self, key: str) -> str:
        layer, written = self._at[key]
        return layer.origin(written)

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def nearest(self, key: str) -> str:
        """Where the key, or the nearest one around it, was set; the name of the whole where nothing is known."""
        while key and key not in self._at:
            key = parent(key)
        return self[key] if key else self._top


def walk(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Everything in nested mappings and lists with its place, containers before what is in them, the top left out."""
    inner: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    for key, below in inner:
        yield (*place, key), below
        yield from walk(below, (*place, key))


def leaves(value: Any) -> Iterator[tuple[Place, Any]]:
    """Of `walk`, what is no container, and empty containers."""
    return ((place, below) for place, below in walk(value) if not (isinstance(below, Mapping | list) and below))


def dotted(place: Place) -> str:
    """A place as messages name it: `datasets[0].name`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def join(above: str, below: str) -> str:
    """The dotted key of `below` within `above`; either may be empty."""
    return f"{above}{below}" if below.startswith("[") else ".".join(part for part in (above, below) if part)


def parent(key: str) -> str:
    """The dotted key around a dotted key, empty at the top."""
    return key[: max(key.rfind("."), key.rfind("["), 0)]


def key_lines(path: Path) -> dict[str, int]:
    """Line, from 1, of every dotted key in a YAML file; nothing of a file that cannot be read."""
    try:
        return _key_lines(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


@lru_cache(maxsize=64)
def _key_lines(path: Path, changed_ns: int) -> dict[str, int]:
    del changed_ns  # only tells one state of the file from another
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {dotted(place): line for place, line in _lines(node, ())}


def _lines(node: yaml.Node | None, place: Place) -> Iterator[tuple[Place, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`: its keys stand here
                yield from _lines(value, place)
            else:
                yield (*place, str(key.value)), key.start_mark.line + 1
                yield from _lines(value, (*place, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*place, index), value.start_mark.line + 1
            yield from _lines(value, (*place, index))
