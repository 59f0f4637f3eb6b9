"""Multiple choice: the letter that the answer names, by NeMo Gym's `mcqa` rules in all their grading modes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Literal, cast

import msgspec

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import last_boxed, output_text, peel_text

Mode = Literal["strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon", "lenient_answer_colon_md"]
ROW_MODES = ("strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon")
"""What a row may ask for; `lenient_answer_colon_md` is the verifier's option alone."""

REGEX_TEXT_LIMIT = 100_000
"""Characters, from the end, that a dataset's own pattern is run over: it may be slow, and the loop must not wait."""

_OTHER_SCRIPTS = {ord(theirs): f" {ours}" for theirs, ours in zip("أبجدঅবডঢＡＢＣＤ", "ABCD" * 3, strict=True)}
"""Arabic, Bengali and full-width option letters, as multilingual benchmarks use them for A to D. The space before each
makes a letter within a word stand alone, as in NeMo Gym."""

_ONE_LETTER = re.compile(r"^[^A-Za-z]*([A-Z])[^A-Za-z]*$")
_LEADING_LETTER = re.compile(r"^\s*([A-Z])\s*[:).\-]")
_ANSWER_COLON = re.compile(r"(?i)answer\s*:\s*(.+)")
_ANSWER_COLON_MD = re.compile(r"(?im)[*_]{0,2}Answer[*_]{0,2}\s*:[*_\s]{0,2}(.+)")
_ALONE = re.compile(r"(?<![A-Za-z])([A-Za-z])(?![A-Za-z])")
_SEPARATOR = re.compile(r"\s*[/|&,;]\s*|\s+(?:or|and)\s+|\s+", re.IGNORECASE)
_LEADING_ALONE = re.compile(r"^([A-Za-z])(?![A-Za-z0-9])")
_CAPITAL_ALONE = re.compile(r"\b[A-Z]\b")
_SPACES = re.compile(r"\s+")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may set."""

    grading_mode: Mode | None = None
    """Wins over the row's; null leaves it to the row, whose default is strict_single_letter_boxed."""


class Mcqa:
    """Reward 1.0 when the answer names the expected option's letter."""

    placement: ClassVar[Placement] = Placement.INLINE
    required: ClassVar[tuple[str, ...]] = ("options", "expected_answer")

    def __init__(self, **options: Any) -> None:
        self._mode = read_options(Options, "mcqa", options).grading_mode

    def verify(self, task: Task) -> Verdict:
        """Score one answer.

        Raises:
            TaskError: the row has no options, no expected answer, or an unknown grading mode.
        """
        row = task.row
        choices = _choices(row)
        gold = str(row.get("expected_answer") or "").strip().upper()
        if not gold:
            raise TaskError("expected_answer is empty")
        mode = self._mode or _row_mode(row)
        text = output_text(task.response).strip()
        letter = _by_row_regex(text, row, choices) if text else None
        if letter is None and text:
            letter = _MODES[mode](text, choices)
        extra = {"expected_answer": gold, "extracted_answer": letter}
        return Verdict(reward=1.0 if letter == gold else 0.0, extra=extra)


def _choices(row: dict[str, Any]) -> dict[str, str]:
    """Option text by letter; options without a text cannot be chosen."""
    options = row.get("options")
    if not isinstance(options, list):
        raise TaskError("options is not a list")
    choices: dict[str, str] = {}
    for option in options:
        for key, text in option.items() if isinstance(option, dict) else ():
            letter = str(key).strip().upper()
            if len(letter) == 1 and letter.isalpha() and text is not None:
                choices[letter] = str(text)
    if not choices:
        raise TaskError("options has no lettered option with a text")
    return choices


def _row_mode(row: dict[str, Any]) -> Mode:
    mode = row.get("grading_mode") or "strict_single_letter_boxed"
    if mode not in ROW_MODES:
        raise TaskError(f"unknown grading_mode {mode!r}: known: {', '.join(ROW_MODES)}")
    return cast(Mode, mode)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError):
        return None


def _by_row_regex(text: str, row: dict[str, Any], choices: dict[str, str]) -> str | None:
    """The row's own patterns, in order; the first that yields a letter wins."""
    metadata = row.get("template_metadata")
    patterns = metadata.get("output_regex") if isinstance(metadata, dict) else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []:
        compiled = _compiled(pattern) if isinstance(pattern, str) else None
        found = compiled.findall(text[-REGEX_TEXT_LIMIT:]) if compiled else []
        if found and isinstance(found[-1], str) and (letter := _letter_or_text(found[-1], choices)):
            return letter
    return None


def _letter_or_text(found: str, choices: dict[str, str]) -> str | None:
    plain = _latin(found).strip().upper()
    if len(plain) == 1 and plain.isalpha():
        return plain  # even one that is no option: the pattern has decided
    return _same_text(found, choices)


def _latin(text: str) -> str:
    return text.translate(_OTHER_SCRIPTS)


def _normal(text: str) -> str:
    return _SPACES.sub(" ", text).strip().lower()


def _same_text(text: str, choices: dict[str, str]) -> str | None:
    wanted = _normal(text)
    return next((letter for letter, choice in choices.items() if wanted and _normal(choice) == wanted), None)


def _strict(text: str, choices: dict[str, str]) -> str | None:
    content = last_boxed(text)
    if content is None:
        return None
    content = peel_text(content)
    found = _ONE_LETTER.match(content) or _LEADING_LETTER.match(content)
    return found[1] if found and found[1] in choices else None


def _lenient_boxed(text: str, choices: dict[str, str]) -> str | None:
    if letter := _strict(text, choices):
        return letter
    content = _normal(peel_text(last_boxed(text) or ""))
    within = [letter for letter, choice in choices.items() if _normal(choice) and _normal(choice) in content]
    return within[0] if len(within) == 1 else None


def _answer_colon(text: str, choices: dict[str, str]) -> str | None:
    found = _ANSWER_COLON.search(text)
    if not found:
        return None
    answer = peel_text(found[1])
    letter = answer.strip().upper()
    return letter if len(letter) == 1 and letter in choices else _same_text(answer, choices)


def _answer_colon_md(text: str, choices: dict[str, str]) -> str | None:
    payloads = _ANSWER_COLON_MD.findall(text)
    return next((letter for payload in reversed(payloads) if (letter := _md_letter(payload, choices))), None)


def _md_letter(payload: str, choices: dict[str, str]) -> str | None:
    answer = _latin(payload).strip().strip("*_` \t\n\r.,;:")
    if _names_several(answer, choices):
        return None
    found = [answer] if len(answer) == 1 else _LEADING_ALONE.findall(answer) or _CAPITAL_ALONE.findall(answer)[-1:]
    return found[0].upper() if found and found[0].upper() in choices else None


def _names_several(answer: str, choices: dict[str, str]) -> bool:
    """Whether two different options stand next to each other with only a separator between them."""
    named = [found for found in _ALONE.finditer(answer) if found[1].upper() in choices]
    return any(
        a[1].upper() != b[1].upper() and _SEPARATOR.fullmatch(answer, a.end(), b.start())
        for a, b in itertools.pairwise(named)
    )


_MODES: dict[Mode, Callable[[str, dict[str, str]], str | None]] = {
    "strict_single_letter_boxed": _strict,
    "lenient_boxed": _lenient_boxed,
    "lenient_answer_colon": _answer_colon,
    "lenient_answer_colon_md": _answer_colon_md,
}
