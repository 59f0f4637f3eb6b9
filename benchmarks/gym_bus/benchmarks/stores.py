"""Registries that data sets are kept in: GitLab's model registry (or any MLflow server) and Hugging Face.

Both are spoken to through their own client libraries, which are imported when a registry is used. Tokens come from the
configuration and appear in no message.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Protocol

import msgspec

from gym_bus.benchmarks.dataset import examine
from gym_bus.benchmarks.spec import GitlabIdentifier, HuggingFaceIdentifier
from gym_bus.errors import ConfigError, DataError, UsageError, did_you_mean
from gym_bus.settings import RegistryConfig

STORAGES = {"gitlab": "gitlab", "mlflow": "gitlab", "hf": "huggingface", "huggingface": "huggingface"}
"""The registry by what a user may call it."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A data set in a registry, or one file of it."""

    name: str
    """Hugging Face: `owner/name`, or a name within the organization of the configuration."""
    version: str = ""
    """GitLab: `1.2.3`, required; Hugging Face: a branch, a tag or a commit, by default the main branch."""
    file: str = ""
    """Name of the file; empty for the only one."""


class Uploaded(msgspec.Struct, frozen=True, kw_only=True):
    """What was put where."""

    name: str
    version: str
    file: str
    rows: int
    sha256: str
    address: str
    """Where a person finds it; of a pull request, its page."""


class Store(Protocol):
    """One registry."""

    def upload(self, file: Path, place: Place, *, create_pr: bool = False) -> str:
        """Put a file there, making the data set where there is none; returns its address.

        Raises:
            UsageError: the registry refuses it or cannot be reached; says what to do.
        """
        ...

    def download(self, place: Place, target: Path) -> None:
        """Fetch a file into `target`, which is there only when all of it has come.

        Raises:
            UsageError: there is none, or the registry cannot be reached.
        """
        ...

    def remove(self, place: Place) -> str:
        """Take a data set away, or the version or file that the place names; returns what was removed, in words.

        Raises:
            UsageError: there is none, or the registry refuses.
        """
        ...


def open_store(storage: str, config: RegistryConfig) -> Store:
    """The registry that the user means.

    Raises:
        UsageError: there is no such kind; its client library is not installed.
        ConfigError: the configuration lacks its address or its token.
    """
    if storage not in STORAGES:
        raise UsageError(f"unknown storage {storage!r}: {did_you_mean(storage, STORAGES)}")
    if STORAGES[storage] == "gitlab":
        from gym_bus.benchmarks.stores_mlflow import MlflowStore

        return MlflowStore(config)
    from gym_bus.benchmarks.stores_huggingface import HuggingFaceStore

    return HuggingFaceStore(config)


def import_client(name: str, package: str) -> ModuleType:
    """A client library. Raises UsageError, naming the extra that installs it, where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UsageError(f"{package} is not installed ({e}): pip install 'gym-bus[registry]'") from None


def required_setting(config: RegistryConfig, key: str) -> str:
    """A setting that a registry cannot do without. Raises ConfigError saying where to put it."""
    value: str = getattr(config, key)
    if not value:
        raise ConfigError(
            f"key 'registry.{key}' is not set: add the line `{key}: ...` to env.yaml, and keep it out of git"
        )
    return value


def place_of(source: GitlabIdentifier | HuggingFaceIdentifier, split: str) -> tuple[str, Place]:
    """The registry and the place that a benchmark's configuration names; `split` where it names no file."""
    if isinstance(source, GitlabIdentifier):
        return "gitlab", Place(name=source.dataset_name, version=source.version, file=source.artifact_fpath)
    return "huggingface", Place(name=source.repo_id, file=source.artifact_fpath or f"{split}.jsonl")


def check_rows(file: Path, *, train: bool) -> int:
    """The number of rows of a file that is to be uploaded. Training data needs `responses_create_params` in each.

    Raises:
        DataError: names the first line that is no row, or lacks them.
    """
    rows = 0
    for one in examine(file):
        rows += 1
        if not one.row or (train and one.problem):
            raise DataError(one.problem or f"{file}:{one.line}: the row is empty")
    if not rows:
        raise DataError(f"{file}: no rows in it")
    return rows
