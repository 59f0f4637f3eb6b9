"""The plan of a job that gets repeats as it needs them: written down before it is run, whatever dies in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gym_bus.benchmarks.dataset import materialized_line
from gym_bus.config import Config
from gym_bus.errors import DataError, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Policy, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.rounds import Rounds
from gym_bus.results.sequence import Limits
from gym_bus.workers.adaptive import Adapting, Aim, Step
from gym_bus.workers.plan import Job
from gym_bus.workers.publish import Order
from gym_bus.workers.results import open_writer

TASKS = 40
ROW = b'{"question":"?","responses_create_params":{"input":"?"}}'


@pytest.fixture
def job(tmp_path: Path) -> Job:
    files = JobFiles(tmp_path)
    lines = [materialized_line(ROW, task, rollout) for task in range(TASKS) for rollout in range(2)]
    files.inputs.write_bytes(b"\n".join(lines) + b"\n")
    record = JobRecord(job="job-1", spans=[(0, TASKS, 2)])
    order = Order(job="job-1", agent="simple", model="m", verifier="mcqa")
    manifest: Any = None  # nothing here reads it
    return Job(manifest=manifest, record=record, order=order, files=files, resumed=False)


def adapting(job: Job, target: float = 0.05, steps: list[Step] | None = None, **aim: Any) -> Adapting:
    made = Adapting(job, Config(), Aim(half_width=target, **aim), (steps if steps is not None else []).append)
    made.open()
    return made


def score(run: Adapting, reward: float | None = None) -> None:
    """Give every rollout that has none a reward; by default the odd tasks are right every second time."""
    with open_writer(run.job.record, run.job.files, Config().results) as writer:
        missing = list(writer.ledger.missing())
        writer.append([(at + 1, scored(rollout, reward)) for at, rollout in enumerate(missing)])
        run.rewards = writer.ledger.rewards()


def scored(rollout: RolloutId, reward: float | None) -> Scored:
    value = float(rollout.task_index % 2 == 0 or rollout.rollout_index % 2) if reward is None else reward
    return Scored(
        rollout=rollout,
        agent="simple",
        verifier="mcqa",
        reward=value,
        row=ROW,
        response=b"{}",
        policy=Policy(model="m"),
    )


def counts(job: Job) -> dict[int, int]:
    """Rollouts by task, as the materialized inputs have them; every index once."""
    seen: dict[int, list[int]] = {}
    for line in job.files.inputs.read_text().splitlines():
        row = json.loads(line)
        seen.setdefault(row["_ng_task_index"], []).append(row["_ng_rollout_index"])
    assert all(sorted(rollouts) == list(range(len(rollouts))) for rollouts in seen.values())
    return {task: len(rollouts) for task, rollouts in seen.items()}


def test_a_round_is_planned_written_down_and_ordered(job: Job) -> None:
    steps: list[Step] = []
    run = adapting(job, steps=steps)
    score(run)

    assert run.advance()

    (step,) = steps
    assert step.next is not None
    assert step.bounds.rollouts == 2 * TASKS
    plan = Rounds.load(job.files.adaptive)
    assert plan is not None
    assert plan.rounds[1] == step.next
    assert counts(job) == plan.counts
    assert {task: run.job.record.group_size(task) for task in range(TASKS)} == plan.counts
    assert run.job.record.total == 2 * TASKS + step.next.total
    odd, even = (sum(step.next.rollouts[start::2]) for start in (1, 0))
    assert odd > even  # where the rewards spread


def test_rounds_go_on_until_the_target_is_met_and_the_interval_holds_what_was_seen(job: Job) -> None:
    run = adapting(job)
    score(run)
    while run.advance():
        score(run)

    ended = run.adapted(None, cancelled=False)  # type: ignore[arg-type]

    assert ended.ended == "reached"
    assert ended.bounds.low < 0.75 < ended.bounds.high
    assert ended.bounds.half_width <= 0.05


def test_a_run_that_died_before_the_rows_were_written_writes_them_when_it_comes_back(job: Job) -> None:
    run = adapting(job)
    score(run)
    before = job.files.inputs.read_bytes()
    run.advance()
    after, record = job.files.inputs.read_bytes(), run.job.record
    job.files.inputs.write_bytes(before)

    back = adapting(job)

    assert job.files.inputs.read_bytes() == after
    assert back.job.record.spans == record.spans
    assert not back.is_complete


def test_a_run_that_comes_back_goes_on_with_the_plan_that_it_has(job: Job) -> None:
    run = adapting(job)
    score(run)
    run.advance()
    plan = job.files.adaptive.read_bytes()

    back = adapting(run.job, target=0.2)

    assert job.files.adaptive.read_bytes() == plan
    assert back.job.record == run.job.record
    score(back)
    assert not back.advance()  # the wider target is met


def test_every_further_rollout_has_a_seed_of_its_own_where_the_first_ones_have(job: Job) -> None:
    run = adapting(job, seeds=100)
    score(run)
    run.advance()

    for line in job.files.inputs.read_text().splitlines()[2 * TASKS :]:
        row = json.loads(line)
        body = row["responses_create_params"]["metadata"]["extra_body"]
        assert json.loads(body) == {"seed": 100 + row["_ng_rollout_index"]}


def test_limits_end_it_and_it_says_so(job: Job) -> None:
    run = adapting(job, target=0.001, most=Limits(rollouts=150))
    score(run)
    while run.advance():
        score(run)

    ended = run.adapted(None, cancelled=False)  # type: ignore[arg-type]
    assert (ended.ended, sum(counts(job).values()) <= 150) == ("limit", True)
    assert run.adapted(None, cancelled=True).ended == "cancelled"  # type: ignore[arg-type]


def test_a_round_that_fails_is_the_last_one_until_it_is_mended(job: Job) -> None:
    run = adapting(job)
    score(run)
    assert run.advance()

    assert not run.advance()  # no rollout of the second round has a reward
    assert run.adapted(None, cancelled=False).ended == "too much fails"  # type: ignore[arg-type]
    score(run)
    assert run.advance()


def test_without_any_reward_nothing_is_planned(job: Job) -> None:
    run = adapting(job)

    assert not run.advance()
    assert run.adapted(None, cancelled=False).ended == "nothing scored"  # type: ignore[arg-type]


def test_rewards_outside_0_and_1_are_refused(job: Job) -> None:
    run = adapting(job)
    score(run, reward=2.5)

    with pytest.raises(UsageError, match=r"rewards from 0 to 1: rollout 0 of task 0 has 2\.5"):
        run.advance()


def test_a_plan_that_is_none_is_named(job: Job) -> None:
    job.files.adaptive.write_bytes(msgspec.json.encode({"rounds": 3}))

    with pytest.raises(DataError, match=r"adaptive\.json: not a plan of rounds"):
        adapting(job)
