"""Plain containers to typed structs, with errors that a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from gym_bus.errors import ConfigError, did_you_mean
from gym_bus.origins import Origins, dotted, leaves, walk

T = TypeVar("T")

_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")
_NOT_LISTED = re.compile(r"Invalid (?:enum )?value '(?P<value>[^']*)'")


def check(type_: type[T], data: Any, where: str | Origins, at: str = "") -> T:
    """`data` as the struct `type_`, every key and type checked.

    Args:
        type_: a msgspec struct that forbids unknown fields.
        data: plain containers.
        where: the source of the data for error messages; or where each key was set.
        at: the dotted key under which `data` stands in its source, empty for the top.

    Raises:
        ConfigError: names the key, its source, near misses of a misspelt key, and the values that a key may have.
    """
    for place, value in leaves(data):
        if isinstance(value, float) and not isfinite(value):  # JSON has no such number: a job could not be written down
            key = ".".join(part for part in (at, dotted(place)) if part)
            raise ConfigError(f"{_source(key, where)}: key {key!r}: expected a finite number, not {value}")
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as e:
        raise ConfigError(_explain(type_, str(e), where, at)) from None


def check_keys(values: Any, source: str) -> None:
    """Raise ConfigError for a key, however deep, that YAML takes for a number or a truth value."""
    for place, below in [((), values), *walk(values)]:
        for key in below if isinstance(below, dict) else ():
            if not isinstance(key, str):
                within = f" of {dotted(place)!r}" if place else ""
                raise ConfigError(f"{source}: key {key!r}{within} is no text but {type(key).__name__}: quote it")


def _explain(type_: Any, error: str, where: str | Origins, at: str) -> str:
    found = _AT_PATH.match(error)
    what, raw_path = (found["what"], found["path"] or "$") if found else (error, "$")
    path = raw_path.removeprefix("$").removeprefix(".")
    full = ".".join(part for part in (at, path) if part)
    if unknown := _UNKNOWN.match(what):
        key = f"{full}.{unknown['field']}".lstrip(".")
        return f"{_source(key, where)}: unknown key {key!r}: {did_you_mean(unknown['field'], _fields_at(type_, path))}"
    said = f"{_source(full, where)}: key {full!r}: " if full else f"{_source(full, where)}: at the top: "
    if (listed := _NOT_LISTED.match(what)) and (choices := _choices_at(type_, path)):
        return f"{said}unknown {listed['value']!r}: {did_you_mean(listed['value'], choices)}"
    return f"{said}{what[0].lower()}{what[1:]}"


def _source(key: str, where: str | Origins) -> str:
    return where if isinstance(where, str) else where.nearest(key)


def _fields_at(type_: Any, path: str) -> list[str]:
    return [name for struct in _types_at(type_, path) for name in get_type_hints(struct)]


def _choices_at(type_: Any, path: str) -> list[str]:
    """What may be written at `path` where only certain texts may."""
    owner, _, name = path.rpartition(".")
    choices = [str(choice) for t in _types_at(type_, path, structs=False) for choice in _literals(t)]
    # The key that says which of several structs is meant is none of their fields.
    tagged = [s for s in _types_at(type_, owner) if s.__struct_config__.tag_field == name]
    return choices or [str(s.__struct_config__.tag) for s in tagged]


def _literals(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) is Literal else ()


def _types_at(type_: Any, path: str, *, structs: bool = True) -> list[Any]:
    """The types that a value at `path`, as msgspec writes it, may have."""
    types = list(_options(type_))
    for part in re.findall(r"\[[^\]]*\]|[^.\[\]]+", path):
        inner: list[Any] = []
        for option in types:
            if part.startswith("["):  # `[3]` of a list, `[...]` of a mapping
                inner += [arg for arg in get_args(option)[-1 if part == "[...]" else 0 :][:1] if arg is not ...]
            elif _is_struct(option):
                inner += [hint for name, hint in get_type_hints(option).items() if name == part]
        types = [option for one in inner for option in _options(one)]
    return [t for t in types if _is_struct(t)] if structs else types


def _options(type_: Any) -> Iterator[Any]:
    """The members of a union, or the type alone."""
    if get_origin(type_) is Annotated:
        yield from _options(get_args(type_)[0])
    elif get_origin(type_) in (Union, UnionType):
        for member in get_args(type_):
            yield from _options(member)
    else:
        yield type_


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)
