"""Waiting with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(limit_s: float, call: Awaitable[T]) -> T:
    """What `call` returns. Raises TimeoutError after `limit_s` seconds.

    For `asyncio.wait_for`, which in Python 3.11 drops a cancellation that comes together with the answer.
    """
    async with asyncio.timeout(limit_s):
        return await call
