"""A zygote from its owner's side: started, spoken to, killed. Nothing here runs programs or reads their output."""

from __future__ import annotations

import array
import asyncio
import contextlib
import importlib.util
import itertools
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from gym_bus.errors import SandboxError, SandboxRefused
from gym_bus.logs import get_logger
from gym_bus.sandbox import advice, child, packages, zygote
from gym_bus.sandbox.api import DEFAULT_LIMITS
from gym_bus.sandbox.cgroups import HEADROOM_BYTES, MemoryGroup
from gym_bus.sandbox.protections import Level

log = get_logger(__name__)

START_LIMIT_S = 20.0
GRACE_S = 15.0
"""Beyond a program's wall limit, for the zygote to kill it, clean up and answer, on a machine that stands still at
times, too."""
LEAVE_S = 0.5
"""For a zygote to end by itself."""
_SCRATCH_PREFIX = "gym-bus-sandbox-"

_IDS_PER_SLOT, _FIRST_ID, _IDS = 2, 0x7000_0000, 0x0800_0000
_FEWEST_IDS = 8192
_numbers = itertools.count()

_BOOT = "import sys; sys.path.insert(0, sys.argv[3]); from gym_bus.sandbox.zygote import main; main()"


class LevelRefused(SandboxRefused):
    """The kernel or a container does not give what a level needs; a lower one may still be had."""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended, as seen from outside of it."""

    status: int
    """As `wait` gives it."""
    timed_out: bool = False
    began: bool = True
    """Whether it came as far as the program's own text, and to its compilation."""
    compiled: bool = True
    fault: str = ""
    """Why it could not be set up."""
    first: bool = False
    """It was the first process of a PID namespace, which SIGKILL reaches only from outside."""
    lowered: bool = False
    """Whether it had lowered its own limit of CPU time, past which the kernel kills."""
    starved: bool = False
    """Whether the kernel killed for want of memory."""
    dirty: bool = False
    """Whether the scratch folder resists; nothing may run there any more."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_rss_bytes: int = 0


class Socket:
    """One end of a socket of whole messages, in an event loop; one message is awaited at a time."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[bytes] | None = None
        self._arrived: deque[bytes] = deque()
        self._loop.add_reader(end.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = self._end.recv(zygote.MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._end.fileno())
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(data)
        else:
            self._arrived.append(data)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message with descriptors. Raises SandboxError where the other end is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._end.sendmsg([message], rights)
        except OSError as e:
            raise SandboxError(f"the zygote is gone: {e.strerror or e}") from None

    async def receive(self, limit_s: float) -> bytes:
        """The next message.

        Raises:
            SandboxError: the other end is gone, or silent for `limit_s` seconds.
        """
        if not self._arrived:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(limit_s, self._expire, self._waiter, limit_s)
            try:
                self._arrived.append(await self._waiter)
            finally:
                timer.cancel()
        if not self._arrived[0]:  # the end, and so it stays
            raise SandboxError("the zygote is gone")
        return self._arrived.popleft()

    @staticmethod
    def _expire(waiter: asyncio.Future[bytes], limit_s: float) -> None:
        if not waiter.done():
            waiter.set_exception(SandboxError(f"the zygote was silent for {limit_s:g} s"))

    def close(self) -> None:
        """The other end sees the end."""
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end.fileno())
            self._end.close()


