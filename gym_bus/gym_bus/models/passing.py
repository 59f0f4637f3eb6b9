"""Reads what a reply took while it passes through to somebody else."""

from __future__ import annotations

import msgspec

from gym_bus.messages import Usage
from gym_bus.models.wire import passing_decoder


class PassingUsage:
    """The usage that a body says, be it one JSON object or a stream of events. What cannot be read is unknown."""

    def __init__(self, *, chat: bool, events: bool) -> None:
        """Nothing has passed yet.

        Args:
            chat: the Chat Completions API, else the Responses API.
            events: server-sent events, of which the last one with a usage counts; only one line is held at a time.
        """
        self._chat, self._events = chat, events
        self._line: list[bytes] = []
        self._found: Usage | None = None

    def passes(self, chunk: bytes) -> None:
        """The next piece of the body, cut anywhere."""
        if not self._events or b"\n" not in chunk:
            self._line.append(chunk)
            return
        *lines, rest = b"".join((*self._line, chunk)).split(b"\n")
        self._line = [rest]
        for line in lines:
            self._look(line)

    def ends(self) -> Usage | None:
        """Nothing more comes: what the reply took, None where it does not say."""
        self._look(b"".join(self._line))
        self._line = []
        return self._found

    def _look(self, text: bytes) -> None:
        if b'"usage"' not in text:  # nearly all events of a stream
            return
        try:
            reply = passing_decoder.decode(text.removeprefix(b"data:"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        self._found = reply.plain_usage(chat=self._chat) or self._found
