from __future__ import annotations

import fcntl
import gzip
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks import prepare as prepare_module
from gym_bus.benchmarks.gsm8k.prepare import convert as gsm8k_convert
from gym_bus.benchmarks.prepare import find_convert, optional_in, prepare
from gym_bus.benchmarks.spec import Benchmark, load_benchmark
from gym_bus.errors import ConfigError, DataError, UsageError

PUBLISHED = b"".join(json.dumps({"q": f"{i}?", "a": i}).encode() + b"\n" for i in range(6))

CONFIG = """\
name: mine
domain: math
verifier: {name: math}
prompt: {user: "{question}"}
datasets:
  - {name: test, type: benchmark, jsonl_fpath: test.jsonl, prepare_script: prepare.py}
  - {name: other, type: validation, jsonl_fpath: other.jsonl, prepare_script: prepare.py, license: MIT}
  - {name: example, type: example, jsonl_fpath: data/example.jsonl}
"""

SCRIPT = """\
from gym_bus.benchmarks.prepare import Source

SOURCES = {{"test": Source(file={file!r}, url={url!r}, sha256=({sha256!r},), licence="MIT, me")}}


def convert(row):
    return None if row["a"] % 2 else {{"question": row["q"], "expected_answer": str(row["a"])}}
"""


def a_benchmark(
    folder: Path, url: str = "http://127.0.0.1:9/data.jsonl", file: str = "data.jsonl", content: bytes = PUBLISHED
) -> Benchmark:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    script = SCRIPT.format(url=url, file=file, sha256=hashlib.sha256(content).hexdigest())
    (folder / "prepare.py").write_text(script)
    return load_benchmark(str(folder))


class _Site(http.server.ThreadingHTTPServer):
    """Answers every path with `body`; counts the requests, and notes what part of it they ask for."""

    body: bytes = PUBLISHED
    announced: int | None = None
    requests: int = 0
    ranges: list[str]
    takes_ranges: bool = True


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Site

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.path == "/gone":
            self.send_error(404)
            return
        wanted = self.headers.get("Range", "")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.takes_ranges else 0
        if start >= len(self.server.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.server.body) - 1}/{len(self.server.body)}")
        self.send_header("Content-Length", str((self.server.announced or len(self.server.body)) - start))
        self.end_headers()
        self.wfile.write(self.server.body[start:])

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def site() -> Iterator[_Site]:
    server = _Site(("127.0.0.1", 0), _Handler)
    server.ranges = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(site: _Site, path: str = "/data.jsonl") -> str:
    return f"http://127.0.0.1:{site.server_address[1]}{path}"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(text: str) -> None:
    del text


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


@pytest.mark.parametrize("place", ["data.jsonl", "mine/data.jsonl", "data.jsonl.gz", "mine/data.jsonl.gz"])
def test_rows_are_prepared_from_a_folder_that_has_the_published_file(tmp_path: Path, place: str) -> None:
    benchmark = a_benchmark(tmp_path / "bench")
    file = tmp_path / "source" / place
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(PUBLISHED) if place.endswith(".gz") else PUBLISHED)
    said: list[str] = []

    prepared = prepare(benchmark, tmp_path / "data", source_dir=tmp_path / "source", say=said.append)

    assert (prepared.path, prepared.rows) == (tmp_path / "data" / "mine" / "test.jsonl", 3)
    assert (prepared.licence, prepared.source) == ("MIT, me", str(file))
    assert rows_of(prepared.path)[2] == {"question": "4?", "expected_answer": "4"}
    assert any("MIT, me" in line for line in said)
    assert leftovers(tmp_path) == []


def test_a_file_that_was_unpacked_by_hand_counts_as_the_published_one(tmp_path: Path) -> None:
    benchmark = a_benchmark(tmp_path / "bench", file="data.jsonl.gz")
    (tmp_path / "data.jsonl").write_bytes(PUBLISHED)

    assert prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet).rows == 3


def test_the_right_file_is_taken_where_another_of_that_name_lies_nearer(tmp_path: Path) -> None:
    benchmark = a_benchmark(tmp_path / "bench")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.jsonl").write_bytes(b"{}\n")
    (tmp_path / "data.jsonl").write_bytes(PUBLISHED)

    assert prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet).source == str(tmp_path / "data.jsonl")


