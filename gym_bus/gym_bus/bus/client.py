"""The NATS client, made to stop where its caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

import nats.aio.client
import nats.errors
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT
from nats.aio.msg import Msg

T = TypeVar("T")

CANCEL_AGAIN_S = 0.1
STEPS_TO_SEE_AN_END = 5
"""Of the loop: in so many a process that stood still finds out that its connection has ended meanwhile, and what it
asks is kept for the next one."""


async def heeding_cancellation(call: Awaitable[T]) -> T:
    """What `call` returns, unless the task was cancelled meanwhile.

    The client waits by `asyncio.wait_for`, which in Python 3.11 drops a cancellation that comes together with the
    answer, and for room in its buffer in a way that drops every one. A cancellation from before, of which the task is
    cleaning up, does not count, nor one that a timeout inside of `call` has made and taken back.
    """
    task = asyncio.current_task()
    assert task, "called outside of a task"
    before = task.cancelling()
    try:
        return await call
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


class NoTLS(nats.errors.Error):
    """A server would be spoken to in clear."""


class Client(nats.aio.client.Client):
    """The same client; where a call may swallow a cancellation, it does not."""

    async def connect(self, *args: Any, **options: Any) -> None:
        """See the base class. Where this is cancelled nothing stays connected."""
        connecting = asyncio.ensure_future(super().connect(*args, **options))
        try:
            await asyncio.wait({connecting})
        except asyncio.CancelledError:
            try:
                while not connecting.done():  # it goes on with the next try where it swallows one
                    connecting.cancel()
                    await asyncio.wait({connecting}, timeout=CANCEL_AGAIN_S)
            finally:
                connecting.cancel()
            if not connecting.cancelled() and not connecting.exception():
                await self.close()
            raise
        connecting.result()

    async def request(self, *args: Any, **options: Any) -> Msg:
        """See the base class."""
        for _ in range(STEPS_TO_SEE_AN_END):
            await asyncio.sleep(0)
        return await heeding_cancellation(super().request(*args, **options))

    async def flush(self, timeout: int = DEFAULT_FLUSH_TIMEOUT) -> None:  # noqa: ASYNC109 - its signature
        """See the base class."""
        await heeding_cancellation(super().flush(timeout))

    async def close(self) -> None:
        """See the base class."""
        await heeding_cancellation(super().close())

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Private, but the one place between what a server says of itself and the password that is sent to it.
        server = self._current_server
        if initial_connection and server and server.uri.scheme == "tls" and not info.get("tls_required"):
            raise NoTLS("the server does not offer TLS, which tls:// demands")
        await super()._process_info(info, initial_connection)

    def _flush_pending(self, force_flush: bool = False) -> Coroutine[Any, Any, Any]:
        # Private, but all that `publish` may wait for, and too often called itself to be looked after.
        flushing = super()._flush_pending(force_flush)
        return heeding_cancellation(flushing) if force_flush else flushing
