"""Lines of the result files: every key once, nothing parsed twice, nothing that a reader could stumble over."""

from __future__ import annotations

import json
from array import array
from typing import Any

import msgspec
import pytest

from gym_bus.errors import FailureKind
from gym_bus.messages import Call, Failed, Failure, Policy, RolloutId, Scored, Timings, Usage
from gym_bus.results.lines import COMPOSED, failed_line, history_of, scored_line


def scored(**changes: Any) -> Scored:
    defaults: dict[str, Any] = {
        "rollout": RolloutId("job-1", 3, 2),
        "agent": "simple",
        "verifier": "mcqa",
        "verifier_digest": "d1",
        "reward": 1.0,
        "row": b'{"question": "1+1?", "expected_answer": "2"}',
        "response": b'{"output": [], "usage": {"input_tokens": 5}}',
        "policy": Policy(model="small", version_start=4, version_end=5, temperature=0.5),
        "usage": Usage(input_tokens=5, output_tokens=7, total_tokens=12),
        "timings": Timings(agent_s=1.5),
        "agent_worker": "agent-1",
        "verifier_worker": "verifier-1",
        "group_size": 4,
        "published_at": 1000.5,
    }
    return Scored(**(defaults | changes))


def failed(**changes: Any) -> Failed:
    defaults: dict[str, Any] = {
        "rollout": RolloutId("job-1", 3, 2),
        "failure": Failure(kind=FailureKind.MODEL_TIMEOUT, detail="no answer in 5 s", stage="agent"),
        "row": b'{"question": "1+1?"}',
    }
    return Failed(**(defaults | changes))


def pairs_of(line: bytes) -> list[tuple[str, Any]]:
    """The top-level keys and values in their order, repeated keys included."""
    pairs: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=lambda found: found)
    return pairs


def keys_of(line: bytes) -> list[str]:
    return [key for key, _ in pairs_of(line)]


def test_a_scored_line_holds_row_response_outcome_and_identity_in_this_order() -> None:
    line = scored_line(scored(components={"format": 0.5}, extra=b'{"extracted_answer": "2"}'), 77)

    assert line.endswith(b"}\n")
    assert keys_of(line) == [
        "question",
        "expected_answer",
        "response",
        "reward",
        "reward_components",
        "extracted_answer",
        "_ng_task_index",
        "_ng_rollout_index",
        "gym_bus",
    ]
    content = json.loads(line)
    assert (content["_ng_task_index"], content["_ng_rollout_index"], content["reward"]) == (3, 2, 1.0)
    assert content["reward_components"] == {"format": 0.5}
    assert content["response"] == {"output": [], "usage": {"input_tokens": 5}}


def test_the_gym_bus_key_says_who_made_the_line_and_how_long_it_took() -> None:
    ours = json.loads(scored_line(scored(number=2), 77))["gym_bus"]

    assert ours == {
        "job": "job-1",
        "attempt": 2,
        "agent": "simple",
        "model": "small",
        "policy_version_start": 4,
        "policy_version_end": 5,
        "temperature": 0.5,
        "verifier": "mcqa",
        "verifier_digest": "d1",
        "agent_worker": "agent-1",
        "verifier_worker": "verifier-1",
        "timings": {
            "request_queue_s": 0.0,
            "agent_s": 1.5,
            "model_queue_s": 0.0,
            "model_s": 0.0,
            "model_calls": 0,
            "tools_s": 0.0,
            "attempt_queue_s": 0.0,
            "verify_s": 0.0,
            "publish_s": 0.0,
        },
        "usage": {
            "input_tokens": 5,
            "output_tokens": 7,
            "total_tokens": 12,
            "reasoning_tokens": None,
            "cached_tokens": None,
        },
        "group_size": 4,
        "stream_seq": 77,
        "finished_at": 1000.5,
    }


@pytest.mark.parametrize(("number", "expected"), [(1, None), (2, 1), (3, 2)])
def test_the_attempt_index_appears_on_retries_only(number: int, expected: int | None) -> None:
    assert json.loads(scored_line(scored(number=number), 1)).get("_ng_attempt_index") == expected
    assert json.loads(failed_line(failed(number=number), 1)).get("_ng_attempt_index") == expected


