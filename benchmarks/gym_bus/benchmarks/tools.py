"""External tools of benchmarks, such as compilers and provers: fetched on first need, checked, kept in one folder.

    LEAN = Tool(name="lean", version="4.22.0", url="https://.../lean-4.22.0-linux.tar.gz", sha256="...",
                executable="lean-4.22.0-linux/bin/lean")

    def ensure_lean() -> Path:
        return ensure_tool(LEAN)

A test that needs the tool is left out until it is there: `pytest.mark.skipif(not is_there(LEAN), reason="no lean")`.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from gym_bus.benchmarks.prepare import Source, fetch
from gym_bus.errors import ConfigError, UsageError

PREFIX = Path(".gym_bus/tools")
"""Beside the prepared data; git is told to ignore it."""
LOCK_LIMIT_S = 900.0
"""How long another process may take to install the same tool."""
LOOK_S = 0.1


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as its makers publish it: an archive for this kind of machine."""

    name: str
    version: str
    url: str
    """Of a `.tar`, `.tar.gz`, `.tar.xz` or `.zip`."""
    sha256: str
    """Hex digest of the archive."""
    executable: str
    """Its path in the archive."""
    licence: str = ""


def is_there(tool: Tool, prefix: Path = PREFIX) -> bool:
    """Whether the tool is installed."""
    return _place(tool, prefix).is_dir()


def ensure_tool(tool: Tool, prefix: Path = PREFIX, say: Callable[[str], None] = print) -> Path:
    """The tool's executable, installed where it is not yet. Blocks: a second process waits for the first one.

    An interrupted installation leaves nothing that counts as one; the next call goes on with its download.

    Raises:
        UsageError: it cannot be fetched, is not the file that was published, or another process does not finish.
        ConfigError: the archive has no such executable.
    """
    place = _place(tool, prefix)
    if not is_there(tool, prefix):
        prefix.mkdir(parents=True, exist_ok=True)
        (prefix / ".gitignore").write_text("*\n")
        with _alone(place.with_name(f".{place.name}.lock")):
            if not is_there(tool, prefix):
                _install(tool, place, say)
    return (place / tool.executable).resolve()


def _place(tool: Tool, prefix: Path) -> Path:
    return prefix / f"{tool.name}-{tool.version}-{tool.sha256[:8]}"


def _install(tool: Tool, place: Path, say: Callable[[str], None]) -> None:
    # Under a name without .gz, the checksum is that of the file as it is published.
    source = Source(file=f"{place.name}.archive", url=tool.url, sha256=(tool.sha256,), licence=tool.licence)
    archive = fetch(source, place.parent / "archives", say, lambda done, total: None)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
        unpacked = Path(scratch, "unpacked")
        shutil.unpack_archive(archive, unpacked, _format(tool), filter="data" if ".tar" in tool.url else None)
        executable = unpacked / tool.executable
        if not executable.is_file():
            raise ConfigError(f"{tool.url}: there is no {tool.executable!r} in it")
        executable.chmod(0o755)
        unpacked.rename(place)  # it is there as a whole, or not at all
    archive.unlink()
    say(f"{tool.name} {tool.version} is in {place}")


def _format(tool: Tool) -> str:
    for name, endings, _ in shutil.get_unpack_formats():
        if tool.url.endswith(tuple(endings)):
            return name
    raise ConfigError(f"{tool.url}: not an archive that can be unpacked")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_LIMIT_S
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(f"{path}: another process holds it for {LOCK_LIMIT_S:g} s: end that one") from None
                time.sleep(LOOK_S)
        yield
