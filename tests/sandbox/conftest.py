"""One real sandbox slot for the whole session; starting it takes a twentieth of a second."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from gym_bus.errors import SandboxError
from gym_bus.sandbox.slot import Slot
from gym_bus.verifiers.runner import SANDBOX_MODULES


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def slot() -> AsyncIterator[Slot]:
    """A slot with the verifiers' harnesses loaded, as the pools start theirs."""
    try:
        made = await Slot.start(modules=SANDBOX_MODULES)
    except SandboxError as e:
        pytest.skip(f"no sandbox on this machine: {e}")
    yield made
    await made.close()