def test_a_folder_without_the_file_is_answered_with_its_address(tmp_path: Path) -> None:
    benchmark = a_benchmark(tmp_path / "bench")

    with pytest.raises(UsageError, match=r"no data.jsonl in .*published at http://127.0.0.1:9/data.jsonl.*--source"):
        prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet)


@pytest.mark.parametrize(("name", "content"), [("data.jsonl", PUBLISHED + b"{}\n"), ("data.jsonl.gz", b"no gzip")])
def test_another_file_than_the_published_one_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, content: bytes
) -> None:
    benchmark = a_benchmark(tmp_path / "bench")
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UsageError, match=rf"{name} is not the published data.jsonl: its sha256 is .*--input FILE"):
        prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet)

    assert not (tmp_path / "data").exists()


def test_the_file_is_fetched_once_and_checked(tmp_path: Path, site: _Site) -> None:
    benchmark = a_benchmark(tmp_path / "bench", url_of(site))

    first = prepare(benchmark, tmp_path / "data", say=quiet)
    second = prepare(benchmark, tmp_path / "data", say=quiet)

    assert (first.rows, first.source, second.rows, site.requests) == (3, url_of(site), 3, 1)
    assert leftovers(tmp_path) == []


def test_a_packed_file_is_fetched_and_unpacked(tmp_path: Path, site: _Site) -> None:
    site.body = gzip.compress(PUBLISHED)
    benchmark = a_benchmark(tmp_path / "bench", url_of(site), file="data.jsonl.gz")

    assert prepare(benchmark, tmp_path / "data", say=quiet).rows == 3


def test_a_half_fetched_file_is_fetched_again(tmp_path: Path, site: _Site) -> None:
    benchmark = a_benchmark(tmp_path / "bench", url_of(site))
    held = tmp_path / "data" / "mine" / "source" / "data.jsonl"
    held.parent.mkdir(parents=True)
    held.write_bytes(PUBLISHED[:20])

    assert prepare(benchmark, tmp_path / "data", say=quiet).rows == 3
    assert held.read_bytes() == PUBLISHED


def test_a_fetched_file_with_another_content_is_refused_and_not_kept(tmp_path: Path, site: _Site) -> None:
    site.body = b"<html>"
    benchmark = a_benchmark(tmp_path / "bench", url_of(site))

    with pytest.raises(UsageError, match=r"http://127.0.0.1:\d+/data.jsonl is not the published data.jsonl"):
        prepare(benchmark, tmp_path / "data", say=quiet)

    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


def test_a_download_that_breaks_off_says_what_to_do(tmp_path: Path, site: _Site) -> None:
    site.announced = len(PUBLISHED) + 100
    benchmark = a_benchmark(tmp_path / "bench", url_of(site))

    with pytest.raises(
        UsageError, match=r"cannot fetch http://.*: the connection ended after \d+ of \d+ bytes.*--source"
    ):
        prepare(benchmark, tmp_path / "data", say=quiet)


def without_checksum(folder: Path, url: str = "http://127.0.0.1:9/data.jsonl", file: str = "data.jsonl") -> Benchmark:
    """A benchmark of whose file no checksum is known, and editions of it carry their number."""
    benchmark = a_benchmark(folder, url, file)
    text = re.sub(r"sha256=\S+,\)", 'editions="data-v*.jsonl"', (folder / "prepare.py").read_text())
    (folder / "prepare.py").write_text(text)
    (folder / "config.yaml").write_text(CONFIG.replace("path: test.jsonl,", "path: test.jsonl, optional: true,"))
    return load_benchmark(str(benchmark.folder))


@pytest.mark.parametrize("name", ["data.jsonl", "data-v0.1.10.jsonl", "mine/data-v1.jsonl.gz"])
def test_without_a_checksum_any_edition_is_taken_and_its_digest_is_told(tmp_path: Path, name: str) -> None:
    benchmark, file = without_checksum(tmp_path / "bench"), tmp_path / "source" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(PUBLISHED) if name.endswith(".gz") else PUBLISHED)
    said: list[str] = []

    prepared = prepare(benchmark, tmp_path / "data", source_dir=tmp_path / "source", say=said.append)

    assert (prepared.rows, prepared.source) == (3, str(file))
    assert f"{file}: no checksum of it is known; its sha256 is {hashlib.sha256(PUBLISHED).hexdigest()}" in said
    assert optional_in(benchmark, tmp_path / "source") == ["test"]
    assert optional_in(benchmark, tmp_path / "bench") == []
    assert optional_in(a_benchmark(tmp_path / "other"), tmp_path / "source") == []


