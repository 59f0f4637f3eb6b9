"""Asking the server: each answer has a deadline, each failure comes as an error of ours."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import nats.errors

from gym_bus.deadline import within
from gym_bus.errors import BusError

API_LIMIT_S = 10.0


def trouble(what: str, error: Exception) -> BusError:
    """What went wrong with `what`, in words: an answer that does not come has none of its own."""
    return BusError(f"{what}: {'no answer in time' if isinstance(error, TimeoutError) else str(error) or repr(error)}")


async def answered(
    call: Awaitable[Any],
    what: str,
    *,
    none_for: type[Exception] | tuple[type[Exception], ...] = (),
    limit_s: float | None = None,
) -> Any:
    """What the server answers to `call`.

    Args:
        call: a call of the NATS client.
        what: what it is about, for the error.
        none_for: errors that are an answer, too: that there is nothing.
        limit_s: seconds; `API_LIMIT_S` where it is not given.

    Raises:
        BusError: no answer in time, or any other error.
    """
    try:
        return await within(API_LIMIT_S if limit_s is None else limit_s, call)
    except none_for:
        return None
    except (TimeoutError, nats.errors.Error) as e:
        raise trouble(what, e) from None
