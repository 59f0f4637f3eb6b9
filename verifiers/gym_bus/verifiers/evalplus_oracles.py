"""When an output passes: EvalPlus's comparison, and its ways of judging tasks that have more than one right output.

The outputs are a solution's own choice: data, of which nothing is built that is larger than what is expected.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import msgspec

from gym_bus.verifiers import literal_tests, wire_values

RTOL = 1e-7
FLOAT_ATOL = 1e-6
"""Absolute tolerance of floats where the task names none."""

NOT_NONE = frozenset({"check_str", "text_match_three", "text_starta_endb"})
"""Of MBPP: only whether there is an output counts."""
SAME_SET = frozenset(
    {
        "similar_elements",
        "find_char_long",
        "common_in_nested_lists",
        "extract_singly",
        "larg_nnum",
        "intersection_array",
        "find_dissimilar",
        "Diff",
    }
)
"""Of MBPP: order and repetitions do not count."""

_UNLIKE = (
    wire_values.ProtocolError,
    wire_values.NotData,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    RecursionError,
)
"""What comes of an output that is no such value."""


class RowError(Exception):
    """What the row expects is no data."""


class Oracle(msgspec.Struct, frozen=True):
    """Judges the outputs of one task."""

    dataset: str
    entry_point: str
    atol: float

    def accepts(self, arguments: Any, frame: Any, expected: Any) -> bool:
        """Whether an output passes. All three as `wire_values.encode` makes them.

        Raises:
            RowError: `arguments` or `expected` is not.
        """
        wanted = _trusted(expected)
        try:
            if self.dataset == "mbpp":
                return self._accepts_of_mbpp(arguments, frame, wanted)
            if self.entry_point == "find_zero":  # any root will do
                return abs(_polynomial(_trusted(arguments)[0], _number(frame))) <= self.atol
            return self._same(frame, wanted)
        except _UNLIKE:
            return False

    def _accepts_of_mbpp(self, arguments: Any, frame: Any, wanted: Any) -> bool:
        if self.entry_point == "are_equivalent":
            return True  # EvalPlus takes every output
        if self.entry_point in NOT_NONE:
            return bool((frame if isinstance(frame, bool) else frame is not None) == wanted)
        if self.entry_point in SAME_SET:
            return _same_set(frame, wanted) or self._close(frame, wanted)
        if (also := _ALSO_RIGHT.get(self.entry_point)) and also(_trusted(arguments), frame, self.atol):
            return True
        return self._same(frame, wanted)

    def _same(self, frame: Any, wanted: Any) -> bool:
        return literal_tests.equal(frame, wanted) or self._close(frame, wanted)

    def _close(self, frame: Any, wanted: Any) -> bool:
        atol = self.atol or (FLOAT_ATOL if _is_floats(wanted) else 0.0)
        if not atol or literal_tests.leaves(frame) != literal_tests.leaves(_encoded(wanted)):
            return False
        got = wire_values.decode(frame, wire_values.no_handle)
        return type(got) is type(wanted) and _near(got, wanted, atol)


def _trusted(frame: Any) -> Any:
    try:
        return wire_values.decode(frame, wire_values.no_handle)
    except (wire_values.ProtocolError, wire_values.NotData) as e:
        raise RowError(str(e)) from None


def _encoded(value: Any) -> Any:
    return wire_values.encode(value, wire_values.no_handle)


def _is_floats(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _near(got: Any, wanted: Any, atol: float) -> bool:
    """As `numpy.allclose` sees arrays of numbers of the same shape; whatever else they hold is not near."""
    if isinstance(wanted, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(wanted):
            return False
        return all(_near(a, b, atol) for a, b in zip(got, wanted, strict=True))
    if not (isinstance(got, _NUMBERS) and isinstance(wanted, _NUMBERS)):
        return False
    if not (cmath.isfinite(got) and cmath.isfinite(wanted)):
        return got == wanted
    return abs(got - wanted) <= atol + RTOL * abs(wanted)


_NUMBERS = (int, float, complex)


def _number(frame: Any) -> Any:
    """A number out of a frame. Raises TypeError for anything else."""
    value = wire_values.decode(frame, wire_values.no_handle) if literal_tests.leaves(frame) == 1 else None
    if not isinstance(value, int | float):
        raise TypeError("no number")
    return value


def _same_set(frame: Any, wanted: Any) -> bool:
    """Whether two collections have the same elements. Of the output's, only those that are wanted are put in a set."""
    if not isinstance(frame, list) or frame[0] not in wire_values.CONTAINERS or frame[0] == "d":
        return False
    elements, most, found = set(wanted), literal_tests.leaves(_encoded(wanted)), set()
    for item in frame[1]:
        if literal_tests.leaves(item) > most:
            return False
        value = wire_values.decode(item, wire_values.no_handle)
        if value not in elements:
            return False
        found.add(value)
    return len(found) == len(elements)


def _polynomial(coefficients: Any, x: float) -> float:
    return float(sum(coefficient * math.pow(x, power) for power, coefficient in enumerate(coefficients)))


def _surface_of_pyramid(given: Any, frame: Any, atol: float) -> bool:
    """With the height taken for that of the apex over the base, where the canonical solution takes it for the slant."""
    edge, height = given
    slant = math.sqrt((edge / 2) ** 2 + height**2)
    return bool(abs(_number(frame) - round(edge**2 + 2 * edge * slant)) <= atol)


def _digits_apart(given: Any, frame: Any, atol: float) -> bool:
    """With the shorter number filled up with zeros in front."""
    del atol
    texts = [str(number) for number in given]
    width = max(map(len, texts))
    pairs = zip(*(text.zfill(width) for text in texts), strict=True)
    return bool(_number(frame) == sum(abs(int(a) - int(b)) for a, b in pairs))


_ALSO_RIGHT: dict[str, Callable[[Any, Any, float], bool]] = {
    "sum_div": lambda given, frame, atol: bool(_number(frame) == 0),
    "surface_Area": _surface_of_pyramid,
    "digit_distance_nums": _digits_apart,
}
"""Of MBPP: outputs that are right beside the canonical one."""
