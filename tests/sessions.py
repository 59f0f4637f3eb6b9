"""Sandboxes seen from outside: their processes, and calls of sessions whose time begins when their code says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from conftest import until

from gym_bus.sandbox.session import Session

SAYS_SO = "import _thread, time\n_thread.start_new_thread(time.sleep, (600,))\n"
"""To whoever looks from outside: what stands before it was run, and the process has a second thread."""


def alive(process: psutil.Process) -> bool:
    """A zombie is not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def with_children(processes: list[psutil.Process]) -> list[psutil.Process]:
    """These and all that they have started, as far as they are still there."""
    found = list(processes)
    for process in filter(alive, processes):
        try:
            found += process.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return found


@contextmanager
def time_begins_when_it_says_so() -> Iterator[None]:
    """Within it, the limit of a session's call counts from when its code has come to `SAYS_SO`."""
    receive = Session._receive

    async def receive_then(session: Session, limit_s: float) -> bytes | None:
        await until(lambda: _threads(session) > 1)
        return await receive(session, limit_s)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "_receive", receive_then)
        yield


def _threads(session: Session) -> int:
    processes = psutil.Process(session._slot._zygote.pid).children(recursive=True)
    return max((process.num_threads() for process in processes), default=0)
