from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.benchmarks.collate import Part, collate
from gym_bus.benchmarks.data_metrics import DataMetrics, differences
from gym_bus.benchmarks.prompt import Prompt
from gym_bus.benchmarks.render import render
from gym_bus.benchmarks.spec import Benchmark, list_benchmarks, load_benchmark
from gym_bus.benchmarks.validate import Figures, Mode, Report, validate_benchmark, validate_file
from gym_bus.errors import ConfigError, DataError, UsageError
from gym_bus.verifiers.registry import VERIFIERS

CONFIG = """\
name: mine
domain: math
verifier: {name: math}
prompt: {user: "{question}"}
datasets:
  - {name: rows, type: train, jsonl_fpath: rows.jsonl, license: MIT, num_repeats: 2}
  - {name: check, type: validation, jsonl_fpath: check.jsonl, license: TBD}
  - {name: example, type: example, jsonl_fpath: example.jsonl}
"""


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"{i}+1?", "expected_answer": str(i + 1), **more} for i in range(count)]


def a_file(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def said(report: Report) -> list[str]:
    return [finding.what for finding in report.findings]


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    (tmp_path / "config.yaml").write_text(CONFIG)
    a_file(tmp_path / "example.jsonl", rows(5))
    return load_benchmark(str(tmp_path))


def checked(benchmark: Benchmark, mode: Mode = Mode.EXAMPLE_VALIDATION, **more: Any) -> list[Report]:
    return validate_benchmark(benchmark, benchmark.folder, mode=mode, required=("expected_answer",), **more)


@pytest.mark.parametrize("name", [info.name for info in list_benchmarks(Path("nowhere"))])
def test_the_example_rows_of_every_built_in_benchmark_are_as_they_were_committed(name: str) -> None:
    benchmark = load_benchmark(name)
    required = VERIFIERS.load(benchmark.spec.verifier.name).required

    reports = validate_benchmark(benchmark, Path("nowhere"), mode=Mode.EXAMPLE_VALIDATION, required=required)

    assert [said(report) for report in reports] == [[]]


# -- rows


def test_every_broken_row_is_named_with_its_line_and_the_others_are_counted(tmp_path: Path) -> None:
    path = a_file(tmp_path / "data.jsonl", [*rows(1), {"question": "?"}, {"responses_create_params": {"input": []}}])
    path.write_text(path.read_text() + "[]\n{\n")

    report = validate_file(path, prompt=Prompt(user="{question}"), required=("expected_answer",))

    assert (report.rows, report.errors, report.metrics["Number of examples"]) == (5, 4, 1)
    assert [text.removeprefix(f"{path}:")[:40] for text in said(report)] == [
        "2: the verifier needs the key 'expected_",
        "3: the verifier needs the key 'expected_",
        "4: expected a JSON object",
        "5: not valid JSON: Input data was trunca",
    ]


@pytest.mark.parametrize(
    ("params", "what"),
    [
        (None, "no responses_create_params.input"),
        ({"input": "hi", "temprature": 1}, "unknown key 'temprature': did you mean 'temperature'"),
        ({"input": 3}, "responses_create_params.input: expected a string or a list"),
        ({"input": "hi", "temperature": "hot"}, "responses_create_params.temperature: expected a number"),
    ],
)
def test_create_params_that_no_endpoint_takes_are_errors(tmp_path: Path, params: Any, what: str) -> None:
    row = {"responses_create_params": params} if params is not None else {"question": "?"}

    (found,) = said(validate_file(a_file(tmp_path / "data.jsonl", [row])))

    assert found.startswith(f"{tmp_path / 'data.jsonl'}:1: ")
    assert what in found


def test_keys_that_are_null_count_as_not_given(tmp_path: Path) -> None:
    call = {"type": "function_call", "name": "f", "call_id": "c", "arguments": "{}", "id": None, "status": None}
    params = {"input": [{"role": "user", "content": "?"}, call], "model": None, "temperature": None}

    assert said(validate_file(a_file(tmp_path / "data.jsonl", [{"responses_create_params": params}]))) == []


def test_a_row_that_is_there_twice_is_a_warning(tmp_path: Path) -> None:
    path = a_file(tmp_path / "data.jsonl", [*rows(2), *rows(1)])

    report = validate_file(path, prompt=Prompt(user="{question}"))

    assert (report.errors, report.warnings) == (0, 1)
    assert said(report)[0].startswith(f"{path}:3: the same row as in line 1")


def test_only_so_many_findings_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    report = validate_file(a_file(tmp_path / "data.jsonl", [{"q": i} for i in range(150)]))

    assert (report.errors, len(report.findings)) == (150, 100)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    assert said(validate_file(a_file(tmp_path / "data.jsonl", []))) == [f"{tmp_path / 'data.jsonl'}: no rows in it"]


# -- the rules for example rows, licences and missing files


@pytest.mark.parametrize("count", [4, 6])
def test_an_example_file_has_exactly_five_rows(benchmark: Benchmark, count: int) -> None:
    a_file(benchmark.folder / "example.jsonl", rows(count))

    (report,) = checked(benchmark, figures=Figures.WRITE)

    assert said(report) == [f"{report.path}: {count} rows, but example data has exactly 5"]
    assert not (benchmark.folder / "example_metrics.json").exists()


def test_example_rollouts_are_five_too_where_there_are_any(benchmark: Benchmark) -> None:
    a_file(benchmark.folder / "example_rollouts.jsonl", rows(3))

    (report,) = checked(benchmark, figures=Figures.WRITE)

    assert "example_rollouts.jsonl: 3 rows" in said(report)[0]


def test_train_preparation_looks_at_train_and_validation_rows(benchmark: Benchmark) -> None:
    a_file(benchmark.folder / "check.jsonl", rows(3))

    train, validation = checked(benchmark, Mode.TRAIN_PREPARATION)

    assert "rows.jsonl: no such file: put it there, or correct jsonl_fpath" in said(train)[0]
    assert validation.errors == 0
    assert "its licence is still to be decided" in said(validation)[0]
    assert f"{benchmark.folder}/config.yaml:7: key 'datasets[1].license'" in said(validation)[0]


@pytest.mark.parametrize(
    ("licence", "what"),
    [
        ("", r"config.yaml:6: key 'datasets\[0\].license': train data needs a licence; known: Apache 2.0, MIT"),
        (
            ", license: Apache",
            r"config.yaml:6: .*unknown licence 'Apache': did you mean 'Apache 2.0'\? known: Apache 2.0, BSD",
        ),
    ],
)
def test_training_data_needs_a_known_licence(tmp_path: Path, licence: str, what: str) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace(", license: MIT", licence))

    with pytest.raises(ConfigError, match=what):
        load_benchmark(str(tmp_path))


def test_a_benchmark_without_such_data_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("\n".join(CONFIG.splitlines()[:-1]))

    with pytest.raises(UsageError, match="no dataset of type example, which example_validation looks at"):
        checked(load_benchmark(str(tmp_path)))


# -- figures


def test_the_figures_are_those_that_nemo_gym_defines() -> None:
    metrics = DataMetrics()
    tool = {"type": "function", "name": "f"}
    metrics.observe(
        {"id": 1, "tags": ["a", "b"], "ok": True, "response": {"x": 1}},
        {"input": [{"role": "system", "content": "one two"}, {"role": "user", "content": "é x"}], "tools": [tool]},
        times=1,
    )
    metrics.observe({"id": 4, "tags": ["a"], "ok": False}, {"input": "hi", "temperature": 0.25}, times=2)

    assert metrics.figures() == {
        "Number of examples": 3,
        "Number of tools": figures(1, 1.0, 1.0, 1.0, 0.0),
        # {"input": [{"role": "system", "content": "one two"}, {"role": "user", "content": "\u00e9 x"}], "tools": [...]}
        "Json-dumped number of words (proxy for token count)": figures(3, 8.0, 4.0, 16.0, 6.93),
        "Number of turns": figures(3, 1.0, 1.0, 1.0, 0.0),
        "Temperature": figures(2, 0.25, 0.25, 0.25, 0.0),
        "id": figures(3, 3.0, 1.0, 4.0, 1.73),
        "ok": figures(3, 0.333, 0.0, 1.0, 0.577),
        "tags": {"unique_count": 2, "total_count": 4},
    }


def figures(total: int, average: float, low: float, high: float, deviation: float) -> dict[str, float]:
    return {
        "Total # non-null values": total,
        "Average": average,
        "Min": low,
        "Max": high,
        "Standard deviation": deviation,
    }


def test_a_key_with_numbers_and_texts_counts_as_texts() -> None:
    metrics = DataMetrics()
    metrics.observe({"answer": 7}, {}, 1)
    metrics.observe({"answer": "07:30"}, {}, 1)

    assert metrics.figures()["answer"] == {"unique_count": 1, "total_count": 1}


