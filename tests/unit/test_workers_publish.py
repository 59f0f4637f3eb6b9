from __future__ import annotations

import pytest

from gym_bus.workers import publish
from gym_bus.workers.publish import take_batch


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([1, 1, 1, 1], [[1, 1, 1], [1]]),
        ([4, 5, 1, 1], [[4, 5], [1, 1]]),
        ([50, 1, 50], [[50], [1, 50]]),
        ([], []),
    ],
)
def test_a_batch_ends_when_its_count_or_its_bytes_are_reached(
    sizes: list[int], batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "BATCH", 3)
    monkeypatch.setattr(publish, "BATCH_BYTES", 9)
    items = iter([b"x" * size for size in sizes])

    taken = list(iter(lambda: [len(item) for item in take_batch(items, len)], []))

    assert taken == batches
