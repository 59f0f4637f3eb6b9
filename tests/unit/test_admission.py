"""Places are given out in order, within both bounds, and none of them is lost."""

from __future__ import annotations

import asyncio

import pytest

from gym_bus.admission import Admission

MANY = 100


async def holding(gate: Admission, size: int, name: str, seen: list[str], until: asyncio.Event) -> None:
    async with gate.place(size):
        seen.append(name)
        await until.wait()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_asks_first_comes_first_though_something_smaller_would_fit() -> None:
    gate, seen, until = Admission(MANY, 10), list[str](), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        async with gate.place(6):
            tasks.create_task(holding(gate, 8, "large", seen, until))
            tasks.create_task(holding(gate, 2, "small", seen, until))
            await turns()
            assert seen == []
        await turns()
        assert seen == ["large", "small"]
        until.set()


@pytest.mark.parametrize(("count", "size_bytes"), [(3, 100), (MANY, 9)])
async def test_no_more_are_let_in_than_either_bound_allows(count: int, size_bytes: int) -> None:
    gate, seen, first, last = Admission(count, size_bytes), list[str](), asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for number in range(5):
            tasks.create_task(holding(gate, 3, f"{number}", seen, last if number else first))
        await turns()
        assert seen == ["0", "1", "2"]
        first.set()
        await turns()
        assert seen == ["0", "1", "2", "3"]
        last.set()
    assert seen == ["0", "1", "2", "3", "4"]


async def test_what_is_larger_than_the_bound_passes_alone() -> None:
    gate, seen, until = Admission(MANY, 10), list[str](), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        async with gate.place(1):
            tasks.create_task(holding(gate, 11, "huge", seen, until))
            await turns()
            assert seen == []
        tasks.create_task(holding(gate, 1, "small", seen, until))
        await turns()
        assert seen == ["huge"]
        until.set()
    assert seen == ["huge", "small"]


async def test_who_is_cancelled_keeps_no_place_and_nobody_waiting() -> None:
    gate, seen, until = Admission(MANY, 10), list[str](), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        async with gate.place(6):
            first = tasks.create_task(holding(gate, 8, "cancelled", seen, until))
            tasks.create_task(holding(gate, 4, "fits", seen, until))
            tasks.create_task(holding(gate, 6, "next", seen, until))
            await turns()
            first.cancel()
            await turns()
            assert seen == ["fits"]
        await turns()
        assert seen == ["fits", "next"]
        until.set()


async def test_who_is_cancelled_just_as_it_is_let_in_gives_the_place_back() -> None:
    gate, until = Admission(1, 10), asyncio.Event()
    until.set()
    async with asyncio.TaskGroup() as tasks:
        async with gate.place(10):
            late = tasks.create_task(holding(gate, 10, "late", [], until))
            await turns()
        late.cancel()
    async with asyncio.timeout(10), gate.place(10):
        pass
