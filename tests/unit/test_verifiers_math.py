"""Mathematics by math-verify: gold as LaTeX in a box, the prediction as an expression or LaTeX."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from gym_bus.errors import TaskError, UsageError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task, Verifier
from gym_bus.verifiers.math import Math


def judged(expected: Any, *texts: str, **options: Any) -> Verdict:
    content = [{"type": "output_text", "text": text} for text in texts]
    response = {"output": [{"type": "message", "role": "assistant", "content": content}]}
    return Math(**options).verify(Task(row={"expected_answer": expected}, response=response))


def test_it_is_a_verifier_for_the_cpu_pool() -> None:
    assert isinstance(Math(), Verifier)
    assert (Math.placement, Math.required) == (Placement.CPU, ("expected_answer",))


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("5", "5"),
        (5, "5"),
        (0.5, r"\boxed{\frac{1}{2}}"),
        (0, "0"),
        ("5", "The answer is 5."),
        (r"\frac{1}{2}", "0.5"),
        (r"\(\frac{1}{2}\)", "1/2"),
        ("$x^2$", r"\boxed{x^2}"),
        (r"\( $$7$$ \)", "$7$"),
        ("  7 ", r"\boxed{7}"),
        ("1,000", "1000"),
        (r"50\%", "0.5"),
        ("5", "x=5"),
        ("x=5", "5"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
        (r"\{1,2\}", r"\boxed{1} and \boxed{2}"),
        ("A", r"\boxed{A}"),
        (r"2\sqrt{3}", r"so $\sqrt{12}$"),
    ],
)
def test_an_equal_value_is_right_however_it_is_written(expected: Any, text: str) -> None:
    verdict = judged(expected, text)

    assert (verdict.reward, verdict.extra["library_reward"]) == (1.0, 1.0)
    assert verdict.extra["expected_answer"] == str(expected)


@pytest.mark.parametrize(
    ("expected", "text", "extracted"),
    [
        ("5", "6", "6"),
        ("6", "I first thought 6, but it is 7", "7"),
        ("7", r"\boxed{6} and \boxed{7}", "{6, 7}"),
        ("0.333", "1/3", "1/3"),
        ("5", "no number at all", None),
        ("5", r"\boxed{", None),
    ],
)
def test_another_value_is_wrong_and_still_shown(expected: str, text: str, extracted: str | None) -> None:
    verdict = judged(expected, text)

    assert (verdict.reward, verdict.extra["extracted_answer"]) == (0.0, extracted)
    assert verdict.extra["library_reward"] == 0.0


def test_the_candidate_that_is_right_is_the_extracted_answer() -> None:
    assert judged("5", r"\boxed{5}").extra["extracted_answer"] == "5"


def test_all_parts_of_the_answer_are_read_as_one_text() -> None:
    assert judged("57", r"\boxed{5", "7}").reward == 1.0


@pytest.mark.parametrize("texts", [(), ("",), (" \n",), ("<think>5</think>",), ("<think>\\boxed{5}",)])
def test_an_empty_answer_scores_zero(texts: tuple[str, ...]) -> None:
    verdict = judged("5", *texts)

    assert (verdict.reward, verdict.extra["extracted_answer"]) == (0.0, None)


@pytest.mark.parametrize("response", [{}, {"output": None}, {"output": [{"content": 3}]}])
def test_a_malformed_response_scores_zero(response: dict[str, Any]) -> None:
    assert Math().verify(Task(row={"expected_answer": "5"}, response=response)).reward == 0.0


def test_an_answer_in_the_thinking_counts_when_asked_for() -> None:
    text = r"<think>\boxed{5}</think> done"

    assert (judged("5", text).reward, judged("5", text, strip_think=False).reward) == (0.0, 1.0)


def test_the_answer_behind_the_thinking_counts() -> None:
    assert judged("5", r"<think>\boxed{6}</think>\boxed{5}").reward == 1.0


def test_a_huge_answer_is_read_from_its_end() -> None:
    assert judged("5", "x" * 1_000_000 + r" \boxed{5}").reward == 1.0


def test_what_stands_before_the_text_limit_is_not_read() -> None:
    text = r"\boxed{5}" + "x" * 1000

    assert (judged("5", text, text_limit=1000).reward, judged("5", text, text_limit=2000).reward) == (0.0, 1.0)


def test_a_long_extracted_answer_is_cut() -> None:
    assert len(judged("5", "\\boxed{" + "9" * 4000 + "}").extra["extracted_answer"]) == 2000


def test_a_comparison_past_its_limit_is_wrong_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    verdict = judged("5", r"\boxed{9^{9^{9^{9}}}}", parse_limit_s=1)

    assert verdict.reward == 0.0
    assert caplog.records == []


def test_logging_is_as_before_afterwards() -> None:
    before = logging.root.manager.disable

    judged("5", r"\boxed{\frac}")

    assert logging.root.manager.disable == before


@pytest.mark.parametrize(
    "text",
    ["\x00\ud800", "\\frac{" * 2000, "(" * 2000, "\\boxed{" * 2000, "$" * 2001, r"\boxed{\frac{1}{0}}", "9" * 5000],
)
def test_unreadable_answers_score_zero(text: str) -> None:
    assert judged("5", text).reward == 0.0


def test_an_answer_too_deep_to_print_is_wrong_and_not_shown() -> None:
    verdict = judged("5", "\\boxed{" + "2/" * 400 + "1}")

    assert (verdict.reward, verdict.extra["extracted_answer"]) == (0.0, None)


@pytest.mark.parametrize("expected", [None, "", " \n", True, ["5"], {"a": 5}])
def test_a_row_without_a_usable_reference_is_refused(expected: Any) -> None:
    with pytest.raises(TaskError, match="expected_answer must be a text or a number"):
        judged(expected, "5")


def test_a_row_without_the_key_is_refused() -> None:
    with pytest.raises(TaskError, match="not None"):
        Math().verify(Task(row={}, response={}))


@pytest.mark.parametrize("expected", ["}", "$ $", "$$$$", r"\(\)"])
def test_a_reference_that_is_no_mathematics_is_refused(expected: str) -> None:
    with pytest.raises(TaskError, match="is no mathematics that can be read"):
        judged(expected, "5")


@pytest.mark.parametrize("options", [{"parse_limit_s": 0}, {"parse_limit_s": 61}, {"text_limit": 10}, {"judge": True}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="verifier 'math'"):
        Math(**options)
