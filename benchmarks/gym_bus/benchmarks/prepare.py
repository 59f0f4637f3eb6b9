"""Prepare a benchmark's data: fetch the published files, check them, write the rows that jobs read.

A benchmark's `prepare.py` holds two names: `SOURCES`, the published file of each dataset that is prepared, by the
dataset's name; and `convert(row)`, a published row to a row of ours, or None where it is not part of the benchmark.
A script of NeMo Gym's form holds one: `prepare()`, which writes the dataset's file itself and returns its path.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import importlib
import importlib.util
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import msgspec

from gym_bus.benchmarks.dataset import Convert, Converter, dataset_digest, load_rows
from gym_bus.benchmarks.spec import Benchmark, DatasetSpec, data_path
from gym_bus.errors import ConfigError, DataError, UsageError, did_you_mean
from gym_bus.registry import stumbled

SILENCE_LIMIT_S = 30.0
"""Seconds that a download may go without a byte."""
DOWNLOAD_LIMIT_S = 900.0
"""Seconds that a whole download may take."""
MAX_DOWNLOAD_BYTES = 4 * 2**30

Progress = Callable[[int, int | None], None]
"""Gets the bytes that are there, and those of the whole file, None where the server does not say."""

Complete = Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]
"""Rows of `convert` to the rows that are written: what can only be computed elsewhere is added to them."""

_CHUNK_BYTES = 2**18
_NOTHING_LEFT = 416
_DAMAGED = "unknown, as it is damaged"
_encode = msgspec.json.Encoder().encode


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A file as the data set's authors published it."""

    file: str
    """Its name; `.gz` is decompressed."""
    url: str
    sha256: tuple[str, ...] = ()
    """Hex digests of the decompressed content, one per published edition that `convert` understands; empty where none
    is known: then any file that is whole is taken, and its digest is told."""
    licence: str
    editions: str = ""
    """Pattern of the names that editions of the file also go by, without `.gz`, such as `rows-v*.jsonl`."""

    def accepts(self, digest: str) -> bool:
        """Whether a file of this digest is the published one."""
        return digest in self.sha256 if self.sha256 else digest != _DAMAGED


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    path: Path
    rows: int
    licence: str
    """As the script says it, empty where it does not."""
    source: str
    """The address or the file that the rows come from; the script where it fetches them itself."""