def test_without_a_checksum_two_editions_are_one_too_many(tmp_path: Path) -> None:
    benchmark = without_checksum(tmp_path / "bench")
    (tmp_path / "data-v1.jsonl").write_bytes(PUBLISHED)
    (tmp_path / "data-v1.jsonl.gz").write_bytes(gzip.compress(PUBLISHED))
    assert prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet).rows == 3
    (tmp_path / "data-v2.jsonl").write_bytes(PUBLISHED * 2)

    with pytest.raises(UsageError, match=r"data-v1.jsonl, .*data-v2.jsonl.*: these differ.*leave one there"):
        prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet)


def test_without_a_checksum_a_damaged_file_is_refused_all_the_same(tmp_path: Path, site: _Site) -> None:
    site.body = b"<html>"
    benchmark = without_checksum(tmp_path / "bench", url_of(site, "/data.jsonl.gz"), "data.jsonl.gz")

    with pytest.raises(UsageError, match=r"data.jsonl.gz is damaged: it is no gzip file"):
        prepare(benchmark, tmp_path / "data", say=quiet)


def test_without_a_checksum_a_download_starts_again_and_is_fetched_once(tmp_path: Path, site: _Site) -> None:
    begun(tmp_path, b"older" + PUBLISHED[5:50])
    benchmark = without_checksum(tmp_path / "bench", url_of(site))

    counts = [prepare(benchmark, tmp_path / "data", say=quiet).rows for _ in range(2)]

    assert (counts, site.ranges) == ([3, 3], [""])


def test_rows_are_completed_before_they_are_written(tmp_path: Path) -> None:
    benchmark = a_benchmark(tmp_path / "bench")
    (tmp_path / "data.jsonl").write_bytes(PUBLISHED)

    prepared = prepare(
        benchmark,
        tmp_path / "data",
        source_dir=tmp_path,
        say=quiet,
        complete=lambda rows: ({**row, "more": 1} for row in rows),
    )

    assert rows_of(prepared.path)[1] == {"question": "2?", "expected_answer": "2", "more": 1}


def begun(tmp_path: Path, content: bytes) -> Path:
    """What an earlier run has kept of the published file."""
    part = tmp_path / "data" / "mine" / "source" / ".data.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path, site: _Site) -> None:
    benchmark = a_benchmark(tmp_path / "bench", url_of(site))
    site.body, site.announced = PUBLISHED[:50], len(PUBLISHED)
    with pytest.raises(UsageError, match=r"The 50 bytes that came are kept: the same command goes on from there"):
        prepare(benchmark, tmp_path / "data", say=quiet)
    site.body, site.announced = PUBLISHED, None
    said: list[str] = []
    seen: list[tuple[int, int | None]] = []

    prepared = prepare(
        benchmark, tmp_path / "data", say=said.append, progress=lambda done, total: seen.append((done, total))
    )

    assert (prepared.rows, site.ranges) == (3, ["", "bytes=50-"])
    assert "going on after 50 bytes" in said[1]
    assert seen[-1] == (len(PUBLISHED), len(PUBLISHED))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("kept", "takes_ranges", "ranges"),
    [
        (PUBLISHED[:50], False, ["bytes=50-"]),  # the server sends all of it
        (PUBLISHED, True, [f"bytes={len(PUBLISHED)}-"]),  # nothing was left to fetch
        (b"older" + PUBLISHED[5:50], True, ["bytes=50-", ""]),  # what was kept is of another edition
    ],
)
def test_whatever_was_kept_the_published_file_comes_out(
    tmp_path: Path, site: _Site, kept: bytes, takes_ranges: bool, ranges: list[str]
) -> None:
    begun(tmp_path, kept)
    site.takes_ranges = takes_ranges

    assert prepare(a_benchmark(tmp_path / "bench", url_of(site)), tmp_path / "data", say=quiet).rows == 3

    assert site.ranges == ranges
    assert leftovers(tmp_path) == []


def test_two_processes_do_not_fetch_the_same_file_at_once(tmp_path: Path, site: _Site) -> None:
    with begun(tmp_path, b"").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(UsageError, match="another process is fetching it: wait for that one"):
            prepare(a_benchmark(tmp_path / "bench", url_of(site)), tmp_path / "data", say=quiet)


