from __future__ import annotations

import random
import tracemalloc

import pytest

from gym_bus.benchmarks import occurrences
from gym_bus.benchmarks.occurrences import Occurrences


def test_texts_are_numbered_in_the_order_of_their_first_appearance_and_counted() -> None:
    found = Occurrences()

    assert [found.add(text) for text in (b"a", b"b", b"a", b"", b"a", b"b")] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (2, 0),
        (0, 2),
        (1, 1),
    ]
    assert len(found) == 3


def test_numbers_stay_while_the_table_grows() -> None:
    chosen = random.Random(7)
    texts = [b"%d" % chosen.randrange(8_000) for _ in range(20_000)]
    found = Occurrences()

    numbers = [found.add(text) for text in texts]

    known: dict[bytes, int] = {}
    count: dict[bytes, int] = {}
    for text, (number, earlier) in zip(texts, numbers, strict=True):
        assert number == known.setdefault(text, len(known))
        assert earlier == count.get(text, 0)
        count[text] = earlier + 1
    assert len(found) == len(known)
    assert len(known) > occurrences._FIRST_SLOTS


def test_digests_that_belong_in_one_slot_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crowded:
        """Digests that differ in their highest byte only: every one belongs in the same slot."""

        def __init__(self, text: bytes, *, digest_size: int) -> None:
            self._digest = bytes(digest_size - 1) + text

        def digest(self) -> bytes:
            return self._digest

    monkeypatch.setattr(occurrences, "blake2b", Crowded)
    monkeypatch.setattr(occurrences, "_FIRST_SLOTS", 2)
    found = Occurrences()
    texts = [bytes([i]) for i in range(100)]

    assert [found.add(text) for text in texts] == [(i, 0) for i in range(100)]
    assert [found.add(text) for text in reversed(texts)] == [(i, 1) for i in reversed(range(100))]


def test_a_text_takes_about_thirty_bytes_however_long_it_is() -> None:
    texts = 20_000
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        found = Occurrences()
        for i in range(texts):
            found.add(b"%d" % i + b"x" * 1000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(found) == texts
    assert (after - before) / texts < 35
