from __future__ import annotations

import pytest

from gym_bus.benchmarks.prompt import Prompt, check_prompt
from gym_bus.errors import ConfigError, DataError


def test_a_prompt_is_filled_from_the_row_and_keeps_doubled_braces() -> None:
    prompt = Prompt(system="Be brief.", user="{question} Put it in \\boxed{{}}.")

    items = prompt.render({"question": "What is {x}?"}, "rows.jsonl:1")

    assert items == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is {x}? Put it in \\boxed{}."},
    ]


def test_values_that_are_no_text_are_shown_as_json() -> None:
    prompt = Prompt(user="{n} {xs} {ok}")

    assert prompt.render({"n": 3, "xs": ["a", 1], "ok": True}, "r:1")[0]["content"] == '3 ["a",1] true'


def test_a_prompt_names_each_field_once() -> None:
    assert Prompt(system="{b}", user="{a} {b} {a}").fields() == ("b", "a")


def test_a_missing_field_is_named_with_the_row_and_near_misses() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*'question'.*did you mean 'questions'"):
        Prompt(user="{question}").render({"questions": "?"}, "rows.jsonl:7")


def test_a_null_field_is_named_with_the_row() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*'question', which is null"):
        Prompt(user="{question}").render({"question": None}, "rows.jsonl:7")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("put it in \\boxed{}", r"\{\} is no row key"),
        ("a } alone", "Single '}' encountered"),
        ("{question!r}", "has a format or a conversion"),
        ("{n:03d}", "has a format or a conversion"),
        ("{row.__class__}", "is no row key"),
        ("{row[0]}", "is no row key"),
    ],
)
def test_a_template_that_no_row_can_fill_is_refused(template: str, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"config.yaml: key 'prompt.user': .*{what}.*for literal braces"):
        check_prompt(Prompt(system="fine", user=template), lambda role: "config.yaml")
