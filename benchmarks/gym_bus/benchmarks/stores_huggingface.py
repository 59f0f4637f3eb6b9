"""Data sets on Hugging Face."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gym_bus.benchmarks.stores import Place, import_client, required_setting
from gym_bus.errors import UsageError, did_you_mean
from gym_bus.settings import RegistryConfig

PACKAGE = "huggingface_hub"


class HuggingFaceStore:
    """Hugging Face's hub, or a mirror of it; see `Store`."""

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config

    def upload(self, file: Path, place: Place, *, create_pr: bool = False) -> str:
        """See `Store.upload`. A data set that is made now is private."""
        required_setting(self._config, "hf_token")
        repo, name = self._repo(place), place.file or file.name
        with self._api() as api:
            if not create_pr:  # whoever may only propose may not make it either
                api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
            commit = api.upload_file(
                path_or_fileobj=str(file),
                path_in_repo=name,
                repo_id=repo,
                repo_type="dataset",
                revision=place.version or None,
                create_pr=create_pr,
                commit_message=f"Upload {name}",
            )
            if self._config.hf_collection:
                api.add_collection_item(self._config.hf_collection, repo, "dataset", exists_ok=True)
        return str(commit.pr_url or commit.commit_url)

    def download(self, place: Place, target: Path) -> None:
        """See `Store.download`. What has come of a file stays beside `target` until the rest has."""
        repo = self._repo(place)
        folder = target.with_name(f".{target.name}.part")
        with self._api() as api:
            name = place.file or self._only_file(api, repo, place.version)
            found = api.hf_hub_download(
                repo, name, repo_type="dataset", revision=place.version or None, local_dir=str(folder)
            )
            Path(found).replace(target)
            shutil.rmtree(folder)

    def remove(self, place: Place) -> str:
        """See `Store.remove`."""
        required_setting(self._config, "hf_token")
        repo = self._repo(place)
        with self._api() as api:
            if place.file:
                api.delete_file(place.file, repo, repo_type="dataset", revision=place.version or None)
                return f"{repo}/{place.file}"
            if place.version:
                raise UsageError(
                    "Hugging Face keeps every version: leave --version out, or name a file with --artifact"
                )
            api.delete_repo(repo, repo_type="dataset")
            return repo

    def _repo(self, place: Place) -> str:
        if "/" in place.name:
            return place.name
        if not self._config.hf_organization:
            raise UsageError(f"{place.name!r}: write owner/{place.name}, or set registry.hf_organization in env.yaml")
        return f"{self._config.hf_organization}/{place.name}"

    @staticmethod
    def _only_file(api: Any, repo: str, revision: str) -> str:
        names = api.list_repo_files(repo, repo_type="dataset", revision=revision or None)
        rows = [name for name in names if name.endswith((".jsonl", ".jsonl.gz"))]
        if len(rows) == 1:
            return str(rows[0])
        raise UsageError(f"{repo}: name the file with --artifact or --split; {did_you_mean('', rows or names)}")

    @contextmanager
    def _api(self) -> Iterator[Any]:
        """The client library's client; what it raises becomes a UsageError."""
        hub = import_client("huggingface_hub", PACKAGE)
        errors = import_client("huggingface_hub.errors", PACKAGE)
        hub.get_session().timeout = self._config.limit_s  # the library itself would wait for ever
        # False: no token from the machine's own login, for the configuration says who we are.
        api = hub.HfApi(endpoint=self._config.hf_endpoint.rstrip("/"), token=self._config.hf_token or False)
        try:
            yield api
        except (errors.HfHubHTTPError, errors.EntryNotFoundError, errors.HFValidationError, OSError) as e:
            raise UsageError(f"{self._config.hf_endpoint}: {_said(e)}") from None


def _said(error: Exception) -> str:
    """The library's message in one line."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
