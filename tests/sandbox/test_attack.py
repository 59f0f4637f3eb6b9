"""The audit of verifiers: sound ones hold, each kind of unsound one is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.spec import Benchmark, load_benchmark
from gym_bus.errors import ConfigError
from gym_bus.verifiers.batching import BatchingPool
from gym_bus.verifiers.text import output_text
from gym_bus.workers import attack as audit
from gym_bus.workers.attack import Finding, attack

# aime24 has the verifier and the form of the answers of gsm8k.
BUILT_IN = ("gsm8k", "math500", "mmlu_stem", "humaneval", "mbpp", "example_multi_step")
HEAD = "import random, time\nfrom gym_bus.verifiers.base import Placement, Verdict\nfrom gym_bus.verifiers.text import "
HEAD += "output_text\nclass Judge:\n    placement, required = Placement.CPU, ()\n    def verify(self, task):\n"
SOUND = "        return Verdict(reward=float(output_text(task.response) == 'gold ' + task.row['answer']))\n"


def judged_by(folder: Path, body: str, more: str = "") -> Benchmark:
    (folder / "verifier.py").write_text(HEAD + body)
    (folder / "config.yaml").write_text(
        "name: tried\ndomain: other\nverifier: {name: tried, code: verifier.py:Judge}\n"
        "prompt: {user: 'Say {answer}.'}\n"
        f"audit: {{gold: 'gold {{answer}}'{more}}}\n"
        "datasets: [{name: example, type: example, jsonl_fpath: rows.jsonl}]\n"
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps({"answer": word}) + "\n" for word in ("a", "b", "c")))
    return load_benchmark(str(folder))


async def found(benchmark: Benchmark, limit: int = 5) -> dict[str, Finding]:
    return {f.case: f for f in await attack(benchmark, Path(), split="example", limit=limit)}


def failing(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.state == "does not hold"}


@pytest.mark.parametrize("name", BUILT_IN)
async def test_what_does_not_hold_of_a_built_in_verifier_is_accepted_with_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_benchmark(name)
    if benchmark.spec.verifier.name == "math":  # these two use up its limit for sympy, seconds each time
        kept = tuple(case for case in audit.CASES if case.name not in ("huge_power", "huge_nesting"))
        monkeypatch.setattr(audit, "CASES", kept)
        benchmark.spec.verifier.options["parse_limit_s"] = 60

    findings = await found(benchmark)

    assert failing(findings) == set()
    accepted = {case: finding.why for case, finding in findings.items() if finding.state == "accepted"}
    assert accepted == benchmark.spec.audit.accepted
    applies = {case for case, finding in findings.items() if finding.state != "does not apply"}
    assert {"gold", "empty", "bad_utf8", "huge_text"} <= applies
    assert ("code_equal" in applies) == (benchmark.spec.domain == "coding")


async def test_a_sound_verifier_holds(tmp_path: Path) -> None:
    assert failing(await found(judged_by(tmp_path, SOUND))) == set()


async def test_one_that_rewards_everything_is_found(tmp_path: Path) -> None:
    findings = await found(judged_by(tmp_path, "        return Verdict(reward=1.0)\n"))

    assert {"empty", "no_output", "prompt_echoed", "think_closed", "answers_listed", "huge_text"} <= failing(findings)
    assert findings["empty"].why == "row 0: reward 1; row 1: reward 1; row 2: reward 1"


async def test_one_that_never_rewards_fails_the_gold_answers_alone(tmp_path: Path) -> None:
    assert failing(await found(judged_by(tmp_path, "        return Verdict(reward=0.0)\n"))) == {"gold"}


async def test_one_that_does_not_say_the_same_twice_is_found(tmp_path: Path) -> None:
    findings = await found(judged_by(tmp_path, "        return Verdict(reward=random.random() + 0.001)\n"))

    assert "not the same twice" in findings["empty"].why


async def test_one_that_raises_holds_for_it_is_a_failure_with_a_class(tmp_path: Path) -> None:
    body = "        if 'gold' not in output_text(task.response): raise ValueError('no')\n" + SOUND

    assert failing(await found(judged_by(tmp_path, body))) == set()


async def test_one_that_takes_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(pool: BatchingPool, batch: list[Any]) -> float:
        """No answer but the endless one comes to its limit, however slow the machine is."""
        return 0.2 if output_text(json.loads(batch[0].check.response)) == "" else 600.0

    monkeypatch.setattr(BatchingPool, "_limit_s", hasty)
    monkeypatch.setattr(audit, "CASES", tuple(case for case in audit.CASES if case.name in ("empty", "blank")))
    body = "        if output_text(task.response) == '': time.sleep(600)\n" + SOUND

    findings = await found(judged_by(tmp_path, body), limit=1)

    assert failing(findings) == {"empty"}
    assert "not judged within" in findings["empty"].why


async def test_a_rule_that_is_accepted_is_told_with_its_reason(tmp_path: Path) -> None:
    body = "        return Verdict(reward=float('gold ' + task.row['answer'] in output_text(task.response)))\n"
    more = ", accepted: {answers_listed: the rule, think_closed: the rule, think_open: the rule}"

    findings = await found(judged_by(tmp_path, body, more))

    assert failing(findings) == set()
    assert (findings["think_open"].state, findings["think_open"].why) == ("accepted", "the rule")


async def test_an_unknown_case_among_the_accepted_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'think_open'"):
        await found(judged_by(tmp_path, SOUND, ", accepted: {think_opn: why}"))
