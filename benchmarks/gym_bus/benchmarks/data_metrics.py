"""What a data file looks like in figures, and whether it still looks as it was when it was committed.

Names, formulas, rounding and tolerances are NeMo Gym's: a `*_metrics.json` of its data sets can be checked here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.benchmarks.spec import DatasetSpec, GitlabIdentifier, HuggingFaceIdentifier
from gym_bus.errors import DataError
from gym_bus.results.disk import replace_file

EXAMPLES = "Number of examples"

ABOUT_BENCHMARK = ("name", "type", "jsonl_fpath", "prepare_script", "prompt_config", "num_repeats")
ABOUT_OTHER = (
    "name",
    "type",
    "jsonl_fpath",
    "num_repeats",
    "source",
    "gitlab_identifier",
    "huggingface_identifier",
    "license",
)
ABOUT = frozenset({*ABOUT_BENCHMARK, *ABOUT_OTHER})
"""Keys of a metrics file that say which dataset it is of."""

_LARGE_TOLERANCE, _SMALL_TOLERANCE = 5e-3, 5e-4
_NOT_COUNTED = frozenset({"responses_create_params", "response"})


class Moments:
    """Count, mean, standard deviation (ddof 1) and extremes of the numbers seen, in one pass."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._low, self._high = math.inf, -math.inf

    def observe(self, value: float, times: int = 1) -> None:
        """Take one number, as often as it counts."""
        for _ in range(times):
            self._count += 1
            delta = value - self._mean
            self._mean += delta / self._count
            self._squares += delta * (value - self._mean)
        self._low, self._high = min(self._low, value), max(self._high, value)

    def figures(self) -> dict[str, float]:
        """Rounded to two digits after the point from 1 on, to three below."""
        n = self._count
        return {
            "Total # non-null values": n,
            "Average": _rounded(self._mean),
            "Min": _rounded(self._low if n else 0.0),
            "Max": _rounded(self._high if n else 0.0),
            "Standard deviation": _rounded(math.sqrt(self._squares / (n - 1)) if n > 1 else 0.0),
        }


class Texts:
    """How many texts there are, and how many different ones; what is kept of a text is a digest of 16 bytes."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._count = 0

    def observe(self, text: str, times: int = 1) -> None:
        """Take one text, as often as it counts."""
        self._seen.add(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest())
        self._count += times

    def figures(self) -> dict[str, float]:
        """The two counts."""
        return {"unique_count": len(self._seen), "total_count": self._count}


class DataMetrics:
    """The figures of one data file, or of several together."""

    def __init__(self) -> None:
        self.examples = 0
        self._tools, self._words, self._turns, self._temperature = Moments(), Moments(), Moments(), Moments()
        self._numbers: dict[str, Moments] = {}
        self._texts: dict[str, Texts] = {}

    def observe(self, row: Mapping[str, Any], params: Mapping[str, Any], times: int) -> None:
        """Take one row, decoded, with its create params, as often as it is repeated."""
        self.examples += times
        if params.get("tools") is not None:
            self._tools.observe(len(params["tools"]), times)
        if turns := _user_turns(params.get("input")):
            self._turns.observe(turns, times)
        if params.get("temperature") is not None:
            self._temperature.observe(params["temperature"], times)
        # The escapes and the spaces of json.dumps are part of the definition: they decide what a word is.
        self._words.observe(len(json.dumps(params).split()), times)
        for key, value in row.items():
            if key not in _NOT_COUNTED:
                self._observe_field(key, value, times)

    def _observe_field(self, key: str, value: Any, times: int) -> None:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool | int | float):
                self._numbers.setdefault(key, Moments()).observe(item, times)
            elif isinstance(item, str):
                self._texts.setdefault(key, Texts()).observe(item, times)

    def figures(self) -> dict[str, Any]:
        """As they stand in a `*_metrics.json`. A key that has numbers and texts counts as one of texts."""
        return {
            EXAMPLES: self.examples,
            "Number of tools": self._tools.figures(),
            "Json-dumped number of words (proxy for token count)": self._words.figures(),
            "Number of turns": self._turns.figures(),
            "Temperature": self._temperature.figures(),
            **{key: numbers.figures() for key, numbers in self._numbers.items()},
            **{key: texts.figures() for key, texts in self._texts.items()},
        }


def _user_turns(given: Any) -> int:
    if isinstance(given, str):
        return 1
    return sum(isinstance(item, dict) and item.get("role") == "user" for item in given or ())


def _rounded(value: float) -> float:
    return round(float(value), 2 if abs(value) >= 1 else 3)


def about(dataset: DatasetSpec) -> dict[str, Any]:
    """The dataset's part of its metrics file: its keys as NeMo Gym writes them."""
    if dataset.type == "benchmark":
        return {key: getattr(dataset, key) for key in ABOUT_BENCHMARK}
    source = dataset.source
    gitlab = source if isinstance(source, GitlabIdentifier) else dataset.gitlab_identifier
    hugging_face = source if isinstance(source, HuggingFaceIdentifier) else dataset.huggingface_identifier
    values = {
        "source": msgspec.to_builtins(source) or None,
        "gitlab_identifier": _identifier(gitlab),
        "huggingface_identifier": _identifier(hugging_face),
        "license": dataset.license or None,
    }
    return {key: values[key] if key in values else getattr(dataset, key) for key in ABOUT_OTHER}


def _identifier(place: GitlabIdentifier | HuggingFaceIdentifier | None) -> dict[str, Any] | None:
    return None if place is None else {key: value for key, value in msgspec.to_builtins(place).items() if key != "type"}


def metrics_path(data: Path) -> Path:
    """The committed figures of a data file."""
    return data.with_name(f"{data.stem}_metrics.json")


def conflict_path(metrics: Path) -> Path:
    """Where figures are written that are not the committed ones."""
    return metrics.with_name(f"{metrics.stem}_conflict.json")


def read_metrics(path: Path) -> dict[str, Any]:
    """The figures in a file. Raises DataError naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: no metrics: {e}") from None


def write_metrics(path: Path, figures: Mapping[str, Any]) -> None:
    """Write a metrics file. Raises UsageError where it cannot be written."""
    replace_file(path, [msgspec.json.format(msgspec.json.encode(figures), indent=4), b"\n"])


def differences(committed: Any, now: Any, at: str = "") -> Iterator[str]:
    """What of `committed` is no longer so. New keys are no difference, nor is the order of a list.

    Numbers with a point may differ by 0.005 where one of them is 1 or more, else by 0.0005.
    """
    if isinstance(committed, dict) and isinstance(now, dict):
        for key, value in committed.items():
            place = f"{at}.{key}" if at else key
            if key not in now:
                yield f"{place} is no longer there"
            else:
                yield from differences(value, now[key], place)
    elif isinstance(committed, list) and isinstance(now, list):
        if not _same_items(committed, now):
            yield f"{at} has other items"
    elif isinstance(committed, float) and isinstance(now, float):
        if not _close(committed, now):
            yield f"{at} is {now}, not {committed}"
    elif committed != now:
        yield f"{at} is {now!r}, not {committed!r}"


def _same_items(committed: list[Any], now: list[Any]) -> bool:
    try:
        return Counter(committed) == Counter(now)
    except TypeError:  # items that cannot be counted are matched one by one
        left = list(now)
        for item in committed:
            match = next((other for other in left if not any(differences(item, other))), None)
            if match is None:
                return False
            left.remove(match)
        return not left


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= (_LARGE_TOLERANCE if max(abs(a), abs(b)) >= 1 else _SMALL_TOLERANCE)
