"""`responses_create_params` checked against the official client's own types, once, where data is loaded."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from gym_bus.errors import DataError, did_you_mean

CREATE_PARAMS = frozenset(
    [
        "background",
        "include",
        "input",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "metadata",
        "model",
        "parallel_tool_calls",
        "previous_response_id",
        "prompt",
        "reasoning",
        "service_tier",
        "store",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "truncation",
        "user",
        "stream",
    ]
)
"""What a row may ask for: NeMo Gym's NeMoGymResponseCreateParamsNonStreaming, which forbids everything else."""


@lru_cache(maxsize=1)
def _adapter() -> Any:
    # Imported on first use: the openai package takes half a second, and workers never need this.
    from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
    from pydantic import TypeAdapter

    return TypeAdapter(ResponseCreateParamsNonStreaming)


def check_create_params(params: dict[str, Any], where: str) -> None:
    """Raise DataError, named after `where`, for create params that no endpoint would take."""
    from pydantic import ValidationError

    at = f"{where}: responses_create_params"
    for key in params:
        if key not in CREATE_PARAMS:
            raise DataError(f"{at}: unknown key {key!r}: {did_you_mean(key, CREATE_PARAMS)}")
    if params.get("stream"):
        raise DataError(f"{at}.stream: rollouts are not streamed; leave it out")
    if not isinstance(params.get("input", ""), str | list):
        raise DataError(f"{at}.input: expected a string or a list of items")
    for key in ("temperature", "top_p"):
        value = params.get(key)
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise DataError(f"{at}.{key}: expected a number from 0 on, not {value!r}")
    metadata = params.get("metadata")
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise DataError(f"{at}.metadata: expected an object whose values are strings")
    _check_tools(params.get("tools"), at)
    try:
        _adapter().validate_python(params)
    except ValidationError as e:
        raise DataError(f"{at}.{_explain(e.errors(include_url=False))}") from None


def _check_tools(tools: Any, at: str) -> None:
    # The client's own type is an iterable, which is checked only when somebody iterates.
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{at}.tools: expected a list")
    for i, tool in enumerate(tools or []):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise DataError(f"{at}.tools.{i}: expected an object with a `type`")
        if kind == "function" and not (isinstance(tool.get("name"), str) and tool["name"]):
            raise DataError(f"{at}.tools.{i}.name: a function needs a name")


_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "nullable"})


def _explain(errors: list[Any]) -> str:
    # Of a union every branch complains; the complaint that lies deepest belongs to the branch that was meant.
    deepest = max(errors, key=lambda error: len(error["loc"]))
    path = ".".join(
        str(part)
        for part in deepest["loc"]
        if isinstance(part, int) or (str(part).isidentifier() and part.islower() and part not in _UNION_BRANCHES)
    )
    return f"{path or deepest['loc'][0]}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}"
