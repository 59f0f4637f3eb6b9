"""A slot: one zygote and the right to run one program at a time in it. The owner's side; nothing here runs programs."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import importlib.util
import itertools
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gym_bus.errors import SandboxError, UsageError
from gym_bus.logs import get_logger
from gym_bus.sandbox import child, zygote
from gym_bus.sandbox.api import DEFAULT_LIMITS, Ended, Limits, Outcome, Program
from gym_bus.sandbox.cgroups import HEADROOM_BYTES, MemoryGroup

log = get_logger(__name__)

START_LIMIT_S = 20.0
GRACE_S = 5.0
"""Beyond a program's wall limit, for the zygote to kill it, clean up and answer."""
SCRATCH_BYTES = 64 * 2**20
STDERR_BYTES = 64 * 1024
ADDRESS_FACTOR, ADDRESS_BASE = 2, 256 * 2**20
"""Address space is a second line behind the cgroup: interpreters reserve more than they use."""

_ADD_SEALS, _SEAL_SHRINK, _SEAL_GROW, _SEAL_SEAL = 1033, 2, 4, 1
_IDS_PER_SLOT, _FIRST_ID, _IDS = 2, 0x7000_0000, 0x0800_0000
_numbers = itertools.count()

_BOOT = "import sys; sys.path.insert(0, sys.argv[3]); from gym_bus.sandbox.zygote import main; main()"


class Zygote:
    """The process of a slot, from the owner's side."""

    def __init__(self, preload: str, modules: Sequence[str]) -> None:
        self._preload, self._modules = preload, tuple(modules)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._group: MemoryGroup | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process that holds the zygote; killing it kills all of it."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start and lock in.

        Raises:
            SandboxError: the kernel does not let us have the isolation that is promised; says what failed.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._group = MemoryGroup.create()
        try:
            with theirs:
                self._process = _launch(theirs, self._preload, self._modules, forks=self._group is not None)
            if self._group:
                self._group.add(self._process.pid)
            await self._handshake()
        except (OSError, SandboxError) as e:
            await self.kill()
            raise SandboxError(f"the sandbox cannot start: {e}; {_advice()}") from None

    async def _handshake(self) -> None:
        assert self._process
        said = await self._receive(START_LIMIT_S)
        if "unshared" in said:
            self._send({"ids": _map_ids(self._process.pid)}, [])
            said = await self._receive(START_LIMIT_S)
        if not said.get("ready"):
            raise SandboxError(str(said.get("error", "the zygote did not come up")))

    def _send(self, value: dict[str, Any], fds: Sequence[int]) -> None:
        assert self._control
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._control.sendmsg([json.dumps(value).encode()], rights)

    async def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._control
        loop = asyncio.get_running_loop()
        try:
            data = await asyncio.wait_for(loop.sock_recv(self._control, zygote.MAX_MESSAGE), limit_s)
        except TimeoutError:
            raise SandboxError(f"the zygote was silent for {limit_s:g} s") from None
        except OSError as e:
            raise SandboxError(f"the zygote is gone: {e}") from None
        if not data:
            raise SandboxError("the zygote is gone")
        found: dict[str, Any] = json.loads(data)
        return found

    async def run(self, fds: Sequence[int], limits: Limits) -> tuple[dict[str, Any], bool]:
        """Have a program run; returns what the zygote saw, and whether the kernel killed for want of memory.

        The descriptors of the caller are closed. Raises SandboxError where the zygote is lost; it is dead then.
        """
        before = 0
        try:
            if self._group:
                self._group.limit(limits.memory_bytes + HEADROOM_BYTES)
                before = self._group.kills()
            try:
                self._send(_order(limits, bounded=self._group is not None), fds)
            finally:
                for fd in fds:
                    os.close(fd)
            said = await self._receive(limits.wall_s + GRACE_S)
        except OSError as e:
            await self.kill()
            raise SandboxError(f"the zygote is gone: {e}") from None
        except (SandboxError, asyncio.CancelledError):
            starved = bool(self._group and self._group.kills() > before)
            await self.kill()
            if starved:
                return {"status": signal.SIGKILL, "started": True}, True
            raise
        if said.get("dirty"):
            log.warning("sandbox_scratch_not_clean", pid=self.pid)
            await self.kill()
        return said, bool(self._group and self._group.kills() > before)

    async def kill(self) -> None:
        """End it with everything in it."""
        if self._control:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.to_thread(process.wait, 10)
        if self._group:
            await self._remove_group(self._group)
            self._group = None

    @staticmethod
    async def _remove_group(group: MemoryGroup) -> None:
        for _ in range(50):  # its processes are dying; an occupied group cannot be removed
            group.remove()
            if not group._folder.exists():
                return
            await asyncio.sleep(0.02)


