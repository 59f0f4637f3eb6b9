r"""Short answers as text: NeMo Gym's `string_match` rules, with everything that they count as the same answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import msgspec

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import boxed, joined_messages, peel_text

Mode = Literal["final_answer", "boxed", "last_line", "full_response"]
MODES: tuple[Mode, ...] = ("final_answer", "boxed", "last_line", "full_response")

CLOSE = 0.98
"""Both the least likeness of two numbers that counts, and the reward of an answer that is only close."""

_FINAL = re.compile(r"(?i)(?:final\s+answer|answer)\s*[:：]\s*(.+)")
_THOUSANDS = re.compile(r"(\d),(\d{3})(?!\d)")
_LATEX = re.compile(
    r"\\(?:boxed|text|textbf|textit|texttt|mathrm|mathbf|mathit|mathsf|mathbb|mathcal|emph|url)\s*\{([^{}]*)\}"
)
_DELIMITERS = re.compile(r"\\[()\[\]]|\$")
_SPACES = re.compile(r"\s+")
_LIST = re.compile(r"\s*[,;]\s*|\s+(?:or|and)\s+")
_UNITS = re.compile(r"(?<=[\d.])\s*(?:\^\s*\{?\s*\\circ\s*\}?|°|(?:cm|mm|km|m)[²³23]?|kg)\s*[cf]?\s*$", re.IGNORECASE)
_MONEY = re.compile(r"[£€$%,]|\\[%$]")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("`", "`"))

_STATES = {
    "alabama": "al", "alaska": "ak", "arizona": "az", "arkansas": "ar", "california": "ca", "colorado": "co",
    "connecticut": "ct", "delaware": "de", "florida": "fl", "georgia": "ga", "hawaii": "hi", "idaho": "id",
    "illinois": "il", "indiana": "in", "iowa": "ia", "kansas": "ks", "kentucky": "ky", "louisiana": "la",
    "maine": "me", "maryland": "md", "massachusetts": "ma", "michigan": "mi", "minnesota": "mn", "mississippi": "ms",
    "missouri": "mo", "montana": "mt", "nebraska": "ne", "nevada": "nv", "new hampshire": "nh", "new jersey": "nj",
    "new mexico": "nm", "new york": "ny", "north carolina": "nc", "north dakota": "nd", "ohio": "oh", "oklahoma": "ok",
    "oregon": "or", "pennsylvania": "pa", "rhode island": "ri", "south carolina": "sc", "south dakota": "sd",
    "tennessee": "tn", "texas": "tx", "utah": "ut", "vermont": "vt", "virginia": "va", "washington": "wa",
    "west virginia": "wv", "wisconsin": "wi", "wyoming": "wy",
}  # fmt: skip
_STATE = re.compile(r"\b(" + "|".join(sorted(_STATES, key=len, reverse=True)) + r")\b")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may set; a row's own values win."""

    extraction_mode: Mode = "final_answer"
    case_sensitive: bool = False


class StringMatch:
    """Reward 1.0 when the answer's text equals the reference, 0.98 for a number that is only close."""

    placement: ClassVar[Placement] = Placement.INLINE
    required: ClassVar[tuple[str, ...]] = ("expected_answer",)

    def __init__(self, **options: Any) -> None:
        self._options = read_options(Options, "string_match", options)

    def verify(self, task: Task) -> Verdict:
        """Score one answer. An empty reference matches nothing.

        Raises:
            TaskError: there is no reference, or an unknown extraction mode.
        """
        row = task.row
        expected = row.get("expected_answer")
        if expected is None or isinstance(expected, dict | list):
            raise TaskError(f"expected_answer must be a text, not {expected!r}"[:200])
        mode = row.get("extraction_mode") or self._options.extraction_mode
        if mode not in MODES:
            raise TaskError(f"unknown extraction_mode {mode!r}: known: {', '.join(MODES)}")
        sensitive = row.get("case_sensitive")
        answer = extract(joined_messages(task.response), mode)
        reward = 0.0
        if answer is not None and str(expected).strip():
            exact = self._options.case_sensitive if sensitive is None else bool(sensitive)
            reward = float(answer.strip() == str(expected).strip()) if exact else likeness(answer, str(expected))
        return Verdict(reward=reward, extra={"expected_answer": str(expected), "extracted_answer": answer})


def extract(text: str, mode: Mode) -> str | None:
    """The answer in a text, None where there is none."""
    if not text:
        return None
    if mode == "full_response":
        return text
    if mode == "last_line":
        return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), None)
    if mode == "final_answer" and (found := _FINAL.findall(text)):
        return str(found[-1]).strip().removesuffix(".").strip() or None
    contents = boxed(text)
    return peel_text(contents[-1]) or None if contents else None


def likeness(answer: str, expected: str) -> float:
    """1.0, 0.98 or 0.0: the first of the rules by which the two are the same answer, or close."""
    a, b = _basic(answer), _basic(expected)
    for form in _FORMS:
        if form(a) == form(b):
            return 1.0
    if _close(a, b):
        return CLOSE
    a, b = _plain(a), _plain(b)
    return 1.0 if a and a == b else CLOSE if _close(a, b) else 0.0


def _basic(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip()
    for opening, closing in _QUOTES:
        if len(text) > 1 and text.startswith(opening) and text.endswith(closing):
            text = text[1:-1].strip()
            break
    text = text.lower()
    return text.rstrip(".!?").strip() or text


def _as_float(text: str) -> str:
    try:
        return str(float(re.sub(r"\\%|\\\$|\$", "", text)))
    except ValueError:
        return text


def _without_thousands(text: str) -> str:
    return _THOUSANDS.sub(r"\1\2", text).replace("\\%", "%")


def _without_latex(text: str) -> str:
    text = _LATEX.sub(r"\1", text)
    return _SPACES.sub(" ", _DELIMITERS.sub("", text)).strip()


def _listed(text: str) -> str:
    listed = _SPACES.sub(" ", _LIST.sub(" ", text)).strip()
    return listed if len(listed) >= 0.9 * len(text) else text


def _abbreviated(text: str) -> str:
    return _listed(_STATE.sub(lambda found: _STATES[found[1]], text)).lower()


_FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    _as_float,
    _without_thousands,
    _without_latex,
    _listed,
    _abbreviated,
)


def _plain(text: str) -> str:
    return _UNITS.sub("", _without_latex(text).translate(_SUPERSCRIPTS)).strip()


def _numbers(text: str) -> Iterator[float]:
    try:
        yield float(_MONEY.sub("", _UNITS.sub("", text.translate(_SUPERSCRIPTS))).strip())
    except (ValueError, OverflowError):
        return


def _close(a: str, b: str) -> bool:
    """Two numbers whose likeness, (1 - relative difference)^2, is above 0.98."""
    for p in _numbers(a):
        for g in _numbers(b):
            difference = abs(p - g) / max(abs(g), 1e-9)
            return max(0.0, 1.0 - difference) ** 2 > CLOSE
    return False
