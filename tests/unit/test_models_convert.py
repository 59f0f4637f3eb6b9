"""Chat Completions to Responses and back, and what a row may ask for; the official client's types are the judge."""

from __future__ import annotations

import time
from array import array
from typing import Any

import msgspec
import pytest
from aiohttp import web
from openai.types.responses import Response

from gym_bus.errors import DataError, ModelError, TaskError
from gym_bus.messages import RolloutId, Usage
from gym_bus.models.api import CallInfo, Reply
from gym_bus.models.convert import chat_messages, chat_request, response_object
from gym_bus.models.registry import Models
from gym_bus.models.schema import check_create_params
from gym_bus.models.serve import serve
from gym_bus.models.wire import ResponsesUsage, TokenDetails, chat_decoder
from gym_bus.settings import ModelConfig, RetryConfig

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
CHAT_ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}


def converted(
    message: dict[str, Any],
    finish_reason: str | None = "stop",
    params: dict[str, Any] | None = None,
    *,
    split_think: bool = False,
    **chat: Any,
) -> dict[str, Any]:
    """The Responses object made of a chat reply, after the official client's types have accepted it."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    wire = chat_decoder.decode(
        msgspec.json.encode({"id": "c", "created": 7, "model": "m", "choices": [choice], **chat})
    )
    assert wire.choices
    made: dict[str, Any] = msgspec.json.decode(
        response_object(wire, wire.choices[0], params or {}, split_think=split_think)
    )
    Response.model_validate(made)
    return made


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]


async def answered(body: dict[str, Any], api: str) -> Reply:
    """What the model client makes of a reply, tokens asked for."""

    async def endpoint(request: web.Request) -> web.Response:
        return web.json_response(body)

    app = web.Application()
    app.router.add_post("/v1/{tail:.*}", endpoint)
    runner, port = await serve(app, "127.0.0.1", 0)
    settings: dict[str, Any] = {"base_url": f"http://127.0.0.1:{port}/v1", "api": api, "return_tokens": True}
    models = Models({"m": ModelConfig(**settings, retry=RetryConfig(server_error=0))})
    try:
        return await models.get("m").respond({"input": "hi"}, CallInfo(rollout=RolloutId("job", 0, 0)))
    finally:
        await models.close()
        await runner.cleanup()


def test_a_plain_answer_becomes_one_assistant_message() -> None:
    response = converted({"content": "Four."})

    assert (response["status"], response["model"], response["created_at"]) == ("completed", "m", 7)
    assert (response["error"], response["incomplete_details"], response["usage"]) == (None, None, None)
    assert kinds(response) == ["message"]
    assert response["output"][0]["content"] == [{"type": "output_text", "text": "Four.", "annotations": []}]
    assert Response.model_validate(response).output_text == "Four."


@pytest.mark.parametrize("message", [{}, {"content": None}, {"content": ""}, {"content": "", "tool_calls": []}])
def test_an_empty_answer_is_still_a_message(message: dict[str, Any]) -> None:
    response = converted(message)

    assert kinds(response) == ["message"]
    assert response["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize(
    ("finish_reason", "status", "details"),
    [
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        (None, "completed", None),
    ],
)
def test_the_finish_reason_says_whether_the_response_is_complete(
    finish_reason: str | None, status: str, details: dict[str, str] | None
) -> None:
    response = converted({"content": "x"}, finish_reason)

    assert (response["status"], response["incomplete_details"]) == (status, details)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_becomes_an_item_before_the_message(key: str) -> None:
    response = converted({"content": "4", key: "2+2"})

    assert kinds(response) == ["reasoning", "message"]
    assert response["output"][0]["summary"] == [{"type": "summary_text", "text": "2+2"}]


@pytest.mark.parametrize(
    ("text", "split_think", "message", "thought"),
    [
        ("<think>2+2\n=4</think>\n\n4", True, "4", "2+2\n=4"),
        ("\n <think>a</think>4 <think>b</think>", True, "4 <think>b</think>", "a"),
        ("<think>2+2</think>4", False, "<think>2+2</think>4", None),
        ("<think>never closed", True, "<think>never closed", None),
        ("4 <think>after</think>", True, "4 <think>after</think>", None),
        ("<think></think>4", True, "4", None),
    ],
)
def test_only_a_leading_think_block_is_split_off_and_only_when_asked(
    text: str, split_think: bool, message: str, thought: str | None
) -> None:
    response = converted({"content": text}, split_think=split_think)

    assert response["output"][-1]["content"][0]["text"] == message
    assert (response["output"][0]["summary"][0]["text"] if len(response["output"]) > 1 else None) == thought


def test_reasoning_that_the_endpoint_split_off_is_not_split_again() -> None:
    response = converted({"content": "<think>b</think>4", "reasoning_content": "a"}, split_think=True)

    assert response["output"][0]["summary"][0]["text"] == "a"
    assert response["output"][1]["content"][0]["text"] == "<think>b</think>4"


def test_tool_calls_become_items_in_order_with_their_arguments_as_written() -> None:
    second = {"id": "", "type": "function", "function": {"name": "stop", "arguments": "{broken"}}

    response = converted({"content": None, "reasoning": "hm", "tool_calls": [CALL, second]}, "tool_calls")

    assert kinds(response) == ["reasoning", "function_call", "function_call"]
    calls = response["output"][1:]
    assert [(c["call_id"], c["name"], c["arguments"]) for c in calls] == [
        ("call_1", "add", '{"a": 1}'),
        ("call_c_1", "stop", "{broken"),
    ]
    assert len({item["id"] for item in response["output"]}) == 3


@pytest.mark.parametrize(
    ("content", "text", "thought"),
    [
        ([{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}], "Four.", None),
        (["Fo", {"text": "ur."}], "Four.", None),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "2"}, {"type": "text", "text": "+2"}]},
                {"type": "text", "text": "Four."},
                {"type": "reference", "reference_ids": [1]},
            ],
            "Four.",
            "2+2",
        ),
        ([{"type": "reasoning", "text": "2+"}, {"type": "thinking", "thinking": "2"}, "Four."], "Four.", "2+2"),
        ([{"type": "reasoning", "reasoning": [7, None, {"text": None}]}, {"type": "text", "text": 4}], "", None),
        ([], "", None),
    ],
)
def test_parts_of_an_answer_are_its_text_and_its_reasoning(content: list[Any], text: str, thought: str | None) -> None:
    response = converted({"content": content})

    assert response["output"][-1]["content"][0]["text"] == text
    assert [item["summary"][0]["text"] for item in response["output"][:-1]] == ([thought] if thought else [])


@pytest.mark.parametrize("content", [[1], [None], {"text": "x"}, 4, True])
def test_what_is_neither_text_nor_parts_is_no_answer(content: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        converted({"content": content})


def test_arguments_sent_as_an_object_become_its_text() -> None:
    function = {"name": "add", "arguments": {"a": 1.50, "b": ["é", None]}}

    response = converted({"tool_calls": [{"function": function, "id": 7}, {"function": {**function, "arguments": {}}}]})

    calls = [(item["call_id"], item["arguments"]) for item in response["output"]]
    assert calls == [("7", '{"a":1.5,"b":["é",null]}'), ("call_c_1", "{}")]


@pytest.mark.parametrize(
    ("given", "made"), [(17, "resp_17"), (1.5, "resp_1.5"), (None, "resp_chat"), ("", "resp_chat")]
)
def test_an_id_may_be_a_number_or_missing(given: Any, made: str) -> None:
    assert converted({"content": "x"}, id=given)["id"] == made


@pytest.mark.parametrize("created", ["1700000000", "2023-11-14T22:13:20Z", None, [7], {"s": 7}, -1, 0, 1e300, 10**30])
def test_a_time_that_is_none_is_the_time_of_its_arrival(created: Any) -> None:
    before = int(time.time())

    assert before <= converted({"content": "x"}, created=created)["created_at"] <= time.time()


def test_a_time_may_have_a_fraction() -> None:
    assert converted({"content": "x"}, created=1700000000.7)["created_at"] == 1700000000


def test_words_beside_tool_calls_come_first() -> None:
    assert kinds(converted({"content": "Let me see.", "tool_calls": [CALL]})) == ["message", "function_call"]


def test_a_refusal_is_a_refusal_part() -> None:
    response = converted({"content": None, "refusal": "I will not."})

    assert response["output"][0]["content"] == [{"type": "refusal", "refusal": "I will not."}]


def test_the_response_repeats_the_tools_it_was_asked_with() -> None:
    choice = {"type": "function", "name": "add"}

    response = converted({"content": "x"}, params={"tools": [ADD], "tool_choice": choice, "parallel_tool_calls": False})

    assert (response["tools"], response["tool_choice"], response["parallel_tool_calls"]) == ([ADD], choice, False)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}, (5, 7, 12, 0, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 7}, (5, 7, 12, 0, 0)),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 7,
                "total_tokens": 12,
                "prompt_tokens_details": {"cached_tokens": 4},
                "completion_tokens_details": {"reasoning_tokens": 3},
            },
            (5, 7, 12, 4, 3),
        ),
        ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {}}, (5, 7, 12, 0, 0)),
    ],
)
def test_usage_is_renamed_and_completed(usage: dict[str, Any], expected: tuple[int, ...]) -> None:
    wire = chat_decoder.decode(msgspec.json.encode({"choices": [{"message": {"content": "x"}}], "usage": usage}))
    assert wire.choices

    made = msgspec.json.decode(response_object(wire, wire.choices[0], {}, split_think=False))["usage"]

    assert (
        made["input_tokens"],
        made["output_tokens"],
        made["total_tokens"],
        made["input_tokens_details"]["cached_tokens"],
        made["output_tokens_details"]["reasoning_tokens"],
    ) == expected


def test_usage_of_a_responses_endpoint_keeps_unknown_details_unknown() -> None:
    known = ResponsesUsage(input_tokens=2, output_tokens=3, input_tokens_details=TokenDetails(cached_tokens=0))

    assert known.plain() == Usage(input_tokens=2, output_tokens=3, total_tokens=5, cached_tokens=0)


async def test_token_ids_beside_the_choice_are_taken_with_their_log_probabilities() -> None:
    content = [{"token": "a", "logprob": -0.25}, {"token": "b", "logprob": -0.5}]
    choice = {"message": {"content": "ab"}, "logprobs": {"content": content}, "token_ids": [11, 12]}

    reply = await answered({"choices": [choice], "prompt_token_ids": [8, 9]}, "chat")

    assert reply.call
    assert array("I", reply.call.prompt_token_ids).tolist() == [8, 9]
    assert array("I", reply.call.token_ids).tolist() == [11, 12]
    assert array("f", reply.call.logprobs).tolist() == [-0.25, -0.5]
    assert b"token_ids" not in reply.body


@pytest.mark.parametrize(
    "logprobs", [None, {"content": None}, {"content": []}, {"content": [{"token": "a", "logprob": -1.0}]}]
)
async def test_without_token_ids_there_is_no_call_to_train_on(logprobs: dict[str, Any] | None) -> None:
    reply = await answered({"choices": [{"message": {"content": "a"}, "logprobs": logprobs}]}, "chat")

    assert reply.call is None


@pytest.mark.parametrize(
    ("api", "tokens", "what"),
    [
        ("chat", {"token_ids": [1, 2], "logprobs": {"content": [{"logprob": -1.0}]}}, "1 log-prob.* for 2 tokens"),
        ("chat", {"token_ids": [1]}, "0 log-probabilities for 1 tokens"),
        ("chat", {"token_ids": [-1], "logprobs": {"content": [{"logprob": -1.0}]}}, "negative value"),
        ("chat", {"logprobs": {"content": [{"token": "token_id:x", "logprob": -1.0}]}}, "invalid literal"),
        ("responses", {"generation_token_ids": [1, 2]}, "0 log-probabilities for 2 tokens"),
        ("responses", {"generation_token_ids": [-1], "generation_log_probs": [-1.0]}, "negative value"),
        ("responses", {"generation_token_ids": "1"}, "Expected `array"),
        ("responses", {"generation_token_ids": [1], "generation_log_probs": [-1e39]}, "too large for its type"),
        ("chat", {"token_ids": [1], "logprobs": {"content": [{"logprob": 1e39}]}}, "too large for its type"),
    ],
)
async def test_tokens_that_do_not_fit_their_log_probabilities_are_an_error(
    api: str, tokens: dict[str, Any], what: str
) -> None:
    item = {"type": "message", "role": "assistant", "content": []}
    bodies = {"chat": {"choices": [{"message": {"content": "a"}, **tokens}]}, "responses": {"output": [item | tokens]}}

    with pytest.raises(ModelError, match=what):
        await answered(bodies[api], api)


async def test_token_arrays_are_cut_from_the_item_that_carries_them_and_from_no_other() -> None:
    message = {"type": "message", "role": "assistant", "content": []}
    tokens = {"prompt_token_ids": [1], "generation_token_ids": [2, 3], "generation_log_probs": [-1.0, -2.0]}
    reasoning = {"type": "reasoning", "id": "rs", "summary": []}

    reply = await answered({"id": "r", "output": [reasoning, {**message, **tokens}]}, "responses")

    assert reply.call
    assert array("I", reply.call.token_ids).tolist() == [2, 3]
    assert msgspec.json.decode(reply.body) == {"id": "r", "output": [reasoning, message]}
    assert [msgspec.json.decode(item) for item in reply.head.output] == [reasoning, message]


def test_a_request_carries_over_what_chat_has_a_word_for() -> None:
    request = chat_request(
        {
            "input": "hi",
            "instructions": "Be brief.",
            "temperature": 0.0,
            "top_p": None,
            "max_output_tokens": 64,
            "tools": [ADD],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "reasoning": {"effort": "low"},
            "top_logprobs": 2,
            "truncation": "auto",
        }
    )

    assert request == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "temperature": 0.0,
        "max_tokens": 64,
        "tools": [CHAT_ADD],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "top_logprobs": 2,
        "logprobs": True,
    }


def test_without_tools_nothing_is_said_of_their_use() -> None:
    request = chat_request({"input": "hi", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True})

    assert set(request) == {"messages"}


def test_a_chosen_function_is_named_in_chats_way() -> None:
    choice = {"type": "function", "name": "add"}

    request = chat_request({"input": "hi", "tools": [msgspec.Raw(msgspec.json.encode(ADD))], "tool_choice": choice})

    assert request["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert request["tools"] == [CHAT_ADD]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ({}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}},
        ),
    ],
)
def test_a_wanted_format_is_passed_on(text: Any, expected: Any) -> None:
    assert chat_request({"input": "hi", "text": text}).get("response_format") == expected


def test_the_items_of_one_turn_become_one_assistant_message() -> None:
    items: list[Any] = [
        {"role": "user", "content": "1+1 and 2+2?"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Use "}, {"text": "the tool."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]},
        msgspec.Raw(b'{"type":"function_call","call_id":"a","name":"add","arguments":"{\\"a\\":1}"}'),
        {"type": "function_call", "call_id": "b", "name": "add", "arguments": ""},
        {"type": "function_call_output", "call_id": "a", "output": "2"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "4"}]},
        {"role": "assistant", "content": "2 and "},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]

    assert chat_messages(items, None) == [
        {"role": "user", "content": "1+1 and 2+2?"},
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "Use the tool.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
                {"id": "b", "type": "function", "function": {"name": "add", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "2"},
        {"role": "tool", "tool_call_id": "b", "content": '[{"type":"input_text","text":"4"}]'},
        {"role": "assistant", "content": "2 and no"},
    ]


def test_instructions_and_leading_system_messages_become_one() -> None:
    items = [
        {"role": "system", "content": "Be polite."},
        {"role": "developer", "content": [{"type": "input_text", "text": "No emoji."}]},
        {"role": "user", "content": None},
        {"role": "system", "content": "Later."},
    ]

    assert chat_messages(items, "Be brief.") == [
        {"role": "system", "content": "Be brief.\nBe polite.\nNo emoji."},
        {"role": "user", "content": ""},
        {"role": "system", "content": "Later."},
    ]
    assert chat_messages(items, None)[0] == {"role": "system", "content": "Be polite."}


def test_parts_that_are_no_text_stay_parts() -> None:
    url = "data:image/png;base64,AA"
    content = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": url, "detail": "low"},
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_id": "f"},
    ]

    assert chat_messages([{"role": "user", "content": content}], None)[0]["content"] == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "file", "file": {"file_id": "f"}},
    ]


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input item of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "content part of type 'input_audio'"),
        ({"input": "hi", "tools": [{"type": "web_search"}]}, "tool of type 'web_search'"),
    ],
)
def test_what_chat_has_no_form_for_is_the_tasks_fault(params: dict[str, Any], what: str) -> None:
    with pytest.raises(TaskError, match=what):
        chat_request(params)


def test_an_answer_survives_the_way_there_and_back() -> None:
    message = {"role": "assistant", "content": "See.", "reasoning_content": "hm", "tool_calls": [CALL]}

    assert chat_messages(converted(message)["output"], None) == [message]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"input": "hi", "temperature": 1, "metadata": {"a": "b"}, "reasoning": {"effort": "low"}, "stream": False},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], "tools": [ADD]},
        {"input": [{"type": "function_call_output", "call_id": "a", "output": "2"}], "max_output_tokens": 5},
    ],
)
def test_create_params_that_an_endpoint_takes_are_taken(params: dict[str, Any]) -> None:
    check_create_params(params, "rows.jsonl:1")


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"input": "hi", "temprature": 1}, ": unknown key 'temprature': did you mean 'temperature'"),
        ({"input": "hi", "stream": True}, r"\.stream: rollouts are not streamed"),
        ({"input": 3}, r"\.input: expected a string or a list"),
        ({"input": "hi", "metadata": {"a": 1}}, r"\.metadata: expected an object whose values are strings"),
        ({"input": "hi", "metadata": "a"}, r"\.metadata: expected an object"),
        ({"input": "hi", "temperature": "hot"}, r"\.temperature: expected a number from 0 on"),
        ({"input": "hi", "tools": 5}, r"\.tools: expected a list"),
        ({"input": "hi", "tools": ["f"]}, r"\.tools\.0: expected an object with a `type`"),
        ({"input": "hi", "tools": [{"type": "function"}]}, r"\.tools\.0\.name: a function needs a name"),
        ({"input": [{"role": "usr", "content": "x"}]}, r"\.input\.0\.role: input should be"),
        ({"input": "hi", "include": ["all"]}, r"\.include\.0: input should be"),
        ({"input": [{"type": "function_call", "name": "f"}]}, r"\.input"),
    ],
)
def test_create_params_that_no_endpoint_takes_are_named_with_the_row(params: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: responses_create_params" + what):
        check_create_params(params, "rows.jsonl:7")
