"""Multiple choice in all grading modes, by the letters that NeMo Gym's rules find."""

from __future__ import annotations

from typing import Any

import pytest

from gym_bus.errors import TaskError, UsageError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task, Verifier
from gym_bus.verifiers.mcqa import REGEX_TEXT_LIMIT, Mcqa

OPTIONS = [{"A": "Blue"}, {"B": "Dark  red"}, {"C": "red"}, {"D": None}]


def judged(text: str, server_mode: str | None = None, **row: Any) -> Verdict:
    content = [{"type": "output_text", "text": text}]
    response = {"output": [{"type": "message", "role": "assistant", "content": content}]}
    full = {"options": OPTIONS, "expected_answer": "A", **row}
    return Mcqa(grading_mode=server_mode).verify(Task(row=full, response=response))


def letter(text: str, **row: Any) -> Any:
    return judged(text, **row).extra["extracted_answer"]


def test_it_is_an_inline_verifier() -> None:
    assert isinstance(Mcqa(), Verifier)
    assert (Mcqa.placement, Mcqa.required) == (Placement.INLINE, ("options", "expected_answer"))


@pytest.mark.parametrize(("expected", "reward"), [("A", 1.0), (" a\n", 1.0), ("B", 0.0)])
def test_the_expected_letter_is_right(expected: str, reward: float) -> None:
    verdict = judged(r"\boxed{A}", expected_answer=expected)

    assert verdict.reward == reward
    assert verdict.extra == {"expected_answer": expected.strip().upper(), "extracted_answer": "A"}


@pytest.mark.parametrize("mode", [None, "lenient_boxed", "lenient_answer_colon", "lenient_answer_colon_md"])
@pytest.mark.parametrize("text", ["", " \n", "I do not know.", r"\boxed{}", "Answer:"])
def test_an_answer_without_a_letter_scores_zero(mode: str | None, text: str) -> None:
    verdict = judged(text, mode)

    assert (verdict.reward, verdict.extra["extracted_answer"]) == (0.0, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{A}", "A"),
        (r"\boxed{ (B) }", "B"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\text{ \text{(C)} }}", "C"),
        (r"\boxed{A: blue}", "A"),
        (r"\boxed{B) dark}", "B"),
        (r"\boxed{B. dark}", "B"),
        (r"\boxed{B - dark}", "B"),
        (r"\boxed{A} no, \boxed{B}", "B"),
        (r"\boxed{A} no, \boxed{B", None),
        (r"\boxed{a}", None),
        (r"\boxed{D}", None),
        (r"\boxed{E}", None),
        (r"\boxed{AB}", None),
        (r"\boxed{Blue}", None),
        ("Answer: A", None),
    ],
)
def test_strict_takes_the_one_capital_of_the_last_box(text: str, found: str | None) -> None:
    assert letter(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{A}", "A"),
        (r"\boxed{it is  BLUE}", "A"),
        (r"\boxed{\text{blue}}", "A"),
        (r"\boxed{red}", "C"),
        (r"\boxed{dark red}", None),  # both B's and C's text stand in it
        (r"\boxed{green}", None),
        ("blue", None),
        (r"\boxed{blue", None),
    ],
)
def test_lenient_boxed_also_takes_the_only_option_whose_text_stands_in_the_box(text: str, found: str | None) -> None:
    assert letter(text, grading_mode="lenient_boxed") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: A", "A"),
        ("The ANSWER : b", "B"),
        ("Answer:\nC", "C"),
        (r"answer: \text{B}", "B"),
        ("Answer: dark RED", "B"),
        ("Answer: D", None),
        ("Answer: A.", None),
        ("Answer: it is blue", None),
        ("Answer: A\nAnswer: B", "A"),
        (r"\boxed{A}", None),
    ],
)
def test_answer_colon_takes_the_first_answer_line_as_a_letter_or_an_options_text(text: str, found: str | None) -> None:
    assert letter(text, grading_mode="lenient_answer_colon") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: A", "A"),
        ("**Answer**: **B**", "B"),
        ("__answer:__ c.", "C"),
        ("Answer: `B`", "B"),
        ("Answer: B because C is wrong", "B"),
        ("Answer: (b) dark", None),
        ("Answer: (B) dark", "B"),
        ("Answer: not B but C", "C"),
        ("Answer: B\nAnswer: unclear", "B"),
        ("Answer: B\nAnswer: C", "C"),
        ("Answer: A or B", None),
        ("Answer: A/B", None),
        ("Answer: A & B", None),
        ("Answer: A, B", None),
        ("Answer: A | B", None),
        ("Answer: A; B", None),
        ("Answer: A and B", None),
        ("Answer: B C", None),
        ("Answer: B or B", "B"),
        ("Answer: A or D", "A"),
        ("Answer: D", None),
        ("Answer: ب", "B"),
        ("Answer: ড", "C"),
        ("Answer: Ａ", "A"),
        ("Answer: Blue", None),
    ],
)
def test_markdown_answer_colon_takes_the_last_answer_line_that_names_one_letter(text: str, found: str | None) -> None:
    assert judged(text, "lenient_answer_colon_md").extra["extracted_answer"] == found


def test_the_jobs_mode_wins_over_the_rows() -> None:
    text = r"Answer: B, or \boxed{A}"

    assert judged(text, "strict_single_letter_boxed", grading_mode="lenient_answer_colon").reward == 1.0


