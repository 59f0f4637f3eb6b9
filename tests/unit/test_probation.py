"""Which suspects may be at work together."""

from __future__ import annotations

from typing import Any, cast

import pytest

from gym_bus.bus import Delivery
from gym_bus.workers.probation import Probation


class Message:
    def __init__(self, name: str, deliveries: int) -> None:
        self.message_id, self.deliveries = name, deliveries


def message(name: str, deliveries: int) -> Delivery:
    return cast(Any, Message(name, deliveries))


def probation(*waiting: Delivery, max_deliver: int = 5) -> Probation:
    made = Probation(max_deliver)
    for suspect in waiting:
        made.add(suspect)
    return made


def started(queue: Probation) -> list[Delivery]:
    return [suspect for suspect in iter(queue.next, None) if suspect]


@pytest.mark.parametrize(
    ("deliveries", "max_deliver", "suspect"), [(1, 5, False), (2, 5, False), (3, 5, True), (2, 2, True), (1, 1, False)]
)
def test_a_message_is_a_suspect_from_its_third_delivery_on_or_its_last(
    deliveries: int, max_deliver: int, suspect: bool
) -> None:
    assert Probation(max_deliver).suspects(message("a", deliveries)) is suspect


def test_groups_of_suspects_grow_with_every_one_that_turns_out_well() -> None:
    queue = probation(*(message(f"{i}", 3) for i in range(7)))
    sizes = []
    while group := started(queue):
        sizes.append(len(group))
        for suspect in group:
            queue.ended(suspect)
    assert sizes == [1, 2, 4]


def test_on_its_last_try_a_suspect_has_no_other_beside_it() -> None:
    first, last, later = message("first", 3), message("last", 5), message("later", 3)
    queue = probation(message("0", 3), first, last, later)
    queue.ended(started(queue)[0])

    assert started(queue) == [first]
    queue.ended(first)
    assert started(queue) == [last]
    queue.ended(last)
    assert started(queue) == [later]


def test_messages_that_are_no_suspects_open_no_room() -> None:
    queue = probation(message("0", 3), message("1", 3))
    started(queue)
    queue.ended(message("free", 1))
    assert started(queue) == []


def test_what_waits_is_given_back_when_the_worker_leaves() -> None:
    queue = probation(message("0", 3), message("1", 3))
    started(queue)
    assert [suspect.message_id for suspect in queue.clear()] == ["1"]
    assert len(queue) == 0
