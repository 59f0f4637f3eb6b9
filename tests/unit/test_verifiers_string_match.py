"""Short answers as text: what is extracted, and what counts as the same answer."""

from __future__ import annotations

from typing import Any

import pytest

from gym_bus.errors import TaskError, UsageError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task, Verifier
from gym_bus.verifiers.string_match import CLOSE, StringMatch, extract, likeness


def judged(text: str, expected: Any = "Paris", options: dict[str, Any] | None = None, **row: Any) -> Verdict:
    content = [{"type": "output_text", "text": text}]
    response = {"output": [{"type": "message", "role": "assistant", "content": content}]}
    return StringMatch(**(options or {})).verify(Task(row={"expected_answer": expected, **row}, response=response))


def test_it_is_an_inline_verifier() -> None:
    assert isinstance(StringMatch(), Verifier)
    assert (StringMatch.placement, StringMatch.required) == (Placement.INLINE, ("expected_answer",))


@pytest.mark.parametrize(
    ("mode", "text", "extracted"),
    [
        ("final_answer", "Final answer: Paris.", "Paris"),
        ("final_answer", "ANSWER： Paris ", "Paris"),
        ("final_answer", "answer: Rome\nthe final  answer :\n Paris", "Paris"),
        ("final_answer", r"so \boxed{Rome} or \boxed{\text{Paris}}", "Paris"),
        ("final_answer", r"Answer: Paris, not \boxed{Rome}", r"Paris, not \boxed{Rome}"),
        ("final_answer", "Paris", None),
        ("boxed", r"Answer: Rome, \boxed{\text{ Paris }}", "Paris"),
        ("boxed", r"\boxed{Paris} or \boxed{Rome", "Paris"),
        ("boxed", r"\boxed{}", None),
        ("boxed", "Answer: Paris", None),
        ("last_line", "Rome\n Paris \n \n", "Paris"),
        ("full_response", " Rome\nor Paris ", "Rome\nor Paris"),
        *((mode, "", None) for mode in ("final_answer", "boxed", "last_line", "full_response")),
        *((mode, " \n ", None) for mode in ("final_answer", "boxed", "last_line", "full_response")),
    ],
)
def test_each_mode_extracts_its_part_of_the_text(mode: str, text: str, extracted: str | None) -> None:
    verdict = judged(text, extraction_mode=mode)

    assert verdict.extra == {"expected_answer": "Paris", "extracted_answer": extracted}
    assert verdict.reward == float(extracted == "Paris")


def test_parts_of_the_answer_are_lines() -> None:
    parts = [{"type": "output_text", "text": text} for text in ("Rome", "Paris")]
    response = {"output": [{"type": "message", "role": "assistant", "content": parts}]}
    row = {"expected_answer": "Paris", "extraction_mode": "last_line"}

    assert StringMatch().verify(Task(row=row, response=response)).reward == 1.0


@pytest.mark.parametrize("mode", [None, ""])
def test_a_row_without_a_mode_takes_the_jobs(mode: str | None) -> None:
    assert judged("Rome\nParis", options={"extraction_mode": "last_line"}, extraction_mode=mode).reward == 1.0


def test_the_rows_mode_wins_over_the_jobs() -> None:
    text = "\\boxed{Paris}\nRome"

    assert judged(text, options={"extraction_mode": "last_line"}, extraction_mode="boxed").reward == 1.0


@pytest.mark.parametrize(
    ("job", "row", "reward"),
    [(False, None, 1.0), (True, None, 0.0), (True, False, 1.0), (False, True, 0.0)],
)
def test_case_matters_when_the_row_or_else_the_job_says_so(job: bool, row: bool | None, reward: float) -> None:
    assert judged("Answer: PARIS", options={"case_sensitive": job}, case_sensitive=row).reward == reward


