"""The verifier pools, with real child processes and real Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
from conftest import until

from gym_bus.errors import SandboxError, TaskError, UsageError, VerifierError
from gym_bus.messages import Verdict
from gym_bus.sandbox import hostile
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.batching import BatchingPool
from gym_bus.verifiers.service import VerifierService

LIMIT_S = 1.5
RECYCLE_AFTER, RECYCLE_BYTES = 400, 300_000_000
HUMANEVAL = Path(__file__).parents[2] / "benchmarks/gym_bus/benchmarks/humaneval/data/example.jsonl"
NAMES = {
    "worker": ("ray::_Actor", "local_pool import serve"),
    "zygote": ("gym_bus.sandbox.zygote",),
    "code_gen's zygote": ("from string import *",),
    "raylet": ("/raylet/raylet ",),
    "control store": ("/gcs/gcs_server ",),
}
"""What the command lines of a pool's processes have in them."""
others: set[psutil.Process] = set()
"""Children of this process that are no pool's, such as a sandbox that other tests share."""
terminated: list[int] = []


@pytest_asyncio.fixture(
    params=["local", pytest.param("ray", marks=pytest.mark.ray)], scope="module", loop_scope="module"
)
async def service(request: pytest.FixtureRequest, scripted_verifier: str) -> AsyncIterator[VerifierService]:
    """One pool of each kind for all tests: starting Ray takes seconds."""
    if request.param == "ray":
        pytest.importorskip("ray")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.append, signal.SIGTERM)
    others.update(psutil.Process().children(recursive=True))
    config = VerifierConfig(
        executor=request.param,
        limit_s=LIMIT_S,
        batch=8,
        tries=2,
        recycle_after=RECYCLE_AFTER,
        recycle_bytes=RECYCLE_BYTES,
        ray=RayConfig(actors=2),
    )
    made = VerifierService(config)
    await judge(made, value=1)
    yield made
    await made.close()


async def judge(service: VerifierService, options: bytes = b"{}", name: str = "scripted", **row: Any) -> Verdict:
    row.setdefault("do", "score")
    work = service.verify(name, options, msgspec.json.encode(row), b"{}")
    return await asyncio.wait_for(work, 100)


