"""Messages that workers may have died of: few of them are worked on at a time, and the likeliest culprits alone.

When a worker dies, everything in its hands is delivered again, and nobody knows which of it was to blame. Without care
the culprit would take the same company with it every time, until all of it counted as poison.
"""

from __future__ import annotations

from collections import deque

from gym_bus.bus import FREE_DELIVERIES, Delivery


class Probation:
    """The queue of one worker's suspects, and how many of them may be at work.

    One at first, and one more for each that comes to an end: what is innocent gets through in ever larger groups. On
    its last try a message has no other suspect beside it.
    """

    def __init__(self, max_deliver: int) -> None:
        self._max_deliver = max_deliver
        self._waiting: deque[Delivery] = deque()
        self._at_work: set[str] = set()
        self._alone = False
        self._room = 1

    def __len__(self) -> int:
        """Suspects that wait."""
        return len(self._waiting)

    def suspects(self, delivery: Delivery) -> bool:
        """Whether a message was delivered too often for its workers to have died by chance."""
        return delivery.deliveries > max(1, min(FREE_DELIVERIES, self._max_deliver - 1))

    def add(self, delivery: Delivery) -> None:
        """A suspect has arrived."""
        self._waiting.append(delivery)

    def next(self) -> Delivery | None:
        """The suspect to work on now; None where none may."""
        if not self._waiting or self._alone or len(self._at_work) >= self._room:
            return None
        last_try = self._waiting[0].deliveries >= self._max_deliver
        if last_try and self._at_work:
            return None
        self._alone = last_try
        delivery = self._waiting.popleft()
        self._at_work.add(delivery.message_id)
        return delivery

    def ended(self, delivery: Delivery) -> None:
        """A message, suspect or not, has come to an end, and the worker lives."""
        if delivery.message_id in self._at_work:
            self._at_work.remove(delivery.message_id)
            self._alone = False
            self._room += 1

    def clear(self) -> list[Delivery]:
        """Let go of those that wait; returns them."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting
