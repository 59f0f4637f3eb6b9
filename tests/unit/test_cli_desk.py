"""The commands of the evaluation engineer's desk: list, search, config, dataset."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from unit.conftest import GymBus

from gym_bus.benchmarks import stores
from gym_bus.benchmarks.stores import Place
from gym_bus.cli import display
from gym_bus.jobs import JobRecord
from gym_bus.messages import RolloutId
from gym_bus.results.ledger import FailedRollout, Ledger
from gym_bus.workers import run as run_module
from gym_bus.workers.run import Progress

MINE = """\
name: mine
domain: games
description: Guess the number that somebody thinks of.
verifier: {name: math}
agent: {name: simple, options: {max_steps: 4}}
prompt: {user: "{question}"}
datasets:
  - {name: rows, type: train, jsonl_fpath: rows.jsonl, license: MIT, source: {type: huggingface, repo_id: me/rows}}
  - {name: example, type: example, jsonl_fpath: example.jsonl}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a benchmark in `mine`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(MINE)
    lines = [json.dumps({"question": f"{i}?", "expected_answer": i}) + "\n" for i in range(5)]
    (tmp_path / "mine" / "example.jsonl").write_text("".join(lines))
    return tmp_path


def listed(gym_bus: GymBus, *arguments: object) -> list[dict[str, Any]]:
    said = gym_bus(*arguments, "--json")
    assert said.code == 0, said.err
    rows: list[dict[str, Any]] = json.loads(said.out)
    return rows


# -- list


def test_benchmarks_are_listed_with_what_they_are_and_whether_their_data_is_there(
    gym_bus: GymBus, folder: Path
) -> None:
    (folder / "data" / "gsm8k").mkdir(parents=True)
    (folder / "data" / "gsm8k" / "test.jsonl").write_text('{"question":"1"}\n')

    rows = {row["name"]: row for row in listed(gym_bus, "list", "benchmarks", "data_dir=data", "--search-dir", ".")}

    assert rows["gsm8k"] == {
        "name": "gsm8k",
        "domain": "math",
        "description": "Grade-school word problems; the final number is compared with the reference.",
        "verified": True,
        "agent": "simple",
        "verifier": "math",
        "toolbox": "",
        "num_repeats": 1,
        "prepared": True,
        "rows": 1,
    }
    assert (rows["mine"]["domain"], rows["mine"]["prepared"], rows["mine"]["rows"]) == ("games", False, None)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("agents", "simple", {"options": ["toolbox", "max_steps"]}),
        ("verifiers", "mcqa", {"runs": "inline", "needs": ["options", "expected_answer"], "options": ["grading_mode"]}),
        (
            "environments",
            "example_multi_step",
            {"benchmarks": ["example_multi_step"], "domain": "instruction_following"},
        ),
        ("models", "simulated", {"kind": "simulated"}),
    ],
)
def test_the_other_kinds_are_listed_too(gym_bus: GymBus, kind: str, name: str, expected: dict[str, Any]) -> None:
    (row,) = listed(gym_bus, "list", kind, name)

    for key, value in expected.items():
        assert row[key][: len(value)] == value if isinstance(value, list) else row[key] == value


def test_a_list_is_a_table_for_people(gym_bus: GymBus) -> None:
    said = gym_bus("list", "benchmarks", "gsm8k", "aime24")

    assert said.code == 0
    assert [line.split()[0] for line in said.out.splitlines()[:4]] == ["benchmarks", "name", "gsm8k", "aime24"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            ("list", "benchmark"),
            "unknown 'benchmark': did you mean 'benchmarks'? known: agents, benchmarks, environments",
        ),
        (("list", "benchmarks", "gsm8"), "unknown benchmark 'gsm8': did you mean 'gsm8k'"),
        (("list", "benchmarks", "--search-dir", "gone"), "--search-dir gone: no such folder"),
        (("lst", "benchmarks"), "no such command 'lst': did you mean 'list'"),
        (("dataset", "validat"), "No such command 'validat'. Did you mean 'validate'?"),
        (
            ("list", "models", "agent.names=[simpel]"),
            "key 'agent.names': unknown agent 'simpel': did you mean 'simple'",
        ),
        (
            ("list", "models", "verifier.names=[mth]"),
            "key 'verifier.names': unknown verifier 'mth': did you mean 'math'",
        ),
    ],
)
def test_a_wrong_word_is_answered_with_what_could_be_meant(
    gym_bus: GymBus, arguments: tuple[str, ...], what: str
) -> None:
    said = gym_bus(*arguments)

    assert said.code == 2
    assert what in said.err


