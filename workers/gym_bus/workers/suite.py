"""A suite file: several benchmarks, each with what it wants otherwise, times several models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gym_bus import subjects
from gym_bus.benchmarks.spec import PartChange
from gym_bus.config import check, file_layers, find_file, interpolate, merge_layers
from gym_bus.errors import ConfigError, UsageError, did_you_mean
from gym_bus.origins import Layer, Origins
from gym_bus.settings import PositiveInt, Repeats, Seed


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of keys."""


class Options(_Section, frozen=True, kw_only=True):
    """What jobs want otherwise than their benchmark's configuration and the settings say."""

    models: tuple[str, ...] | None = None
    """Names of models, in place of the suite's."""
    num_repeats: Repeats | None = None
    limit: PositiveInt | None = None
    """Tasks."""
    split: str | None = None
    input: str | None = None
    """Rows of this file instead; beside the suite file, or a path from the working directory."""
    prompt: str | None = None
    """A prompt's file, found as `input` is."""
    seeds: Seed | None = None
    responses_create_params: dict[str, Any] = {}
    """Sampling parameters."""
    agent: PartChange = PartChange()
    verifier: PartChange = PartChange()


class Entry(Options, frozen=True, kw_only=True):
    """One line of the suite's table."""

    benchmark: str | None = None
    """A name, a folder or a configuration file; null where the entry's own name is it."""


class SuiteSpec(_Section, frozen=True, kw_only=True):
    """A suite file, its settings apart."""

    name: str | None = None
    """None for the file's name."""
    models: tuple[str, ...] = ()
    jobs_at_once: PositiveInt | None = None
    """None for all."""
    defaults: Options = Options()
    """For every benchmark that does not say otherwise."""
    benchmarks: dict[str, Entry | None]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark of a suite, defaults applied."""

    name: str
    where: str
    """File, line and key, for errors."""
    benchmark: str
    models: tuple[str, ...]
    models_where: str
    """File, line and key that name them, for errors."""
    limit: int | None
    split: str | None
    input: Path | None
    job: tuple[Layer, ...]
    """Settings of its jobs."""
    changes: tuple[Layer, ...]
    """For `load_benchmark`."""


class Suite(msgspec.Struct, frozen=True, kw_only=True):
    """A suite file that was read and checked."""

    name: str
    jobs_at_once: int | None
    parts: tuple[Part, ...]
    settings: Layer
    """The suite's own settings, for the models and the workers."""

    def chosen(self, names: Sequence[str]) -> tuple[Part, ...]:
        """The parts of these names, in the suite's order; all without names. Raises UsageError for unknown ones."""
        known = [part.name for part in self.parts]
        for name in names:
            if name not in known:
                raise UsageError(f"--only {name}: no such benchmark in the suite: {did_you_mean(name, known)}")
        return tuple(part for part in self.parts if part.name in (names or known))


class _Placed(Layer, frozen=True, kw_only=True):
    """A layer that was taken out of a larger whole, which knows where everything was written."""

    whole: Origins

    def origin(self, key: str) -> str:
        return self.whole.nearest(self.as_written(key))


def read_suite(path: Path, overrides: Sequence[Layer] = ()) -> Suite:
    """The suite in a file, and in those of its `config_paths`; `overrides` win over them.

    Raises:
        ConfigError: names file, line and key, and near misses.
    """
    values, origins = merge_layers([*file_layers([path]), *overrides], str(path))
    settings = values.pop("settings", None) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{origins.nearest('settings')}: key 'settings': expected a mapping of keys to values")
    values = interpolate(
        values,
        origins,
        remedy="in the suite file, or as suite.KEY=value",
        lacking="${{{}}} names no key of the suite; variables of env.yaml belong under `settings`".format,
    )
    spec = _checked(values, origins)
    try:
        name = subjects.token(spec.name or path.stem, "suite")
    except UsageError as e:
        raise ConfigError(f"{origins.nearest('name')}: key 'name': {e}") from None
    return Suite(
        name=name,
        jobs_at_once=spec.jobs_at_once,
        parts=tuple(_parts(spec, values, origins, path)),
        settings=_Placed(str(path), settings, written={key: f"settings.{key}" for key in settings}, whole=origins),
    )