@pytest.mark.parametrize(
    "row",
    [
        b"{}",
        b"{ }",
        b'{"a": 1}',
        b' \n{"a": 1 ,\r\n "b": {"c": [1, {"d": "}"}]} }\n',
        b'{"a": "brace } quote \\" newline \\n comma ,"}',
        '{"frage": "wie geht\'s, Ω?"}'.encode(),
        b'{"a": "\\u00e9", "\\u0062": 2}',
        b'{"a": 1e400, "big": 123456789012345678901234567890, "f": 0.10}',
    ],
)
def test_any_row_is_copied_as_it_is_and_onto_one_line(row: bytes) -> None:
    line = scored_line(scored(row=row, response=b'{\n  "output": [\r\n  ]\n}'), 1)

    assert line.count(b"\n") == 1
    assert b"\r" not in line
    content = json.loads(line)
    assert {key: content[key] for key in json.loads(row)} == json.loads(row)


def test_numbers_of_the_row_keep_every_digit() -> None:
    line = scored_line(scored(row=b'{"id": 123456789012345678901234567890, "x": 0.1000}'), 1)

    assert b'"id":123456789012345678901234567890' in line
    assert b'"x":0.1000' in line


@pytest.mark.parametrize("name", ["expected_answer", "expected\\u005fanswer", "\\u0065xpected_answer"])
def test_an_extra_field_replaces_the_row_field_of_its_name_however_either_is_escaped(name: str) -> None:
    row = f'{{"{name}": "from the row", "z": 1}}'.encode()

    line = scored_line(scored(row=row, extra=b'{"expected_answer": "from the verifier"}'), 1)

    assert keys_of(line).count("expected_answer") == 1
    assert json.loads(line)["expected_answer"] == "from the verifier"


def test_keys_of_the_composer_in_row_or_extra_are_dropped() -> None:
    forged = json.dumps(dict.fromkeys(sorted(COMPOSED), "forged")).encode()

    good = scored_line(scored(row=forged, extra=forged), 1)
    bad = failed_line(failed(row=forged), 1)

    assert b"forged" not in good
    assert b"forged" not in bad
    assert sorted(keys_of(good)) == sorted(set(keys_of(good)))
    assert "_ng_failure_class" not in keys_of(good)


def test_a_failed_line_says_why_and_has_no_reward() -> None:
    content = json.loads(failed_line(failed(row=b'{"question": "?", "reward": 0.0}'), 9))

    assert "reward" not in content
    assert "response" not in content
    assert content["_ng_failure_class"] == "model_timeout"
    assert content["_ng_failure_terminal"] is False
    assert content["_ng_failure_stage"] == "agent"
    assert content["_ng_failure_detail"] == "no answer in 5 s"
    assert content["gym_bus"]["model"] is None
    assert content["gym_bus"]["usage"] is None
    assert content["gym_bus"]["stream_seq"] == 9


