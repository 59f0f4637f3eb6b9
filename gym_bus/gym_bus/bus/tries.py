"""How often a message was worked on, which is less often than the broker has delivered it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from gym_bus import subjects
from gym_bus.bus.pull import ID_HEADER, Delivery
from gym_bus.bus.topology import DELIVERIES
from gym_bus.deadline import within
from gym_bus.errors import BusError

if TYPE_CHECKING:
    from gym_bus.bus.publish import Publisher
    from gym_bus.bus.streams import Streams

HAND_BACK_LIMIT_S = 2.0
FREE_DELIVERIES = 2
"""A worker may be killed for any reason: so many deliveries of a message raise no suspicion, and nothing is noted."""


class Tries:
    """Notes on single deliveries, kept on the stream of advisories."""

    def __init__(self, publisher: Publisher, streams: Streams) -> None:
        self._publisher, self._streams = publisher, streams

    async def begin(self, delivery: Delivery) -> None:
        """Note that work on this delivery begins: should the worker die now, it counts. Raises BusError."""
        await self._note(delivery, "begun")

    async def hand_back(self, delivery: Delivery) -> None:
        """Return a leased message that this worker did not get done, through no fault of the message.

        The broker counts this delivery like any other, so it is noted beside (see `before`): first the note, then
        the nak. A crash in between costs the message one further try. A note that cannot be stored costs it one less.
        """
        with contextlib.suppress(BusError, TimeoutError):
            await within(HAND_BACK_LIMIT_S, self._note(delivery, "returned"))
        await delivery.nak()

    async def before(self, delivery: Delivery) -> int:
        """How many earlier deliveries of the message were worked on and came to no end.

        Of the first ones (`FREE_DELIVERIES`) every one counts that was not handed back: whether work on them began is
        not noted. A worker that died with a message still in its buffer makes no further try of it. A week's notes are
        known. Raises BusError.
        """
        notes = await self._streams.counts(subjects.ADVISORIES, f"{_notes_on(delivery)}.>")
        noted = {tuple(note.split(".")[-2:]) for note in notes}
        return sum(
            (number <= FREE_DELIVERIES or (str(number), "begun") in noted) and (str(number), "returned") not in noted
            for number in range(1, delivery.deliveries)
        )

    async def _note(self, delivery: Delivery, what: str) -> None:
        note = f"{_notes_on(delivery)}.{delivery.deliveries}.{what}"
        await self._publisher.publish(note, b"", {ID_HEADER: note})


def _notes_on(delivery: Delivery) -> str:
    # The time tells the message from one at the same sequence of a stream that was made anew or rolled back.
    return f"{DELIVERIES}.{delivery.stream}.{delivery.sequence}.{delivery.stored_at_ns}"
