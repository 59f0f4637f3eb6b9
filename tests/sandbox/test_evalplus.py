"""EvalPlus's tests: expected outputs computed from canonical solutions, answers judged, all in the real sandbox."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gym_bus.benchmarks.spec import load_benchmark
from gym_bus.cli import dataset as dataset_cli
from gym_bus.errors import DataError, TaskError, UsageError
from gym_bus.messages import Verdict
from gym_bus.sandbox.slot import Slot
from gym_bus.verifiers import evalplus_data, wire_values
from gym_bus.verifiers.base import Task
from gym_bus.verifiers.function_tests import HumanEval, Mbpp
from gym_bus.verifiers.testing import response_of
from gym_bus.workers.attack import attack
from gym_bus.workers.preparing import completed as completed_rows

Row = dict[str, Any]
Verifier = type[HumanEval | Mbpp]

MEAN: Row = {
    "task_id": "HumanEval/901",
    "prompt": 'from typing import List\n\n\ndef mean(xs: List[float]) -> float:\n    """The mean; 0 of nothing."""\n',
    "entry_point": "mean",
    "canonical_solution": "    return sum(xs) / len(xs) if xs else 0.0\n",
    "base_input": [[[1.0, 2.0]], [[3.0]]],
    "plus_input": [[[]], [[0.1] * 10], [[1e308, 1e308]]],
    "atol": 0,
}
SHARED: Row = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nFind the shared elements.\nassert similar_elements((1, 2), (2,)) == (2,)\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "\ndef similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5], [5, 4]]],
    "plus_input": [[[], []], [["a", 1, "a"], ["a"]]],
    "atol": 0,
}


def fenced(code: str) -> str:
    return f"So:\n```python\n{code}\n```\n"


def suite(outputs: list[Any], seconds: float = 0.0) -> Row:
    """Tests of which the first gives 0 to the function, the second 1, ..."""
    encoded = [wire_values.encode(value, wire_values.no_handle) for value in outputs]
    inputs = [["t", [number]] for number in range(len(outputs))]
    return {"inputs": inputs, "outputs": encoded, "seconds": [seconds] * len(outputs)}


def ready(base: list[Any], plus: list[Any], **more: Any) -> Row:
    """A prepared row whose function is `f`."""
    return {"prompt": "", "entry_point": "f", "base_tests": suite(base), "plus_tests": suite(plus), **more}


SQUARES = ready([0, 1, 4], [0, 1, 4, 9])


async def judged(slot: Slot, row: Row, text: str, verifier: Verifier = HumanEval, **options: Any) -> Verdict:
    options.setdefault("min_time_limit", 60.0)  # where a test is not about time, none may run out of it
    return await verifier(**options).verify(Task(row=row, response=response_of(text)), slot)


async def completed(slot: Slot, row: Row, verifier: Verifier = HumanEval) -> Row:
    made, left_out = await verifier.complete(row, slot)
    assert left_out == 0
    return made


@pytest.mark.asyncio(loop_scope="session")
async def test_a_published_row_gets_expected_outputs_and_the_canonical_solution_passes(slot: Slot) -> None:
    row = await completed(slot, MEAN)

    verdict = await judged(slot, row, fenced(MEAN["prompt"] + MEAN["canonical_solution"]))

    assert HumanEval.incomplete(MEAN)
    assert not HumanEval.incomplete(row)
    assert "base_input" not in row
    assert row["base_tests"]["outputs"] == [["f", (1.5).hex()], ["f", (3.0).hex()]]
    assert row["plus_tests"]["outputs"][2] == ["f", "inf"]
    assert all(0 <= seconds < 60 for seconds in row["base_tests"]["seconds"])
    assert (verdict.reward, verdict.extra["failure_reason"]) == (1.0, "none")
    assert (verdict.extra["base_status"], verdict.extra["plus_status"]) == ("pass", "pass")
    assert verdict.components == {"passing_base_tests": 1.0, "passing_plus_tests": 1.0}
    assert verdict.extra["tests"] == [
        {"suite": "base", "passed": 2, "of": 2, "first_failed": None},
        {"suite": "plus", "passed": 3, "of": 3, "first_failed": None},
    ]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("error", "atol", "reward"), [(1e-9, 0, 1.0), (1e-7, 0, 1.0), (1e-5, 0, 0.0), (1e-5, 1e-4, 1.0), (1e-3, 1e-4, 0.0)]
)
async def test_floats_are_compared_with_the_tolerance_of_their_task(
    slot: Slot, error: float, atol: float, reward: float
) -> None:
    row = await completed(slot, {**MEAN, "atol": atol})

    verdict = await judged(slot, row, fenced(f"def mean(xs):\n    return sum(xs) / (len(xs) or 1) + {error}"))

    assert verdict.reward == reward


@pytest.mark.asyncio(loop_scope="session")
async def test_a_set_in_any_order_is_right_where_the_task_asks_for_one_and_arguments_are_tuples(slot: Slot) -> None:
    row = await completed(slot, SHARED, Mbpp)
    code = (
        "def similar_elements(a, b):\n    assert type(a) is type(b) is tuple\n    return [x for x in a if x in b][::-1]"
    )

    verdict = await judged(slot, row, fenced(code), Mbpp)
    wrong = await judged(slot, row, fenced(code.replace("[::-1]", "[:1]")), Mbpp)

    assert row["plus_tests"]["inputs"][0] == ["t", [["t", []], ["t", []]]]
    assert verdict.reward == 1.0
    assert (wrong.reward, wrong.extra["failure_reason"]) == (0.0, "wrong_answer")


@pytest.mark.asyncio(loop_scope="session")
async def test_an_answer_that_passes_the_base_tests_alone_is_wrong(slot: Slot) -> None:
    verdict = await judged(slot, SQUARES, fenced("f = {0: 0, 1: 1, 2: 4}.get"))

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, "wrong_answer")
    assert verdict.components == {"passing_base_tests": 1.0, "passing_plus_tests": 0.0}
    assert (verdict.extra["is_correct"], verdict.extra["is_correct_plus"]) == (True, False)
    assert verdict.extra["tests"][1] == {"suite": "plus", "passed": 3, "of": 4, "first_failed": 3}


@pytest.mark.asyncio(loop_scope="session")
async def test_an_answer_that_passes_the_plus_tests_alone_has_no_plus_score(slot: Slot) -> None:
    verdict = await judged(slot, ready([0, 1, 5], [0, 1]), fenced("def f(x): return x * x"))

    assert (verdict.extra["base_status"], verdict.extra["plus_status"]) == ("fail", "pass")
    assert verdict.components == {"passing_base_tests": 0.0, "passing_plus_tests": 0.0}


HOSTILE = {
    "equal": ("class A(int):\n    __eq__ = lambda *_: True\ndef f(x): return A(7)", "wrong_answer"),
    "object": ("class A:\n    __eq__ = lambda *_: True\ndef f(x): return A()", "wrong_answer"),
    "exits": ("import os\ndef f(x): os._exit(0)", "runtime_error"),
    "sys.exit": ("import sys\ndef f(x): sys.exit(0)", "runtime_error"),
    "raises": ("def f(x): raise ValueError('\\ud800')", "runtime_error"),
    "at once": ("1 / 0", "runtime_error"),
    "no program": ("def f(x:", "compile_error"),
    "no such name": ("def g(x): return x", "runtime_error"),
    "memory": ("def f(x): return [0] * 10**10", "runtime_error"),
    "too large": ("def f(x): return 'x' * 9_000_000", "runtime_error"),
    "nested": ("def f(x):\n    a = []\n    for _ in range(500): a = [a]\n    return a", "wrong_answer"),
    "forged": (
        "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'\\x06\\0\\0\\0[\"ok\"]' * 9)\n"
        "    except OSError: pass\nos._exit(0)",
        "runtime_error",
    ),
    "forged values": (
        "import json, os\nsaid = b''.join(len(d := json.dumps(r).encode()).to_bytes(4, 'little') + d\n"
        "    for r in [['ready']] + [['ok', ['h', 0, True], 0]] * 9)\n"
        "for fd in range(1, 64):\n    try: os.write(fd, said)\n    except OSError: pass\nos._exit(0)",
        "wrong_answer",
    ),
    "frames": (
        "import sys\ndef f(x):\n    frame, found = sys._getframe(1), []\n    while frame:\n"
        "        found += [k for k in frame.f_locals if k in ('expected', 'outputs')]\n        frame = frame.f_back\n"
        "    return found",
        "wrong_answer",
    ),
}  # fmt: skip


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(("code", "reason"), HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_or_broken_answer_gains_nothing(slot: Slot, code: str, reason: str) -> None:
    verdict = await judged(slot, SQUARES, fenced(code))

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, reason)
    assert set(verdict.components.values()) == {0.0}
    assert (await judged(slot, SQUARES, fenced("def f(x): return x * x"))).reward == 1.0


LIMITS = {"min_time_limit": 0.1, "gt_time_limit_factor": 4.0}


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("body", ["while True: pass", "__import__('time').sleep(600)"])
async def test_a_test_that_goes_past_its_limit_is_a_timeout(slot: Slot, body: str) -> None:
    row = ready([0], [])

    verdict = await judged(slot, row, fenced(f"def f(x):\n    {body}"), **LIMITS)

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, "timeout")
    assert verdict.extra["base_status"] == "timeout"


@pytest.mark.asyncio(loop_scope="session")
async def test_a_solution_that_lifts_the_limit_of_a_test_is_ended_by_that_of_all(slot: Slot) -> None:
    code = "import signal\ndef f(x):\n    signal.setitimer(signal.ITIMER_REAL, 0)\n    while True: pass"

    verdict = await judged(slot, ready([0], []), fenced(code), **LIMITS)

    assert (verdict.reward, verdict.extra["base_status"]) == (0.0, "timeout")


@pytest.mark.asyncio(loop_scope="session")
async def test_a_test_may_take_four_times_as_long_as_the_canonical_solution(slot: Slot) -> None:
    row = {**ready([0], [0]), "base_tests": suite([0], seconds=15), "plus_tests": suite([0], seconds=15)}
    code = "import time\ndef f(x):\n    time.sleep(0.3)\n    return 0"

    assert (await judged(slot, row, fenced(code), **LIMITS)).reward == 1.0
    assert (await judged(slot, row, fenced(code), min_time_limit=0.1, gt_time_limit_factor=0.01)).reward == 0.0


@pytest.mark.asyncio(loop_scope="session")
async def test_the_limits_of_both_suites_are_told_to_the_pool() -> None:
    few, many = Task(row=SQUARES, response={}), Task(row=ready([0] * 500, [0] * 500), response={})

    slow = Task(row={**SQUARES, "base_tests": suite([0, 1], seconds=1.5)}, response={})

    assert HumanEval().longest_s(few) == 2 * (3 + 1) + 2 * (4 + 1)
    assert HumanEval().longest_s(slow) == 2 * (2 * 4 * 1.5 + 1) + 2 * (4 + 1)
    assert HumanEval().longest_s(many) == 2 * 2 * (60 + 1)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    "text",
    ["", "    return x * x", "```python\ndef f(x): return x * x", "```python\n \n```", "```", "def f(x): return x * x"],
)
async def test_an_answer_without_a_closed_block_has_no_code(slot: Slot, text: str) -> None:
    verdict = await judged(slot, SQUARES, text)

    assert (verdict.reward, verdict.extra["failure_reason"]) == (0.0, "no_code")
    assert (verdict.extra["base_status"], verdict.extra["tests"]) == (None, [])
    assert verdict.components == {"passing_base_tests": 0.0, "passing_plus_tests": 0.0}


@pytest.mark.asyncio(loop_scope="session")
async def test_thinking_is_not_taken_out_and_a_body_alone_stands_outside_of_the_function(slot: Slot) -> None:
    row = await completed(slot, MEAN)
    thought = f"<think>{fenced(MEAN['prompt'] + MEAN['canonical_solution'])}</think>"

    assert (await judged(slot, row, thought)).reward == 1.0
    assert (await judged(slot, row, fenced(MEAN["canonical_solution"]))).extra["failure_reason"] == "compile_error"


@pytest.mark.asyncio(loop_scope="session")
async def test_inputs_whose_output_is_no_data_or_does_not_come_are_left_out_and_counted(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evalplus_data, "CALLS_BYTES", 8)  # more than one program
    monkeypatch.setattr(evalplus_data, "CALL_LIMIT_S", 1.0)
    body = (
        "    import os\n    if x == 1: raise ValueError\n    if x == 2: return [object()]\n"
        "    if x == 3: os._exit(0)\n    while x == 4: pass\n    return x\n"
    )
    row = {
        "task_id": "HumanEval/902", "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": body, "atol": 0,
        "base_input": [[0]], "plus_input": [[1], [2], [5], [3], [4], [6]],
    }  # fmt: skip

    made, left_out = await HumanEval.complete(row, slot)

    assert left_out == 4
    assert made["plus_tests"]["inputs"] == [["t", [5]], ["t", [6]]]
    assert made["plus_tests"]["outputs"] == [5, 6]


@pytest.mark.asyncio(loop_scope="session")
async def test_tests_beyond_the_room_of_a_row_are_left_out(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evalplus_data, "MAX_TESTS_BYTES", 300)
    row = {**MEAN, "plus_input": [[[0.5] * 100], [[1.0]]]}

    made, left_out = await HumanEval.complete(row, slot)

    assert left_out == 1
    assert len(made["base_tests"]["inputs"]) == 2
    assert made["plus_tests"]["outputs"] == [["f", (1.0).hex()]]


@pytest.mark.asyncio(loop_scope="session")
async def test_of_a_match_only_whether_there_is_one_is_kept_and_judged(slot: Slot) -> None:
    canonical = "\nimport re\ndef check_str(s):\n    return re.search('^[aeiou]', s)\n"
    row = {**SHARED, "entry_point": "check_str", "canonical_solution": canonical, "task_id": "Mbpp/461"}
    row |= {"base_input": [["annie"]], "plus_input": [["dawood"]]}

    made = await completed(slot, row, Mbpp)

    assert (made["base_tests"]["outputs"], made["plus_tests"]["outputs"]) == ([True], [False])
    for code, reward in ((canonical, 1.0), ("def check_str(s): return s[0] in 'aeiou'", 1.0), ("check_str = str", 0.0)):
        assert (await judged(slot, made, fenced(code), Mbpp)).reward == reward


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_input": "x"}, "HumanEval/901: not a row of EvalPlus: .*base_input"),
        ({"canonical_solution": "    return (\n"}, "HumanEval/901: its canonical solution does not run: compile_error"),
        ({"prompt": "1 / 0\n"}, "does not run: "),
        ({"plus_input": [[json.loads("[" * 70 + "]" * 70)]]}, "HumanEval/901: an input is nested too deeply"),
        ({"base_input": [], "plus_input": [[1, 2]]}, "none of its inputs has an expected output"),
    ],
)
async def test_a_published_row_that_cannot_be_completed_is_broken(slot: Slot, change: Row, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        await HumanEval.complete({**MEAN, **change}, slot)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ready([], []), "both empty"),
        ({**SQUARES, "base_tests": {**suite([0]), "seconds": []}}, "1 inputs, 1 outputs, 0 seconds"),
        ({**SQUARES, "entry_point": 3}, "cannot be read: .*entry_point"),
        ({**SQUARES, "base_tests": {**suite([0, 1]), "outputs": [0, ["?", 1]]}}, "tests are broken: no such"),
        ({**SQUARES, "base_tests": {**suite([0]), "inputs": [["t", ["x" * 9_000_000]]]}}, "inputs are too large"),
        (MEAN, "gym-bus dataset prepare humaneval --split plus"),
    ],
)
async def test_a_row_whose_tests_cannot_be_read_is_broken(slot: Slot, row: Row, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        await judged(slot, row, fenced("def f(x): return x * x"))


@pytest.mark.asyncio(loop_scope="session")
async def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="min_time_limit"):
        HumanEval(min_time_limit=0)


@pytest.mark.parametrize(("name", "row"), [("humaneval", MEAN), ("mbpp", SHARED)])
def test_the_command_prepares_rows_and_of_the_audits_cheats_only_thinking_passes_as_in_the_reference(
    name: str, row: Row, tmp_path: Path, slot: Slot
) -> None:
    file = tmp_path / {"humaneval": "HumanEvalPlus-v0.1.10.jsonl.gz", "mbpp": "MbppPlus.jsonl.gz"}[name]
    file.write_bytes(gzip.compress(json.dumps({**row, "plus_input": [*row["plus_input"], ["?"]]}).encode()))
    arguments = ["prepare", name, "--split", "plus", "--source", str(tmp_path), "--data-dir", str(tmp_path)]

    said = CliRunner().invoke(dataset_cli.command, arguments, standalone_mode=False)

    assert "computing the expected outputs" in said.output
    assert f"{row['task_id']}: 1 tests left out" in said.output
    (prepared,) = (tmp_path / name / "plus.jsonl").read_text().splitlines()
    assert len(json.loads(prepared)["plus_tests"]["outputs"]) == len(row["plus_input"])
    benchmark = load_benchmark(name)
    benchmark.spec.verifier.options["min_time_limit"] = 60.0
    findings = asyncio.run(attack(benchmark, tmp_path, split="plus", limit=5))
    assert {finding.case for finding in findings if finding.state == "does not hold"} == {"think_closed", "think_open"}
    assert {finding.case: finding.state for finding in findings}["gold"] == "holds"


def test_rows_that_lack_nothing_need_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slot, "start", None)

    assert list(completed_rows([{"a": 1}], "humaneval", print)) == [{"a": 1}]
    assert list(completed_rows([{"a": 1}], "math", print)) == [{"a": 1}]


def test_a_row_that_cannot_be_completed_is_told_with_its_task(slot: Slot) -> None:
    with pytest.raises(DataError, match="HumanEval/901: its canonical solution does not run"):
        list(completed_rows([{**MEAN, "canonical_solution": "    return ("}], "humaneval", print))