@pytest.mark.parametrize(
    ("committed", "now", "found"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, []),
        ({"a": 1}, {}, ["a is no longer there"]),
        ({"a": {"b": 12.0}}, {"a": {"b": 12.004}}, []),
        ({"a": {"b": 12.0}}, {"a": {"b": 12.006}}, ["a.b is 12.006, not 12.0"]),
        ({"a": 0.5}, {"a": 0.5004}, []),
        ({"a": 0.5}, {"a": 0.501}, ["a is 0.501, not 0.5"]),
        ({"a": 5}, {"a": 6}, ["a is 6, not 5"]),
        ({"a": [1, 2]}, {"a": [2, 1]}, []),
        ({"a": [{"x": 1.0}, {"x": 2.0}]}, {"a": [{"x": 2.001}, {"x": 1.0}]}, []),
        ({"a": [{"x": 1.0}]}, {"a": [{"x": 2.0}]}, ["a has other items"]),
        ({"a": "x"}, {"a": None}, ["a is None, not 'x'"]),
    ],
)
def test_figures_differ_beyond_the_tolerance(committed: Any, now: Any, found: list[str]) -> None:
    assert list(differences(committed, now)) == found


def test_example_rows_need_their_figures_beside_them(benchmark: Benchmark) -> None:
    assert "example_metrics.json: no such file: write it with --write-metrics" in said(checked(benchmark)[0])[0]
    assert checked(benchmark, figures=Figures.WRITE)[0].errors == 0

    written = json.loads((benchmark.folder / "example_metrics.json").read_text())

    assert (written["name"], written["license"], written["Number of examples"]) == ("example", None, 5)
    assert checked(benchmark)[0].errors == 0


def test_other_figures_than_the_committed_ones_are_a_conflict_until_they_are_written_anew(benchmark: Benchmark) -> None:
    checked(benchmark, figures=Figures.WRITE)
    a_file(benchmark.folder / "example.jsonl", rows(5, level=3))
    path, conflict = benchmark.folder / "example_metrics.json", benchmark.folder / "example_metrics_conflict.json"
    path.write_text(path.read_text().replace('"Number of examples": 5', '"Number of examples": 7'))

    found = said(checked(benchmark)[0])

    assert found[0] == f"{path}: Number of examples is 5, not 7"
    assert str(conflict) in found[1]
    assert "level" in json.loads(conflict.read_text())
    assert checked(benchmark, figures=Figures.WRITE)[0].errors == 0
    assert not conflict.exists()


def test_a_conflict_that_is_over_must_be_tidied_away(benchmark: Benchmark) -> None:
    checked(benchmark, figures=Figures.WRITE)
    (benchmark.folder / "example_metrics_conflict.json").write_text("{}")

    assert "which is over: delete it" in said(checked(benchmark)[0])[0]


def test_a_file_on_its_own_is_held_against_the_figures_beside_it_but_not_with_a_prompt(tmp_path: Path) -> None:
    path = a_file(tmp_path / "rows.jsonl", rows(2, responses_create_params={"input": "hi"}))
    committed = {"name": "rows", "Number of examples": 3}
    (tmp_path / "rows_metrics.json").write_text(json.dumps(committed))

    assert said(validate_file(path))[0] == f"{tmp_path}/rows_metrics.json: Number of examples is 2, not 3"
    a_file(path, rows(2))
    assert said(validate_file(path, prompt=Prompt(user="{question}"))) == []


def test_figures_that_are_no_json_are_named(benchmark: Benchmark) -> None:
    (benchmark.folder / "example_metrics.json").write_text("{")

    assert "example_metrics.json: no metrics: " in said(checked(benchmark)[0])[0]


# -- collate


def collated(benchmark: Benchmark, output: Path, **more: Any) -> tuple[list[Any], list[Report]]:
    part = Part(benchmark, ("expected_answer",))
    return collate([part], benchmark.folder, output, types=Mode.TRAIN_PREPARATION.types, **more)


def test_rows_are_collated_with_prompt_agent_and_repeats(benchmark: Benchmark, tmp_path: Path) -> None:
    a_file(benchmark.folder / "rows.jsonl", rows(2, responses_create_params={"temperature": 0.5}))
    a_file(benchmark.folder / "check.jsonl", rows(1))

    files, reports = collated(benchmark, tmp_path / "out")

    assert [(file.type, file.rows) for file in files] == [("train", 4), ("validation", 1)]
    assert [report.errors for report in reports] == [0, 0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == ["0+1?", "0+1?", "1+1?", "1+1?"]
    assert lines[0] == {
        "question": "0+1?",
        "expected_answer": "1",
        "responses_create_params": {"input": [{"role": "user", "content": "0+1?"}], "temperature": 0.5},
        "agent_ref": {"type": "responses_api_agents", "name": "mine_simple_agent"},
    }
    figures = json.loads((tmp_path / "out" / "train_metrics.json").read_text())
    assert (figures["name"], figures["num_repeats"], figures["Number of examples"]) == ("rows", 2, 4)
    assert json.loads((benchmark.folder / "rows_metrics.json").read_text()) == figures
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "train.jsonl",
        "train_metrics.json",
        "validation.jsonl",
        "validation_metrics.json",
    ]


