"""Job folders, written with the composers of the results consumer: for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.errors import FailureKind
from gym_bus.messages import Failed, Failure, Policy, RolloutId, Scored, Timings, Usage
from gym_bus.results.files import JobFiles
from gym_bus.results.lines import failed_line, scored_line
from gym_bus.results.manifest import Manifest

Rewards = Sequence[Sequence[float | FailureKind]]
encode = msgspec.json.encode


def answer(task: int, rollout: int) -> str:
    return f"task {task} makes {task + rollout}"


def row_of(task: int) -> dict[str, Any]:
    return {"question": f"what is {task}?", "expected_answer": str(task), "level": f"L{task % 2}"}


def message(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def write_job(
    folder: Path,
    rewards: Rewards,
    *,
    said: Callable[[int, int], str] = answer,
    row: Callable[[int], dict[str, Any]] = row_of,
    model: str = "m",
) -> JobFiles:
    """A finished job: per task and rollout a reward, or why there is none. Its agent took task + 2 rollout seconds."""
    folder.mkdir(parents=True)
    files = JobFiles(folder)
    manifest_of(folder.name, rewards, model).save(files.manifest)
    params = {"temperature": 0.5}
    with files.rollouts.open("wb") as scored, files.failures.open("wb") as failed, files.inputs.open("wb") as inputs:
        for task, of_task in enumerate(rewards):
            told = {"input": [{"role": "user", "content": f"please: what is {task}?"}], **params}
            whole = {**row(task), "responses_create_params": told}
            for rollout, reward in enumerate(of_task):
                inputs.write(encode(whole | {"_ng_task_index": task, "_ng_rollout_index": rollout}) + b"\n")
                common = _common(RolloutId(folder.name, task, rollout), encode(whole), model)
                if isinstance(reward, FailureKind):
                    failed.write(_failed(reward, common))
                else:
                    scored.write(_scored(reward, said(task, rollout), common))
    return files


def _common(rollout: RolloutId, row: bytes, model: str) -> dict[str, Any]:
    agent_s = rollout.task_index + 2.0 * rollout.rollout_index
    return {
        "rollout": rollout,
        "agent": "simple",
        "verifier": "math",
        "row": row,
        "policy": Policy(model=model, temperature=0.5),
        "timings": Timings(request_queue_s=1.0, agent_s=agent_s, model_s=0.5, model_calls=1, verify_s=0.25),
        "published_at": 1000.0 + agent_s,
    }


def _scored(reward: float, said: str, common: dict[str, Any]) -> bytes:
    rollout = common["rollout"]
    return scored_line(
        Scored(
            reward=reward,
            response=encode({"output": [message(said)]}),
            usage=Usage(input_tokens=5, output_tokens=10 + rollout.task_index, total_tokens=15 + rollout.task_index),
            extra=encode({"extracted_answer": str(rollout.task_index + rollout.rollout_index)}),
            **common,
        ),
        1,
    )


def _failed(kind: FailureKind, common: dict[str, Any]) -> bytes:
    detail = f"task {common['rollout'].task_index} broke"
    return failed_line(Failed(failure=Failure(kind=kind, detail=detail, stage="agent"), **common), 1)


def manifest_of(job: str, rewards: Rewards, model: str) -> Manifest:
    return Manifest(
        job=job,
        created_at=0.0,
        benchmark="arith",
        dataset_digest="d" * 64,
        rows=len(rewards),
        num_repeats=max(map(len, rewards)),
        agent="simple",
        model=model,
        model_kind="openai",
        model_name=f"the-{model}",
        verifier="math",
        config_digest="c" * 64,
        gym_bus_version="0",
    )


def write_lines(path: Path, *rows: Any) -> None:
    """JSON lines as NeMo Gym would write them."""
    path.write_bytes(b"".join(encode(row) + b"\n" for row in rows))
