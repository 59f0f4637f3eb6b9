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

encode = msgspec.json.encode


def answer(task: int, rollout: int) -> str:
    return f"task {task} makes {task + rollout}"


def message(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def write_job(
    folder: Path,
    rewards: Sequence[Sequence[float | FailureKind]],
    *,
    said: Callable[[int, int], str] = answer,
    fields: Callable[[int], dict[str, Any]] = lambda task: {"level": f"L{task % 2}"},
    model: str = "m",
    temperature: float = 0.5,
) -> JobFiles:
    """A finished job: per task, per rollout a reward, or why there is none. Rollout r of task t works t + 2r seconds."""
    folder.mkdir(parents=True)
    files = JobFiles(folder)
    manifest_of(folder.name, rewards, model).save(files.manifest)
    with files.rollouts.open("wb") as scored, files.failures.open("wb") as failed, files.inputs.open("wb") as inputs:
        sequence = 0
        for task, of_task in enumerate(rewards):
            row = {"question": f"what is {task}?", "expected_answer": str(task), **fields(task)}
            params = {"input": [{"role": "user", "content": f"please: what is {task}?"}], "temperature": temperature}
            row |= {"responses_create_params": params}
            for rollout, reward in enumerate(of_task):
                sequence += 1
                inputs.write(encode(row | {"_ng_task_index": task, "_ng_rollout_index": rollout}) + b"\n")
                common: dict[str, Any] = {
                    "rollout": RolloutId(folder.name, task, rollout),
                    "agent": "simple",
                    "verifier": "math",
                    "row": encode(row),
                    "group_size": len(of_task),
                    "policy": Policy(model=model, temperature=temperature),
                    "timings": Timings(
                        request_queue_s=1.0, agent_s=task + 2.0 * rollout, model_s=0.5, model_calls=1, verify_s=0.25
                    ),
                    "published_at": 1000.0 + sequence,
                }
                if isinstance(reward, FailureKind):
                    failure = Failure(kind=reward, detail=f"it broke after {sequence} s", stage="agent")
                    failed.write(failed_line(Failed(failure=failure, **common), sequence))
                    continue
                result = Scored(
                    reward=reward,
                    response=encode({"output": [message(said(task, rollout))]}),
                    usage=Usage(input_tokens=5, output_tokens=10 + task, total_tokens=15 + task),
                    extra=encode({"extracted_answer": str(task + rollout)}),
                    **common,
                )
                scored.write(scored_line(result, sequence))
    return files


def manifest_of(job: str, rewards: Sequence[Sequence[Any]], model: str) -> Manifest:
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