def test_a_failed_line_keeps_the_response_where_generation_had_succeeded() -> None:
    result = failed(
        response=b'{"id": "r"}',
        failure=Failure(kind=FailureKind.JUDGE_FAILED, detail="judge is down", terminal=True),
    )

    content = json.loads(failed_line(result, 1))

    assert content["response"] == {"id": "r"}
    assert content["_ng_failure_terminal"] is True
    assert content["_ng_failure_judge_error"] == "judge is down"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"row": b"[1]"}, "row"),
        ({"row": b""}, "row"),
        ({"row": b'{"a": 1} {"b": 2}'}, "row"),
        ({"row": b'{"a": nope}'}, "row"),
        ({"response": b'{"a": 1'}, "response"),
        ({"response": b""}, "response"),
        ({"extra": b'"text"'}, "extra"),
        ({"row": b'{"a": "\xff"}'}, "utf-8"),
        ({"row": b'{"\xff": 1}'}, "row"),
    ],
)
def test_what_could_not_be_read_back_is_not_composed(changes: dict[str, bytes], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        scored_line(scored(**changes), 1)


def u32(*values: int) -> bytes:
    return array("I", values).tobytes()


def f32(*values: float) -> bytes:
    return array("f", values).tobytes()


FIRST = Call(prompt_token_ids=u32(1, 2), token_ids=u32(3, 4), logprobs=f32(-0.5, -0.25))
SECOND = Call(prompt_token_ids=u32(1, 2, 3, 4, 5), token_ids=u32(6), logprobs=f32(-1.0))
TOOL_USE: list[dict[str, Any]] = [
    {"type": "reasoning", "summary": []},
    {"type": "function_call", "name": "add", "arguments": "{}"},
    {"type": "function_call_output", "output": "2"},
    {"type": "message", "role": "assistant", "content": []},
]


def test_tokens_go_onto_the_last_item_of_each_model_call() -> None:
    result = scored(response=json.dumps({"id": "r", "output": TOOL_USE}).encode(), calls=(FIRST, SECOND))

    content = json.loads(scored_line(result, 1, tokens=True))

    output = content["response"]["output"]
    assert [sorted(item.keys() & {"prompt_token_ids"}) for item in output] == [
        [],
        ["prompt_token_ids"],
        [],
        ["prompt_token_ids"],
    ]
    assert output[1] == TOOL_USE[1] | {
        "prompt_token_ids": [1, 2],
        "generation_token_ids": [3, 4],
        "generation_log_probs": [-0.5, -0.25],
    }
    assert output[3]["generation_token_ids"] == [6]
    assert content["response"]["id"] == "r"
    assert "calls" not in content["gym_bus"]


def test_tokens_are_written_on_request_only() -> None:
    result = scored(response=json.dumps({"output": TOOL_USE}).encode(), calls=(FIRST, SECOND))

    assert b"token_ids" not in scored_line(result, 1)


def test_calls_around_a_user_turn_are_told_apart() -> None:
    turns = [
        {"type": "message", "role": "assistant", "content": []},
        {"role": "user", "content": "wrong, try again"},
        {"type": "message", "role": "assistant", "content": []},
    ]
    result = scored(response=json.dumps({"output": turns}).encode(), calls=(FIRST, SECOND))

    output = json.loads(scored_line(result, 1, tokens=True))["response"]["output"]

    assert [item.get("generation_token_ids") for item in output] == [[3, 4], None, [6]]


@pytest.mark.parametrize("response", [{"output": TOOL_USE[:1]}, {"output": []}, {}, {"output": "text"}, [1]])
def test_tokens_that_cannot_be_placed_for_certain_are_kept_beside_the_response(response: Any) -> None:
    result = scored(response=json.dumps(response).encode(), calls=(FIRST, SECOND))

    content = json.loads(scored_line(result, 1, tokens=True))

    assert content["response"] == response
    assert [call["generation_token_ids"] for call in content["gym_bus"]["calls"]] == [[3, 4], [6]]


def test_a_failed_line_keeps_what_its_attempt_had_beside_the_response() -> None:
    call = Call(prompt_token_ids=b"\1\0\0\0", token_ids=b"\2\0\0\0", logprobs=b"\0\0\0\0")
    kept = json.loads(failed_line(failed(extra=b'{"turns": 2, "reward": 1}', calls=(call,)), 1))["gym_bus"]["stored"]

    assert kept["extra"] == {"turns": 2}
    assert msgspec.convert(kept["calls"], tuple[Call, ...]) == (call,)
    assert "stored" not in json.loads(failed_line(failed(), 1))["gym_bus"]


def test_a_history_tells_every_failed_attempt_and_goes_on_in_the_scored_line() -> None:
    first = failed_line(failed(agent_worker="a-1", published_at=7.0), 1)
    second = failed_line(
        failed(number=2, failure=Failure(kind=FailureKind.SANDBOX_LOST, detail="x" * 5000, stage="verifier")),
        2,
        before=history_of(first),
    )
    line = json.loads(scored_line(scored(number=3), 3, before=history_of(second)))

    assert line["gym_bus"]["history"][0] == {
        "attempt": 1,
        "stage": "agent",
        "class": "model_timeout",
        "detail": "no answer in 5 s",
        "worker": "a-1",
        "at": 7.0,
    }
    assert [(past["attempt"], len(past["detail"])) for past in line["gym_bus"]["history"]] == [(1, 16), (2, 1000)]


def test_a_failed_line_without_a_history_is_its_own() -> None:
    line = json.loads(failed_line(failed(agent_worker="a-1"), 1))
    del line["gym_bus"]["history"]

    assert [(p.attempt, p.kind, p.worker) for p in history_of(json.dumps(line).encode())] == [
        (1, "model_timeout", "a-1")
    ]
