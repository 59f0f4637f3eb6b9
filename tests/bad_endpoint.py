"""A model endpoint on a bare socket, which may break any rule of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

import msgspec

from gym_bus.errors import FailureKind

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWER = {
    "object": "response",
    "status": "completed",
    "output": [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "\\boxed{A}"}]},
    ],
}
GOOD_BODY = msgspec.json.encode(ANSWER)
DRIP_S = 0.02
BEFORE_RESET_S = 0.02
"""In which what was sent gets through."""


class Fault(msgspec.Struct, frozen=True):
    """What is sent instead of an answer, and how it ends."""

    sent: bytes
    kind: FailureKind
    """What a call that gets nothing else fails with."""
    then: Literal["keep", "close", "reset", "hang", "repeat"] = "keep"
    """`keep` serves the connection's next request; `repeat` sends the `more` again and again."""
    more: bytes = b""
    every_s: float = DRIP_S


def reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


ERROR = FailureKind.MODEL_ERROR
TIMEOUT = FailureKind.MODEL_TIMEOUT
UNREACHABLE = FailureKind.MODEL_UNREACHABLE
LIMITED = FailureKind.RATE_LIMITED
REFUSED = FailureKind.REQUEST_REFUSED
HALF = OK + b"Content-Length: 1000\r\n\r\n" + GOOD_BODY

