"""The `python` tool: a Python session per rollout, in a sandbox of its own, that keeps its variables between calls."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import msgspec

from gym_bus.agents.tools import ToolError
from gym_bus.errors import SandboxError
from gym_bus.logs import get_logger
from gym_bus.messages import RolloutId
from gym_bus.sandbox.api import Limits
from gym_bus.sandbox.protections import Level
from gym_bus.sandbox.session import DEFAULT_SESSION_LIMITS, Answer, Session

log = get_logger(__name__)

MOST_CODE_BYTES = 2**20

_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
"""Rights to a session. A worker process has one event loop, and toolboxes know nothing else that they share."""


class PythonTool:
    """`python(code)`: what the code printed, then the value of its last expression or its traceback.

    A data set names the tool in `responses_create_params.tools`:

        {"type": "function", "name": "python", "strict": true,
         "description": "Run Python code. Variables are kept between calls. Returns what was printed and the value of "
                        "the last expression. There is no network, and only the standard library.",
         "parameters": {"type": "object", "additionalProperties": false, "required": ["code"],
                        "properties": {"code": {"type": "string", "description": "Python source code."}}}}

    The session starts with the first call: no network, none of the host's files, and a scratch folder `/tmp` that lasts
    as long as the session. Processes that a call leaves running are ended with it; threads go on. A call over its
    limit, too much memory and a crash end the session: the model is told, and its next call starts a fresh one.
    Settings are class attributes: another package changes them in a subclass, registered under a name of its own.
    """

    call_limit_s: ClassVar[float] = 10.0
    """Wall-clock seconds of one call; also the longest that a first call waits for one of the `most_sessions`."""
    idle_limit_s: ClassVar[float] = 300.0
    """Seconds without a call after which a session ends."""
    most_sessions: ClassVar[int] = 64
    """At the same time in one worker process; the first toolbox that is used decides."""
    limits: ClassVar[Limits] = DEFAULT_SESSION_LIMITS
    sandbox_level: ClassVar[Level] = Level.NAMESPACES
    """The lowest level of isolation that will do; `landlock`, for machines without namespaces, gives no `/tmp`."""
    packages: ClassVar[str] = "numpy scipy sympy pandas"
    """Packages that sessions may import where they are installed beside gym_bus, separated by spaces."""
    preload: ClassVar[str] = ""
    """Further modules, of such packages or of the standard library, that sessions find imported already."""

    def __init__(self, row: Mapping[str, msgspec.Raw], rollout: RolloutId) -> None:
        del row
        self._rollout = rollout
        self._lock = asyncio.Lock()
        self._session: Session | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._lost = ""
        self._closed = False

    def names(self) -> tuple[str, ...]:
        """The one tool."""
        return ("python",)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run `arguments["code"]`; calls of one rollout run one after the other.

        Raises:
            ToolError: there is no code, no session is free, or none can be started.
        """
        del name
        code = arguments.get("code")
        if not isinstance(code, str):
            raise ToolError("argument 'code' must be a string")
        if len(code) > MOST_CODE_BYTES:
            raise ToolError(f"argument 'code' is longer than {MOST_CODE_BYTES} characters")
        async with self._lock:
            return await self._call(code)

    async def _call(self, code: str) -> str:
        self._stop_clock()
        session = await self._ready()
        lost, self._lost = self._lost, ""
        try:
            answer = await session.call(code, self.call_limit_s)
        except BaseException:  # the caller has given up, or we are short of something: the code may still run
            await self._end("the last call was given up")
            raise
        if answer.over:
            await self._end(answer.over)
        else:
            self._start_clock()
        return _text(answer, lost)

    async def _ready(self) -> Session:
        """The session, a fresh one where there is none."""
        if self._session is not None and self._session.over:
            await self._end(await self._session.last_words())
        if self._session is None and not self._closed:
            self._session = await self._started()
        if self._session is None or self._closed:
            await self._end("")
            raise ToolError("the rollout is over")
        return self._session

    async def _started(self) -> Session:
        await self._take_place()
        try:
            return await Session.start(
                self.limits, preload=self.preload, packages=self.packages, least=self.sandbox_level
            )
        except BaseException as e:
            self._place().release()
            if not isinstance(e, SandboxError):
                raise
            log.warning("python_session_not_started", rollout=str(self._rollout), why=str(e))
            raise ToolError(f"no Python session could be started: {e}") from None

    def _place(self) -> asyncio.Semaphore:
        return _places.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.most_sessions))

    async def _take_place(self) -> None:
        try:
            async with asyncio.timeout(self.call_limit_s):
                await self._place().acquire()
        except TimeoutError:
            raise ToolError(
                f"no Python session was free within {self.call_limit_s:g} s; nothing was run, try again"
            ) from None

    async def _end(self, why: str) -> None:
        """End the session, if there is one, and remember what to tell the model at its next call."""
        session, self._session = self._session, None
        if session is None:
            return
        self._lost = why
        try:
            await session.close()
        finally:
            self._place().release()

    def _start_clock(self) -> None:
        self._clock = asyncio.get_running_loop().call_later(self.idle_limit_s, self._expire)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _expire(self) -> None:
        self._expiring = asyncio.create_task(self._end_idle(self._clock))

    async def _end_idle(self, clock: asyncio.TimerHandle | None) -> None:
        async with self._lock:
            if self._clock is clock:  # no call came in between
                await self._end(f"there was no call for {self.idle_limit_s:g} s")

    async def close(self) -> None:
        """End the session, also under a call that runs."""
        self._closed = True
        self._stop_clock()
        if self._session is not None:
            await self._session.close()
        async with self._lock:  # a call that was just starting a session sees that it is closed, and gives it back
            self._stop_clock()
            await self._end("")


def _text(answer: Answer, lost: str) -> str:
    """What the model reads; notes that are not the code's output stand in brackets on lines of their own."""
    parts = [f"[This is a fresh session, earlier variables are lost: {lost}.]" if lost else "", answer.printed]
    if answer.cut:
        parts.append("[Output cut: only its beginning is shown.]")
    parts.append(answer.result)
    if answer.over:
        parts.append(
            f"[The session has ended: {answer.over}. Its variables are lost; the next call starts a fresh session.]"
        )
    text = "\n".join(part.removesuffix("\n") for part in parts if part)
    return text or "[No output.]"
