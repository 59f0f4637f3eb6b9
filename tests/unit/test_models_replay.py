"""Recorded answers: found by task or by prompt, one sample per rollout, and lines that are none named by number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response

from gym_bus.errors import DataError, RequestRefused
from gym_bus.messages import RolloutId, Usage
from gym_bus.models.api import CallInfo, Reply
from gym_bus.models.prompts import prompt_of, prompt_text
from gym_bus.models.registry import Models
from gym_bus.models.replay import CACHED_LINES, ReplayModel
from gym_bus.settings import ModelConfig

CALL_ITEM = {"type": "function_call", "call_id": "a", "name": "add", "arguments": "{}"}


def write(file: Path, *lines: dict[str, Any] | bytes) -> Path:
    file.write_bytes(b"".join((i if isinstance(i, bytes) else msgspec.json.encode(i)) + b"\n" for i in lines))
    return file


@contextmanager
def recorded(file: Path, *lines: dict[str, Any] | bytes) -> Iterator[ReplayModel]:
    model = ReplayModel(write(file, *lines))
    try:
        yield model
    finally:
        os.close(model._fd)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def text_of(reply: Reply) -> str:
    item = msgspec.json.decode(reply.head.output[0])
    return str(item["content"][0]["text"])


def ask(model: ReplayModel, prompt: str = "?", task: int | None = 0, rollout: int = 0, step: int = 0) -> Reply:
    return model.answer({"input": prompt}, task, rollout, step)


async def test_sample_i_of_a_task_answers_its_rollout_i(file: Path) -> None:
    write(file, {"task_index": 4, "completions": ["a", "b b", "c"]}, {"task_index": 2, "completions": ["d"]})
    models = Models({"m": ModelConfig(kind="replay", file=str(file))})
    model = models.get("m")

    async def respond(task: int, rollout: int) -> Reply:
        return await model.respond({"input": "one two"}, CallInfo(rollout=RolloutId("job", task, rollout)))

    found = [text_of(await respond(*at)) for at in ((4, 0), (4, 1), (4, 2), (2, 0), (4, 1))]
    reply = await respond(4, 1)
    await models.close()

    assert found == ["a", "b b", "c", "d", "b b"]
    assert reply.usage == Usage(input_tokens=2, output_tokens=2, total_tokens=4)
    assert msgspec.json.decode(reply.body)["model"] == "m"
    assert reply.head.incomplete_details is None


def test_an_answer_is_found_by_its_prompt_where_no_line_has_the_task(file: Path) -> None:
    lines = {"prompt": " What is 2+2?\n", "completions": ["4"]}, {"task_index": 1, "completions": ["by task"]}
    with recorded(file, *lines) as model:
        assert text_of(ask(model, "What is 2+2?", task=None)) == "4"
        assert text_of(ask(model, "  What is 2+2?", task=9)) == "4"
        assert text_of(ask(model, "What is 2+2?", task=1)) == "by task"


def test_of_two_lines_with_one_prompt_the_task_decides(file: Path) -> None:
    lines = ({"task_index": i, "prompt": "same", "completions": [f"answer {i}"]} for i in range(2))
    with recorded(file, *lines) as model:
        assert [text_of(ask(model, "same", task=i)) for i in range(2)] == ["answer 0", "answer 1"]


@pytest.mark.parametrize(
    ("task", "prompt", "rollout", "what"),
    [
        (5, "?", 0, r"answers\.jsonl: no recorded answer for task 5"),
        (None, "?", 0, "no recorded answer for this prompt"),
        (0, "?", 2, "no sample 2 for task 0: it has 2"),
        (None, "known", 7, "no sample 7 for task of this prompt: it has 2"),
    ],
)
def test_what_was_not_recorded_is_refused_in_words(
    file: Path, task: int | None, prompt: str, rollout: int, what: str
) -> None:
    with (
        recorded(file, {"task_index": 0, "prompt": "known", "completions": ["a", "b"]}) as model,
        pytest.raises(RequestRefused, match=what) as e,
    ):
        ask(model, prompt, task, rollout)
    assert e.value.status == 404


def test_a_recorded_response_comes_back_as_the_bytes_it_was(file: Path) -> None:
    body = (
        b'{"id": "r",  "output": [{"type": "message", "role": "assistant", "content": []}],'
        b' "incomplete_details": {"reason": "max_output_tokens"}, "usage": {"input_tokens": 1, "output_tokens": 2,'
        b' "total_tokens": 3, "input_tokens_details": {"cached_tokens": 1},'
        b' "output_tokens_details": {"reasoning_tokens": 2}}}'
    )
    with recorded(file, b'{"task_index": 0, "responses": [' + body + b', {"output": []}]}') as model:
        reply, bare = ask(model), ask(model, rollout=1)

    assert reply.body == body
    assert reply.usage == Usage(input_tokens=1, output_tokens=2, total_tokens=3, cached_tokens=1, reasoning_tokens=2)
    assert reply.head.incomplete_details and reply.head.incomplete_details.reason == "max_output_tokens"
    assert (bare.usage, bare.head.output) == (Usage(), [])


def test_a_list_of_responses_is_a_conversation_one_per_model_call(file: Path) -> None:
    steps = [{"id": "1", "output": [CALL_ITEM]}, {"id": "2", "output": []}]
    with recorded(file, {"task_index": 0, "responses": [steps, {"id": "alone", "output": []}]}) as model:
        found = [msgspec.json.decode(ask(model, rollout=r, step=s).body)["id"] for r, s in ((0, 0), (0, 1), (1, 3))]
        with pytest.raises(RequestRefused, match="2 model calls, the agent makes another"):
            ask(model, step=2)
    assert found == ["1", "2", "alone"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "not a line of recorded answers: Input data was truncated"),
        (b"[]", "not a line of recorded answers"),
        (b'{"prompt": "\xff", "completions": []}', "not a line of recorded answers"),
        (b'{"task_index": -1, "completions": []}', "not a line of recorded answers.*task_index"),
        (b'{"task_index": 1, "completions": ["a", 2]}', r"not a line of recorded answers.*completions\[1\]"),
        (b'{"task_index": 1, "responses": [3]}', "not a line of recorded answers"),
        (b'{"task_index": 1, "responses": [[[]]]}', "not a line of recorded answers"),
        (b'{"completions": ["a"]}', "neither `task_index` nor `prompt`"),
        (b'{"task_indx": 1, "completions": ["a"]}', "neither .*did you mean 'task_index'"),
        (b'{"task_index": 1}', "expected `completions`, a list of texts, or `responses`"),
        (b'{"task_index": 1, "completions": [], "responses": []}', "expected `completions`, a list of texts, or"),
        (b'{"task_index": 1, "responses": [{"id": "r"}]}', "a recorded response has no `output`"),
        (b'{"task_index": 1, "responses": [[{"output": []}, {"id": "r"}]]}', "a recorded response has no `output`"),
        (b'{"task_index": 0, "completions": ["b"]}', "a second line for task 0"),
    ],
)
def test_a_line_that_is_no_answer_is_named_with_file_and_line(file: Path, line: bytes, what: str) -> None:
    write(file, {"task_index": 0, "completions": ["a"]}, b"", line)

    with pytest.raises(DataError, match=rf"answers\.jsonl:3: .*{what}"):
        ReplayModel(file)


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_a_file_without_answers_is_an_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)

    with pytest.raises(DataError, match="no recorded answers in it"):
        ReplayModel(file)


@pytest.mark.parametrize(("name", "why"), [("missing.jsonl", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(DataError, match=f"cannot be read: {why}"):
        ReplayModel(tmp_path / name)


def test_more_lines_than_are_kept_in_memory_all_answer(file: Path) -> None:
    count = CACHED_LINES + 3
    lines = ({"task_index": i, "completions": [f"{'x' * i} {i}"]} for i in range(count))
    with recorded(file, *lines) as model:
        found = [text_of(ask(model, task=i)) for i in [*range(count), 0, count - 1]]
        assert len(model._cache) == CACHED_LINES
    assert [int(text.split()[-1]) for text in found] == [*range(count), 0, count - 1]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("  hi ", "hi"),
        ([{"role": "user", "content": "hi"}], "hi"),
        ([{"role": "user", "content": "one"}, {"role": "user", "content": "two"}], "two"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}, CALL_ITEM], "hi"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a "}, {"type": "input_image"}, "b"]}], "a"),
        ([msgspec.Raw(b'{"role": "user", "content": "raw"}')], "raw"),
        ([{"role": "user", "content": None}], ""),
        ([{"role": "system", "content": "hi"}], ""),
        (["hi"], ""),
        ([], ""),
        (None, ""),
        (5, ""),
    ],
)
def test_the_prompt_is_the_text_of_the_last_user_message(given: Any, prompt: str) -> None:
    assert prompt_text(given) == prompt


def test_the_prompt_of_a_row_is_that_of_its_create_params() -> None:
    row = {"id": 1, "responses_create_params": {"input": [{"role": "user", "content": "hi "}]}}

    assert prompt_of(msgspec.json.encode(row)) == "hi"


def test_a_recorded_conversations_items_are_those_of_the_official_types(file: Path) -> None:
    response = {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "output": [CALL_ITEM],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    with recorded(file, {"task_index": 0, "responses": [response]}) as model:
        checked = Response.model_validate(msgspec.json.decode(ask(model).body))
    assert [item.type for item in checked.output] == ["function_call"]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (['{"task_index":0,"responses":[{"output":3}]}'], r":1: not a line of recorded answers"),
        (
            ['{"prompt":"a","completions":["x"]}', '{"prompt":" a","completions":["y"]}'],
            r":2: a second line for the same",
        ),
    ],
)
def test_a_recording_that_cannot_be_played_is_named_with_its_line(tmp_path: Path, lines: list[str], what: str) -> None:
    file = tmp_path / "replay.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=what):
        ReplayModel(file)


def test_a_recorded_usage_without_a_total_gets_one(tmp_path: Path) -> None:
    file = tmp_path / "replay.jsonl"
    file.write_text('{"task_index":0,"responses":[{"output":[],"usage":{"input_tokens":2,"output_tokens":3}}]}')
    assert ReplayModel(file).answer({"input": "x"}, 0, 0, 0).usage.total_tokens == 5
