"""The built-in hostile programs against the real sandbox, and the examination against sandboxes that do not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from gym_bus.errors import SandboxError, SandboxRefused
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program
from gym_bus.sandbox.hostile import ATTACKS, HONEST, HONEST_INPUT, HONEST_SAYS, LIMITS, Attack, examine
from gym_bus.sandbox.protections import NAMES, Protection
from gym_bus.sandbox.slot import Slot

session_loop = pytest.mark.asyncio(loop_scope="session")

GROUPS = dict.fromkeys(attack.group for attack in ATTACKS)


@session_loop
@pytest.mark.parametrize("group", GROUPS)
async def test_hostile_programs_are_held_and_an_honest_one_right_behind_each_is_right(slot: Slot, group: str) -> None:
    assert (await slot.run(HONEST, HONEST_INPUT)).stdout == HONEST_SAYS
    before = slot._zygote.pid
    attacks = [attack for attack in ATTACKS if attack.group == group]

    held = [one async for one in examine(slot, slot.protections(), attacks)]

    assert [one for one in held if not one.held] == []
    assert len(held) == len(attacks) > 9
    assert slot._zygote.pid == before  # no program has cost the slot its zygote


def test_attacks_have_names_of_their_own_and_can_be_told_from_honest_programs() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) > 140
    assert b"BROKEN" not in HONEST.source
    for attack in ATTACKS:
        compile(attack.program().source, attack.name, "exec")


class Leaky:
    """A sandbox that does what it is told to."""

    def __init__(self, attacked: Outcome | Exception, after: Outcome | None = None) -> None:
        self._attacked, self._after = attacked, after or ended(HONEST_SAYS)

    async def run(self, program: Program, stdin: bytes = b"", limits: Limits = LIMITS) -> Outcome:
        assert program == HONEST
        return self._after

    async def run_cases(
        self,
        program: Program,
        stdins: Sequence[bytes],
        limits: Limits = LIMITS,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        if isinstance(self._attacked, Exception):
            raise self._attacked
        return [ended(b"")] * (len(stdins) - 1) + [self._attacked]

    async def run_pair(self, solution: Program, tester: Program, limits: Limits = LIMITS) -> tuple[Outcome, Outcome]:
        raise NotImplementedError


def ended(stdout: bytes, how: Ended = Ended.FINISHED, exit_code: int = 0) -> Outcome:
    return Outcome(ended=how, exit_code=exit_code, stdout=stdout)


@pytest.mark.parametrize(
    ("attacked", "after", "detail"),
    [
        (ended(b"x BROKEN secret"), None, "BROKEN secret"),
        (ended(b"", Ended.SIGNALLED), None, "ended with signalled"),
        (ended(b""), ended(b"['modules']\n"), "the next program: finished, b\"['modules']"),
        (ended(b""), ended(HONEST_SAYS, exit_code=1), "the next program: finished"),
        (SandboxError("the zygote is gone"), None, "the zygote is gone"),
    ],
)
@pytest.mark.parametrize("cases", [1, 2])
async def test_a_sandbox_that_does_not_hold_is_found_out(
    attacked: Outcome | Exception, after: Outcome | None, detail: str, cases: int
) -> None:
    attack = Attack("try", "group", "", cases=cases)

    (held,) = [one async for one in examine(Leaky(attacked, after), (), [attack])]

    assert held.held is False
    assert held.detail.startswith(detail)


async def test_an_attack_on_what_a_level_does_not_protect_is_not_tried_and_not_called_held() -> None:
    sandbox = Leaky(SandboxRefused("not to be used"))
    attack = Attack("look", "files", "", needs=NAMES)

    (held,) = [one async for one in examine(sandbox, [Protection(NAMES, False, "stat works")], [attack])]

    assert (held.held, held.ended) == (None, Ended.NOT_RUN)
    assert held.detail == "no protection of names of files here: stat works"
