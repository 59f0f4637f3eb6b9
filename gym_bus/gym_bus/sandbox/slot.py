"""A slot: the right to run one program at a time, isolated. The owner's side; nothing here runs programs."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from gym_bus.errors import SandboxError, SandboxRefused, UsageError
from gym_bus.logs import get_logger
from gym_bus.sandbox import child, landlock, languages, zygote
from gym_bus.sandbox.api import DEFAULT_LIMITS, Ended, Limits, Outcome, Program
from gym_bus.sandbox.owner import GRACE_S, Ending, LevelRefused, Socket, Zygote
from gym_bus.sandbox.packages import find
from gym_bus.sandbox.protections import Facts, Level, Protection, describe

log = get_logger(__name__)

STDERR_BYTES = 64 * 1024
ADDRESS_FACTOR, ADDRESS_BASE, ADDRESS_PACKAGES = 2, 256 * 2**20, 2**30
"""Address space is a second line behind the cgroup: interpreters reserve more than they use."""
CPU_TICK_SHARE = 0.5
"""The kernel counts a limit in ticks: on a busy virtual machine a program that it killed has used as much as a quarter
less by its own finer account."""

_ADD_SEALS, _SEAL_SHRINK, _SEAL_GROW, _SEAL_SEAL = 1033, 2, 4, 1


def memfd(name: str, content: bytes) -> int:
    """A file in memory, to be read from its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    if content:
        os.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
    return fd


class Capture:
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
        return os.pread(self.fd, min(written, self._limit), 0) if written else b"", written > self._limit


class _Streams:
    """Input and outputs of one run."""

    def __init__(self, stdin: bytes, limits: Limits) -> None:
        self.out, self.err = Capture("stdout", limits.output_bytes), Capture("stderr", STDERR_BYTES)
        self.fds = [memfd("stdin", stdin), self.out.fd, self.err.fd]

    def close(self) -> None:
        """Give the memory back."""
        for fd in self.fds:
            os.close(fd)


@contextlib.contextmanager
def _streams(stdin: bytes, limits: Limits) -> Iterator[_Streams]:
    made = _Streams(stdin, limits)
    try:
        yield made
    finally:
        made.close()


class _Packed:
    """A program as its process reads it: the source, then arguments and files where there are any."""

    def __init__(self, program: Program, language: languages.Language | None, known: str) -> None:
        files, source = program.files, program.source
        if program.names not in ("", known):
            source = program.names.encode() + b"\n" + source
        header: dict[str, object] = {}
        if language is not None:
            files, source = {**files, language.file: source}, b""
            header = language.header()
            header["argv"] = [*language.command, *program.arguments]
        packed = b""
        if header or files or program.arguments:
            header |= {"arguments": program.arguments, "files": [(name, len(data)) for name, data in files.items()]}
            encoded = json.dumps(header).encode()
            packed = len(encoded).to_bytes(4, "little") + encoded + b"".join(files.values())
        self.sizes = (len(source), len(packed))
        self.fd = memfd("program", source + packed)