class Zygote:
    """The process of a slot."""

    boot: ClassVar[str] = _BOOT
    """What its interpreter runs."""

    def __init__(
        self,
        preload: str,
        modules: Sequence[str] = (),
        *,
        names: str = "",
        optional: str = "",
        tools: bool = False,
        level: Level = Level.NAMESPACES,
    ) -> None:
        self._preload, self._modules, self._tools, self.level = preload, tuple(modules), tools, level
        self.packages = packages.find(preload, optional)
        """Installed packages that its programs may import."""
        self._resident_bytes = 0
        self.names = names
        """Text whose names its programs find."""
        self.disk_bytes = DEFAULT_LIMITS.disk_bytes
        """Of the scratch folder of the next process that is started."""
        self._scratch = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Socket | None = None
        self.group: MemoryGroup | None = None
        self._lost = False
        self.own_user = False
        """Whether programs run as a user of their own."""
        self.landlock = 0
        """Version of Landlock that holds programs, 0 where namespaces do."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return not self._lost and self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process that holds the zygote; killing it kills all of it."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start and lock in.

        Raises:
            LevelRefused: the kernel does not let us have the level; says what failed and what would mend it.
            SandboxError: it does not start for another reason.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lost = False
        self._control = Socket(ours)
        self.group = MemoryGroup.create()
        try:
            with theirs:
                self._process = _launch(self.boot, theirs, self._settings() | self._outside())
            if self.group:
                self.group.add(self._process.pid)
            await self._handshake()
            if self.group and self.packages.modules:
                self._resident_bytes = self.group.used_bytes()
        except (OSError, SandboxError) as e:
            await self.kill()
            refused = isinstance(e, LevelRefused)
            mend = f"; {advice.to_get(self.level)}" if refused else ""
            raise (LevelRefused if refused else SandboxError)(f"the sandbox cannot start: {e}{mend}") from None

    def _settings(self) -> dict[str, Any]:
        return {
            "interpreter": sys.base_prefix,
            "preload": self._preload,
            "packages": self.packages._asdict(),
            "modules": list(self._modules),
            "names": self.names,
            "module_paths": sorted({_root_of(name) for name in self._modules}),
            "disk_bytes": max(mmap.PAGESIZE, self.disk_bytes),  # 0 would be no limit to the kernel
            "forks": self.group is not None,
            "tools": self._tools,
            "level": self.level,
        }

    def _outside(self) -> dict[str, Any]:
        """The user and the working folder of programs that have no namespaces."""
        if self.level is Level.NAMESPACES:
            return {}
        user = _other_user()
        if user is None and os.geteuid() == 0:
            _refuse_root("no other user is to be had")
        try:
            _sweep_scratch()
            self._scratch = tempfile.mkdtemp(prefix=f"{_SCRATCH_PREFIX}{os.getpid()}-")
        except OSError as e:
            raise SandboxRefused(f"{e.strerror or e}; docker run --tmpfs /tmp gives one") from None
        if user:  # the zygote lays the files, the program's user reads them
            os.chown(self._scratch, user, user + 1)
            os.chmod(self._scratch, 0o750)  # noqa: PTH101
        self.own_user = user is not None
        return {"user": user, "scratch": self._scratch}

    async def _handshake(self) -> None:
        assert self._process
        assert self._control
        said = json.loads(await self._control.receive(START_LIMIT_S))
        if "unshared" in said:
            try:
                self.own_user = _map_ids(self._process.pid)
            except OSError as e:
                raise LevelRefused(f"uid_map: {e.strerror or e}") from None
            self._control.send(json.dumps({"ids": self.own_user}).encode())
            said = json.loads(await self._control.receive(START_LIMIT_S))
        if not said.get("ready"):
            why = str(said.get("error", "the zygote did not come up"))
            raise LevelRefused(why) if said.get("refused") else SandboxError(why)
        self.landlock = int(said["landlock"])

    def bound(self, memory_bytes: int) -> None:
        """Set the memory limit for what runs next."""
        if self.group:
            self.group.limit(memory_bytes + HEADROOM_BYTES + self._resident_bytes)

    def starved(self) -> bool:
        """Whether the kernel has killed for want of memory below the limit since this was asked last."""
        return self.group is not None and self.group.starved()

    def send(self, order: bytes, fds: Sequence[int]) -> None:
        """Have a program run; `ended` waits for its end.

        Args:
            order: `child.ORDER`, packed.
            fds: stdin, stdout, stderr, program, and a socket where the program gets one; ours may be closed then.

        Raises:
            SandboxError: the zygote is lost.
        """
        if self._control is None:
            raise SandboxError("the zygote is gone")
        try:
            self._control.send(order, fds)
        except SandboxError:
            self._lost = True
            raise

    async def ended(self, limit_s: float) -> Ending:
        """How the program that was sent has ended.

        Raises:
            SandboxError: the zygote is lost, or silent for longer than the limit; it is dead then.
        """
        if self._control is None:
            raise SandboxError("the zygote is gone")
        try:
            said = await self._control.receive(limit_s + GRACE_S)
        except (SandboxError, asyncio.CancelledError) as e:
            starved = self.starved()
            await self.kill()
            if starved and isinstance(e, SandboxError):
                return Ending(status=signal.SIGKILL, starved=True)
            raise
        status, timed_out, dirty, lowered, wall_s, cpu_s, rss = zygote.REPLY.unpack_from(said)
        words, starved = said[zygote.REPLY.size :], self.starved()
        began = words.startswith(child.BEGAN)
        if dirty or not began:  # whatever is wrong with it, a new one has it not
            log.warning("sandbox_replaced", pid=self.pid, dirty=bool(dirty), began=began)
            await self.kill()
        return Ending(
            status=status,
            timed_out=bool(timed_out),
            began=began,
            compiled=words != child.NOT_COMPILED,
            fault="" if began else words.removeprefix(child.NOT_SET_UP).decode(errors="replace"),
            first=self.level is Level.NAMESPACES,
            lowered=bool(lowered),
            starved=starved,
            dirty=bool(dirty),
            wall_s=wall_s,
            cpu_s=cpu_s,
            max_rss_bytes=rss,
        )

    async def kill(self) -> None:
        """End it with everything in it."""
        if self._control:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(_end, process)
        scratch, self._scratch = self._scratch, ""
        if scratch:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
        group, self.group = self.group, None
        if group:
            await _remove_group(group)


def _end(process: subprocess.Popen[bytes]) -> None:
    # Its end of the socket has closed, so it is ending what runs in it, and waits for that. Killed at once it would
    # leave its children to the init process, and in a container that is often a worker, which waits for none of them.
    try:
        process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


async def _remove_group(group: MemoryGroup) -> None:
    for _ in range(50):  # its processes are dying; an occupied group cannot be removed
        if group.remove():
            return
        await asyncio.sleep(0.02)


def _launch(boot: str, control: socket.socket, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    source_root = str(Path(__file__).resolve().parents[2])
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    # The interpreter's own start: isolated, no site packages, nothing of our environment.
    command = [interpreter, "-I", "-S", "-E", "-X", "utf8", "-c", boot, str(control.fileno()), json.dumps(settings)]
    return subprocess.Popen(
        [*command, source_root],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[control.fileno()],
        # Symbols are looked up once, by the zygote, not by each program.
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "LD_BIND_NOW": "1", **dict.fromkeys(zygote.ONE_THREAD, "1")},
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
        try:
            first = free_ids()
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(f"0 {first} {_IDS_PER_SLOT}\n")
            return True
        except (OSError, LevelRefused) as e:
            _refuse_root(str(e))
            log.info("sandbox_ids_shared", why=str(e))
    Path(f"/proc/{pid}/setgroups").write_text("deny")
    # 1, not 0, which the kernel treats as root in places even where it has no capabilities.
    Path(f"/proc/{pid}/uid_map").write_text(f"1 {os.geteuid()} 1\n")
    Path(f"/proc/{pid}/gid_map").write_text(f"1 {os.getegid()} 1\n")
    return False


def _refuse_root(why: str) -> None:
    """Raise LevelRefused where the user 0 is no other outside: limits do not hold for the machine's root."""
    if Path("/proc/self/uid_map").read_text().split()[:2] == ["0", "0"]:
        raise LevelRefused(f"programs would run as the machine's root: {why}")


def _next_ids(count: int) -> int:
    """Where, among `count` ids, the next slot's begin."""
    return (os.getpid() * 64 + next(_numbers)) * _IDS_PER_SLOT % count


def free_ids() -> int:
    """An id for the zygote, its programs' behind it, that nothing else is. Raises LevelRefused where there is none."""
    ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if any(start <= _FIRST_ID and start + count >= _FIRST_ID + _IDS for start, _, count in ranges):
        return _FIRST_ID + _next_ids(_IDS)
    start, _, count = max(ranges, key=lambda one: one[2])
    if count < _FEWEST_IDS:
        raise LevelRefused("this user namespace maps no ids that programs could have")
    return start + count // 2 + _next_ids(count // 2 - _IDS_PER_SLOT)  # accounts are at the lower end


def _other_user() -> int | None:
    """Who a zygote without namespaces is to be, its programs behind it; None where it can be nobody else."""
    if not advice.missing_capabilities():
        with contextlib.suppress(LevelRefused):
            return free_ids()
    return None


def _sweep_scratch() -> None:
    """Remove the folders of owners that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH_PREFIX}*"):
        owner = folder.name.removeprefix(_SCRATCH_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
