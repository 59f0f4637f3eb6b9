r"""Short answers as text: NeMo Gym's `string_match` rules, with everything that they count as the same answer."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import msgspec

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import braces, joined_messages, last_balanced_boxed, peel_text

Mode = Literal["final_answer", "boxed", "last_line", "full_response"]
MODES: tuple[Mode, ...] = ("final_answer", "boxed", "last_line", "full_response")

CLOSE = 0.98
"""Both the least likeness of two numbers that counts, and the reward of an answer that is only close."""

_FINAL = re.compile(r"(?i)(?:final\s+answer|answer)\s*[:：]\s*(.+)")
_THOUSANDS = re.compile(r"(\d+),(\d+)")
"""One pass, as NeMo Gym: of 1,234,567 the first comma goes."""
_LATEX = re.compile(r"\\(?:boxed|text|textbf|textit|texttt|mathrm|mathbf|mathit|mathsf|mathbb|mathcal|emph|url)\s*\{")
_DELIMITERS = re.compile(r"\\[()\[\]]|\$")
_LIST = re.compile(r"[,;]|and|or")
_UNITS = re.compile(r"\^\{?\\circ\}?|\\circ|°|cm[²³]?|mm|km|m[²³]?|kg")
"""Within words too, as in NeMo Gym: the same is done to both sides."""
_MONEY = re.compile(r"\\[%$]|[£€$%,]")
_UNICODE_MATH = str.maketrans({"°": "^\\circ", "√": "\\sqrt", "π": "\\pi"})
"""What is left to translate after NFKC, which has made superscripts and full-width signs plain."""

_STATES = {
    "district of columbia": "dc",
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
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
    if mode == "final_answer" and (found := _FINAL.findall(text)):
        return str(found[-1]).strip().rstrip(".").strip() or None
    content = last_balanced_boxed(text)
    return peel_text(content) or None if content is not None else None


def likeness(answer: str, expected: str) -> float:
    """1.0, 0.98 or 0.0: the first of the rules by which the two are the same answer, or close."""
    a, b = _basic(answer), _basic(expected)
    for form in _FORMS:
        if form(a) == form(b):
            return 1.0
    if _close(a, b):
        return CLOSE
    a, b = _plain(a), _plain(b)
    return 1.0 if a == b else CLOSE if _close(a, b) else 0.0


def _basic(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
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
    """Without the wrapping commands, however deep, and without delimiters; spaces collapsed."""
    cut: list[tuple[int, int]] = []
    if wrappers := list(_LATEX.finditer(text)):
        pairs = braces(text)
        for found in wrappers:
            cut.append(found.span())
            if (closing := pairs.get(found.end() - 1)) is not None:
                cut.append((closing, closing + 1))
    kept, at = [], 0
    for start, end in sorted(cut):
        kept.append(text[at:start])
        at = end
    return " ".join(_DELIMITERS.sub("", "".join([*kept, text[at:]])).split())


def _listed(text: str) -> str:
    """Separators of a list as spaces; a text of which they are more than a tenth is no list.

    NeMo Gym's rule, "and" and "or" within words included: the same is done to both sides.
    """
    listed = _LIST.sub(" ", text)
    return " ".join(listed.split()) if len(listed) >= 0.9 * len(text) else text


def _abbreviated(text: str) -> str:
    # In capitals until the list is read: Oregon's "OR" is no conjunction.
    return _listed(_STATE.sub(lambda found: _STATES[found[1]].upper(), text)).lower()


_FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    _as_float,
    _without_thousands,
    _without_latex,
    _listed,
    _abbreviated,
)


def _plain(text: str) -> str:
    return _UNITS.sub("", _without_latex(text).translate(_UNICODE_MATH)).strip()


def _numbers(text: str) -> Iterator[float]:
    with contextlib.suppress(ValueError, OverflowError):
        yield float(_UNITS.sub("", _MONEY.sub("", text).translate(_UNICODE_MATH)).strip())


def _close(a: str, b: str) -> bool:
    """Two numbers whose likeness, (1 - relative difference)^2, is above 0.98."""
    for p in _numbers(a):
        for g in _numbers(b):
            difference = abs(p - g) / max(abs(g), 1e-9)
            return max(0.0, 1.0 - difference) ** 2 > CLOSE
    return False
