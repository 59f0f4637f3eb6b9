"""The sandbox as its callers see it: run a program under limits, get back what it did and why it ended."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from gym_bus.errors import SandboxError, SandboxRefused


class Ended(enum.StrEnum):
    """The one cause of a program's end."""

    FINISHED = "finished"
    """It exited by itself; `exit_code` says how."""
    WALL_LIMIT = "wall_limit"
    CPU_LIMIT = "cpu_limit"
    """Of all its processes together, those that it left running included; the wall limit bounds these sooner."""
    MEMORY = "memory"
    """Its processes together were at the limit and one was killed, or it gave up with a MemoryError."""
    OUTPUT_LIMIT = "output_limit"
    """It wrote more to standard output than is kept, however it ended then."""
    SIGNALLED = "signalled"
    """Killed by a signal of its own making, as a crash is; `signal` says which. A program's first process is the first
    of its PID namespace, so a signal that it sends itself with `kill` has no effect."""
    COMPILE_ERROR = "compile_error"
    """The program's text is no valid program."""
    NOT_RUN = "not_run"
    """An earlier case of the same batch failed and the caller asked to stop there."""
    REFUSED = "refused"
    """It was not started: this machine's sandbox does not run it. Raised as SandboxRefused, never in an Outcome."""
    SANDBOX_LOST = "sandbox_lost"
    """The sandbox failed under it: nothing is known of it. Raised as SandboxError, never in an Outcome."""

    @classmethod
    def of(cls, error: SandboxError) -> Ended:
        """What a program that ended on `error` has to show for it."""
        return cls.REFUSED if isinstance(error, SandboxRefused) else cls.SANDBOX_LOST


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one program may use. They hold for all its processes together."""

    wall_s: Annotated[float, Meta(gt=0)] = 12.0
    """Wall-clock seconds per case. CPU decides 'too slow'; the wall limit catches programs that sleep. One that
    takes longer than that to be set up has the same time again."""
    cpu_s: Annotated[float, Meta(gt=0)] = 10.0
    """CPU seconds per case. A process that uses up the whole seconds is killed; what they use together is counted."""
    memory_bytes: Annotated[int, Meta(gt=0)] = 512 * 2**20
    processes: Annotated[int, Meta(ge=1)] = 64
    output_bytes: Annotated[int, Meta(ge=0)] = 2**20
    """Of standard output; standard error is cut at 64 KiB."""
    disk_bytes: Annotated[int, Meta(ge=0)] = 64 * 2**20
    """Of the private scratch folder, in whole pages; another size than before takes a fresh zygote, 50 ms."""
    file_bytes: Annotated[int, Meta(ge=0)] = 64 * 2**20
    """Of any single file."""


DEFAULT_LIMITS = Limits()


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """What to run."""

    source: bytes
    """UTF-8 text of the program."""
    language: str = "python"
    arguments: tuple[str, ...] = ()
    files: dict[str, bytes] = {}
    """Relative name to content, laid into the scratch folder before the start."""
    names: str = ""
    """Python text whose names the program finds, as if it began with it. It costs every program its time, but for those
    of a slot that was started with this very text: it ran there once, and its names are like built-in ones."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of a program did. Everything in it was observed from outside the program."""

    ended: Ended
    exit_code: int | None = None
    signal: int | None = None
    stdout: bytes = b""
    """Cut at the limit. Decode with errors="replace"."""
    stderr: bytes = b""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    max_rss_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether it exited by itself with status 0."""
        return self.ended is Ended.FINISHED and self.exit_code == 0


class Sandbox(Protocol):
    """One place where one program runs at a time, isolated from the host and from every other program."""

    async def run(self, program: Program, stdin: bytes = b"", limits: Limits = DEFAULT_LIMITS) -> Outcome:
        """Run `program` once.

        Raises:
            SandboxError: the sandbox itself failed; nothing is known about the program.
            SandboxRefused: this machine's sandbox does not run such a program; another's may.
            UsageError: no machine's does: the language is unknown, or a file would lie outside the scratch folder.
        """
        ...

    async def run_cases(
        self,
        program: Program,
        stdins: Sequence[bytes],
        limits: Limits = DEFAULT_LIMITS,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """Run `program` once per entry of `stdins`, each in processes of its own; outcomes in the same order.

        `go_on(case, outcome)` is asked outside the sandbox after each case; when it says False, the cases after it
        are `NOT_RUN`.
        """
        ...

    async def run_pair(
        self, solution: Program, tester: Program, limits: Limits = DEFAULT_LIMITS
    ) -> tuple[Outcome, Outcome]:
        """Run the tester's and the solution's programs in two separate sandboxes joined by one stream socket.

        The tester finds its end as file descriptor 3, the solution finds its own as file descriptor 3. Neither can
        see the other's memory, files or processes: only bytes cross, so the tester's expected values and verdict
        are out of the solution's reach. Returns (solution outcome, tester outcome).
        """
        ...
