"""Publishing with acks through one bounded window: cheaper than the client's own, and it survives a killed server."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import msgspec
import nats.errors
from nats.aio.msg import Msg

from gym_bus.admission import Admission
from gym_bus.bus.asking import trouble
from gym_bus.bus.client import Client
from gym_bus.errors import BusError, PayloadTooLarge
from gym_bus.settings import MiB

WINDOW_MESSAGES = 256
WINDOW_BYTES = 2 * MiB
"""More in flight makes the server slower, not faster (measured from 8 KiB bodies up)."""
REPUBLISH_S = 3.0
"""Seconds without an ack after which a message is sent again under the same id."""


class _PubError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _PubAck(msgspec.Struct):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _PubError | None = None


_pub_ack_decoder = msgspec.json.Decoder(_PubAck)


class Refused(BusError):
    """The broker does not take this message, and would not take it later either."""

    retryable = False


class _Unacked:
    """One published message whose ack has not come."""

    __slots__ = ("deadline", "future", "headers", "payload", "sent_at", "subject")

    def __init__(
        self, subject: str, payload: bytes, headers: dict[str, str], deadline: float, future: asyncio.Future[_PubAck]
    ) -> None:
        self.subject, self.payload, self.headers = subject, payload, headers
        self.deadline, self.future, self.sent_at = deadline, future, 0.0


class Publisher:
    """The ack window: one inbox, an integer token per message, a future per message, one sweeper for all deadlines."""

    def __init__(self, client: Client, limit_s: float) -> None:
        self._nc, self._limit_s = client, limit_s
        self._gate = Admission(WINDOW_MESSAGES, WINDOW_BYTES)
        self._unacked: dict[str, _Unacked] = {}
        self._token = 0
        self._inbox = client.new_inbox()
        self._sweeper: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Subscribe to the acks."""
        await self._nc.subscribe(f"{self._inbox}.*", cb=self._on_ack)
        self._sweeper = asyncio.create_task(self._sweep(), name="publish sweeper")

    async def close(self) -> None:
        """Give up on what is not acked; whoever waits for it gets a BusError."""
        if self._sweeper:
            self._sweeper.cancel()
        for entry in self._unacked.values():
            if not entry.future.done():
                entry.future.set_exception(Refused("the connection was closed before the broker acked"))
                entry.future.exception()  # whoever waits gets it; where nobody does, it is no unhandled error

    async def _on_ack(self, message: Msg) -> None:
        entry = self._unacked.get(message.subject.rpartition(".")[2])
        if entry is None or entry.future.done():
            return
        if not message.data:  # no responders: the stream or JetStream itself is not there, yet
            entry.sent_at = time.monotonic() - REPUBLISH_S + 0.2
            return
        entry.future.set_result(_pub_ack_decoder.decode(message.data))

    async def _send(self, token: str, entry: _Unacked) -> None:
        entry.sent_at = time.monotonic()
        with contextlib.suppress(nats.errors.OutboundBufferLimitError):  # disconnected: the sweeper sends it again
            await self._nc.publish(entry.subject, entry.payload, f"{self._inbox}.{token}", entry.headers)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            now = time.monotonic()
            for token, entry in list(self._unacked.items()):
                if entry.future.done():
                    continue
                if now > entry.deadline:
                    entry.future.set_exception(
                        BusError(f"no ack from the broker for {entry.subject} within {self._limit_s:g} s")
                    )
                elif now - entry.sent_at > REPUBLISH_S and self._nc.is_connected:
                    await self._send(token, entry)

    async def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> bool:
        """Publish until the broker has it. Returns False where it had it already.

        Raises:
            PayloadTooLarge: the stream does not take messages of this size.
            Refused: the stream refuses for a reason that waiting does not mend, or the connection was closed.
            BusError: no ack within the limit, or the stream was full for so long: worth going on.
        """
        await self._gate.enter(len(payload))
        self._token += 1
        token = str(self._token)
        deadline = time.monotonic() + self._limit_s
        try:
            while True:
                future: asyncio.Future[_PubAck] = self._loop.create_future()
                entry = self._unacked[token] = _Unacked(subject, payload, headers, deadline, future)
                await self._send(token, entry)
                ack = await future
                if ack.error is None:
                    return not ack.duplicate
                if not await self._refused(subject, ack.error, deadline):
                    return False
        except nats.errors.MaxPayloadError as e:
            raise PayloadTooLarge(f"{subject}: {len(payload)} bytes are more than the server takes") from e
        except (nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError) as e:
            raise Refused(f"{subject}: the connection is closed") from e
        except nats.errors.Error as e:
            raise trouble(subject, e) from e
        finally:
            self._unacked.pop(token, None)
            self._gate.leave(len(payload))

    async def _refused(self, subject: str, error: _PubError, deadline: float) -> bool:
        """Whether to publish again (after the wait that a full stream needs); False for a known duplicate."""
        # err_code 10077 has three meanings; only the description tells them apart.
        text = error.description
        if "per subject" in text:
            return False
        if "message too large" in text or "message size exceeds" in text:
            raise PayloadTooLarge(f"{subject}: {text}")
        if error.code not in (500, 503) and "exceeded" not in text:
            raise Refused(f"{subject}: the broker refused the message: {text}")
        if time.monotonic() > deadline:
            raise BusError(f"{subject}: the broker refused the message for {self._limit_s:g} s: {text}")
        await asyncio.sleep(random.uniform(0.02, 0.2))
        return True