@pytest.mark.parametrize("mode", ["lenient_answer_colon_md", "other", ["strict_single_letter_boxed"], 5])
def test_a_row_cannot_ask_for_an_unknown_mode(mode: Any) -> None:
    with pytest.raises(TaskError, match=r"unknown grading_mode .*: known: strict_single_letter_boxed, lenient_"):
        judged(r"\boxed{A}", grading_mode=mode)


@pytest.mark.parametrize("mode", ["", None])
def test_a_row_without_a_mode_is_judged_strictly(mode: str | None) -> None:
    assert letter(r"\boxed{A}", grading_mode=mode) == "A"


@pytest.mark.parametrize("options", [{"grading_mode": "other"}, {"mode": "lenient_boxed"}])
def test_unknown_options_of_a_job_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="verifier 'mcqa'"):
        Mcqa(**options)


@pytest.mark.parametrize(
    ("regex", "text", "found"),
    [
        (r"final:\s*(\w)", "final: b final: c", "C"),
        (r"FINAL:\s*(\w+)", "final: E", "E"),  # no option, but the pattern has decided
        (r"final:([ a-z]+)", "final:  dark RED ", "B"),
        (r"final:\s*(\S)", "final: ج", "C"),
        ([r"none (\w)", r"final: (\w)", r"(\w)"], "final: b x", "B"),
        ([r"final: (\w+)", r"x(\w)"], "final: purple xa", "A"),
    ],
)
def test_a_rows_pattern_comes_first_and_its_last_match_counts(regex: Any, text: str, found: str) -> None:
    text = text + r" \boxed{A}" if found != "A" else text

    assert letter(text, template_metadata={"output_regex": regex}) == found


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "output_regex",
        {},
        {"output_regex": None},
        {"output_regex": ""},
        {"output_regex": "("},
        {"output_regex": [None, 5]},
        {"output_regex": r"(\w)(\w)"},
        {"output_regex": r"nothing (\w)"},
        {"output_regex": r"box(ed)"},
    ],
)
def test_a_pattern_that_yields_no_letter_leaves_it_to_the_mode(metadata: Any) -> None:
    assert letter(r"\boxed{A}", template_metadata=metadata) == "A"


def test_a_pattern_is_run_over_the_end_of_a_long_text_only() -> None:
    metadata = {"output_regex": r"final: (\w)"}

    assert letter("final: B " + "x" * REGEX_TEXT_LIMIT + r"\boxed{A}", template_metadata=metadata) == "A"
    assert letter("x" * REGEX_TEXT_LIMIT + r"\boxed{A} final: B", template_metadata=metadata) == "B"


def test_option_keys_are_letters_in_any_case_and_texts_may_be_numbers() -> None:
    options = [{"a": 4}, {"b": 5.5}, {"AB": "x", "1": "y", "": "z"}]

    assert letter("Answer: 5.5", options=options, grading_mode="lenient_answer_colon") == "B"
    assert letter(r"\boxed{A}", options=options) == "A"


def test_several_options_may_stand_in_one_object() -> None:
    assert letter(r"\boxed{B}", options=[{"A": "x", "B": "y"}]) == "B"


@pytest.mark.parametrize("options", [None, {"A": "x"}, "A"])
def test_options_that_are_no_list_are_refused(options: Any) -> None:
    with pytest.raises(TaskError, match="options is not a list"):
        judged(r"\boxed{A}", options=options)


@pytest.mark.parametrize("options", [[], [5, "A"], [{"A": None}], [{"1": "x"}], [{"AB": "x"}], [{5: "x"}]])
def test_a_row_without_a_lettered_option_is_refused(options: Any) -> None:
    with pytest.raises(TaskError, match="options has no lettered option with a text"):
        judged(r"\boxed{A}", options=options)


@pytest.mark.parametrize("expected", [None, "", "  "])
def test_a_row_without_a_reference_is_refused(expected: Any) -> None:
    with pytest.raises(TaskError, match="expected_answer is empty"):
        judged(r"\boxed{A}", expected_answer=expected)


@pytest.mark.parametrize("mode", [None, "lenient_boxed", "lenient_answer_colon", "lenient_answer_colon_md"])
@pytest.mark.parametrize("text", ["\\boxed{" * 10_000, "Answer: " + "A " * 50_000 + "B", "*" * 100_000, "\x00\ud800"])
def test_a_huge_or_odd_answer_is_judged_like_any_other(mode: str | None, text: str) -> None:
    assert judged(text, mode, expected_answer="C").reward == 0.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: I think B", None),
        ("Answer: option B (see Table X)", None),
        ("Answer: E or A or B", None),
        ("Answer: A, A or B", None),
        ("Answer: a or b", None),
        ("Answer: A, or B", "A"),
        ("Answer：B", None),
        ("Answer: أأ", "A"),
        ("Answer: CأB", "C"),
        ("Answer: Paris ب_", "B"),
    ],
)
def test_the_markdown_mode_takes_one_letter_that_stands_out(text: str, letter: str | None) -> None:
    assert judged(text, "lenient_answer_colon_md").extra["extracted_answer"] == letter


@pytest.mark.parametrize("pattern", [5, True, {"(.)": 1}])
def test_a_pattern_of_another_type_is_passed_over(pattern: object) -> None:
    assert judged(r"\boxed{A}", template_metadata={"output_regex": pattern}).extra["extracted_answer"] == "A"
