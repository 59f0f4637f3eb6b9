r"""Final answers of mathematics, compared by meaning: NeMo Gym's `math_with_judge` rules without the judge.

The gold answer is read as LaTeX inside `\boxed{}`, the prediction as a plain expression or LaTeX, both by math-verify.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from gym_bus.errors import TaskError
from gym_bus.messages import Verdict
from gym_bus.verifiers.base import Placement, Task
from gym_bus.verifiers.options import read_options
from gym_bus.verifiers.text import output_text, without_think

_PAREN = re.compile(r"^\\\((.*)\\\)$", re.DOTALL)
_DOLLARS = re.compile(r"^(\$+)(.*)\1$", re.DOTALL)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may set."""

    strip_think: bool = True
    """Leave out `<think>` blocks, so that an answer that stands in the thinking alone does not count."""
    parse_limit_s: Annotated[int, Meta(ge=1, le=60)] = 5
    """math-verify's own limit for reading one text, and for one comparison; a slower one counts as wrong."""
    text_limit: Annotated[int, Meta(ge=1000)] = 200_000
    """Characters of the answer that are read, from its end."""


class Math:
    """Reward 1.0 when the answer's final value equals the reference."""

    placement: ClassVar[Placement] = Placement.CPU
    required: ClassVar[tuple[str, ...]] = ("expected_answer",)
    nemo_gym_options: ClassVar[dict[str, Any]] = {"strip_think": False, "text_limit": 1_000_000_000}
    """What makes it judge as `math_with_judge` does, which reads the thinking, too, and texts of any length."""

    def __init__(self, **options: Any) -> None:
        self._options = read_options(Options, "math", options)

    def verify(self, task: Task) -> Verdict:
        """Score one answer.

        Raises:
            TaskError: `expected_answer` is missing, empty, or nothing that math-verify can read.
        """
        expected = task.row.get("expected_answer")
        if isinstance(expected, bool) or not isinstance(expected, str | int | float) or not str(expected).strip():
            raise TaskError(f"expected_answer must be a text or a number, not {expected!r}")
        gold = self._gold(str(expected))
        text = output_text(task.response)
        if self._options.strip_think:
            text = without_think(text)
        candidates = self._parse(text[-self._options.text_limit :]) if text.strip() else []
        right = next((c for c in candidates if self._equal(gold, c)), None)
        reward = 0.0 if right is None else 1.0
        answer = right if right is not None else next(iter(candidates), None)
        extra = {
            "expected_answer": str(expected),
            "extracted_answer": None if answer is None else _shown(answer),
            "library_reward": reward,
        }
        return Verdict(reward=reward, extra=extra)

    def _gold(self, expected: str) -> list[Any]:
        from math_verify import LatexExtractionConfig, parse

        with _quiet():
            gold: list[Any] = parse(
                f"\\boxed{{{_unwrapped(expected)}}}",
                (LatexExtractionConfig(),),
                parsing_timeout=self._options.parse_limit_s,
            )
        if not gold:
            raise TaskError(f"expected_answer {expected[:200]!r} is no mathematics that can be read")
        return gold

    def _parse(self, text: str) -> list[Any]:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

        try:
            with _quiet():
                found: list[Any] = parse(
                    text,
                    (ExprExtractionConfig(), LatexExtractionConfig()),
                    parsing_timeout=self._options.parse_limit_s,
                )
        except Exception:  # what a model wrote may make sympy raise anything: it is no readable answer
            return []
        return found

    def _equal(self, gold: list[Any], candidate: Any) -> bool:
        from math_verify import verify

        try:
            with _quiet():
                return bool(verify(gold, candidate, timeout_seconds=self._options.parse_limit_s))
        except Exception:  # as above
            return False


def _unwrapped(expected: str) -> str:
    r"""`expected` without the outer `\(..\)` and then `$..$`, which math-verify does not want inside `\boxed{}`."""
    text = expected.strip()
    if found := _PAREN.match(text):
        text = found[1].strip()
    if found := _DOLLARS.match(text):
        text = found[2].strip()
    return text


def _shown(answer: Any) -> str | None:
    with contextlib.suppress(Exception):  # sympy's printing can fail on what its reading let through
        return str(answer)[:2000]
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """math-verify and sympy warn about every answer that they cannot read; that is the normal case here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