class Slot:
    """One place to run programs, isolated from the host and from each other; implements `Sandbox`."""

    def __init__(
        self, preload: str = zygote.PRELOAD, modules: Sequence[str] = (), names: str = "", packages: str = ""
    ) -> None:
        self._make = partial(Zygote, preload, modules, names=names, optional=packages)
        self._zygote = self._make()
        self._partner: Zygote | None = None
        self._tools: Zygote | None = None
        self._lock = asyncio.Lock()
        self._facts = Facts(level=Level.NAMESPACES, own_user=False, memory_group=0)
        self.lowered = ""
        """Why it has not the highest level, and what would mend it; empty where it has."""

    @classmethod
    async def start(
        cls,
        preload: str = zygote.PRELOAD,
        modules: Sequence[str] = (),
        *,
        names: str = "",
        packages: str = "",
        least: Level = Level.NAMESPACES,
    ) -> Slot:
        """A slot that is ready.

        Args:
            preload: modules to have imported before any program, space-separated: of the standard library, or of
                installed packages, which programs cannot import otherwise.
            modules: modules of the caller's that programs may import; they may use the standard library only.
            names: text whose names programs find without paying for it; see `Program.names`. It is the caller's own.
            packages: further installed distributions that programs may import, space-separated; not imported before,
                and not there where they are not installed.
            least: the lowest level that will do where the machine does not give the highest.

        Raises:
            UsageError: no installed package has a module of `preload`.
            SandboxRefused: this machine does not give `least`; the message says what failed and what would mend it.
            SandboxError: it does not start for another reason.
        """
        await asyncio.to_thread(find, preload, packages)  # it reads many small files, once for the whole process
        slot = cls(preload, modules, names, packages)
        try:
            slot._facts = _facts(await slot._first(least))
            await slot._self_test()
        except BaseException:  # also where the caller has given up: nobody else knows of the process
            await slot.close()
            raise
        return slot

    @property
    def level(self) -> Level:
        """How far programs are shut in."""
        return self._facts.level

    def protections(self) -> list[Protection]:
        """What is protected, and how."""
        return describe(self._facts)

    async def _first(self, least: Level) -> Zygote:
        """Come up with the highest level that the machine gives."""
        try:
            return await self._ready(self._zygote)
        except LevelRefused as e:
            self.lowered = str(e)
        if not Level.LANDLOCK.reaches(least):
            less = f"; or settle for less: verifier.sandbox_level={Level.LANDLOCK}, --least {Level.LANDLOCK}"
            raise SandboxRefused(self.lowered + (less if landlock.version() else ""))
        self._zygote.level = Level.LANDLOCK
        try:
            await self._ready(self._zygote)
        except LevelRefused as e:
            raise SandboxRefused(f"{self.lowered}. And {e}") from None
        log.info("sandbox_level_lowered", level=Level.LANDLOCK, why=self.lowered)
        return self._zygote

    async def _ready(self, zygote: Zygote, limits: Limits = DEFAULT_LIMITS) -> Zygote:
        """Have it run; another size of the scratch folder takes another process."""
        if not zygote.alive or zygote.disk_bytes != limits.disk_bytes:
            await zygote.kill()
            zygote.disk_bytes = limits.disk_bytes
            await zygote.start()
        return zygote

    async def _self_test(self) -> None:
        """Through the same path that programs take: what must be refused is, and an honest program passes."""
        source = _SELF_TEST + (_IN_NAMESPACES if self.level is Level.NAMESPACES else _UNDER_LANDLOCK)
        outcome = await self.run(Program(source=source), limits=Limits(wall_s=10, cpu_s=5))
        if outcome.stdout != b"held\n" or not outcome.ok:
            await self.close()
            said = (outcome.stdout + outcome.stderr).decode(errors="replace")[-500:]
            raise SandboxError(f"the sandbox does not hold on this machine: {said or outcome}")

    async def _zygote_for(self, language: languages.Language | None, limits: Limits) -> Zygote:
        if language is None:
            return await self._ready(self._zygote, limits)
        if self._tools is None:
            self._tools = Zygote("", tools=True)
        return await self._ready(self._tools, limits)

    async def run(self, program: Program, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """Run `program` once; see `Sandbox.run`."""
        if language := self._language(program):
            return (await self._run_cases(program, language, [stdin], limits, None))[0]
        async with self._lock:
            return await self._run(await self._ready(self._zygote, limits), program, stdin, limits)

    async def run_cases(
        self,
        program: Program,
        stdins: Sequence[bytes],
        limits: Limits = DEFAULT_LIMITS,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """Run `program` once per input; see `Sandbox.run_cases`."""
        language = self._language(program)
        if language is None and (len(stdins) == 1 or not self._forks):
            return await self._run_each(program, stdins, limits, go_on)
        return await self._run_cases(program, language, stdins, limits, go_on)

    async def _run_each(
        self,
        program: Program,
        stdins: Sequence[bytes],
        limits: Limits,
        go_on: Callable[[int, Outcome], bool] | None,
    ) -> list[Outcome]:
        """Each case as a program of its own: nothing that holds the program between them has to be able to fork."""
        outcomes: list[Outcome] = []
        for case, stdin in enumerate(stdins):
            outcomes.append(await self.run(program, stdin, limits))
            if go_on is not None and not go_on(case, outcomes[-1]):
                break
        return outcomes + [Outcome(ended=Ended.NOT_RUN)] * (len(stdins) - len(outcomes))

    def _language(self, program: Program) -> languages.Language | None:
        language = languages.find(program.language)
        for name in program.files:
            if name.startswith("/") or not set(name.split("/")).isdisjoint({"", ".", ".."}):
                raise UsageError(f"file {name!r}: expected a path below the program's working folder")
        if language is None:
            return None
        if not self._forks:
            raise SandboxRefused(
                f"this machine's sandbox runs Python only, not {program.language}: that needs level "
                f"{Level.NAMESPACES} and a memory cgroup; see gym-bus sandbox doctor"
            )
        if missing := language.missing():
            raise SandboxRefused(f"{program.language} needs {missing}, which is not on this machine: install it")
        return language

    @property
    def _forks(self) -> bool:
        """Whether programs may start processes: only where a cgroup bounds them all and a PID namespace ends them."""
        return self.level is Level.NAMESPACES and self._facts.memory_group > 0

    async def _run_cases(
        self,
        program: Program,
        language: languages.Language | None,
        stdins: Sequence[bytes],
        limits: Limits,
        go_on: Callable[[int, Outcome], bool] | None,
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        async with self._lock:
            more = True
            while more and len(outcomes) < len(stdins):  # again after a case that took the program's process with it
                batch = _Batch(await self._zygote_for(language, limits), program, language, limits)
                more = await batch.run(stdins, outcomes, go_on)
        return outcomes + [Outcome(ended=Ended.NOT_RUN)] * (len(stdins) - len(outcomes))

    async def run_pair(
        self, solution: Program, tester: Program, limits: Limits = DEFAULT_LIMITS
    ) -> tuple[Outcome, Outcome]:
        """Run two programs that can only talk; see `Sandbox.run_pair`."""
        for program in (solution, tester):
            if languages.find(program.language) is not None:
                raise UsageError(f"only Python programs can be joined, not {program.language}")
        async with self._lock:
            if self._partner is None:
                self._partner = self._make(level=self.level)
            first, second = await self._ready(self._zygote, limits), await self._ready(self._partner, limits)
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
        self, where: Zygote, program: Program, stdin: bytes, limits: Limits, joined: int | None = None
    ) -> Outcome:
        with _streams(stdin, limits) as streams:
            packed = _Packed(program, None, where.names)
            sent = [packed.fd, *([joined] if joined is not None else [])]
            try:
                where.bound(limits.memory_bytes)
                where.send(_order(child.ONE, limits, where, None, packed.sizes), [*streams.fds, *sent])
            finally:
                for fd in sent:  # at once: a peer must see the end when the program closes its side
                    os.close(fd)
            return _outcome(await where.ended(limits.wall_s), limits, streams)

    async def run_joined(self, program: Program, end: socket.socket, limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """Run a Python program that has `end` as descriptor 3; ours is closed. Cancelled, it ends the program.

        Raises:
            SandboxError: the sandbox itself failed.
        """
        async with self._lock:
            return await self._run(await self._ready(self._zygote, limits), program, b"", limits, end.detach())

    async def close(self) -> None:
        """End the zygotes."""
        for held in (self._zygote, self._partner, self._tools):
            if held is not None:
                await held.kill()


def _facts(first: Zygote) -> Facts:
    group = first.group.version if first.group else 0
    return Facts(level=first.level, own_user=first.own_user, memory_group=group, landlock=first.landlock)


def _order(
    kind: int, limits: Limits, where: Zygote, language: languages.Language | None, sizes: tuple[int, int]
) -> bytes:
    bounded = where.group is not None
    address = limits.memory_bytes * (ADDRESS_FACTOR if bounded else 1) + ADDRESS_BASE
    if where.packages.modules or (bounded and where.packages.folders):  # what is preloaded takes its own in any case
        address += ADDRESS_PACKAGES
    if language is not None and not language.bounded_address_space and bounded:
        address = 0
    file_bytes = max(limits.file_bytes, limits.output_bytes + STDERR_BYTES)
    return child.ORDER.pack(kind, limits.wall_s, limits.cpu_s, address, file_bytes, limits.processes, *sizes)


class _Batch:
    """One process that holds a program and runs it case by case, each in a process of its own."""

    def __init__(self, where: Zygote, program: Program, language: languages.Language | None, limits: Limits) -> None:
        self._where, self._program, self._language, self._limits = where, program, language, limits

    async def run(
        self, stdins: Sequence[bytes], outcomes: list[Outcome], go_on: Callable[[int, Outcome], bool] | None
    ) -> bool:
        """Run the cases that have no outcome yet; whether more may be run, in a new process, when this one is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cases = Socket(ours)
        with _streams(b"", self._limits) as streams:
            try:
                self._send(theirs, streams)
                for case in range(len(outcomes), len(stdins)):
                    outcome, usable = await self._case(cases, stdins[case], streams)
                    outcomes.append(outcome)
                    more = go_on is None or go_on(case, outcome)
                    if not usable:
                        return more
                    if not more:
                        break
            except BaseException:
                await self._where.kill()
                raise
            finally:
                cases.close()
            await self._where.ended(GRACE_S)
        return False

    def _send(self, theirs: socket.socket, streams: _Streams) -> None:
        packed = _Packed(self._program, self._language, self._where.names)
        try:
            self._where.bound(self._limits.memory_bytes)
            order = _order(child.CASES, self._limits, self._where, self._language, packed.sizes)
            self._where.send(order, [*streams.fds, packed.fd, theirs.fileno()])
        finally:
            os.close(packed.fd)
            theirs.close()

    async def _case(self, cases: Socket, stdin: bytes, whole: _Streams) -> tuple[Outcome, bool]:
        """One case, and whether the process can run another."""
        limits = self._limits
        build_s = limits.wall_s if self._language is not None and self._language.build else 0.0
        with _streams(stdin, limits) as streams:
            try:
                cases.send(b"run", streams.fds)
                said = await cases.receive(limits.wall_s + build_s + GRACE_S)
            except SandboxError:
                cases.close()
                return self._gone(await self._where.ended(GRACE_S), whole), False
            status, timed_out, dirty, wall_s, cpu_s, rss = child.CASE.unpack(said)
            ending = Ending(
                status=status,
                timed_out=bool(timed_out),
                starved=self._where.starved(),
                wall_s=wall_s,
                cpu_s=cpu_s,
                max_rss_bytes=rss,
            )
            outcome = _outcome(ending, limits, streams)
        if dirty:
            cases.close()
            await self._where.ended(GRACE_S)
        return outcome, not dirty

    def _gone(self, ending: Ending, whole: _Streams) -> Outcome:
        """What a case has that ended the program's process with it."""
        outcome = _outcome(ending, self._limits, whole)
        # It ignores what signals it can: it crashed, and all that it does with the program's text is to compile it.
        if outcome.ended in (Ended.MEMORY, Ended.CPU_LIMIT, Ended.COMPILE_ERROR, Ended.SIGNALLED):
            return outcome
        raise SandboxError(f"the process that held the program ended: {outcome.ended.value}")


def _outcome(ending: Ending, limits: Limits, streams: _Streams) -> Outcome:
    status = ending.status
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    cause = _cause(ending, limits, code, killed_by)
    stdout, cut = streams.out.read()
    stderr, _ = streams.err.read()
    if cut and cause in (None, Ended.WALL_LIMIT, Ended.CPU_LIMIT):  # it came to that limit first
        cause = Ended.OUTPUT_LIMIT
    elif cause is None:
        cause = _own_end(code, killed_by, stderr)
    return Outcome(
        ended=cause,
        exit_code=code,
        signal=killed_by,
        stdout=stdout,
        stderr=stderr,
        wall_s=ending.wall_s,
        cpu_s=ending.cpu_s,
        max_rss_bytes=ending.max_rss_bytes,
    )


def _cause(ending: Ending, limits: Limits, code: int | None, killed_by: int | None) -> Ended | None:
    """What ended the program from outside; None where it ended by itself. Raises SandboxError where it never began."""
    if ending.starved:
        return Ended.MEMORY
    if not ending.began:
        why = ending.fault or f"it ended before it began ({'exit ' + str(code) if code is not None else killed_by})"
        raise SandboxError(f"the program could not be set up: {why}")
    if killed_by in (signal.SIGKILL, signal.SIGXCPU) and ending.cpu_s >= CPU_TICK_SHARE * limits.cpu_s:
        return Ended.WALL_LIMIT if ending.timed_out else Ended.CPU_LIMIT
    if ending.timed_out:
        return Ended.WALL_LIMIT
    if not ending.compiled:
        return Ended.COMPILE_ERROR
    if ending.first and killed_by == signal.SIGKILL:
        if not ending.lowered:
            _check_killer(ending, limits)
        return Ended.CPU_LIMIT
    return Ended.CPU_LIMIT if ending.cpu_s > limits.cpu_s else None


def _check_killer(ending: Ending, limits: Limits) -> None:
    """Raise SandboxError where the kernel cannot have killed for CPU time, by its coarse account, so early."""
    if ending.wall_s * (os.cpu_count() or 1) < CPU_TICK_SHARE * limits.cpu_s:
        raise SandboxError("the program was killed from outside, by the machine's own lack of memory or by hand")


def _own_end(code: int | None, killed_by: int | None, stderr: bytes) -> Ended:
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
refused("a signal to another process", lambda: os.kill(os.getppid() or 2, 0))
if set(os.environ) - {"HOME", "PATH", "LANG", "TMPDIR"}:
    raise SystemExit("not refused: the host's environment")
if any(os.path.exists("/dev/fd/%d" % fd) for fd in range(3, 20)):
    raise SystemExit("not refused: inherited descriptors")
for fd in range(3, 64):
    refused("descriptor %d" % fd, lambda: os.fstat(fd))
"""
_IN_NAMESPACES = b"""
refused("a signal to another process", lambda: os.kill(2, 0))
open("/tmp/mine", "w").close()
print("held")
"""
_UNDER_LANDLOCK = b"""
refused("a file of its own", lambda: open("mine", "w"))
refused("a look at the host's files", lambda: os.listdir("/tmp"))
refused("a second process", os.fork)
refused("a change of a file", lambda: os.chmod(os.__file__, 0o644))
refused("a signal to everyone", lambda: os.kill(-1, 0))
print("held")
"""