# -- search


@pytest.mark.parametrize(
    ("query", "kind", "first"),
    [
        ("gsm8", "benchmark", "gsm8k"),
        ("coding", "benchmark", "humaneval"),
        ("coddng", "benchmark", "humaneval"),
        ("multi step", "benchmark", "example_multi_step"),
        ("competition", "benchmark", "math500"),
        ("guess number", "benchmark", "mine"),
        ("grade school", "benchmark", "gsm8k"),
        ("mcq", "verifier", "mcqa"),
    ],
)
def test_things_are_found_by_name_domain_and_description_even_misspelt(
    gym_bus: GymBus, query: str, kind: str, first: str
) -> None:
    found = listed(gym_bus, "search", query, "--search-dir", ".")

    assert [row["name"] for row in found if row["kind"] == kind][:1] == [first]


def test_a_search_can_be_for_one_kind_and_may_find_nothing(gym_bus: GymBus) -> None:
    assert {row["kind"] for row in listed(gym_bus, "search", "math", "--kind", "verifiers")} == {"verifier"}
    assert listed(gym_bus, "search", "xylophone") == []
    assert gym_bus("search", "xylophone").out.startswith("nothing like 'xylophone'")
    assert "math500" in gym_bus("search", "math").out


@pytest.mark.parametrize("query", ["instruction", "instruktion folowing", "instruction_following"])
def test_a_search_finds_the_words_of_a_domain(gym_bus: GymBus, query: str) -> None:
    found = {(row["kind"], row["name"]) for row in listed(gym_bus, "search", query)}
    assert ("benchmark", "example_multi_step") in found


def test_what_is_found_is_a_model_whatever_the_kind_of_model(gym_bus: GymBus) -> None:
    assert [(row["kind"], row["name"]) for row in listed(gym_bus, "search", "simulatd")] == [("model", "simulated")]


def test_a_search_for_nothing_is_refused(gym_bus: GymBus) -> None:
    assert "nothing to search for" in gym_bus("search", " ").err


def test_a_missing_file_is_not_called_an_unknown_benchmark(gym_bus: GymBus) -> None:
    assert "error: rows.jsonl: no such" in gym_bus("dataset", "validate", "rows.jsonl").err


def test_a_role_that_is_misspelt_is_suggested(gym_bus: GymBus) -> None:
    assert "did you mean 'agent'?" in gym_bus("worker", "agnt").err


# -- config resolve


def test_the_merged_configuration_is_shown_with_sources_and_without_secrets(gym_bus: GymBus, folder: Path) -> None:
    (folder / "env.yaml").write_text("my_key: very-secret\nhf_token: hf_very_secret\n")
    (folder / "base.yaml").write_text("models:\n  generic:\n    base_url: http://h/v1\n    api_key: ${my_key}\n")
    (folder / "top.yaml").write_text(
        "config_paths: [base.yaml]\nmodels:\n  mine:\n    _inherit_from: models.generic\n    model: m\n"
        "    headers: {X-Other: other-secret}\n"
    )
    more = ("models.mine.extra_body.note='is very-secret'", "bus.url=nats://me:pw@h:1")

    said = gym_bus("config", "resolve", "--config", "top.yaml", *more)
    found = json.loads(gym_bus("config", "resolve", "--config", "top.yaml", *more, "--json").out)

    assert said.code == 0
    assert "secret" not in said.out.replace("********", "")
    assert yaml.safe_load(said.out) == found["values"]
    assert found["values"]["models"]["mine"] == {
        "base_url": "http://h/v1",
        "api_key": "********",
        "model": "m",
        "headers": {"X-Other": "********"},
        "extra_body": {"note": "is ********"},
    }
    assert found["values"]["bus"] == {"url": "nats://me:********@h:1"}
    assert found["sources"] == {
        "models.simulated.kind": "built-in models",
        "models.mine.base_url": "base.yaml:3",
        "models.mine.api_key": "base.yaml:4, my_key from env.yaml:1",
        "models.mine.model": "top.yaml:5",
        "models.mine.headers.X-Other": "top.yaml:6",
        "models.mine.extra_body.note": "argument models.mine.extra_body.note=...",
        "registry.hf_token": "env.yaml:2",
        "bus.url": "argument bus.url=...",
    }


