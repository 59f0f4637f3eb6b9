"""Files as NeMo Gym writes them: responses of all kinds of items, rows of its verifiers, the files of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def message(*texts: str, refusal: str | None = None) -> dict[str, Any]:
    """An assistant message; each text is a part of its own."""
    content: list[dict[str, Any]] = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    if refusal is not None:
        content.append({"type": "refusal", "refusal": refusal})
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": content}


def reasoning(*texts: str) -> dict[str, Any]:
    """Thinking as an item of its own, as a reasoning parser makes it."""
    summary = [{"type": "summary_text", "text": text} for text in texts]
    return {"id": "rs_1", "type": "reasoning", "summary": summary, "content": None, "encrypted_content": None}


def tool_call(name: str, output: str) -> list[dict[str, Any]]:
    """A function call and what it gave."""
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": name, "arguments": "{}"}
    return [call, {"type": "function_call_output", "id": None, "call_id": "call_1", "output": output, "status": None}]


def response(*items: dict[str, Any], cut: bool = False) -> dict[str, Any]:
    """A Responses object; `cut` where the model ran out of tokens."""
    return {
        "id": "resp_1",
        "created_at": 1760000000.0,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": {},
        "model": "policy",
        "object": "response",
        "output": list(items),
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": 12,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 34,
            "output_tokens_details": None,
            "total_tokens": 46,
        },
    }


def write_run(
    folder: Path, rollouts: Iterable[tuple[dict[str, Any], dict[str, Any], float]], *, dropped: Sequence[str] = ()
) -> Path:
    """The rollouts file of a run, with its materialized inputs beside it; returns its path.

    Args:
        folder: where to.
        rollouts: row, response, and NeMo Gym's reward; each is a task.
        dropped: row fields that the verifier's reply does not name, so that the rollouts lack them.
    """
    path = folder / "rollouts.jsonl"
    inputs, lines = [], []
    for task, (row, answered, reward) in enumerate(rollouts):
        made = {
            "responses_create_params": {"input": [{"role": "user", "content": "?"}]},
            **row,
            "agent_ref": {"type": "responses_api_agents", "name": "simple_agent"},
            "_ng_task_index": task,
            "_ng_rollout_index": 0,
        }
        inputs.append(made)
        kept = {key: value for key, value in made.items() if key not in dropped}
        lines.append({**kept, "response": answered, "reward": reward})
    write_lines(folder / "rollouts_materialized_inputs.jsonl", inputs)
    write_lines(path, reversed(lines))  # in order of completion
    return path


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """JSONL by Python's own json."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
