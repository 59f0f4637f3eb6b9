"""Stored rollouts of NeMo Gym get the rewards that its rules give, whatever the shape of their responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from nemogym import message, reasoning, response, tool_call, write_lines, write_run
from unit.conftest import GymBus

from gym_bus.config import Config, JobConfig
from gym_bus.results.manifest import Manifest
from gym_bus.results.reader import join_rollouts
from gym_bus.verifiers.base import Verifier
from gym_bus.verifiers.runner import build, task_of
from gym_bus.workers.reverify import options_for

OPTIONS: list[dict[str, Any]] = [{"A": "Paris"}, {"B": "Rome"}, {"C": "New  York"}, {"D": None}]
MD = {"grading_mode": "lenient_answer_colon_md"}


def choice(gold: str, **fields: Any) -> dict[str, Any]:
    return {"options": OPTIONS, "expected_answer": gold, **fields}


def regex(*patterns: str) -> dict[str, Any]:
    return {"template_metadata": {"output_regex": list(patterns) if len(patterns) > 1 else patterns[0]}}


def boxed_mode(mode: str) -> dict[str, Any]:
    return {"grading_mode": mode}


Recorded = list[tuple[dict[str, Any], dict[str, Any], float]]
"""Row, response, reward."""

MCQA: Recorded = [
    (choice("b"), response(reasoning("A?"), message(r"so \boxed{B}")), 1.0),
    (choice("B"), response(message(r"first \boxed{B}"), message(r", no: \boxed{A}")), 0.0),
    (choice("B"), response(message(r"\bo"), *tool_call("look", r"\boxed{A}"), message(r"xed{B}")), 1.0),
    (choice("B"), response(message(r"<think>\boxed{B}"), cut=True), 1.0),  # the thinking is read, too
    (choice("B"), response(message(r"<think>\boxed{A}</think> it is B")), 0.0),
    (choice("B"), response(message(r"\boxed{\text{ \text{B} }}")), 1.0),
    (choice("B"), response(message(r"\boxed{B) Rome}")), 1.0),
    (choice("B"), response(message(r"\boxed{b}")), 0.0),
    (choice("B"), response(message(r"\boxed{A or B}")), 0.0),
    (choice("B"), response(message(r"\boxed{B} \boxed{B")), 0.0),  # the last one does not close
    (choice("D"), response(message(r"\boxed{D}")), 0.0),  # an option without a text
    (choice("B"), response(message(refusal="No.")), 0.0),
    (choice("B"), response(), 0.0),
    (choice("B"), response(reasoning(r"\boxed{B}"), cut=True), 0.0),
    (choice("B", **boxed_mode("lenient_boxed")), response(message(r"\boxed{It is rome.}")), 1.0),
    (choice("B", **boxed_mode("lenient_boxed")), response(message(r"\boxed{rome or paris}")), 0.0),
    (choice("C", **boxed_mode("lenient_boxed")), response(message(r"\boxed{new york}")), 1.0),
    (choice("B", **boxed_mode("lenient_answer_colon")), response(message("ANSWER : B\nAnswer: A")), 1.0),
    (choice("C", **boxed_mode("lenient_answer_colon")), response(message("answer: new york")), 1.0),
    (choice("B", **boxed_mode("lenient_answer_colon")), response(message("answer: B, Rome")), 0.0),
    (choice("B", **boxed_mode("lenient_answer_colon")), response(message(r"\boxed{B}")), 0.0),
    (choice("B", grading_mode=None, template_metadata=None), response(message(r"\boxed{B}")), 1.0),
    (choice("B", **regex(r"pick (\w)")), response(message(r"pick A, pick b. \boxed{A}")), 1.0),
    (choice("E", **regex(r"pick (\w)")), response(message("pick e")), 1.0),  # even one that is no option
    (choice("B", **regex(r"pick (\w+)")), response(message("pick ROME")), 1.0),
    (choice("B", **regex(r"choose (\w)", r"pick (\w)")), response(message("pick B")), 1.0),
    (choice("B", **regex(r"(broken")), response(message(r"\boxed{B}")), 1.0),
    (choice("B", **regex(r"pick (.)")), response(message("pick \u09ac")), 1.0),
]

MCQA_MD: Recorded = [
    (choice("B"), response(message("Answer: A\n\n**Answer:** B")), 1.0),
    (choice("B"), response(message("**Answer**: (B")), 1.0),
    (choice("B"), response(message("Answer: B. Rome")), 1.0),
    (choice("B"), response(message("Answer: A or B")), 0.0),
    (choice("A"), response(message("Answer: A\nAnswer: nothing here")), 1.0),  # the last that yields a letter
    (choice("B"), response(message("the answer: it must be B")), 1.0),
    (choice("B"), response(message("Answer: \u0628")), 1.0),
    (choice("B", grading_mode="lenient_boxed"), response(message(r"\boxed{B}")), 0.0),  # the server's mode wins
]


def short(gold: str | int, **fields: Any) -> dict[str, Any]:
    return {"expected_answer": gold, **fields}


STRING_MATCH: Recorded = [
    (short("Rome"), response(message("The answer: Paris"), message("Final Answer: rome.")), 1.0),
    (short("Rome"), response(message("It is"), message(r"\boxed{\text{Rome}}")), 1.0),  # no answer line: the box
    (short("a b"), response(message("a", "b")), 0.0),
    (short("a b", extraction_mode="full_response"), response(message("a\tb")), 1.0),
    (short("Rome", extraction_mode="last_line"), response(message("Paris"), message("Rome\n\n")), 1.0),
    (short("Rome", extraction_mode="boxed"), response(message(r"\boxed{Rome} \boxed{")), 1.0),
    (short("Rome", case_sensitive=True), response(message("Answer: rome")), 0.0),
    (short("Rome", case_sensitive=None), response(message("Answer: rome")), 1.0),
    (short("1,234"), response(message("Answer: 1234")), 1.0),
    (short("5"), response(message("Answer: 5.00")), 1.0),
    (short("100"), response(message("Answer: 100.5")), 0.98),
    (short("100"), response(message("Answer: 102")), 0.0),
    (short("50%"), response(message(r"Answer: 50\%")), 1.0),
    (short("new york"), response(message("Answer: NY")), 1.0),
    (short("a, b and c"), response(message("Answer: a; b; c")), 0.0),
    (short("12 cm"), response(message("Answer: 12.0 cm")), 0.98),
    (short(""), response(message("Answer: ")), 0.0),
    (short("Rome"), response(), 0.0),
    (short("Rome"), response(message(refusal="Rome")), 0.0),
]

MATH: Recorded = [
    (short("5"), response(reasoning("4?"), message(r"\boxed{5}")), 1.0),
    (short("5"), response(message(r"<think>\boxed{5}"), cut=True), 1.0),  # the thinking is read, too
    (short("5"), response(message(r"<think>is it \boxed{4}?</think>\boxed{5}")), 0.0),  # two boxes are one set
    (short(r"\{4,5\}"), response(message(r"\boxed{4}"), message(r" and \boxed{5}")), 1.0),
    (short("5"), response(message(r"\boxed{5}. I checked: \boxed{5}")), 1.0),
    (short("5"), response(message(r"\boxed{5} \boxed{done}")), 0.0),  # letters are variables
    (short(5), response(message("so the answer is 5.")), 1.0),
    (short("20"), response(message("Asked: what are 20% of 100?")), 0.0),
    (short(r"$\frac{1}{2}$"), response(message(r"\boxed{0.5}")), 1.0),
    (short("5"), response(message(r"\boxed{5}" + " and so on" * 30_000)), 1.0),  # all of a text is read
    (short("57"), response(message(r"\boxed{5"), *tool_call("think", "6}"), message("7}")), 1.0),
    (short("5"), response(message(refusal="5")), 0.0),
    (short("5"), response(), 0.0),
]


@pytest.mark.parametrize(
    ("verifier", "rollouts", "options"),
    [("mcqa", MCQA, {}), ("mcqa", MCQA_MD, MD), ("string_match", STRING_MATCH, {}), ("math", MATH, {})],
    ids=["mcqa", "mcqa-md", "string_match", "math"],
)
def test_rewards_are_those_of_nemo_gyms_rules(
    tmp_path: Path, verifier: str, rollouts: Recorded, options: dict[str, Any]
) -> None:
    path = write_run(tmp_path, rollouts, dropped=("options", "template_metadata", "grading_mode", "extraction_mode"))
    used = options_for(path, verifier, Config()) | options
    judge = cast(Verifier, build(verifier, json.dumps(used).encode()))

    rewards = {
        joined.task_index: judge.verify(task_of(joined.row, joined.response)).reward
        for joined in join_rollouts(tmp_path / "rollouts_materialized_inputs.jsonl", path)
    }

    assert rewards == {task: reward for task, (_, _, reward) in enumerate(rollouts)}


def test_options_are_those_of_the_job_that_made_the_rollouts(tmp_path: Path) -> None:
    path = write_run(tmp_path, [(short("5"), response(), 0.0)])
    assert options_for(path, "math", Config()) == {"strip_think": False, "text_limit": 10**9}  # NeMo Gym's way
    set_here = Config(job=JobConfig(verifier_options={"strip_think": True}))
    assert options_for(path, "math", set_here) == {"strip_think": True, "text_limit": 10**9}

    write_lines(path, [{"response": response(), "reward": 0.0, "gym_bus": {"job": "j"}}])
    assert options_for(path, "math", Config()) == {}

    texts = dict.fromkeys(
        ("job", "benchmark", "dataset_digest", "model", "model_kind", "model_name", "config_digest"), ""
    )
    counts = {"created_at": 0.0, "rows": 1, "num_repeats": 1}
    Manifest(
        **texts, **counts, agent="simple", verifier="math", verifier_options={"parse_limit_s": 9}, gym_bus_version="0"
    ).save(tmp_path / "job.json")
    assert options_for(path, "math", Config()) == {"parse_limit_s": 9}
    assert options_for(path, "mcqa", Config()) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rollouts rollouts.jsonl --output rollouts.jsonl --verifier mcqa", "would overwrite rollouts.jsonl"),
        ("--rollouts rollouts_failures.jsonl --output rollouts.jsonl --verifier mcqa", "would overwrite rollouts_fail"),
        ("--rollouts rollouts.jsonl --output x.jsonl --verifier mcq", "did you mean 'mcqa'"),
        ("--rollouts empty.jsonl --output x.jsonl --verifier mcqa", "empty.jsonl: no rollouts in it"),
        ("--rollouts rollouts.jsonl --output x.jsonl --verifier mcqa", "lacks, as do all others; --inputs FILE"),
    ],
)
def test_what_would_lose_data_or_mean_nothing_is_refused(
    tmp_path: Path, gym_bus: GymBus, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path, [(choice("B"), response(), 0.0)], dropped=("options",))
    (tmp_path / "rollouts_failures.jsonl").write_bytes(path.read_bytes())
    (tmp_path / "empty.jsonl").touch()
    before = {at: at.read_bytes() for at in tmp_path.iterdir()}

    ended = gym_bus("eval", "reverify", *arguments.split())

    assert ended.code == 2
    assert said in " ".join(ended.err.split())
    assert {at: at.read_bytes() for at in tmp_path.iterdir()} == before