@pytest.fixture
def unhurried(service: VerifierService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks with so much time that a machine that stalls does not look like a worker that hangs."""
    pool = pool_of(service)
    monkeypatch.setattr(pool, "_config", msgspec.structs.replace(pool._config, limit_s=60.0))


def pool_of(service: VerifierService) -> BatchingPool:
    assert service._pool
    return service._pool


def processes(kind: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        if process in others:
            continue
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(name in line for name in NAMES[kind]):
            found.append(process)
    return found


async def run_code(service: VerifierService, number: int) -> bool:
    """A program in the sandbox, a wrong one for odd numbers; whether it got the reward that it should."""
    tests = {"unit_tests": {"inputs": [f"{number}\n"], "outputs": [f"{number + 1}\n"]}}
    row = {"verifier_metadata": tests}
    answer = said(f"print(int(input()) + {1 + number % 2})")
    work = service.verify("code_gen", b"{}", msgspec.json.encode(row), answer)
    return (await asyncio.wait_for(work, 100)).reward == float(number % 2 == 0)


def said(code: str) -> bytes:
    part = {"type": "output_text", "text": f"```python\n{code}\n```"}
    return msgspec.json.encode({"output": [{"type": "message", "role": "assistant", "content": [part]}]})


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.usefixtures("unhurried")
async def test_many_callers_get_their_own_verdicts(service: VerifierService) -> None:
    verdicts = await asyncio.gather(*(judge(service, value=i) for i in range(100)))
    assert [v.reward for v in verdicts] == list(range(100))


@pytest.mark.usefixtures("unhurried")
async def test_options_reach_the_verifier(service: VerifierService) -> None:
    assert (await judge(service, b'{"factor": 3}', value=2)).reward == 6


@pytest.mark.usefixtures("unhurried")
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


@pytest.mark.usefixtures("unhurried")
async def test_a_check_that_kills_its_worker_is_no_verdict_and_harms_nobody(service: VerifierService) -> None:
    outcomes = await asyncio.gather(
        judge(service, do="die"), *(judge(service, value=i) for i in range(5)), return_exceptions=True
    )
    assert isinstance(outcomes[0], SandboxError)
    assert [o.reward for o in outcomes[1:] if isinstance(o, Verdict)] == list(range(5))


@pytest.mark.usefixtures("unhurried")
async def test_a_check_whose_worker_died_once_is_judged_by_another(service: VerifierService, tmp_path: Path) -> None:
    verdict = await judge(service, do="die once", flag=str(tmp_path / "flag"), value=7)
    assert verdict.reward == 7


async def test_an_unknown_verifier_is_a_failure_and_no_reward(service: VerifierService) -> None:
    with pytest.raises(VerifierError, match=r"unknown verifier 'scritped'.*scripted"):
        await judge(service, name="scritped", value=1)
    with pytest.raises(VerifierError, match="options of verifier 'scripted'"):
        await judge(service, b'{"fcator": 1}', value=1)


@pytest.mark.parametrize("kind", ["worker", "zygote"])
async def test_checks_in_flight_when_a_process_is_killed_get_the_verdicts_that_they_should(
    service: VerifierService, kind: str
) -> None:
    checks = [asyncio.create_task(run_code(service, n)) for n in range(80)]
    for place in (0, -1):
        await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED)
        processes(kind)[place].kill()
        checks_left = sum(not check.done() for check in checks)
        assert checks_left > 30, "the kill came too late to hit anything"
        await until(lambda: sum(not check.done() for check in checks) < checks_left - 20)  # noqa: B023
    assert all(await asyncio.gather(*checks))


@pytest.mark.usefixtures("unhurried")
async def test_workers_that_have_done_their_share_are_replaced_and_no_check_is_lost(service: VerifierService) -> None:
    pool = pool_of(service)
    recycled, replaced = pool.recycled, pool.replaced
    before = {process.pid for process in processes("worker")}
    verdicts = await asyncio.gather(*(judge(service, value=n) for n in range(3 * RECYCLE_AFTER)))
    assert [v.reward for v in verdicts] == list(range(3 * RECYCLE_AFTER))
    await until(lambda: len({process.pid for process in processes("worker")} - before) >= 1)
    assert pool.recycled > recycled
    assert pool.replaced == replaced


@pytest.mark.usefixtures("unhurried")
async def test_a_worker_that_has_grown_is_replaced(service: VerifierService) -> None:
    grown = await judge(service, do="grow", bytes=RECYCLE_BYTES, value=1)
    pid = grown.extra["pid"]

    async def has_gone() -> bool:  # one at a time makes room, so it may be asked once more
        assert (await judge(service, value=2)).reward == 2
        return not psutil.pid_exists(pid)

    await until(has_gone)
    assert all(process.memory_info().rss < RECYCLE_BYTES for process in processes("worker"))


async def test_programs_leave_nothing_behind_in_a_worker(service: VerifierService) -> None:
    def held() -> tuple[int, int, int, int]:
        found = processes("worker") + processes("zygote")
        groups = [group for process in found for group in Path("/sys/fs/cgroup").glob(f"*/gym-bus-{process.pid}-*")]
        resident = sum(process.memory_info().rss for process in found)
        return len(found), len(groups), sum(process.num_fds() for process in found), resident

    async def warm() -> bool:
        assert all(await asyncio.gather(*(run_code(service, n) for n in range(60))))
        settled = pool_of(service)._recycling is None
        return settled and len(processes("worker")) == 2 and len(processes("code_gen's zygote")) == 4

    await until(warm)
    count, groups, files, resident = held()
    assert all(await asyncio.gather(*(run_code(service, n) for n in range(120))))
    await until(warm)  # a worker may just be being replaced
    now = held()
    assert now[:2] == (count, groups)
    assert now[2] < files + 10
    assert now[3] < resident + 4e6


@pytest.mark.usefixtures("unhurried")
async def test_honest_answers_are_judged_right_among_hostile_ones(service: VerifierService) -> None:
    rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]

    async def honest(n: int) -> bool:
        row, right = rows[n % len(rows)], n // len(rows) % 2 == 0
        code = row["prompt"] + (row["canonical_solution"] if right else "    pass\n")
        verdict = await service.verify("humaneval", b"{}", msgspec.json.encode(row), said(code))
        return verdict.reward == float(right)

    async def held(n: int, attack: hostile.Attack) -> bool:
        code = attack.program().source.decode(errors="replace")
        options = b'{"cpu_s": 0.3}'
        return (await service.verify("humaneval", options, msgspec.json.encode(rows[n % 5]), said(code))).reward == 0.0

    replaced = pool_of(service).replaced
    attacks = hostile.ATTACKS[::6]
    work = [check for n, attack in enumerate(attacks) for check in (held(n, attack), honest(n))]
    assert all(await asyncio.wait_for(asyncio.gather(*work), 100))
    assert pool_of(service).replaced == replaced


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["raylet", pytest.param("control store", marks=pytest.mark.slow)])
async def test_a_ray_that_dies_is_started_again_and_the_checks_in_flight_are_redone(
    service: VerifierService, kind: str
) -> None:
    if not processes(kind):
        pytest.skip("children need no Ray")
    await until(lambda: both_serve(service))
    before = {process.pid for process in processes("worker")}
    checks = [asyncio.create_task(run_code(service, n)) for n in range(50)]
    await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED)
    processes(kind)[0].kill()
    assert all(await asyncio.gather(*checks))
    await until(lambda: not any(map(psutil.pid_exists, before)))
    await until(lambda: both_serve(service))


async def both_serve(service: VerifierService) -> bool:
    """Whether both places of the pool have a worker, when there is work enough for both."""
    assert all(await asyncio.gather(*(run_code(service, n) for n in range(20))))
    return len(processes("worker")) == 2


@pytest.mark.ray
async def test_sigterm_is_left_to_the_worker_and_prints_no_stack(
    service: VerifierService, capfd: pytest.CaptureFixture[str]
) -> None:
    terminated.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: terminated)
    assert "SIGTERM" not in capfd.readouterr().err


@pytest.mark.ray
async def test_a_cluster_is_joined_by_its_address(service: VerifierService) -> None:
    if not processes("raylet"):
        pytest.skip("children need no Ray")
    import ray

    script = """
        import asyncio, json, sys
        from gym_bus.settings import RayConfig, VerifierConfig
        from gym_bus.verifiers.service import VerifierService

        async def main():
            ray = RayConfig(address=sys.argv[1], actors=1, cpus_per_actor=0.0)
            service = VerifierService(VerifierConfig(ray=ray))
            verdict = await service.verify("code_gen", b"{}", sys.argv[2].encode(), sys.argv[3].encode())
            await service.close()
            print(verdict.reward)

        asyncio.run(main())
    """
    row = json.dumps({"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": ["2"]}}})
    address = ray.get_runtime_context().gcs_address
    joined = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(script), address, row, said("print(int(input()) + 1)").decode()],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert joined.stdout.splitlines()[-1:] == ["1.0"], joined.stderr
    assert (await judge(service, value=3)).reward == 3  # ours goes on when the other has left


async def test_a_closed_pool_refuses(scripted_verifier: str) -> None:
    service = VerifierService(VerifierConfig(executor="local", ray=RayConfig(actors=1)))
    await judge(service, value=1)
    await service.close()
    await service.close()


async def test_an_unreachable_ray_cluster_is_an_infrastructure_fault(scripted_verifier: str) -> None:
    service = VerifierService(VerifierConfig(tries=1, ray=RayConfig(address="127.0.0.1:1")))
    with pytest.raises(SandboxError, match=r"127\.0\.0\.1:1: nothing answers"):
        await asyncio.wait_for(service.verify("scripted", b"{}", b"{}", b"{}"), 60)
    await service.close()


async def test_the_digest_tells_code_and_options_apart(scripted_verifier: str) -> None:
    service = VerifierService(VerifierConfig())
    plain = service.digest("scripted", b"{}")
    assert plain == VerifierService(VerifierConfig()).digest("scripted", b"{}")
    assert plain != service.digest("scripted", b'{"factor":2}')
    assert service.digest("scripted", b'{"factor":2}') == service.digest("scripted", b'{ "factor": 2}')
    with pytest.raises(UsageError):
        service.check("scripted", b'{"x":1}')
