"""The test split of MBPP as Google Research published it; and MBPP+, with the inputs of EvalPlus."""

from __future__ import annotations

from typing import Any

from gym_bus.benchmarks.prepare import Source

SOURCES = {
    "test": Source(
        file="mbpp.jsonl",
        url="https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
        sha256=("ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",),
        licence="Creative Commons Attribution 4.0 International, Austin et al., Google Research",
    ),
    "plus": Source(
        file="MbppPlus.jsonl.gz",
        url="https://github.com/evalplus/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz",
        licence="Apache 2.0, EvalPlus; after MBPP, Creative Commons Attribution 4.0 International, Austin et al.",
        editions="MbppPlus-v*.jsonl",
    ),
}

TEST_SPLIT = range(11, 511)
"""Task ids of the test split, by the data set's paper; 1 to 10 are for prompts, 511 and up for training."""

_PLUS_KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
_KEYS = ("task_id", "text", "code", "test_setup_code", "test_list", "challenge_test_list")


def convert(row: dict[str, Any]) -> dict[str, Any] | None:
    """All published keys, and the tests as one text for the prompt, after their setup where they have one."""
    if "plus_input" in row:
        return _convert_plus(row)
    if row["task_id"] not in TEST_SPLIT:
        return None
    tests_text = "\n".join([*filter(None, [row["test_setup_code"]]), *row["test_list"]])
    return {**{key: row[key] for key in _KEYS}, "tests_text": tests_text}


def _convert_plus(row: dict[str, Any]) -> dict[str, Any]:
    """MBPP+ has the sentence and an assert or more in a docstring; here they are apart, as the prompt wants them."""
    text, assert_, tests = row["prompt"].strip().strip('"').strip().partition("\nassert ")
    return {
        **{key: row[key] for key in _PLUS_KEYS},
        "text": text,
        "code": row["canonical_solution"],
        "tests_text": (assert_ + tests).strip(),
    }
