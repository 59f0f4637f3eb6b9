"""Data sets in registries.

MLflow's API is that of a real `mlflow server` where one can be started (its command with the server's dependencies on
the PATH); GitLab and Hugging Face offer no server of theirs, so small ones that keep to their documented answers stand
in, and the real client libraries talk to them.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gym_bus.benchmarks.spec import GitlabIdentifier, HuggingFaceIdentifier
from gym_bus.benchmarks.stores import Place, Store, check_rows, open_store, place_of
from gym_bus.errors import ConfigError, DataError, UsageError
from gym_bus.server import held_port
from gym_bus.settings import RegistryConfig

ROW = '{"responses_create_params": {"input": "1+1?"}}\n'
TOKEN = "token-of-the-test"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Routes to the `routes` of a stand-in; everything needs its token."""

    routes: ClassVar[list[tuple[str, str, Callable[..., Any]]]]

    def answer(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {key: values[0] for key, values in urllib.parse.parse_qs(address.query).items()}
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.say(401, {"message": "401 Unauthorized"})
            return
        path = urllib.parse.unquote(address.path)
        for method, prefix, act in self.routes:
            if method == self.command and path.startswith(prefix):
                self.say(*act(path.removeprefix(prefix), query, body))
                return
        self.say(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"no {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = answer

    def say(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


class _StandIn:
    """A server on a free port."""

    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"routes": self.routes()})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        raise NotImplementedError

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class GitlabStandIn(_StandIn):
    """GitLab's MLflow API: versions by name, made with a place for their files; no search, no lists of files."""

    API = "/api/v4/projects/7/ml/mlflow/api/2.0/mlflow"
    FILES = "/api/v4/projects/7/packages/ml_models"

    def __init__(self) -> None:
        self.models: dict[str, dict[str, str]] = {}
        self.files: dict[str, bytes] = {}
        super().__init__()

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        return [
            ("POST", f"{self.API}/registered-models/create", self.create_model),
            ("GET", f"{self.API}/registered-models/get", self.get_model),
            ("DELETE", f"{self.API}/registered-models/delete", self.delete_model),
            ("POST", f"{self.API}/model-versions/create", self.create_version),
            ("GET", f"{self.API}/model-versions/get", self.get_version),
            ("GET", f"{self.API}/runs/get", self.get_run),
            ("PUT", self.FILES, self.put_file),
            ("GET", self.FILES, self.get_file),
        ]

    def create_model(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        name = json.loads(body)["name"]
        if name in self.models:
            return 400, {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "it exists"}
        self.models[name] = {}
        return 200, {"registered_model": {"name": name}}

    def get_model(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if query["name"] not in self.models:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}
        return 200, {"registered_model": {"name": query["name"]}}

    def delete_model(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if self.models.pop(json.loads(body)["name"], None) is None:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"}
        return 200, {}

    def create_version(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        (version,) = [tag["value"] for tag in asked["tags"] if tag["key"] == "gitlab.version"]
        self.models[asked["name"]][version] = str(sum(map(len, self.models.values())) + 100)
        return 200, self.version(asked["name"], version)

    def get_version(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if query["version"] not in self.models.get(query["name"], {}):
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}
        return 200, self.version(query["name"], query["version"])

    def version(self, name: str, version: str) -> dict[str, Any]:
        return {"model_version": {"name": name, "version": version, "run_id": self.models[name][version]}}

    def get_run(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        info = {
            "run_id": query["run_id"],
            "run_uuid": query["run_id"],
            "experiment_id": "1",
            "status": "RUNNING",
            "start_time": 0,
            "artifact_uri": f"{self.url}{self.FILES}/{query['run_id']}/files/",
            "lifecycle_stage": "active",
            "user_id": "1",
        }
        return 200, {"run": {"info": info, "data": {}}}

    def put_file(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        self.files[path.replace("//", "/")] = body
        return 201, {}

    def get_file(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        found = self.files.get(path.replace("//", "/"))
        return (404, {"message": "404 Not found"}) if found is None else (200, found)


class HuggingFaceStandIn(_StandIn):
    """The hub's API for data sets, as far as the client library asks for it."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: list[bool] = []
        super().__init__()

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        return [
            ("POST", "/api/repos/create", self.create),
            ("DELETE", "/api/repos/delete", self.delete),
            ("POST", "/api/validate-yaml", lambda path, query, body: (200, {"errors": [], "warnings": []})),
            ("POST", "/api/datasets/", self.post),
            ("GET", "/api/datasets/", self.info),
            ("HEAD", "/datasets/", self.resolve),
            ("GET", "/datasets/", self.resolve),
        ]

    def create(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if repo in self.repos:
            return 409, {"error": "You already created this dataset repo", "url": f"{self.url}/datasets/{repo}"}
        self.repos[repo] = {}
        self.private.append(asked.get("private", False) or asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/datasets/{repo}", "name": repo, "id": repo}

    def delete(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        return (200, {}) if self.repos.pop(repo, None) is not None else (404, {"error": "Repository not found"})

    def post(self, path: str, query: dict[str, str], body: bytes) -> Any:
        owner, name, act, _ = path.split("/", 3)
        repo = f"{owner}/{name}"
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if act == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        for line in body.splitlines():
            change = json.loads(line)
            if change["key"] == "file":
                self.repos[repo][change["value"]["path"]] = base64.b64decode(change["value"]["content"])
            elif change["key"] == "deletedFile":
                self.repos[repo].pop(change["value"]["path"])
        done = {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.url}/datasets/{repo}/commit/{'c' * 40}"}
        return 200, done | (
            {"pullRequestUrl": f"{self.url}/datasets/{repo}/discussions/1"} if "create_pr" in query else {}
        )

    def info(self, path: str, query: dict[str, str], body: bytes) -> Any:
        repo = "/".join(path.split("/")[:2])
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        files = [{"type": "file", "rfilename": name, "path": name, "size": 1, "oid": "o"} for name in self.repos[repo]]
        if "/tree/" in path:
            return 200, files
        return 200, {"id": repo, "sha": "c" * 40, "private": True, "siblings": files}

    def resolve(self, path: str, query: dict[str, str], body: bytes) -> Any:
        owner, name, _, _, file = path.split("/", 4)
        found = self.repos.get(f"{owner}/{name}", {}).get(file)
        if found is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        return 200, found, {"ETag": f'"{hashlib.sha256(found).hexdigest()}"', "X-Repo-Commit": "c" * 40}


@pytest.fixture(scope="module")
def gitlab() -> Iterator[GitlabStandIn]:
    server = GitlabStandIn()
    yield server
    server.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[HuggingFaceStandIn]:
    server = HuggingFaceStandIn()
    yield server
    server.close()


def mlflow_command() -> str | None:
    """An `mlflow` that can start a server: the client library's own lacks what that needs."""
    for folder in os.environ["PATH"].split(os.pathsep):
        command, python = Path(folder) / "mlflow", Path(folder) / "python"
        if command.exists() and python.exists():
            check = [str(python), "-c", "import flask_cors, sqlalchemy"]
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                return str(command)
    return None


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = mlflow_command()
    if command is None:
        pytest.skip("no mlflow command with a server's dependencies on the PATH (pip install mlflow)")
    held, port = held_port()
    held.close()
    folder, url = tmp_path_factory.mktemp("mlflow"), f"http://127.0.0.1:{port}"
    address = urllib.parse.urlsplit(url)
    options = f"--host 127.0.0.1 --port {address.port} --workers 1 --artifacts-destination {folder}"
    process = subprocess.Popen(
        [command, "server", "--backend-store-uri", f"sqlite:///{folder}/db", *options.split()],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"{url}/health", 60)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        shutil.rmtree(folder)


def wait_for(url: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {url}"
            time.sleep(0.1)


def gitlab_store(server: GitlabStandIn, token: str = TOKEN) -> Store:
    uri = f"{server.url}/api/v4/projects/7/ml/mlflow"
    return open_store("gitlab", RegistryConfig(mlflow_tracking_uri=uri, mlflow_tracking_token=token, limit_s=60))


def hub_store(server: HuggingFaceStandIn, token: str = TOKEN, **more: Any) -> Store:
    return open_store("hf", RegistryConfig(hf_endpoint=server.url, hf_token=token, limit_s=60, **more))


def rows_file(folder: Path, text: str = ROW) -> Path:
    (folder / "rows.jsonl").write_text(text)
    return folder / "rows.jsonl"


def roundtrip(store: Store, place: Place, folder: Path) -> str:
    store.upload(rows_file(folder), place)
    store.download(place, folder / "back.jsonl")
    return (folder / "back.jsonl").read_text()


def refused(action: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UsageError) as raised:
        action(*arguments)
    assert TOKEN not in str(raised.value)
    return str(raised.value)


# -- an MLflow server


def test_a_file_goes_to_an_mlflow_server_and_comes_back(mlflow_server: str, tmp_path: Path) -> None:
    store = open_store("mlflow", RegistryConfig(mlflow_tracking_uri=mlflow_server, limit_s=30))
    first, second = Place(name="rows", version="1.0.0"), Place(name="rows", version="1.1.0", file="named.jsonl")

    assert roundtrip(store, first, tmp_path) == ROW
    assert roundtrip(store, second, tmp_path) == ROW
    assert "'1.0.1' of 'rows': did you mean '1.0.0'" in refused(
        store.download, Place(name="rows", version="1.0.1"), tmp_path / "x"
    )
    assert "404" in refused(store.download, Place(name="rows", version="1.0.0", file="gone"), tmp_path / "x")
    assert store.remove(first) == "rows 1.0.0"
    assert "no version '1.0.0'" in refused(store.download, first, tmp_path / "x")
    assert store.remove(Place(name="rows")) == "rows"
    assert "no version '1.1.0'" in refused(store.download, second, tmp_path / "x")
    assert "not found" in refused(store.remove, Place(name="rows"))
    assert not (tmp_path / "x").exists()


# -- GitLab


def test_a_file_goes_to_gitlab_and_comes_back(gitlab: GitlabStandIn, tmp_path: Path) -> None:
    store = gitlab_store(gitlab)
    place = Place(name="rows", version="1.0.0", file="rows.jsonl")

    assert roundtrip(store, place, tmp_path) == ROW
    (tmp_path / "rows.jsonl").write_text(ROW * 2)
    assert store.upload(tmp_path / "rows.jsonl", Place(name="rows", version="1.0.1")).endswith("rows 1.0.1")

    assert set(gitlab.models["rows"]) == {"1.0.0", "1.0.1"}
    assert len(gitlab.files) == 2
    assert store.remove(Place(name="rows")) == "rows"
    assert "rows" not in gitlab.models


def test_gitlab_is_told_the_file_and_removes_whole_data_sets(gitlab: GitlabStandIn, tmp_path: Path) -> None:
    store = gitlab_store(gitlab)
    store.upload(rows_file(tmp_path), Place(name="other", version="1.0.0"))

    assert "name the file with --artifact" in refused(
        store.download, Place(name="other", version="1.0.0"), tmp_path / "x"
    )
    assert "no version '2.0.0' of 'other'" in refused(
        store.download, Place(name="other", version="2.0.0", file="f"), tmp_path / "x"
    )
    assert "leave --version out" in refused(store.remove, Place(name="other", version="1.0.0"))


@pytest.mark.parametrize("version", ["", "1", "latest"])
def test_a_model_registry_needs_a_version(gitlab: GitlabStandIn, tmp_path: Path, version: str) -> None:
    said = refused(gitlab_store(gitlab).upload, rows_file(tmp_path), Place(name="rows", version=version))

    assert "one of the form 1.2.3" in said


def test_a_wrong_token_is_told_without_the_token(gitlab: GitlabStandIn, tmp_path: Path) -> None:
    store = gitlab_store(gitlab, token="another-token")

    said = refused(store.upload, rows_file(tmp_path), Place(name="rows", version="1.0.0"))

    assert "401" in said
    assert "another-token" not in said


def test_the_process_keeps_its_environment(gitlab: GitlabStandIn, tmp_path: Path) -> None:
    before = dict(os.environ)

    refused(gitlab_store(gitlab).download, Place(name="gone", version="1.0.0", file="f"), tmp_path / "x")

    assert dict(os.environ) == before


def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    store = open_store("mlflow", RegistryConfig(mlflow_tracking_uri="http://me:pw-123@127.0.0.1:9", limit_s=2))

    said = refused(store.remove, Place(name="rows"))

    assert said.startswith("http://127.0.0.1:9: ")
    assert "pw-123" not in said


# -- Hugging Face


def test_a_file_goes_to_hugging_face_and_comes_back(hub: HuggingFaceStandIn, tmp_path: Path) -> None:
    store = hub_store(hub, hf_organization="org")
    place = Place(name="rows", file="train.jsonl")

    assert roundtrip(store, place, tmp_path) == ROW
    (tmp_path / "rows.jsonl").write_text(ROW * 2)
    store.upload(tmp_path / "rows.jsonl", place)
    store.download(Place(name="org/rows"), tmp_path / "back.jsonl")

    assert (tmp_path / "back.jsonl").read_text() == ROW * 2
    assert hub.private == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.jsonl", "rows.jsonl"]


def test_a_pull_request_is_answered_with_its_page(hub: HuggingFaceStandIn, tmp_path: Path) -> None:
    hub.repos["org/theirs"] = {}

    address = hub_store(hub).upload(rows_file(tmp_path), Place(name="org/theirs"), create_pr=True)

    assert address == f"{hub.url}/datasets/org/theirs/discussions/1"


def test_of_several_files_one_must_be_named(hub: HuggingFaceStandIn, tmp_path: Path) -> None:
    hub.repos["org/two"] = {"train.jsonl": b"{}", "test.jsonl": b"{}", "README.md": b""}

    said = refused(hub_store(hub).download, Place(name="org/two"), tmp_path / "x")

    assert "name the file with --artifact or --split; known: test.jsonl, train.jsonl" in said


def test_what_is_not_on_the_hub_is_said(hub: HuggingFaceStandIn, tmp_path: Path) -> None:
    hub.repos["org/one"] = {"train.jsonl": b"{}"}
    store = hub_store(hub)

    assert "404" in refused(store.download, Place(name="org/one", file="gone.jsonl"), tmp_path / "x")
    assert "404" in refused(store.download, Place(name="org/gone"), tmp_path / "x")
    assert "401" in refused(hub_store(hub, token="wrong").download, Place(name="org/one"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_file_or_a_whole_data_set_is_removed_from_the_hub(hub: HuggingFaceStandIn) -> None:
    hub.repos["org/old"] = {"train.jsonl": b"{}", "test.jsonl": b"{}"}
    store = hub_store(hub)

    assert store.remove(Place(name="org/old", file="test.jsonl")) == "org/old/test.jsonl"
    assert list(hub.repos["org/old"]) == ["train.jsonl"]
    assert "leave --version out" in refused(store.remove, Place(name="org/old", version="main"))
    assert store.remove(Place(name="org/old")) == "org/old"
    assert "org/old" not in hub.repos


# -- what is said before a registry is asked


@pytest.mark.parametrize(
    ("storage", "config", "error", "what"),
    [
        ("gitlabb", {}, UsageError, "unknown storage 'gitlabb': did you mean 'gitlab'"),
        ("gitlab", {}, ConfigError, "key 'registry.mlflow_tracking_uri' is not set: add the line"),
        (
            "gitlab",
            {"mlflow_tracking_uri": "https://h/api/v4/projects/1/ml/mlflow"},
            ConfigError,
            "mlflow_tracking_token",
        ),
    ],
)
def test_a_registry_that_is_not_set_up_says_what_is_missing(
    storage: str, config: dict[str, str], error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what):
        open_store(storage, RegistryConfig(**config))


def test_uploading_to_the_hub_needs_a_token_and_an_owner(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'registry.hf_token' is not set"):
        open_store("hf", RegistryConfig()).upload(rows_file(tmp_path), Place(name="a/b"))
    with pytest.raises(UsageError, match=r"write owner/b, or set registry.hf_organization"):
        open_store("hf", RegistryConfig(hf_token="t")).upload(rows_file(tmp_path), Place(name="b"))


def test_a_client_library_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)

    with pytest.raises(UsageError, match=r"huggingface_hub is not installed .*pip install 'gym-bus\[registry\]'"):
        open_store("hf", RegistryConfig(hf_token="t")).remove(Place(name="a/b"))


@pytest.mark.parametrize(
    ("text", "train", "what"),
    [
        ('{"question": "?"}\n', True, r"rows.jsonl:1: no responses_create_params.input"),
        (ROW + "[]\n", False, r"rows.jsonl:2: expected a JSON object"),
        ("", False, r"rows.jsonl: no rows in it"),
    ],
)
def test_what_is_uploaded_are_rows(tmp_path: Path, text: str, train: bool, what: str) -> None:
    with pytest.raises(DataError, match=what):
        check_rows(rows_file(tmp_path, text), train=train)


def test_rows_that_are_not_for_training_may_lack_create_params(tmp_path: Path) -> None:
    assert check_rows(rows_file(tmp_path, '{"question": "?"}\n'), train=False) == 1


def test_the_place_that_a_benchmark_names() -> None:
    there = GitlabIdentifier(dataset_name="d", version="1.0.0", artifact_fpath="f.jsonl")

    assert place_of(there, "train") == ("gitlab", Place(name="d", version="1.0.0", file="f.jsonl"))
    assert place_of(HuggingFaceIdentifier(repo_id="a/b"), "train") == (
        "huggingface",
        Place(name="a/b", file="train.jsonl"),
    )