def prepare(
    benchmark: Benchmark,
    data_dir: Path,
    *,
    which: str | None = None,
    source_dir: Path | None = None,
    say: Callable[[str], None] = print,
    progress: Progress = lambda done, total: None,
    complete: Complete = iter,
) -> Prepared:
    """Write the rows of one dataset. A run that is interrupted leaves the file as it was, and keeps what it fetched.

    Args:
        benchmark: whose data.
        data_dir: the data folder of all benchmarks.
        which: type or name of the dataset; None for the main one.
        source_dir: a folder that has the published file, in `<benchmark>/` or directly, perhaps with `.gz`; None
            fetches it.
        say: gets the licence and the course of things, in sentences.
        progress: gets the course of the download.
        complete: adds to the converted rows what is still missing.

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
    target = data_path(benchmark, data_dir, dataset.name)
    if not hasattr(module, "convert"):
        return _run_script(module, benchmark, dataset, target, source_dir, say)
    source = _source_of(module, benchmark, dataset)
    say(f"{benchmark.spec.name}/{dataset.name}: licence {source.licence}")
    if source_dir is None:
        published = fetch(source, target.parent / "source", say, progress)
    else:
        published = _find(source, source_dir, benchmark)
    if not source.sha256:
        say(f"{published}: no checksum of it is known; its sha256 is {_digest(published)}")
    rows = _write_rows(published, Converter(module.convert), target, complete)
    say(f"{benchmark.spec.name}/{dataset.name}: {rows} rows in {target}")
    return Prepared(
        path=target, rows=rows, licence=source.licence, source=source.url if source_dir is None else str(published)
    )


def _run_script(
    module: ModuleType,
    benchmark: Benchmark,
    dataset: DatasetSpec,
    target: Path,
    source_dir: Path | None,
    say: Callable[[str], None],
) -> Prepared:
    script = _script(benchmark, dataset)
    if source_dir is not None:
        raise UsageError(f"{script}: its prepare() fetches the data itself: leave --source out")
    say(f"{benchmark.spec.name}/{dataset.name}: running prepare() of {script}")
    made = Path(module.prepare())
    if made.resolve() != target.resolve():
        raise ConfigError(f"{script}: prepare() has written {made}, but jsonl_fpath is {target}: let them be the same")
    rows = sum(1 for _ in load_rows(target))
    say(f"{benchmark.spec.name}/{dataset.name}: {rows} rows in {target}")
    return Prepared(path=target, rows=rows, licence=dataset.license, source=str(script))


def optional_in(benchmark: Benchmark, source_dir: Path) -> list[str]:
    """Names of the optional datasets whose published file lies in a folder."""
    return [
        dataset.name
        for dataset in benchmark.spec.datasets
        if dataset.optional
        and dataset.prepare_script is not None
        and _places(_source_of(load_prepare_module(benchmark, dataset), benchmark, dataset), source_dir, benchmark)
    ]


def find_convert(benchmark: Benchmark, which: str | None = None) -> Convert | None:
    """What turns published rows of a dataset into rows of ours; None where its rows need no preparation."""
    dataset = benchmark.dataset(which)
    if dataset.prepare_script is None:
        return None
    convert: Convert | None = getattr(load_prepare_module(benchmark, dataset), "convert", None)
    return convert


def _script(benchmark: Benchmark, dataset: DatasetSpec) -> Path:
    return (benchmark.root or benchmark.folder) / (dataset.prepare_script or "")


def load_prepare_module(benchmark: Benchmark, dataset: DatasetSpec) -> ModuleType:
    """The benchmark's `prepare_script`, imported: code of the benchmark that the user named.

    Raises:
        ConfigError: there is no such file, it needs what is not installed, or it lacks what it must define.
    """
    path = _script(benchmark, dataset)
    if not path.is_file():
        at = f"datasets[{benchmark.spec.datasets.index(dataset)}].prepare_script"
        raise ConfigError(f"{benchmark.origins.nearest(at)}: key {at!r}: no file {dataset.prepare_script!r}")
    try:
        module = (
            importlib.import_module(f"{benchmark.package}.{path.stem}") if benchmark.package else _import_file(path)
        )
    except ImportError as e:
        raise ConfigError(f"{path}: {e}; install what the script needs into the environment of gym-bus") from None
    except (Exception, SystemExit) as e:  # as it is imported, an author's code may do anything
        raise ConfigError(f"{path} does not load: {stumbled(e)}") from None
    if callable(getattr(module, "prepare", None)) and not hasattr(module, "SOURCES"):
        return module
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
            f"{_script(benchmark, dataset)}: SOURCES has no entry for dataset {dataset.name!r}: "
            + did_you_mean(dataset.name, sources)
        )
    return sources[dataset.name]


def _find(source: Source, folder: Path, benchmark: Benchmark) -> Path:
    there = _places(source, folder, benchmark)
    if not there:
        raise UsageError(
            f"no {source.file} in {folder / benchmark.spec.name} or {folder}; it is published at {source.url}: put it "
            "there, or leave --source out to fetch it"
        )
    digests = {place: _digest(place) for place in there}
    accepted = [place for place, found in digests.items() if source.accepts(found)]
    if len({digests[place] for place in accepted}) > 1 and not source.sha256:
        raise UsageError(f"{', '.join(map(str, accepted))}: these differ, and each may be meant: leave one there")
    if accepted:
        return accepted[0]
    raise UsageError(_mismatch(str(there[0]), digests[there[0]], source))


def _places(source: Source, folder: Path, benchmark: Benchmark) -> list[Path]:
    """The files in a folder that may be the published one, the likeliest first."""
    plain = source.file.removesuffix(".gz")
    found: list[Path] = []
    for at in (folder / benchmark.spec.name, folder):
        found += [at / name for name in (source.file, plain, f"{plain}.gz")]
        if source.editions:
            found += sorted(at.glob(source.editions)) + sorted(at.glob(f"{source.editions}.gz"))
    return [place for place in dict.fromkeys(found) if place.is_file()]


def fetch(source: Source, folder: Path, say: Callable[[str], None], progress: Progress) -> Path:
    """The published file in `folder`, downloaded where it is not there; an interrupted download is gone on with.

    Raises:
        UsageError: it cannot be had, or is another one than was published.
    """
    path = folder / source.file
    if path.is_file() and source.accepts(_digest(path)):
        say(f"{path}: already fetched")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("ab") as out:
        _take(out, part)
        # Without a checksum nothing would say whether what is there and what comes belong together.
        begun = out.tell() if source.sha256 else _empty(out)
        say(f"fetching {source.url}" + (f", going on after {begun:,} bytes" if begun else ""))
        _get(source, out, progress)
        if begun and not source.accepts(_digest(part, compressed=source.file.endswith(".gz"))):
            _empty(out)  # what was kept may be of an older edition
            _get(source, out, progress)
        os.fsync(out.fileno())
        found = _digest(part, compressed=source.file.endswith(".gz"))
        if not source.accepts(found):
            part.unlink()
            raise UsageError(_mismatch(source.url, found, source))
        part.replace(path)
    return path


def _empty(out: IO[bytes]) -> int:
    out.seek(0)
    return out.truncate()


def _take(out: IO[bytes], part: Path) -> None:
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{part}: another process is fetching it: wait for that one") from None


def _get(source: Source, out: IO[bytes], progress: Progress) -> None:
    """Download what `out` does not have yet. What has come stays there, whatever happens."""
    try:
        _download(source.url, out, progress)
    except (OSError, ValueError, http.client.HTTPException) as e:
        why = getattr(e, "reason", None) or e
        kept = f"The {out.tell():,} bytes that came are kept: the same command goes on from there. Or get"
        raise UsageError(
            f"cannot fetch {source.url}: {why}. {kept if out.tell() else 'Get'} {source.file} from there some other "
            "way and pass its folder with --source"
        ) from None
    finally:
        out.flush()
        if not out.tell():
            Path(out.name).unlink()


def _download(url: str, out: IO[bytes], progress: Progress) -> None:
    if not url.startswith(("https://", "http://")):
        raise ValueError("the address must start with https:// or http://")
    deadline, size = time.monotonic() + DOWNLOAD_LIMIT_S, out.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        reply = urllib.request.urlopen(request, timeout=SILENCE_LIMIT_S)
    except urllib.error.HTTPError as e:
        if size and e.code == _NOTHING_LEFT:
            return
        raise
    with reply:
        if size and not str(reply.headers.get("Content-Range", "")).startswith(f"bytes {size}-"):
            size = _empty(out)  # the server sends the whole of it
        announced = reply.headers.get("Content-Length")
        total = size + int(announced) if announced is not None else None
        while chunk := reply.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"the file is larger than {MAX_DOWNLOAD_BYTES >> 30} GiB")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {DOWNLOAD_LIMIT_S:g} s")
            out.write(chunk)
            progress(size, total)
    if total is not None and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def _digest(path: Path, compressed: bool | None = None) -> str:
    try:
        return dataset_digest(path, compressed)
    except DataError:
        return _DAMAGED


def _mismatch(what: str, found: str, source: Source) -> str:
    if not source.sha256:
        return f"{what} is damaged: it is no gzip file, or a part of one"
    return (
        f"{what} is not the published {source.file}: its sha256 is {found}, expected {' or '.join(source.sha256)}. "
        "Where the authors have published a new edition, run it with --input FILE, which takes rows as published"
    )


def _write_rows(published: Path, converter: Converter, target: Path, complete: Complete) -> int:
    count = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target) as out:
        for row in complete(_converted(published, converter)):
            out.write(_encode(row) + b"\n")
            count += 1
        if count == 0:
            raise UsageError(f"{published}: no row of it is part of the benchmark")
    return count


def _converted(published: Path, converter: Converter) -> Iterator[dict[str, Any]]:
    for line, row in load_rows(published):
        decoded: dict[str, Any] = {key: msgspec.json.decode(value) for key, value in row.items()}
        converted = converter(decoded, f"{published}:{line}")
        if converted is not None:
            yield converted


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
