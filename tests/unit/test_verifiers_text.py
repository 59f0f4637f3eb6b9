"""The pieces that verifiers share: text out of a response, code out of a text, options of a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import pytest

from gym_bus.errors import UsageError
from gym_bus.verifiers.code_text import between_last_fences, defines, last_block
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import (
    function_calls,
    joined_messages,
    last_balanced_boxed,
    last_boxed,
    last_item_text,
    last_message,
    output_text,
    peel_text,
    without_think,
)


def message(*texts: str, **others: Any) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text} for text in texts]
    return {"type": "message", "role": "assistant", "content": content, **others}


CALL = {"type": "function_call", "name": "look", "arguments": "{}"}
CONVERSATION = {"output": [message("one", "two"), CALL, message(" three", "four ")]}
BROKEN: list[dict[str, Any]] = [
    {},
    {"output": None},
    {"output": "text"},
    {"output": []},
    {"output": [None, "text", 3]},
    {"output": [{}]},
    {"output": [message(content=None)]},
    {"output": [message(content={"text": "x"})]},
    {"output": [message(content=["x", None, {}, {"text": 3}, {"type": "refusal", "refusal": "no"}])]},
]


def test_output_text_joins_all_parts_of_all_messages_with_nothing_between() -> None:
    assert output_text(CONVERSATION) == "onetwo threefour "


def test_joined_messages_are_separated_by_newlines_and_stripped() -> None:
    assert joined_messages(CONVERSATION) == "one\ntwo\n three\nfour"


def test_the_last_message_is_its_parts_separated_by_newlines_and_stripped() -> None:
    assert last_message(CONVERSATION) == "three\nfour"


def test_the_last_message_is_found_before_trailing_tool_items() -> None:
    assert last_message({"output": [message("one"), message("two"), CALL]}) == "two"


def test_the_last_item_is_read_by_its_first_part() -> None:
    assert last_item_text(CONVERSATION) == " three"


def test_a_trailing_tool_item_has_no_text() -> None:
    assert last_item_text({"output": [message("one"), CALL]}) == ""


def test_function_calls_keep_their_order() -> None:
    second = {**CALL, "name": "hand_in"}

    assert function_calls({"output": [CALL, message("x"), second]}) == [CALL, second]


@pytest.mark.parametrize("item", [message("no", role="user"), {**message("no"), "type": "reasoning"}])
def test_only_assistant_messages_are_text(item: dict[str, Any]) -> None:
    response = {"output": [item, message("yes")]}

    assert (output_text(response), joined_messages(response)) == ("yes", "yes")


def test_only_output_text_parts_are_output_text() -> None:
    response = {"output": [message(content=[{"type": "other", "text": "no"}, {"type": "output_text", "text": "yes"}])]}

    assert output_text(response) == "yes"
    assert joined_messages(response) == "no\nyes"


def test_content_that_is_a_string_is_text() -> None:
    response = {"output": [{"role": "assistant", "content": "plain"}]}

    assert [read(response) for read in (output_text, joined_messages, last_item_text, last_message)] == ["plain"] * 4


@pytest.mark.parametrize("response", BROKEN)
def test_whatever_is_malformed_reads_as_no_text(response: dict[str, Any]) -> None:
    assert [read(response) for read in (output_text, joined_messages, last_item_text, last_message)] == [""] * 4
    assert function_calls(response) == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no thinking", "no thinking"),
        ("<think>a</think>b", "b"),
        ("<thinking>a\nb</thinking>c", "c"),
        ("a<think>b</think>c<think>d</think>e", "ace"),
        ("thought in the prompt's block</think>b", "b"),
        ("a<think>b<think>c</think>d</think>e", "e"),
        ("a<think>never closed", "a"),
        ("a</think>b<think>c", "b"),
        ("<think>a</thinking>b", "b"),
        ("a < think > b", "a < think > b"),
        ("", ""),
    ],
)
def test_thinking_is_left_out(text: str, left: str) -> None:
    assert without_think(text) == left


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \boxed{b}}", "b"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{1 and {\boxed{2", None),
        (r"\boxed {1}", None),
        ("", None),
    ],
)
def test_the_last_box_that_balances_is_found(text: str, content: str | None) -> None:
    assert last_balanced_boxed(text) == content


@pytest.mark.parametrize(
    "read",
    [
        lambda n: last_balanced_boxed("\\boxed{" * n),
        lambda n: last_balanced_boxed("\\boxed{" * n + "}" * n),
        lambda n: last_boxed("\\boxed{" * n + "}" * n),
        lambda n: peel_text("\\text{" * n + "}" * n),
        lambda n: peel_text("\\text{" * n),
        lambda n: without_think("<think>" * n),
        lambda n: without_think("</think>" * n),
        lambda n: without_think("<think>" * n + "</think>" * n),
        lambda n: without_think("<think></think>" * n),
    ],
)
@pytest.mark.timeout(60)
def test_repetitions_are_read_in_linear_time(read: Callable[[int], object]) -> None:
    read(200_000)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{\text{2}}", r"\text{2}"),
        (r"\boxed{1} and \boxed{2", None),
        ("none", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_box_counts_even_when_it_does_not_balance(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("content", "peeled"),
    [
        (r"\text{A}", "A"),
        (r" \text { \text{ A } } ", "A"),
        (r"\text{A{B}}", "A{B}"),
        (r"\text{A} and \text{B}", r"\text{A} and \text{B}"),
        (r"\text{A", r"\text{A"),
        (r"\textbf{A}", r"\textbf{A}"),
        (" A ", "A"),
    ],
)
def test_text_wrappers_are_peeled_when_they_hold_all(content: str, peeled: str) -> None:
    assert peel_text(content) == peeled


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a\n"),
        ("one\n```python\na\n```\ntwo\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nrun it:\n```\nout\n```", "a\n"),
        ("```\na\n```\n```py\nb\n```", "b\n"),
        ("```python3\r\na\r\n```", "a\n"),
        ("    return 1", "    return 1"),
    ],
)
def test_the_last_block_is_the_last_python_block_or_the_last_block_or_all(text: str, code: str) -> None:
    assert last_block(text) == code


@pytest.mark.parametrize("text", ["", " \n", "```", "```\na", "```python\na", "```python\n \n```", "```\n```"])
def test_a_text_without_code_has_no_last_block(text: str) -> None:
    assert last_block(text) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```\na\n```", "a"),
        ("```cpp\na\n```\n```python\nb\n  c\n```\nbye", "b\n  c"),
        ("```\n```", ""),
        ("```a``` and\nb\n```", "b"),
        ("```\na\n```\nb\n```", "b"),
        ("```\na", None),
        ("a", None),
        ("", None),
    ],
)
def test_the_code_of_code_gen_stands_between_the_last_two_lines_with_a_fence(text: str, code: str | None) -> None:
    assert between_last_fences(text) == code


@pytest.mark.parametrize(
    ("code", "name", "whether"),
    [
        ("def f(x):\n  pass", "f", True),
        ("import x\nasync  def f (x): ...", "f", True),
        ("def ff(x): ...", "f", False),
        ("class A:\n  def f(x): ...", "f", False),
        ("# def f(", "f", False),
        ("def fab(): ...", "f.b", False),
    ],
)
def test_a_function_is_defined_when_it_stands_at_the_top_level(code: str, name: str, whether: bool) -> None:
    assert defines(code, name) is whether


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    depth: Annotated[int, msgspec.Meta(ge=1)] = 3


def test_options_are_read_with_their_defaults() -> None:
    assert (read_options(Wishes, "v", {}), read_options(Wishes, "v", {"depth": 5})) == (Wishes(), Wishes(depth=5))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dept": 5}, r"verifier 'v': unknown option 'dept': did you mean 'depth'\? known: depth"),
        ({"depth": 0}, r"verifier 'v': Expected `int` >= 1 - at `\$.depth`"),
        ({"depth": "5"}, r"verifier 'v': Expected `int`, got `str` - at `\$.depth`"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_its_verifier(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        read_options(Wishes, "v", options)
