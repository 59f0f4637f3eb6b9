"""Prepare a benchmark's data: fetch the published files, check them, write the rows that jobs read.

A benchmark's `prepare.py` holds two names: `SOURCES`, the published file of each dataset that is prepared, by the
dataset's name; and `convert(row)`, a published row to a row of ours, or None where it is not part of the benchmark.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import importlib.util
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import msgspec

from gym_bus.benchmarks.dataset import Convert, Converter, dataset_digest, load_rows
from gym_bus.benchmarks.spec import Benchmark, DatasetSpec, data_path
from gym_bus.errors import ConfigError, DataError, UsageError, did_you_mean

SILENCE_LIMIT_S = 30.0
"""Seconds that a download may go without a byte."""
DOWNLOAD_LIMIT_S = 900.0
"""Seconds that a whole download may take."""
MAX_DOWNLOAD_BYTES = 4 * 2**30

_CHUNK_BYTES = 2**18
_encode = msgspec.json.Encoder().encode


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the data set's authors published it."""

    file: str
    """Its name; `.gz` is decompressed."""
    url: str
    sha256: tuple[str, ...]
    """Hex digests of the decompressed content, one per published edition that `convert` understands."""
    licence: str


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    path: Path
    rows: int
    licence: str
    source: str
    """The address or the file that the rows come from."""