def test_where_a_row_is_broken_nothing_is_written(benchmark: Benchmark, tmp_path: Path) -> None:
    a_file(benchmark.folder / "rows.jsonl", [*rows(1), {"question": "?"}])
    a_file(benchmark.folder / "check.jsonl", rows(1))

    files, reports = collated(benchmark, tmp_path / "out")

    assert files == []
    assert "rows.jsonl:2: the verifier needs" in said(reports[0])[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_collated_figures_in_conflict_stop_everything_until_they_may_be_overwritten(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    for name in ("rows", "check"):
        a_file(benchmark.folder / f"{name}.jsonl", rows(1))
    collated(benchmark, tmp_path / "out")
    before = (tmp_path / "out" / "train.jsonl").read_text()
    a_file(benchmark.folder / "rows.jsonl", rows(3))
    (benchmark.folder / "rows_metrics.json").unlink()

    with pytest.raises(DataError, match=r"train_metrics.json: .*Number of examples is 6, not 2.*--overwrite-metrics"):
        collated(benchmark, tmp_path / "out")

    assert (tmp_path / "out" / "train_metrics_conflict.json").exists()
    assert (tmp_path / "out" / "train.jsonl").read_text() == before
    files, _ = collated(benchmark, tmp_path / "out", overwrite=True)
    assert files[0].rows == 6
    assert not (tmp_path / "out" / "train_metrics_conflict.json").exists()


def test_benchmarks_without_such_data_cannot_be_collated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of these benchmarks has a dataset of type train"):
        collate([Part(load_benchmark("mmlu_stem"))], tmp_path, tmp_path, types=["train"])


# -- render


def test_a_prompt_is_applied_to_rows(tmp_path: Path) -> None:
    source = a_file(tmp_path / "raw.jsonl", [{"q": "1+1?", "responses_create_params": {"temperature": 1, "input": []}}])
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("system: Be brief.\nuser: 'Solve {q} in \\boxed{{}}'\n")

    assert render(source, prompt, tmp_path / "new" / "out.jsonl") == 1

    assert json.loads((tmp_path / "new" / "out.jsonl").read_text()) == {
        "q": "1+1?",
        "responses_create_params": {
            "temperature": 1,
            "input": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Solve 1+1? in \\boxed{}"},
            ],
        },
        "prompt_config_used": str(prompt),
    }


def test_rows_that_have_an_input_already_are_named_together_and_nothing_is_written(tmp_path: Path) -> None:
    given = {"q": "?", "responses_create_params": {"input": "hi"}}
    source = a_file(tmp_path / "raw.jsonl", [given, {"q": "?"}, given])
    (tmp_path / "prompt.yaml").write_text("user: '{q}'\n")

    with pytest.raises(DataError, match=r"raw.jsonl: lines 1, 3 already have a responses_create_params.input"):
        render(source, tmp_path / "prompt.yaml", tmp_path / "out.jsonl")

    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("user: '{}'", r"prompt.yaml:1: key 'prompt.user'"),
        ("system: x", r"prompt.yaml: at the top: .*missing required field `user`"),
        ("usr: x\nuser: y", r"prompt.yaml: unknown key 'usr': did you mean 'user'"),
        ("user: [", r"prompt.yaml:2: not valid YAML"),
        ("user: " + "[" * 2000, r"prompt.yaml: not valid YAML"),
        ("user: x\n1: y", r"prompt.yaml: key 1 is no text"),
        ("user: &a {x: *a}", r"prompt.yaml: not valid YAML"),
        (None, r"prompt.yaml: no such file"),
    ],
)
def test_a_broken_prompt_is_named(tmp_path: Path, text: str | None, what: str) -> None:
    if text is not None:
        (tmp_path / "prompt.yaml").write_text(text + "\n")

    with pytest.raises(ConfigError, match=what):
        render(a_file(tmp_path / "raw.jsonl", rows(1)), tmp_path / "prompt.yaml", tmp_path / "out.jsonl")
