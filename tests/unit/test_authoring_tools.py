"""External tools: fetched once, checked, whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.tools import Tool, ensure_tool, is_there
from gym_bus.errors import ConfigError, UsageError

SCRIPT = b"#!/bin/sh\necho proved\n"


class _Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 -- the fixture empties it

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    _Handler.asked.clear()
    handler = functools.partial(_Handler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def publish(tmp_path: Path, site: str, name: str = "prover.tar.gz", **more: Any) -> Tool:
    path = tmp_path / "site" / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr("prover/bin/prove", SCRIPT)
    else:
        with tarfile.open(path, "w:gz") as archive:
            entry = tarfile.TarInfo("prover/bin/prove")
            entry.size = len(SCRIPT)
            archive.addfile(entry, io.BytesIO(SCRIPT))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    given = {"sha256": digest, "executable": "prover/bin/prove"} | more
    return Tool(name="prover", version="1.0", url=f"{site}/{name}", **given)


@pytest.mark.parametrize("name", ["prover.tar.gz", "prover.zip"])
def test_a_tool_is_installed_on_first_need_and_runs(name: str, tmp_path: Path, site: str) -> None:
    tool, prefix = publish(tmp_path, site, name), tmp_path / "tools"
    assert not is_there(tool, prefix)

    first = ensure_tool(tool, prefix, say=lambda text: None)
    second = ensure_tool(tool, prefix, say=lambda text: None)

    assert subprocess.run([first], capture_output=True, check=True).stdout == b"proved\n"
    assert first == second
    assert is_there(tool, prefix)
    assert len(_Handler.asked) == 1
    assert (prefix / ".gitignore").read_text() == "*\n"


def test_several_that_need_it_at_once_fetch_it_once(tmp_path: Path, site: str) -> None:
    tool, prefix = publish(tmp_path, site), tmp_path / "tools"

    with ThreadPoolExecutor(4) as threads:
        places = set(threads.map(lambda _: ensure_tool(tool, prefix, say=lambda text: None), range(4)))

    assert len(places) == 1
    assert len(_Handler.asked) == 1


def test_another_file_than_was_published_is_not_installed(tmp_path: Path, site: str) -> None:
    tool, prefix = publish(tmp_path, site, sha256="0" * 64), tmp_path / "tools"

    with pytest.raises(UsageError, match="sha256"):
        ensure_tool(tool, prefix, say=lambda text: None)
    assert not is_there(tool, prefix)


def test_an_archive_without_the_executable_leaves_nothing_that_counts(tmp_path: Path, site: str) -> None:
    tool, prefix = publish(tmp_path, site, executable="bin/other"), tmp_path / "tools"

    with pytest.raises(ConfigError, match="no 'bin/other'"):
        ensure_tool(tool, prefix, say=lambda text: None)
    assert not is_there(tool, prefix)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, site: str) -> None:
    tool = publish(tmp_path, site)
    (tmp_path / "site" / "prover.bin").write_bytes((tmp_path / "site" / "prover.tar.gz").read_bytes())
    renamed = Tool(name="p", version="1", url=f"{site}/prover.bin", sha256=tool.sha256, executable="x")

    with pytest.raises(ConfigError, match="not an archive"):
        ensure_tool(renamed, tmp_path / "tools", say=lambda text: None)
