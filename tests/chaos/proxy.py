"""A TCP proxy that misbehaves on demand: it cuts, delays, stalls and refuses connections."""

from __future__ import annotations

import asyncio
import contextlib
import random

CHUNK_BYTES = 64 * 1024


class _Link:
    """One client's connection and ours to the target."""

    def __init__(self, writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        self.writers = writers
        self.flowing = asyncio.Event()
        self.flowing.set()

    def abort(self) -> None:
        self.flowing.set()
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Listens on a free loopback port and passes everything on to `target_port`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.delay_s = 0.0
        """Of every chunk, in both directions."""
        self.refusing = False

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        self.cut()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            there, to_there = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link((writer, to_there))
        self._links.add(link)
        try:
            await asyncio.gather(self._pump(link, reader, to_there), self._pump(link, there, writer))
        finally:
            self._links.discard(link)
            link.abort()

    async def _pump(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await link.flowing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
            await link.flowing.wait()  # of a stalled connection neither side learns that the other is gone
        link.abort()

    def cut(self, share: float = 1.0, drawn: random.Random | None = None) -> int:
        """Reset connections; returns how many."""
        return len([link.abort() for link in self._some(share, drawn)])

    def stall(self, share: float = 1.0, drawn: random.Random | None = None) -> int:
        """Leave connections open and pass nothing on, in both directions, until `flow`."""
        return len([link.flowing.clear() for link in self._some(share, drawn)])

    def _some(self, share: float, drawn: random.Random | None) -> list[_Link]:
        return [link for link in list(self._links) if drawn is None or drawn.random() < share]

    def flow(self) -> None:
        """Be a good proxy again: what was held goes through."""
        self.delay_s, self.refusing = 0.0, False
        for link in self._links:
            link.flowing.set()
