"""Reads what an endpoint sends: whole, within bounds, and as UTF-8."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from gym_bus.admission import Admission
from gym_bus.errors import ModelError

MAX_REPLY_BYTES = 64 * 2**20
SMALL_REPLY_BYTES = 256 * 2**10
"""Of a reply so much is read at once; what goes on waits until there is room for all of it."""
LARGE_REPLIES_BYTES = 4 * MAX_REPLY_BYTES
"""What the replies of one model that are larger may take together while they are read."""

_HALF_PAIR = re.compile(
    rb"((?:[^\\]++|\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))++)"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
"""In JSON, as much as is in order, in the group; or the escape of half a surrogate pair, which is no character."""


class Reader:
    """Reads the replies of one model, large ones a few at a time."""

    def __init__(self) -> None:
        self._large = Admission(LARGE_REPLIES_BYTES // SMALL_REPLY_BYTES, LARGE_REPLIES_BYTES)

    async def read(self, reply: aiohttp.ClientResponse, ends_at: float) -> bytes:
        """The whole body as UTF-8, what is none replaced. Raises ModelError where it is larger than any answer.

        `ends_at` is by the loop's clock: until then a large reply waits for its room.
        """
        size = reply.content_length
        packed = "Content-Encoding" in reply.headers  # then its length says nothing of what comes out of it
        if size is not None and size <= SMALL_REPLY_BYTES and not packed:
            return _as_utf8(await reply.read())
        most = MAX_REPLY_BYTES if size is None or packed else size
        data = bytearray()
        if most <= MAX_REPLY_BYTES and not await _filled(data, SMALL_REPLY_BYTES, reply):
            return _as_utf8(bytes(data))
        if most <= MAX_REPLY_BYTES:
            async with self._room(most, ends_at):
                if not await _filled(data, MAX_REPLY_BYTES, reply):
                    return _as_utf8(bytes(data))
        raise ModelError(f"{reply.url}: the reply is larger than {MAX_REPLY_BYTES >> 20} MiB", reply.status)

    @asynccontextmanager
    async def _room(self, size: int, ends_at: float) -> AsyncIterator[None]:
        """Room for a large reply; the wait for it counts as a wait for the endpoint."""
        async with asyncio.timeout_at(ends_at) as waiting, self._large.place(size):
            waiting.reschedule(None)
            yield


async def _filled(data: bytearray, most: int, reply: aiohttp.ClientResponse) -> bool:
    """Add what comes to `data`; true once that is more than `most`, false at the reply's end."""
    async for chunk in reply.content.iter_any():
        data += chunk
        if len(data) > most:
            return True
    return False


def _as_utf8(data: bytes) -> bytes:
    """What is no UTF-8 replaced: a server cut a character in two, and the answer is still the model's."""
    if b"\\ud" in data or b"\\uD" in data:
        data = _HALF_PAIR.sub(lambda found: found[1] or b"\\ufffd", data)
    if data.isascii():
        return data
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="replace").encode()
    return data