def test_a_benchmark_is_shown_as_a_job_would_use_it(gym_bus: GymBus) -> None:
    said = gym_bus("config", "resolve", "./mine", "job.agent_options.max_steps=9", "--json")
    found = json.loads(said.out)

    benchmark = found["values"]["benchmark"]
    assert benchmark["agent"] == {"name": "simple", "options": {"max_steps": 9}}
    assert benchmark["datasets"][0]["source"] == {"type": "huggingface", "repo_id": "me/rows"}
    assert found["sources"]["benchmark.agent.options.max_steps"] == "argument job.agent_options.max_steps=..."
    assert found["sources"]["benchmark.datasets[0].license"] == "mine/config.yaml:8"
    assert found["sources"]["benchmark.domain"] == "mine/config.yaml:2"


def test_a_job_may_change_its_benchmark_and_its_sampling(gym_bus: GymBus, folder: Path) -> None:
    (folder / "top.yaml").write_text("log_level: info\nresponses_create_params:\n  max_output_tokens: 4096\n")
    change = ("benchmark.verifier.options.strip_think=true", "++benchmark.num_repeats=4", "models.m.model=m4096")

    found = json.loads(gym_bus("config", "resolve", "./mine", "--config", "top.yaml", *change, "--json").out)

    benchmark, sources = found["values"]["benchmark"], found["sources"]
    assert (benchmark["verifier"]["options"], benchmark["num_repeats"]) == ({"strip_think": True}, 4)
    assert sources["benchmark.verifier.options.strip_think"] == "argument benchmark.verifier.options.strip_think=..."
    assert found["values"]["job"]["sampling"] == {"max_output_tokens": 4096}
    assert sources["job.sampling.max_output_tokens"] == "top.yaml:3"
    assert found["values"]["models"]["m"]["model"] == "m4096"  # a sampling parameter is no secret to look for


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("responses_create_params.temperatur=1", "unknown key 'temperatur': did you mean 'temperature'"),
        ("job.sampling.top_p=x", "argument job.sampling.top_p=...: responses_create_params.top_p: expected a number"),
        ("responses_create_params=1", "argument responses_create_params=...: key 'job.sampling': expected `object`"),
        ("job.seeds=-1", "argument job.seeds=...: key 'job.seeds'"),
        ("benchmark.verifer.name=math", "argument benchmark.verifer.name=...: unknown key 'verifer'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_of_a_model_or_a_benchmark_is_refused(gym_bus: GymBus, argument: str, what: str) -> None:
    said = gym_bus("config", "resolve", "./mine", argument)

    assert said.code == 2
    assert what in said.err


def test_defaults_are_shown_on_request(gym_bus: GymBus) -> None:
    found = json.loads(gym_bus("config", "resolve", "--all", "agent.concurrency=3", "--json").out)

    assert (found["values"]["agent"]["concurrency"], found["values"]["agent"]["prefetch"]) == (3, 256)
    assert (found["sources"]["agent.concurrency"], found["sources"]["agent.prefetch"]) == (
        "argument agent.concurrency=...",
        "default",
    )


@pytest.mark.parametrize(
    ("old", "new", "argument", "what"),
    [
        (
            "name: math",
            "name: mth",
            "",
            "mine/config.yaml:4: key 'verifier': unknown verifier 'mth': did you mean 'math'",
        ),
        ("name: simple", "name: smple", "", "config.yaml:5: key 'agent': unknown agent 'smple': did you mean 'simple'"),
        (
            "max_steps: 4",
            "toolbox: pyton",
            "",
            "config.yaml:5: key 'agent': unknown toolbox 'pyton': did you mean 'python'",
        ),
        ("", "", "job.verifier_options.strip=1", "argument job.verifier_options.strip=...: key 'job.verifier_options'"),
    ],
)
def test_names_that_lead_nowhere_are_named_with_where_they_stand(
    gym_bus: GymBus, folder: Path, old: str, new: str, argument: str, what: str
) -> None:
    (folder / "mine" / "config.yaml").write_text(MINE.replace(old, new))

    said = gym_bus("config", "resolve", "./mine", *filter(None, [argument]))

    assert said.code == 2
    assert what in said.err


# -- dataset


def test_data_is_checked_and_its_figures_are_written(gym_bus: GymBus, folder: Path) -> None:
    missing = gym_bus("dataset", "validate", "./mine")
    written = gym_bus("dataset", "validate", "./mine", "--write-metrics")
    (report,) = listed(gym_bus, "dataset", "validate", "./mine")

    assert (missing.code, written.code) == (1, 0)
    assert "example_metrics.json: no such file: write it with --write-metrics" in missing.out
    assert (report["dataset"], report["rows"], report["errors"]) == ("mine/example", 5, 0)


def test_without_an_argument_the_examples_of_every_benchmark_are_checked(gym_bus: GymBus) -> None:
    reports = listed(gym_bus, "dataset", "validate")

    assert {"gsm8k/example", "humaneval/example"} <= {report["dataset"] for report in reports}
    assert [report["findings"] for report in reports if report["findings"]] == []


def test_a_file_is_checked_with_a_prompt_and_for_a_verifier(gym_bus: GymBus, folder: Path) -> None:
    (folder / "prompt.yaml").write_text("user: '{question}'\n")
    (folder / "rows.jsonl").write_text('{"question": "?", "expected_answer": 1}\n' * 2)
    file = ("dataset", "validate", "rows.jsonl", "--prompt-config", "prompt.yaml")

    assert gym_bus(*file).code == 0
    assert gym_bus(*file, "--strict").code == 1
    assert "rows.jsonl:2: the same row as in line 1" in gym_bus(*file).out
    assert "the verifier needs the key 'options'" in gym_bus(*file, "--verifier", "mcqa").out
    assert "2 rows, but example data has exactly 5" in gym_bus(*file, "--mode", "example_validation").out


def test_data_is_brought_together(gym_bus: GymBus, folder: Path) -> None:
    said = gym_bus(
        "dataset", "collate", "./mine", "mmlu_stem", "--mode", "example_validation", "--output-dir", "out", "--json"
    )

    assert said.code == 0, said.out
    (file,) = json.loads(said.out)["files"]
    assert (file["type"], file["rows"]) == ("example", 10)
    agents = [json.loads(line)["agent_ref"]["name"] for line in (folder / "out" / "example.jsonl").open()]
    assert agents == ["mine_simple_agent"] * 5 + ["mmlu_stem_simple_agent"] * 5


def test_what_cannot_be_brought_together_is_told_with_what_to_do(gym_bus: GymBus, folder: Path) -> None:
    said = gym_bus("dataset", "collate", "./mine", "--output-dir", "out")

    assert said.code == 1
    assert "rows.jsonl: no such file: run `gym-bus dataset collate mine --download`" in said.out
    assert list((folder / "out").iterdir()) == []


def test_a_prompt_is_rendered_into_rows(gym_bus: GymBus, folder: Path) -> None:
    (folder / "prompt.yaml").write_text("user: 'So {question}'\n")

    said = gym_bus(
        "dataset", "render", "-i", "mine/example.jsonl", "--prompt-config", "prompt.yaml", "-o", "rendered.jsonl"
    )

    assert (said.code, said.out) == (0, "rendered.jsonl: 5 rows\n")
    row = json.loads((folder / "rendered.jsonl").read_text().splitlines()[4])
    assert row["responses_create_params"]["input"] == [{"role": "user", "content": "So 4?"}]
    again = ("-i", "mine/example.jsonl", "--prompt-config", "prompt.yaml", "-o", "again.jsonl", "--json")
    assert json.loads(gym_bus("dataset", "render", *again).out) == {"file": "again.jsonl", "rows": 5}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("validate", "./mine", "--verifier", "math"), "--prompt-config and --verifier are for a FILE"),
        (
            ("validate", "gsm8k", "--mode", "train"),
            "unknown 'train': known: example_validation, train_preparation",
        ),
        (("upload", "--storage", "hf", "-i", "mine/example.jsonl"), "which data set? give --name, or --benchmark"),
        (("upload", "--storage", "hf", "-i", "gone.jsonl", "--name", "a/b"), "gone.jsonl: no such file"),
        (
            ("upload", "--storage", "hf", "-i", "mine/example.jsonl", "--name", "a/b"),
            "example.jsonl:1: no responses_create",
        ),
        (("download", "--storage", "hf"), "which data set? give --storage and --name, or --benchmark"),
        (("download", "--benchmark", "gsm8k"), "gsm8k/test names no registry"),
        (
            ("download", "--benchmark", "./mine", "--storage", "gitlab"),
            "mine/rows is not in gitlab: known: huggingface",
        ),
        (("rm", "--storage", "gitlab", "--name", "x", "--yes"), "'registry.mlflow_tracking_uri' is not set"),
    ],
)
def test_a_dataset_command_that_cannot_be_done_says_why(gym_bus: GymBus, arguments: tuple[str, ...], what: str) -> None:
    said = gym_bus("dataset", *arguments)

    assert said.code == 2
    assert what in said.err


