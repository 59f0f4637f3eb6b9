"""For tests of verifiers: what an endpoint would have sent, and one verdict without bus or pool."""

from __future__ import annotations

from typing import Any

from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Task, Verifier


def response_of(text: str) -> dict[str, Any]:
    """A Responses object with one assistant message."""
    content = [{"type": "output_text", "annotations": [], "text": text}]
    message = {"id": "msg", "type": "message", "role": "assistant", "status": "completed", "content": content}
    return {"id": "resp", "object": "response", "status": "completed", "output": [message]}


def judge(verifier: Verifier, row: dict[str, Any], text: str) -> Verdict:
    """The verdict on an answer. Raises TaskError where the row is broken."""
    return verifier.verify(Task(row, response_of(text)))
