"""A Python session: an interpreter in a slot of its own that runs code call by call. The owner's side.

What comes back was written by the code in the session or could have been: it is bounded and is only ever text. Limits
and the session's end are observed and enforced from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import msgspec

from gym_bus.errors import SandboxError
from gym_bus.sandbox import session_side
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program
from gym_bus.sandbox.protections import Level
from gym_bus.sandbox.slot import Capture, Slot, memfd
from gym_bus.sandbox.zygote import PRELOAD

DEFAULT_SESSION_LIMITS = Limits(wall_s=24 * 3600.0, cpu_s=600.0, output_bytes=0)
"""Of a whole session. CPU seconds are counted per process, and what runs between two calls counts too."""
PRINTED_BYTES = 16 * 1024
"""Of what one call prints, standard output and error together."""
DEATH_S = 10.0
"""How long a session may take to be seen dead after its socket has closed, on a machine that stands still at times."""

_MODULE = session_side.__name__
_PROGRAM = Program(source=f"from {_MODULE} import main; main()".encode())
_MOST_BYTES = session_side.NONCE_BYTES + 2 * session_side.RESULT_BYTES


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one call has to show."""

    printed: str
    """Standard output and error, in the order in which they were written."""
    cut: bool
    """Whether more was printed than is kept."""
    result: str = ""
    """The last expression's value or the traceback."""
    over: str = ""
    """Why the session has ended, part of a sentence; empty where it goes on."""


class _Files:
    """A call's code, and what it prints."""

    def __init__(self, code: str) -> None:
        self._output = Capture("printed", PRINTED_BYTES)
        self.fds = (memfd("code", code.encode(errors="replace")), self._output.fd)

    def answer(self, result: bytes = b"", over: str = "") -> Answer:
        printed, cut = self._output.read()
        return Answer(
            printed=printed.decode(errors="replace"), cut=cut, result=result.decode(errors="replace"), over=over
        )


@contextlib.contextmanager
def _files(code: str) -> Iterator[_Files]:
    made = _Files(code)
    try:
        yield made
    finally:
        for fd in made.fds:
            os.close(fd)


class Session:
    """One namespace that lasts from call to call. To be closed by who started it."""

    def __init__(self, slot: Slot, limits: Limits) -> None:
        self._slot, self._limits = slot, limits
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.setblocking(False)
        self._ran = asyncio.create_task(slot.run_joined(_PROGRAM, theirs, limits))
        self._lock = asyncio.Lock()

    @classmethod
    async def start(
        cls,
        limits: Limits = DEFAULT_SESSION_LIMITS,
        *,
        preload: str = "",
        packages: str = "",
        least: Level = Level.NAMESPACES,
    ) -> Session:
        """A session that is ready; takes a twentieth of a second and about 10 MB.

        Args:
            limits: of the whole session.
            preload: further modules to have imported before, as for `Slot.start`.
            packages: installed distributions that it may import, as for `Slot.start`.
            least: the lowest level that will do.

        Raises:
            UsageError: no installed package has a module of `preload`.
            SandboxRefused: this machine does not give the level `least`.
            SandboxError: the sandbox failed.
        """
        slot = await Slot.start(f"{PRELOAD} {preload}", [_MODULE], packages=packages, least=least)
        try:
            return cls(slot, limits)
        except OSError as e:  # no descriptor is left
            await slot.close()
            raise SandboxError(f"no session can be made: {e}") from None

    @property
    def over(self) -> bool:
        """Whether it has ended; `last_words` says why."""
        return self._ran.done()

    async def call(self, code: str, limit_s: float) -> Answer:
        """Run code; one call at a time, others wait.

        A session that runs over `limit_s` seconds, or whose caller is cancelled, is ended.
        """
        async with self._lock:
            with _files(code) as files:
                try:
                    return await self._call(files, limit_s)
                except BaseException:
                    await self._kill()
                    raise

    async def _call(self, files: _Files, limit_s: float) -> Answer:
        nonce = os.urandom(session_side.NONCE_BYTES)
        said: bytes | None = b""
        with contextlib.suppress(OSError):  # it is gone: what it left says why
            socket.send_fds(self._end, [nonce], list(files.fds))
            said = await self._receive(limit_s)
        if said is None:
            why = f"the call ran longer than {limit_s:g} s"
        elif said.startswith(nonce):
            return files.answer(said[len(nonce) :])
        else:
            why = "the code sent messages of its own over the session's socket" if said else await self.last_words()
        await self._kill()
        return files.answer(over=why)

    async def _receive(self, limit_s: float) -> bytes | None:
        """The next message, empty where the session is gone; None where the time was up."""
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._end.fileno(), _wake, readable)
        try:
            async with asyncio.timeout(limit_s):
                await readable
        except TimeoutError:
            return None
        finally:
            loop.remove_reader(self._end.fileno())
        return self._end.recv(_MOST_BYTES)

    async def last_words(self) -> str:
        """Why it has ended, part of a sentence."""
        await asyncio.wait([self._ran], timeout=DEATH_S)
        if not self._ran.done():
            return "the code closed the session's socket"
        if self._ran.cancelled():
            return "it was closed"
        try:
            return _why(self._ran.result(), self._limits)
        except SandboxError as e:
            return f"its sandbox failed: {e}"

    async def _kill(self) -> None:
        self._ran.cancel()
        await asyncio.gather(self._ran, return_exceptions=True)
        await self._slot.close()

    async def close(self) -> None:
        """End it with everything in it; a call that runs gets its answer. Nothing happens the second time."""
        await self._kill()
        async with self._lock:  # the call that ran needs its end of the socket until it has seen the other close
            self._end.close()


def _wake(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)


def _why(outcome: Outcome, limits: Limits) -> str:
    match outcome.ended:
        case Ended.MEMORY:
            return f"it used more than {limits.memory_bytes // 2**20} MiB of memory"
        case Ended.CPU_LIMIT:
            return f"it used more than {limits.cpu_s:g} s of CPU time"
        case Ended.WALL_LIMIT:
            return f"it was older than {limits.wall_s:g} s"
        case Ended.SIGNALLED:
            return f"the interpreter crashed ({_signal_name(outcome.signal or 0)})"
    return f"the code ended the interpreter, exit code {outcome.exit_code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