@pytest.mark.parametrize(
    ("limit", "value", "what"),
    [("MAX_DOWNLOAD_BYTES", 10, "the file is larger"), ("DOWNLOAD_LIMIT_S", -1.0, "not complete after")],
)
def test_a_download_is_bounded(
    tmp_path: Path, site: _Site, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, what: str
) -> None:
    monkeypatch.setattr(prepare_module, limit, value)

    with pytest.raises(UsageError, match=what):
        prepare(a_benchmark(tmp_path / "bench", url_of(site)), tmp_path / "data", say=quiet)


def test_a_page_that_is_gone_says_what_to_do(tmp_path: Path, site: _Site) -> None:
    benchmark = a_benchmark(tmp_path / "bench", url_of(site, "/gone"))

    with pytest.raises(UsageError, match=r"cannot fetch http://.*/gone: .*Not Found.*--source"):
        prepare(benchmark, tmp_path / "data", say=quiet)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/data.jsonl", "file:///etc/hostname"])
def test_an_address_that_cannot_be_reached_says_what_to_do(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match=rf"cannot fetch {url}: .*Get data.jsonl from there some other way"):
        prepare(a_benchmark(tmp_path / "bench", url), tmp_path / "data", say=quiet)


def test_a_broken_row_is_named_and_the_earlier_file_stays(tmp_path: Path) -> None:
    content = PUBLISHED + b'{"q": "no answer"}\n'
    benchmark = a_benchmark(tmp_path / "bench", content=content)
    (tmp_path / "data.jsonl").write_bytes(content)
    target = tmp_path / "data" / "mine" / "test.jsonl"
    target.parent.mkdir(parents=True)
    target.write_text("earlier\n")

    with pytest.raises(DataError, match=r"data.jsonl:7: not a row as published: the key 'a'"):
        prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet)

    assert target.read_text() == "earlier\n"
    assert leftovers(tmp_path) == []


def test_a_file_of_which_no_row_belongs_to_the_benchmark_is_refused(tmp_path: Path) -> None:
    content = b'{"q": "1?", "a": 1}\n'
    benchmark = a_benchmark(tmp_path / "bench", content=content)
    (tmp_path / "data.jsonl").write_bytes(content)

    with pytest.raises(UsageError, match="no row of it is part of the benchmark"):
        prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet)


def test_example_rows_need_no_preparation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dataset 'example' needs no preparation"):
        prepare(a_benchmark(tmp_path / "bench"), tmp_path / "data", which="example", say=quiet)


def test_a_dataset_without_a_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepare.py: SOURCES has no entry for dataset 'other'"):
        prepare(a_benchmark(tmp_path / "bench"), tmp_path / "data", which="other", say=quiet)


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (None, "no file 'prepare.py'"),
        ("SOURCES = {}", r"it must define convert\(row\)"),
        ("def convert(row): ...", "it must define SOURCES"),
    ],
)
def test_a_prepare_script_that_lacks_something_is_named(tmp_path: Path, script: str | None, what: str) -> None:
    benchmark = a_benchmark(tmp_path / "bench")
    (tmp_path / "bench" / "prepare.py").unlink()
    if script is not None:
        (tmp_path / "bench" / "prepare.py").write_text(script)

    with pytest.raises(ConfigError, match=what):
        prepare(benchmark, tmp_path / "data", source_dir=tmp_path, say=quiet)


def test_a_prepare_script_that_is_no_python_file_is_named(tmp_path: Path) -> None:
    benchmark = a_benchmark(tmp_path / "bench")
    (tmp_path / "bench" / "config.yaml").write_text(CONFIG.replace("prepare.py", "prepare.txt"))
    (tmp_path / "bench" / "prepare.txt").write_text("")

    with pytest.raises(ConfigError, match=r"prepare.txt: not a Python file"):
        prepare(load_benchmark(str(benchmark.folder)), tmp_path / "data", source_dir=tmp_path, say=quiet)


def test_the_conversion_of_a_dataset_is_found(tmp_path: Path) -> None:
    benchmark = a_benchmark(tmp_path / "bench")

    convert = find_convert(benchmark)

    assert convert is not None
    assert convert({"q": "2?", "a": 2}) == {"question": "2?", "expected_answer": "2"}
    assert find_convert(benchmark, "example") is None


def test_the_script_of_a_built_in_benchmark_is_its_own_module() -> None:
    assert find_convert(load_benchmark("gsm8k"), "train") is gsm8k_convert