FAULTS: dict[str, Fault] = {
    "closes without a word": Fault(b"", UNREACHABLE, "close"),
    "resets without a word": Fault(b"", UNREACHABLE, "reset"),
    "closes within the headers": Fault(OK, UNREACHABLE, "close"),
    "hangs without a word": Fault(b"", TIMEOUT, "hang"),
    "hangs within the headers": Fault(OK, TIMEOUT, "hang"),
    "hangs after the headers": Fault(OK + b"Content-Length: 1000\r\n\r\n", TIMEOUT, "hang"),
    "hangs within the body": Fault(HALF, TIMEOUT, "hang"),
    "half a body": Fault(HALF, ERROR, "close"),
    "a reset within the body": Fault(HALF, ERROR, "reset"),
    "a body longer than it says": Fault(OK + b"Content-Length: 10\r\n\r\n" + GOOD_BODY, ERROR, "close"),
    "chunks that do not end": Fault(CHUNKED + chunk(GOOD_BODY), TIMEOUT, "hang"),
    "chunks that break off": Fault(CHUNKED + chunk(GOOD_BODY), ERROR, "close"),
    "chunks without a size": Fault(CHUNKED + b"zz\r\n{\r\n", ERROR, "close"),
    "a drip of headers": Fault(OK + b"X: ", TIMEOUT, "repeat", b"x"),
    "a drip of the body": Fault(OK + b"Content-Length: 100000\r\n\r\n", TIMEOUT, "repeat", b" "),
    "a drip of chunks": Fault(CHUNKED, TIMEOUT, "repeat", chunk(b" ")),
    "a drip of interim replies": Fault(b"", TIMEOUT, "repeat", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "a huge body": Fault(OK + b"Content-Length: 99999999999\r\n\r\n", ERROR, "hang"),
    "chunks without end": Fault(CHUNKED, ERROR, "repeat", chunk(b" " * 2**20), 0.0),
    "an empty body": Fault(reply(b""), ERROR),
    "no content": Fault(b"HTTP/1.1 204 No Content\r\n\r\n", ERROR),
    "no HTTP": Fault(b"SSH-2.0-OpenSSH_9.6\r\n", ERROR, "hang"),
    "no gzip": Fault(reply(GOOD_BODY, "Content-Encoding: gzip"), ERROR),
    "half a gzip": Fault(reply(gzip.compress(GOOD_BODY)[:60], "Content-Encoding: gzip"), ERROR),
    "a page": Fault(reply(b"<html><h1>Welcome</h1></html>"), ERROR),
    "half a JSON": Fault(reply(GOOD_BODY[:-20]), ERROR),
    "a deep JSON": Fault(reply(b'{"output": ' + b"[" * 100_000), ERROR),
    "another JSON": Fault(reply(b'{"answer": "A"}'), ERROR),
    "a number too large beside the answer": Fault(reply(GOOD_BODY[:-1] + b',"x":1e999}'), ERROR),
    "a number too long beside the answer": Fault(reply(GOOD_BODY[:-1] + b',"x":%b}' % (b"9" * 5000)), ERROR),
    "900 levels beside the answer": Fault(reply(GOOD_BODY[:-1] + b',"x":%b}' % (b"[" * 900 + b"]" * 900)), ERROR),
    "output of another shape": Fault(reply(b'{"output": "A"}'), ERROR),
    "output of numbers": Fault(reply(b'{"output": [1, 2]}'), ERROR),
    "an error with status 200": Fault(reply(b'{"error": {"message": "CUDA out of memory"}}'), ERROR),
    "an error in words with status 200": Fault(reply(b'{"error": "CUDA out of memory", "output": []}'), ERROR),
    "an error of an odd type with status 200": Fault(reply(b'{"error": {"type": ["x"], "code": {}}}'), ERROR),
    "an error of 900 levels": Fault(reply(b'{"error": %b}' % (b"[" * 900 + b"]" * 900)), ERROR),
    "an error of 900 levels with status 500": Fault(
        reply(b'{"error": %b}' % (b"[" * 900 + b"]" * 900), status="500 Internal Server Error"), ERROR
    ),
    "an answer that failed": Fault(reply(b'{"status": "failed", "output": []}'), ERROR),
    "an answer that was cancelled": Fault(reply(b'{"status": "cancelled", "output": []}'), ERROR),
    "an answer that is not ready": Fault(reply(b'{"status": "in_progress", "output": []}'), ERROR),
    "a rate limit with status 200": Fault(reply(b'{"error": {"type": "rate_limit_error"}}'), LIMITED),
    "a rate limit by number with status 200": Fault(reply(b'{"error": {"message": "wait", "code": 429}}'), LIMITED),
    "status 500": Fault(reply(b"{}", status="500 Internal Server Error"), ERROR),
    "status 502 with a page": Fault(reply(b"<html>Bad Gateway</html>", status="502 Bad Gateway"), ERROR),
    "status 503": Fault(reply(b"{}", status="503 Service Unavailable"), ERROR),
    "status 504": Fault(reply(b"{}", status="504 Gateway Timeout"), TIMEOUT),
    "status 429": Fault(reply(b"{}", status="429 Too Many Requests"), LIMITED),
    "status 429 for long": Fault(reply(b"{}", "Retry-After: 86400", status="429 Too Many Requests"), LIMITED),
    "status 429 for ever": Fault(reply(b"{}", "Retry-After: inf", status="429 Too Many Requests"), LIMITED),
    "a redirect": Fault(reply(b"", "Location: http://127.0.0.1:1/", status="307 Temporary Redirect"), ERROR),
    "a redirect to itself": Fault(reply(b"", "Location: /v1/responses", status="302 Found"), ERROR),
    "status 404": Fault(reply(b"{}", status="404 Not Found"), REFUSED),
}


class BadEndpoint:
    """Serves a fault or, where there is None, the answer; counts who asked."""

    def __init__(self, fault_of: Callable[[int], Fault | None]) -> None:
        """`fault_of` is given the task's index."""
        self._fault_of = fault_of
        self.asked: Counter[int] = Counter()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._serve_one(reader, writer):
                    pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; returns whether the connection goes on."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        await reader.readexactly(int(_header(head, "Content-Length") or 0))
        task = int((_header(head, "X-Gym-Rollout") or "job/0").split("/")[1])
        self.asked[task] += 1
        fault = self._fault_of(task)
        writer.write(fault.sent if fault else reply(GOOD_BODY))
        await writer.drain()
        if fault is None or fault.then == "keep":
            return True
        await _end(fault, writer)
        return False


async def _end(fault: Fault, writer: asyncio.StreamWriter) -> None:
    while fault.then in ("hang", "repeat"):
        writer.write(fault.more)
        await writer.drain()
        await asyncio.sleep(fault.every_s)
    if fault.then == "reset":
        await asyncio.sleep(BEFORE_RESET_S)
        no_linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)


def _header(head: str, name: str) -> str | None:
    found = re.search(rf"^{name}: *(.*?)\r$", head, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


@asynccontextmanager
async def bad_endpoint(fault_of: Callable[[int], Fault | None]) -> AsyncIterator[BadEndpoint]:
    """A listening endpoint."""
    endpoint = BadEndpoint(fault_of)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(endpoint.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1024)
    endpoint.port = server.sockets[0].getsockname()[1]
    try:
        yield endpoint
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
