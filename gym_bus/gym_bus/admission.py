"""A gate that bounds what is in hand, in count and in bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Admission:
    """A gate bounded in count and bytes; waiters pass in the order they came."""

    def __init__(self, count: int, size_bytes: int) -> None:
        self._count, self._bytes = count, size_bytes
        self._max_bytes = size_bytes
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def place(self, size: int) -> AsyncIterator[None]:
        """A place for `size` bytes, from when there is one until the end of the block."""
        await self.enter(size)
        try:
            yield
        finally:
            self.leave(size)

    async def enter(self, size: int) -> None:
        """Wait for a place for `size` bytes; who got it must `leave` with as many.

        What is larger than the whole bound passes alone.
        """
        if self._waiters or not self._fits(size):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((size, waiter))
            try:
                await waiter  # the place was taken for us by `_let_in`
            except asyncio.CancelledError:
                if waiter.cancelled():
                    self._let_in()  # those behind may fit where this one did not
                else:
                    self.leave(size)
                raise
            return
        self._count -= 1
        self._bytes -= size

    def leave(self, size: int) -> None:
        """Give a place back."""
        self._count += 1
        self._bytes += size
        if self._waiters:
            self._let_in()

    def _fits(self, size: int) -> bool:
        return self._count > 0 and (size <= self._bytes or self._bytes == self._max_bytes)

    def _let_in(self) -> None:
        while self._waiters and (self._waiters[0][1].done() or self._fits(self._waiters[0][0])):
            size, waiter = self._waiters.popleft()
            if not waiter.done():
                self._count -= 1
                self._bytes -= size
                waiter.set_result(None)