def prepare(
    benchmark: Benchmark,
    data_dir: Path,
    *,
    which: str | None = None,
    source_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Write the rows of one dataset; a run that is interrupted leaves the file as it was.

    Args:
        benchmark: whose data.
        data_dir: the data folder of all benchmarks.
        which: type or name of the dataset; None for the main one.
        source_dir: a folder that has the published file, in `<benchmark>/` or directly, perhaps with `.gz`; None
            fetches it.
        say: gets the licence and the progress, in sentences.

    Raises:
        UsageError: the file cannot be had or is another one than was published; the message says what to do.
        DataError: a row is not as published.
    """
    dataset = benchmark.dataset(which)
    if dataset.prepare_script is None:
        raise UsageError(
            f"{benchmark.spec.name}: dataset {dataset.name!r} needs no preparation, it is part of the benchmark"
        )
    module = load_prepare_module(benchmark, dataset)
    source = _source_of(module, benchmark, dataset)
    say(f"{benchmark.spec.name}/{dataset.name}: licence {source.licence}")
    target = data_path(benchmark, data_dir, dataset.name)
    if source_dir is None:
        published = _fetch(source, target.parent / "source", say)
    else:
        published = _find(source, source_dir, benchmark.spec.name)
    rows = _write_rows(published, Converter(module.convert), target)
    say(f"{benchmark.spec.name}/{dataset.name}: {rows} rows in {target}")
    return Prepared(
        path=target, rows=rows, licence=source.licence, source=source.url if source_dir is None else str(published)
    )


def find_convert(benchmark: Benchmark, which: str | None = None) -> Convert | None:
    """What turns published rows of a dataset into rows of ours; None where its rows need no preparation."""
    dataset = benchmark.dataset(which)
    if dataset.prepare_script is None:
        return None
    convert: Convert = load_prepare_module(benchmark, dataset).convert
    return convert


def load_prepare_module(benchmark: Benchmark, dataset: DatasetSpec) -> ModuleType:
    """The benchmark's `prepare_script`, imported: code of the benchmark that the user named.

    Raises:
        ConfigError: there is no such file, or it lacks `SOURCES` or `convert`.
    """
    path = benchmark.folder / (dataset.prepare_script or "")
    if not path.is_file():
        raise ConfigError(f"{benchmark.folder}: key 'datasets.prepare_script': no file {dataset.prepare_script!r}")
    if benchmark.package is not None:
        module = importlib.import_module(f"{benchmark.package}.{path.stem}")
    else:
        module = _import_file(path)
    if not isinstance(getattr(module, "SOURCES", None), Mapping):
        raise ConfigError(f"{path}: it must define SOURCES, a mapping from dataset names to {__name__}.Source")
    if not callable(getattr(module, "convert", None)):
        raise ConfigError(f"{path}: it must define convert(row), which returns a row or None")
    return module


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_{path.parent.name}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _source_of(module: ModuleType, benchmark: Benchmark, dataset: DatasetSpec) -> Source:
    sources: Mapping[str, Source] = module.SOURCES
    if dataset.name not in sources:
        raise ConfigError(
            f"{benchmark.folder / (dataset.prepare_script or '')}: SOURCES has no entry for dataset {dataset.name!r}: "
            + did_you_mean(dataset.name, sources)
        )
    return sources[dataset.name]


def _find(source: Source, folder: Path, benchmark: str) -> Path:
    plain = source.file.removesuffix(".gz")
    places = [at / name for at in (folder / benchmark, folder) for name in (source.file, plain, f"{plain}.gz")]
    there = [place for place in dict.fromkeys(places) if place.is_file()]
    if not there:
        raise UsageError(
            f"no {source.file} in {folder / benchmark} or {folder}; it is published at {source.url}: put it there, or "
            "leave --source out to fetch it"
        )
    digests = {place: _digest(place) for place in there}
    for place, found in digests.items():
        if found in source.sha256:
            return place
    raise UsageError(_mismatch(str(there[0]), digests[there[0]], source))


def _fetch(source: Source, folder: Path, say: Callable[[str], None]) -> Path:
    path = folder / source.file
    if path.is_file() and _digest(path) in source.sha256:
        say(f"{path}: already fetched")
        return path
    say(f"fetching {source.url}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _replacing(path) as out:
            _download(source.url, out)
            out.flush()
            found = _digest(Path(out.name), compressed=source.file.endswith(".gz"))
            if found not in source.sha256:
                raise UsageError(_mismatch(source.url, found, source))
    except (OSError, ValueError, http.client.HTTPException) as e:
        why = getattr(e, "reason", None) or e
        raise UsageError(
            f"cannot fetch {source.url}: {why}. Get {source.file} from there some other way and pass its folder with "
            "--source"
        ) from None
    return path


def _download(url: str, out: IO[bytes]) -> None:
    if not url.startswith(("https://", "http://")):
        raise ValueError("the address must start with https:// or http://")
    deadline, size = time.monotonic() + DOWNLOAD_LIMIT_S, 0
    with urllib.request.urlopen(url, timeout=SILENCE_LIMIT_S) as reply:
        while chunk := reply.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"the file is larger than {MAX_DOWNLOAD_BYTES >> 30} GiB")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {DOWNLOAD_LIMIT_S:g} s")
            out.write(chunk)
        announced = reply.headers.get("Content-Length")
    if announced is not None and int(announced) != size:
        raise OSError(f"the connection ended after {size} of {announced} bytes")


def _digest(path: Path, compressed: bool | None = None) -> str:
    try:
        return dataset_digest(path, compressed)
    except DataError:
        return "unknown, as it is damaged"


def _mismatch(what: str, found: str, source: Source) -> str:
    return (
        f"{what} is not the published {source.file}: its sha256 is {found}, expected {' or '.join(source.sha256)}. "
        "Where the authors have published a new edition, run it with --input FILE, which takes rows as published"
    )


def _write_rows(published: Path, converter: Converter, target: Path) -> int:
    count = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target) as out:
        for line, row in load_rows(published):
            decoded: dict[str, Any] = {key: msgspec.json.decode(value) for key, value in row.items()}
            converted = converter(decoded, f"{published}:{line}")
            if converted is not None:
                out.write(_encode(converted) + b"\n")
                count += 1
        if count == 0:
            raise UsageError(f"{published}: no row of it is part of the benchmark")
    return count


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is complete and on disk, and vanishes where it is not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