def _launch(control: socket.socket, preload: str, modules: Sequence[str], *, forks: bool) -> subprocess.Popen[bytes]:
    here = Path(__file__).resolve()
    source_root = str(here.parents[2])
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    config = {
        "interpreter": sys.base_prefix,
        "preload": preload,
        "modules": list(modules),
        "module_paths": sorted({_root_of(name) for name in modules}),
        "disk_bytes": SCRATCH_BYTES,
        "forks": forks,
    }
    # The interpreter's own start: isolated, no site packages, nothing of our environment.
    command = [interpreter, "-I", "-S", "-E", "-X", "utf8", "-c", _BOOT, str(control.fileno()), json.dumps(config)]
    return subprocess.Popen(
        [*command, source_root],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[control.fileno()],
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        cwd="/",
        start_new_session=True,
    )


def _root_of(module: str) -> str:
    """The folder of `sys.path` that a module comes from."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SandboxError(f"no module {module!r} to load into the sandbox")
    return str(Path(spec.origin).resolve().parents[module.count(".")])


def _map_ids(pid: int) -> bool:
    """Give the namespace its user ids. True where programs get one of their own, False where all share ours."""
    if os.geteuid() == 0:
        first = _FIRST_ID + (os.getpid() * 64 + next(_numbers)) * _IDS_PER_SLOT % _IDS
        try:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(f"0 {first} {_IDS_PER_SLOT}\n")
            return True
        except OSError:
            log.info("sandbox_ids_shared", why="this user namespace cannot map further ids")
    Path(f"/proc/{pid}/setgroups").write_text("deny")
    Path(f"/proc/{pid}/uid_map").write_text(f"0 {os.geteuid()} 1\n")
    Path(f"/proc/{pid}/gid_map").write_text(f"0 {os.getegid()} 1\n")
    return False


def _advice() -> str:
    return (
        "the kernel must allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces "
        "> 0, and on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0); in a container, its seccomp and AppArmor "
        "profiles must allow unshare and mount"
    )


def _order(limits: Limits, *, bounded: bool) -> dict[str, Any]:
    address = limits.memory_bytes * (ADDRESS_FACTOR if bounded else 1) + ADDRESS_BASE
    return {
        "wall_s": limits.wall_s,
        "cpu_s": limits.cpu_s,
        "address_bytes": address,
        "file_bytes": max(limits.file_bytes, limits.output_bytes + STDERR_BYTES),
        "processes": limits.processes,
    }


def _pack(program: Program) -> bytes:
    """The program as its process reads it: header length, header (JSON), files, source."""
    files: dict[str, tuple[int, int]] = {}
    blobs = b"".join(program.files.values())
    header = b""
    for _ in range(3):  # offsets depend on the header's length, which settles after a round or two
        start = 4 + len(header)
        for name, content in program.files.items():
            files[name] = (start, start + len(content))
            start += len(content)
        header = json.dumps({"arguments": program.arguments, "files": files, "source": start}).encode()
    return len(header).to_bytes(4, "little") + header + blobs + program.source


def _memfd(name: str, content: bytes) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class _Capture:
    """An output file that the kernel keeps from growing past its limit; the shared offset says how much was written."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Whole pages, and room for a byte too many: the kernel writes page by page and refuses at the end.
        os.ftruncate(self.fd, (limit_bytes // mmap.PAGESIZE + 1) * mmap.PAGESIZE)
        fcntl.fcntl(self.fd, _ADD_SEALS, _SEAL_GROW | _SEAL_SHRINK | _SEAL_SEAL)

    def read(self) -> tuple[bytes, bool]:
        """What was written, cut at the limit, and whether it was cut."""
        written = os.lseek(self.fd, 0, os.SEEK_CUR)
        return os.pread(self.fd, min(written, self._limit), 0), written > self._limit

    def close(self) -> None:
        os.close(self.fd)


class Slot:
    """One place to run programs, isolated from the host and from each other; implements `Sandbox`."""

    def __init__(self, preload: str = zygote.PRELOAD, modules: Sequence[str] = ()) -> None:
        self._preload, self._modules = preload, tuple(modules)
        self._zygote = Zygote(preload, modules)
        self._partner: Zygote | None = None
        self._lock = asyncio.Lock()

    @classmethod
    async def start(cls, preload: str = zygote.PRELOAD, modules: Sequence[str] = ()) -> Slot:
        """A slot that is ready.

        Args:
            preload: modules of the standard library to have imported before any program, space-separated.
            modules: modules of the caller's that programs may import; they may use the standard library only.

        Raises:
            SandboxError: this machine does not give the isolation; the message says what would.
        """
        slot = cls(preload, modules)
        await slot._ready(slot._zygote)
        await slot._self_test()
        return slot

    async def _ready(self, zygote: Zygote) -> Zygote:
        if not zygote.alive:
            await zygote.kill()
            await zygote.start()
        return zygote

    async def _self_test(self) -> None:
        """Through the same path that programs take: what must be refused is, and an honest program passes."""
        outcome = await self.run(Program(source=_SELF_TEST), limits=Limits(wall_s=10, cpu_s=5))
        if outcome.stdout != b"held\n" or not outcome.ok:
            await self.close()
            said = (outcome.stdout + outcome.stderr).decode(errors="replace")[-500:]
            raise SandboxError(f"the sandbox does not hold on this machine: {said or outcome}")

    async def run(self, program: Program, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """Run `program` once; see `Sandbox.run`."""
        async with self._lock:
            return await self._run(await self._ready(self._zygote), program, stdin, limits)

    async def run_cases(
        self,
        program: Program,
        stdins: Sequence[bytes],
        limits: Limits = DEFAULT_LIMITS,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """Run `program` once per input; see `Sandbox.run_cases`."""
        outcomes: list[Outcome] = []
        for case, stdin in enumerate(stdins):
            outcomes.append(await self.run(program, stdin, limits))
            if go_on is not None and not go_on(case, outcomes[-1]):
                break
        return outcomes + [Outcome(ended=Ended.NOT_RUN)] * (len(stdins) - len(outcomes))

    async def run_pair(
        self, solution: Program, tester: Program, limits: Limits = DEFAULT_LIMITS
    ) -> tuple[Outcome, Outcome]:
        """Run two programs that can only talk; see `Sandbox.run_pair`."""
        async with self._lock:
            if self._partner is None:
                self._partner = Zygote(self._preload, self._modules)
            first, second = await self._ready(self._zygote), await self._ready(self._partner)
            a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            outcomes = await asyncio.gather(
                self._run(first, solution, b"", limits, a.detach()),
                self._run(second, tester, b"", limits, b.detach()),
                return_exceptions=True,
            )
        found: list[Outcome] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            found.append(outcome)
        return found[0], found[1]

    async def _run(
        self, zygote: Zygote, program: Program, stdin: bytes, limits: Limits, joined: int | None = None
    ) -> Outcome:
        if program.language != "python":
            if joined is not None:
                os.close(joined)
            raise UsageError(f"language {program.language!r} is not supported: known: python")
        out, err = _Capture("stdout", limits.output_bytes), _Capture("stderr", STDERR_BYTES)
        try:
            fds = [_memfd("stdin", stdin), os.dup(out.fd), os.dup(err.fd), _memfd("program", _pack(program))]
            said, starved = await zygote.run([*fds, *([joined] if joined is not None else [])], limits)
            return _outcome(said, starved, limits, out.read(), err.read()[0])
        finally:
            out.close()
            err.close()

    async def close(self) -> None:
        """End the zygotes."""
        await self._zygote.kill()
        if self._partner is not None:
            await self._partner.kill()


def _outcome(said: dict[str, Any], starved: bool, limits: Limits, out: tuple[bytes, bool], err: bytes) -> Outcome:
    status = int(said["status"])
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if said.get("fault") or (not said.get("started") and code != child.COMPILE_FAILED and not starved):
        why = (
            said.get("fault") or f"it ended before it began ({'exit ' + str(code) if code is not None else killed_by})"
        )
        raise SandboxError(f"the program could not be set up: {why}")
    cpu_s = float(said.get("cpu_s", 0.0))
    return Outcome(
        ended=_cause(said, starved, limits, code, killed_by, cpu_s, out[1], err),
        exit_code=code,
        signal=killed_by,
        stdout=out[0],
        stderr=err,
        wall_s=float(said.get("wall_s", 0.0)),
        cpu_s=cpu_s,
        max_rss_bytes=int(said.get("max_rss_bytes", 0)),
    )


def _cause(
    said: dict[str, Any],
    starved: bool,
    limits: Limits,
    code: int | None,
    killed_by: int | None,
    cpu_s: float,
    cut: bool,
    stderr: bytes,
) -> Ended:
    if not said.get("started") and code == child.COMPILE_FAILED:
        return Ended.COMPILE_ERROR
    if starved:
        return Ended.MEMORY
    if said.get("timed_out"):
        return Ended.WALL_LIMIT
    # The kernel counts in ticks: what it took for the limit may be a little less by its own finer account.
    if killed_by in (signal.SIGKILL, signal.SIGXCPU) and cpu_s >= 0.8 * limits.cpu_s:
        return Ended.CPU_LIMIT
    if cut:
        return Ended.OUTPUT_LIMIT
    if killed_by is not None:
        return Ended.SIGNALLED
    last = stderr.rstrip().rpartition(b"\n")[2]
    return Ended.MEMORY if code == 1 and last.startswith(b"MemoryError") else Ended.FINISHED


_SELF_TEST = b"""
import os
def refused(what, do):
    try:
        do()
    except OSError:
        return
    raise SystemExit("not refused: " + what)
def connect():
    import _socket
    _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
refused("a socket", connect)
refused("the host's files", lambda: os.listdir("/home"))
refused("the host's secrets", lambda: open("/etc/shadow").read())
refused("processes", lambda: os.listdir("/proc"))
refused("a write outside the scratch folder", lambda: open("/here", "w"))
refused("a signal to another process", lambda: os.kill(2, 0))
open("/tmp/mine", "w").close()
if set(os.environ) - {"HOME", "PATH", "LANG", "TMPDIR"}:
    raise SystemExit("not refused: the host's environment")
if any(os.path.exists("/dev/fd/%d" % fd) for fd in range(3, 20)):
    raise SystemExit("not refused: inherited descriptors")
for fd in range(3, 64):
    refused("descriptor %d" % fd, lambda: os.fstat(fd))
print("held")
"""
