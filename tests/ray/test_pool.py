"""The verifier pools, with real child processes and real Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from gym_bus.errors import SandboxError, TaskError, UsageError, VerifierError
from gym_bus.messages import Verdict
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.service import VerifierService

LIMIT_S = 1.5


@pytest_asyncio.fixture(
    params=["local", pytest.param("ray", marks=pytest.mark.ray)], scope="module", loop_scope="module"
)
async def service(request: pytest.FixtureRequest, scripted_verifier: str) -> AsyncIterator[VerifierService]:
    """One pool of each kind for all tests: starting Ray takes seconds."""
    if request.param == "ray":
        pytest.importorskip("ray")
    config = VerifierConfig(executor=request.param, limit_s=LIMIT_S, batch=8, tries=2, ray=RayConfig(actors=2))
    made = VerifierService(config)
    await judge(made, value=1)
    yield made
    await made.close()


async def judge(service: VerifierService, options: bytes = b"{}", name: str = "scripted", **row: Any) -> Verdict:
    row.setdefault("do", "score")
    work = service.verify(name, options, msgspec.json.encode(row), b"{}")
    return await asyncio.wait_for(work, 60)


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_many_callers_get_their_own_verdicts(service: VerifierService) -> None:
    verdicts = await asyncio.gather(*(judge(service, value=i) for i in range(100)))
    assert [v.reward for v in verdicts] == list(range(100))


async def test_options_reach_the_verifier(service: VerifierService) -> None:
    assert (await judge(service, b'{"factor": 3}', value=2)).reward == 6


async def test_a_broken_task_and_a_broken_verifier_touch_nobody_else(service: VerifierService) -> None:
    outcomes = await asyncio.gather(
        judge(service, value=1),
        judge(service, do="broken task"),
        judge(service, do="broken verifier"),
        judge(service, value=2),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], TaskError)
    assert isinstance(outcomes[2], VerifierError)
    assert "ZeroDivisionError: oops" in str(outcomes[2])
    assert [o.reward for o in outcomes if isinstance(o, Verdict)] == [1, 2]


async def test_an_answer_that_takes_too_long_to_judge_scores_0_and_its_batch_is_redone(
    service: VerifierService,
) -> None:
    verdicts = await asyncio.gather(judge(service, do="hang"), *(judge(service, value=i) for i in range(5)))
    assert verdicts[0].reward == 0.0
    assert verdicts[0].extra["verifier_timeout"] is True
    assert [v.reward for v in verdicts[1:]] == list(range(5))


async def test_a_check_that_kills_its_worker_is_no_verdict_and_harms_nobody(service: VerifierService) -> None:
    outcomes = await asyncio.gather(
        judge(service, do="die"), *(judge(service, value=i) for i in range(5)), return_exceptions=True
    )
    assert isinstance(outcomes[0], SandboxError)
    assert [o.reward for o in outcomes[1:] if isinstance(o, Verdict)] == list(range(5))


async def test_a_check_whose_worker_died_once_is_judged_by_another(service: VerifierService, tmp_path: Path) -> None:
    verdict = await judge(service, do="die once", flag=str(tmp_path / "flag"), value=7)
    assert verdict.reward == 7


async def test_an_unknown_verifier_is_a_failure_and_no_reward(service: VerifierService) -> None:
    with pytest.raises(VerifierError, match=r"unknown verifier 'scritped'.*scripted"):
        await judge(service, name="scritped", value=1)
    with pytest.raises(VerifierError, match="options of verifier 'scripted'"):
        await judge(service, b'{"fcator": 1}', value=1)


async def test_a_closed_pool_refuses(scripted_verifier: str) -> None:
    service = VerifierService(VerifierConfig(executor="local", ray=RayConfig(actors=1)))
    await judge(service, value=1)
    await service.close()
    await service.close()


async def test_an_unreachable_ray_cluster_is_an_infrastructure_fault(scripted_verifier: str) -> None:
    pytest.importorskip("ray")
    service = VerifierService(VerifierConfig(ray=RayConfig(address="127.0.0.1:1")))
    with pytest.raises((SandboxError, VerifierError), match=r"127\.0\.0\.1:1"):
        await asyncio.wait_for(service.verify("scripted", b"{}", b"{}", b"{}"), 100)


async def test_the_digest_tells_code_and_options_apart(scripted_verifier: str) -> None:
    service = VerifierService(VerifierConfig())
    plain = service.digest("scripted", b"{}")
    assert plain == VerifierService(VerifierConfig()).digest("scripted", b"{}")
    assert plain != service.digest("scripted", b'{"factor":2}')
    assert service.digest("scripted", b'{"factor":2}') == service.digest("scripted", b'{ "factor": 2}')
    with pytest.raises(UsageError):
        service.check("scripted", b'{"x":1}')