@pytest.mark.parametrize(("text", "reward"), [("Answer: Paris", 1.0), ('Answer: "Paris"', 0.0), ("Answer: 5", 0.0)])
def test_where_case_matters_only_the_very_same_text_is_right(text: str, reward: float) -> None:
    assert judged(text, " Paris ", case_sensitive=True).reward == reward


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("PARIS", "paris"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\text{\textbf{x}}", "x"),
        (r"\text{x", "x"),
        ("a, b", "a b"),
        ("a, b, c", "a,b,c"),
        ("red, blue", "red; blue"),
        ("District of Columbia", "DC"),
        ("Portland, Oregon", "Portland, OR"),
        ("π/2", r"\pi/2"),
        ("√2", r"\sqrt2"),
        ("1,5", "15"),
        ('"Paris"', "Paris"),
        ("'Paris'", "Paris"),
        ("Paris!?.", "Paris"),
        ("...", "..."),
        ("Ｐａｒｉｓ", "Paris"),
        ("5.0", "5"),
        ("$5", "5"),
        (r"\$5", "5"),
        (r"5\%", "5"),
        ("1,234", "1234"),
        ("it has 1,234 rooms", "it has 1234 rooms"),
        (r"a 5\% rise", "a 5% rise"),
        (r"\text{Paris}", "Paris"),
        (r"\( \mathbf{x} \)", "$x$"),
        ("New  York", r"\textit{New York}"),
        ("Austin, Texas", "Austin, TX"),
        ("West Virginia", "WV"),
        ("the old cities of Paris, London", "the old cities of Paris; London"),
        ("5 km long, 3 kg", "5 km long, 3"),
        ("Rome", "Roe"),
    ],
)
def test_the_same_answer_counts_however_it_is_written(answer: str, expected: str) -> None:
    assert (likeness(answer, expected), likeness(expected, answer)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("99.5", "100"),
        ("1,234,567", "1234567"),
        ("5%", "5"),
        ("£5", "5"),
        ("5 kg", "5"),
        ("90°", "90"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("$99.5$ cm", "100 cm"),
        (r"\text{99.5}", "100"),
    ],
)
def test_a_close_number_is_almost_right(answer: str, expected: str) -> None:
    assert likeness(answer, expected) == CLOSE == 0.98


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Rome", "Paris"),
        ("98", "100"),
        ("5 km²", "5"),
        ("20°C", "20°F"),
        ("20 °C", "20"),
        ("5", "-5"),
        ("0", "1"),
        ("0.001", "0"),
        ("nan", "5"),
        ("5", "nan"),
        ("inf", "-inf"),
        ("5", "inf"),
        ("1e999", "5"),
        ("5", "Paris"),
        ("Paris", "5"),
        ("a, b, c", "abc"),
        ("“Paris”", "Paris"),
        ("`Paris`", "Paris"),
        ("\x00\ud800", "5"),
    ],
)
def test_another_answer_is_wrong(answer: str, expected: str) -> None:
    assert likeness(answer, expected) == 0.0


def test_a_short_text_is_no_list_when_too_little_is_left_of_it() -> None:
    assert likeness("red and blue", "red blue") == 0.0


@pytest.mark.parametrize(("expected", "text"), [(5, "Answer: 5"), (2.5, "Answer: 2.50"), (True, "Answer: true")])
def test_a_reference_that_is_no_text_is_read_as_one(expected: Any, text: str) -> None:
    verdict = judged(text, expected)

    assert (verdict.reward, verdict.extra["expected_answer"]) == (1.0, str(expected))


@pytest.mark.parametrize("expected", ["", "  "])
@pytest.mark.parametrize("sensitive", [False, True])
def test_an_empty_reference_matches_nothing(expected: str, sensitive: bool) -> None:
    assert judged("Answer: Paris", expected, case_sensitive=sensitive).reward == 0.0


@pytest.mark.parametrize("expected", [None, ["Paris"], {"a": "Paris"}])
def test_a_row_without_a_reference_is_refused(expected: Any) -> None:
    with pytest.raises(TaskError, match="expected_answer must be a text"):
        judged("Answer: Paris", expected)


@pytest.mark.parametrize("mode", ["other", ["boxed"], 5])
def test_an_unknown_mode_of_a_row_is_refused(mode: Any) -> None:
    with pytest.raises(
        TaskError, match=r"unknown extraction_mode .*: known: final_answer, boxed, last_line, full_resp"
    ):
        judged("Answer: Paris", extraction_mode=mode)


@pytest.mark.parametrize("options", [{"extraction_mode": "other"}, {"case": True}, {"case_sensitive": "yes"}])
def test_unknown_options_of_a_job_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="verifier 'string_match'"):
        StringMatch(**options)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["a" + " " * 200_000 + "b", "5kg" + " " * 200_000 + "b", "\\text{" * 50_000])
def test_long_answers_are_compared_in_linear_time(text: str) -> None:
    assert likeness(text, "c") == 0.0


def test_the_last_line_ends_at_any_line_break() -> None:
    assert extract("a\rb", "last_line") == "b"
