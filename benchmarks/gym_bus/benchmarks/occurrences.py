"""Equal texts found again, without keeping the texts."""

from __future__ import annotations

from array import array
from hashlib import blake2b

DIGEST_BYTES = 16
"""128 bits: that any two different texts of ten million share a digest has a chance of 1 in 10^24."""
_FIRST_SLOTS = 1024


class Occurrences:
    """Numbers texts in the order of their first appearance and counts them, in about 30 bytes a text.

    A dictionary of the same digests takes five times as much.
    """

    def __init__(self) -> None:
        self._digests = bytearray()
        """Of every text, in the order of their numbers."""
        self._counts = array("I")
        self._slots = array("I", [0]) * _FIRST_SLOTS
        """Number + 1 of the digest that is looked for here or, where another one came first, in the slots behind; 0
        where there is none. Their count is a power of two, and a third of them stays free."""

    def __len__(self) -> int:
        """Different texts."""
        return len(self._counts)

    def add(self, text: bytes) -> tuple[int, int]:
        """The text's number, from 0, and how often it was added before."""
        digest = blake2b(text, digest_size=DIGEST_BYTES).digest()
        slot = self._slot_of(digest)
        number = self._slots[slot] - 1 if self._slots[slot] else self._append(digest, slot)
        earlier = self._counts[number]
        self._counts[number] += 1
        return number, earlier

    def _append(self, digest: bytes, slot: int) -> int:
        number = len(self)
        self._digests += digest
        self._counts.append(0)
        self._slots[slot] = number + 1
        if 3 * len(self) > 2 * len(self._slots):
            self._grow()
        return number

    def _slot_of(self, digest: bytes) -> int:
        """Where the digest is found, or belongs."""
        mask = len(self._slots) - 1
        slot = int.from_bytes(digest, "little") & mask
        while (after := self._slots[slot] * DIGEST_BYTES) and self._digests[after - DIGEST_BYTES : after] != digest:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        self._slots = array("I", [0]) * (2 * len(self._slots))
        for number in range(len(self)):
            start = number * DIGEST_BYTES
            self._slots[self._slot_of(bytes(self._digests[start : start + DIGEST_BYTES]))] = number + 1