@pytest.mark.parametrize(("terminal", "code", "what"), [(False, 2, "say --yes"), (True, 0, "nothing is removed")])
def test_nothing_is_removed_without_a_yes(
    gym_bus: GymBus, monkeypatch: pytest.MonkeyPatch, terminal: bool, code: int, what: str
) -> None:
    answers = io.StringIO("n\n")
    answers.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", answers)

    said = gym_bus("dataset", "rm", "--storage", "hf", "--name", "a/b")

    assert said.code == code
    assert what in said.out + said.err


def test_what_is_removed_is_told_to_a_program(gym_bus: GymBus, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shelf:
        def remove(self, place: Place) -> str:
            return f"{place.name} {place.version}"

    monkeypatch.setattr(stores, "open_store", lambda storage, config: Shelf())

    said = gym_bus("dataset", "rm", "--storage", "hf", "--name", "a/b", "--version", "2", "--yes", "--json")

    assert (said.code, json.loads(said.out)) == (0, {"storage": "hf", "removed": "a/b 2"})


def test_a_new_folder_is_told_to_a_program(gym_bus: GymBus, folder: Path) -> None:
    made = json.loads(gym_bus("env", "init", "fresh", "--kind", "multi-turn", "--json").out)

    assert (made["name"], made["kind"], made["folder"]) == ("fresh", "multi-turn", "fresh")
    assert all((folder / file).is_file() for file in made["files"])
    assert "fresh/verifier.py" in made["files"]


# -- the live display


async def test_without_a_terminal_a_line_says_how_far_a_run_is_and_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "PLAIN_EVERY_S", -1.0)
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(run_module, "time", clock)
    run = Progress(JobRecord(job="j", benchmark="mine", model="m", spans=[(0, 10, 4)]), Ledger("j", 10, 4))
    with display.live(quiet=False) as shown:
        shown.begin(run)
        run.published = 38
        for task in range(10):
            run.ledger.record_scored(RolloutId("j", task, 0), task % 2)
        run.ledger.record_failed(RolloutId("j", 0, 1), FailedRollout("rate_limited", 1, False))
        run.finished, clock.monotonic = 10, lambda: 104.0
        shown.refresh()

    assert capsys.readouterr().err.splitlines() == [
        "mine m: 0 of 40, 0 in flight · 0/s · no reward yet",
        "mine m: 11 of 40, 27 in flight · 2/s · mean reward 0.5000 · failed: rate_limited 1 · 0:00:12 left",
    ]