def _checked(values: Mapping[str, Any], origins: Origins) -> SuiteSpec:
    entries = values.get("benchmarks")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        check(Entry, entry or {}, origins, at=f"benchmarks.{name}")  # msgspec does not name a mapping's key
    spec = check(SuiteSpec, values, origins)
    if not spec.benchmarks:
        raise ConfigError(f"{origins.nearest('benchmarks')}: key 'benchmarks': name at least one")
    return spec


def _parts(spec: SuiteSpec, values: Mapping[str, Any], origins: Origins, path: Path) -> Iterator[Part]:
    shared = _Extract(values.get("defaults") or {}, "defaults", origins, path)
    for name, found in spec.benchmarks.items():
        entry, key = found or Entry(), f"benchmarks.{name}"
        own = _Extract(values["benchmarks"][name] or {}, key, origins, path)
        try:
            subjects.token(name, "benchmark")
        except UsageError as e:
            raise ConfigError(f"{origins.nearest(key)}: key {key!r}: {e}; write its path as `benchmark:`") from None
        models, models_where = _models(spec, entry, key, origins)
        yield Part(
            name=name,
            where=f"{origins.nearest(key)}: key {key!r}",
            benchmark=_beside(entry.benchmark or name, path),
            models=models,
            models_where=models_where,
            limit=entry.limit or spec.defaults.limit,
            split=entry.split or spec.defaults.split,
            input=own.file("input") or shared.file("input"),
            job=(shared.job(), own.job()),
            changes=(shared.change(), own.change()),
        )


def _models(spec: SuiteSpec, entry: Entry, key: str, origins: Origins) -> tuple[tuple[str, ...], str]:
    """The models of an entry, each once, and where they are named."""
    listed = {f"{key}.models": entry.models, "defaults.models": spec.defaults.models, "models": spec.models}
    for at, models in listed.items():
        if models:
            return tuple(dict.fromkeys(models)), f"{origins.nearest(at)}: key {at!r}"
    raise ConfigError(f"{origins.nearest(key)}: key {key!r}: no models: list some under `models`")


def _beside(benchmark: str, path: Path) -> str:
    """A benchmark as `load_benchmark` finds it: a path may start at the suite file's folder."""
    there = path.parent / benchmark
    return str(there) if "/" in benchmark and there.exists() else benchmark


class _Extract:
    """What a group of options means, in the words of the settings and of a benchmark's configuration."""

    def __init__(self, values: Mapping[str, Any], key: str, origins: Origins, path: Path) -> None:
        self._values, self._key, self._origins, self._path = values, key, origins, path

    def file(self, key: str) -> Path | None:
        """The file that is named there. Raises ConfigError where there is none."""
        name = self._values.get(key)
        return find_file(name, self._path, self._origins.nearest(f"{self._key}.{key}")) if name else None

    def job(self) -> Layer:
        """Settings."""
        keys = {"sampling": "responses_create_params", "seeds": "seeds"}
        values = {new: self._values[key] for new, key in keys.items() if self._values.get(key) is not None}
        return self._layer({"job": values} if values else {}, {f"job.{new}": key for new, key in keys.items()})

    def change(self) -> Layer:
        """Keys of the benchmark's configuration."""
        keys = ("num_repeats", "agent", "verifier")
        values = {key: self._values[key] for key in keys if self._values.get(key) is not None}
        if prompt := self.file("prompt"):
            values["prompt_config"] = str(prompt.resolve())
        return self._layer(values, {**{key: key for key in keys}, "prompt_config": "prompt"})

    def _layer(self, values: dict[str, Any], written: Mapping[str, str]) -> Layer:
        return _Placed(
            self._key,
            values,
            written={new: f"{self._key}.{key}" for new, key in written.items()},
            whole=self._origins,
        )
