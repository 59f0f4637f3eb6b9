"""Data sets in a GitLab project's model registry, which speaks MLflow's API, or on an MLflow server.

A data set is a registered model, and a version of it holds the files. The two servers differ in what a version is:
GitLab knows it by its name, `1.2.3`, and makes the place for its files; an MLflow server numbers its versions, so the
name is a tag there, and the files belong to a run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gym_bus.benchmarks.stores import Place, import_client, required_setting
from gym_bus.errors import UsageError, did_you_mean
from gym_bus.settings import RegistryConfig

PACKAGE = "mlflow-skinny"
VERSION_TAG = "gitlab.version"
MAX_SAID = 300
"""Characters of a server's message that are shown."""

_VERSION = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")


class MlflowStore:
    """A registry that speaks MLflow's API; see `Store`."""

    def __init__(self, config: RegistryConfig) -> None:
        self._uri = required_setting(config, "mlflow_tracking_uri").rstrip("/")
        self._gitlab = "/api/v4/projects/" in self._uri
        self._token = config.mlflow_tracking_token
        if self._gitlab:
            self._token = required_setting(config, "mlflow_tracking_token")
        self._limit_s = config.limit_s

    def upload(self, file: Path, place: Place, *, create_pr: bool = False) -> str:
        """See `Store.upload`."""
        if create_pr:
            raise UsageError("--create-pr is for Hugging Face: a model registry has no pull requests")
        _check_version(place)
        with self._client() as client:
            _unless("RESOURCE_ALREADY_EXISTS", client.create_registered_model, place.name)
            version = self._find(client, place)
            run_id = version.run_id if version is not None else self._create(client, place)
            with TemporaryDirectory() as folder:  # the library takes the name from the path
                named = Path(folder) / (place.file or file.name)
                named.symlink_to(file.resolve())
                client.log_artifact(run_id, str(named), artifact_path="")
        return f"{self._uri} {place.name} {place.version}"

    def download(self, place: Place, target: Path) -> None:
        """See `Store.download`."""
        _check_version(place)
        part = target.with_name(f".{target.name}.part")
        with self._client() as client:
            run_id = self._version(client, place).run_id
            name = place.file or self._only_file(client, run_id, place)
            files = import_client("mlflow.artifacts", PACKAGE).get_artifact_repository(
                f"runs:/{run_id}", tracking_uri=self._uri
            )
            try:
                # The public method lists the folder first, which GitLab's API does not offer.
                files._download_file(name, str(part))
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)

    def remove(self, place: Place) -> str:
        """See `Store.remove`; GitLab's API removes whole data sets only."""
        with self._client() as client:
            if not place.version:
                client.delete_registered_model(place.name)
                return place.name
            if self._gitlab:
                raise UsageError("GitLab's API removes whole data sets: leave --version out, or use the project's page")
            version = self._version(client, place)
            client.delete_model_version(place.name, version.version)
            client.delete_run(version.run_id)
            return f"{place.name} {place.version}"

    def _version(self, client: Any, place: Place) -> Any:
        found = self._find(client, place)
        if found is not None:
            return found
        known = [] if self._gitlab else [version.tags.get(VERSION_TAG, "") for version in _versions(client, place)]
        hint = f": {did_you_mean(place.version, filter(None, known))}" if known else ""
        raise UsageError(f"{_shown(self._uri)}: no version {place.version!r} of {place.name!r}{hint}")

    def _find(self, client: Any, place: Place) -> Any:
        """The version with its `run_id`; None where there is none."""
        if not self._gitlab:
            return next((v for v in _versions(client, place) if v.tags.get(VERSION_TAG) == place.version), None)
        return _unless("RESOURCE_DOES_NOT_EXIST", client.get_model_version, place.name, place.version)

    def _create(self, client: Any, place: Place) -> str:
        """A new version; returns the id of the run that its files belong to."""
        tags = {VERSION_TAG: place.version}
        if self._gitlab:
            made = client.create_model_version(place.name, place.version, tags=tags, await_creation_for=0)
            return str(made.run_id)
        name = f"[data]{place.name}"
        experiment = client.get_experiment_by_name(name)
        run = client.create_run(experiment.experiment_id if experiment else client.create_experiment(name))
        client.create_model_version(
            place.name, run.info.artifact_uri, run_id=run.info.run_id, tags=tags, await_creation_for=0
        )
        return str(run.info.run_id)

    def _only_file(self, client: Any, run_id: str, place: Place) -> str:
        names = [] if self._gitlab else [info.path for info in client.list_artifacts(run_id)]
        if len(names) == 1:
            return str(names[0])
        known = f"; there are {', '.join(sorted(names))}" if names else ""
        raise UsageError(f"{place.name} {place.version}: name the file with --artifact{known}")

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """The client library's client; what it raises becomes a UsageError."""
        # The library takes these from the environment and nowhere else.
        settings = {
            "MLFLOW_TRACKING_TOKEN": self._token,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(self._limit_s))),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }
        with _environment({key: value for key, value in settings.items() if value}):
            mlflow = import_client("mlflow", PACKAGE)
            logging.getLogger("mlflow").setLevel(logging.WARNING)
            try:
                yield mlflow.MlflowClient(tracking_uri=self._uri)
            except (mlflow.exceptions.MlflowException, OSError) as e:
                raise UsageError(f"{_shown(self._uri)}: {_shown(str(e).splitlines()[0])[:MAX_SAID]}") from None


def _versions(client: Any, place: Place) -> list[Any]:
    quoted = place.name.replace("'", "\\'")
    return list(client.search_model_versions(f"name='{quoted}'"))


def _check_version(place: Place) -> None:
    if not _VERSION.fullmatch(place.version):
        raise UsageError(f"--version {place.version or 'is missing'}: a model registry needs one of the form 1.2.3")


def _unless(code: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; None where the server answers with this error code."""
    try:
        return call(*arguments)
    except import_client("mlflow.exceptions", PACKAGE).MlflowException as e:
        if e.error_code != code:
            raise
        return None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _shown(text: str) -> str:
    """Without the password of an address."""
    return re.sub(r"://[^/@\s]*@", "://", text)
