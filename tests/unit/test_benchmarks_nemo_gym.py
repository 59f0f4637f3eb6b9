"""Configurations of NeMo Gym's shape: `benchmarks/<name>/config.yaml` over a resources server's own file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gym_bus.benchmarks.prepare import prepare
from gym_bus.benchmarks.spec import GitlabIdentifier, HuggingFaceSource, data_path, list_benchmarks, load_benchmark
from gym_bus.errors import ConfigError, UsageError

SERVER = """\
mcqa:
  resources_servers:
    mcqa:
      entrypoint: app.py
      grading_mode: null
      domain: knowledge
      verified: false
      description: Multiple choice
      value: Improve benchmarks
mcqa_simple_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      max_steps: 3
      resources_server:
        type: resources_servers
        name: mcqa
      model_server:
        type: responses_api_models
        name: policy_model
      datasets:
      - name: train
        type: train
        jsonl_fpath: resources_servers/mcqa/data/train.jsonl
        gitlab_identifier: {dataset_name: syn, version: 1.1.2, artifact_fpath: rows.jsonl}
        license: Apache 2.0
      - name: validation
        type: validation
        jsonl_fpath: resources_servers/mcqa/data/validation.jsonl
        source: {type: huggingface, repo_id: me/rows}
        license: MIT
"""

BENCHMARK = """\
config_paths:
- resources_servers/mcqa/configs/mcqa.yaml

quiz_resources_server:
  _inherit_from: mcqa
  resources_servers:
    mcqa:
      grading_mode: lenient_boxed

quiz_agent:
  _inherit_from: mcqa_simple_agent
  responses_api_agents:
    simple_agent:
      resources_server:
        name: quiz_resources_server
      datasets:
      - name: quiz
        type: benchmark
        jsonl_fpath: benchmarks/quiz/data/quiz.jsonl
        prompt_config: benchmarks/prompts/quiz.yaml
        prepare_script: benchmarks/quiz/prepare.py
        num_repeats: 8
"""

SCRIPT = """\
from pathlib import Path


def prepare():
    path = Path(__file__).parent / "data" / "{file}"
    path.parent.mkdir(exist_ok=True)
    path.write_text('{{"problem": "1+1?"}}\\n')
    return path
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in (
        ("resources_servers/mcqa/configs/mcqa.yaml", SERVER),
        ("benchmarks/quiz/config.yaml", BENCHMARK),
        ("benchmarks/quiz/prepare.py", SCRIPT.format(file="quiz.jsonl")),
        ("benchmarks/prompts/quiz.yaml", "user: |-\n  Answer in \\boxed{{}}. It costs ${{5}}.\n\n  {problem}\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def edit(checkout: Path, old: str, new: str, name: str = "benchmarks/quiz/config.yaml") -> str:
    path = checkout / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return str(checkout / "benchmarks/quiz")


def test_a_benchmark_is_read_with_what_it_inherits(checkout: Path) -> None:
    benchmark = load_benchmark(str(checkout / "benchmarks/quiz"))

    spec = benchmark.spec
    assert (spec.name, spec.domain, spec.description, spec.verified) == ("quiz", "knowledge", "Multiple choice", False)
    assert (spec.agent.name, spec.agent.options) == ("simple", {"max_steps": 3})
    assert (spec.verifier.name, spec.verifier.options) == ("mcqa", {"grading_mode": "lenient_boxed"})
    assert (benchmark.main.name, benchmark.main.num_repeats, benchmark.instance) == ("quiz", 8, "quiz_agent")
    assert data_path(benchmark, Path("elsewhere")) == checkout / "benchmarks/quiz/data/quiz.jsonl"
    assert spec.prompt is not None
    assert spec.prompt.render({"problem": "Why?"}, "row")[0]["content"] == "Answer in \\boxed{}. It costs ${5}.\n\nWhy?"


def test_where_each_part_was_written_is_known(checkout: Path) -> None:
    origins = load_benchmark(str(checkout / "benchmarks/quiz")).origins

    assert origins["domain"] == f"{checkout}/resources_servers/mcqa/configs/mcqa.yaml:6"
    assert origins["verifier.options.grading_mode"] == f"{checkout}/benchmarks/quiz/config.yaml:8"
    assert origins["datasets[0].num_repeats"] == f"{checkout}/benchmarks/quiz/config.yaml:22"


def test_an_environment_is_read_from_its_servers_file_and_knows_its_registries(checkout: Path) -> None:
    benchmark = load_benchmark(str(checkout / "resources_servers/mcqa/configs/mcqa.yaml"))

    train, validation = benchmark.spec.datasets
    assert (benchmark.spec.name, benchmark.main.name) == ("mcqa", "train")
    assert train.registries == {
        "gitlab": GitlabIdentifier(dataset_name="syn", version="1.1.2", artifact_fpath="rows.jsonl")
    }
    assert validation.registries == {"huggingface": HuggingFaceSource(repo_id="me/rows")}


def test_its_own_prepare_script_writes_the_data(checkout: Path) -> None:
    said: list[str] = []

    prepared = prepare(load_benchmark(str(checkout / "benchmarks/quiz")), checkout / "data", say=said.append)

    assert (prepared.path, prepared.rows) == (checkout / "benchmarks/quiz/data/quiz.jsonl", 1)
    assert json.loads(prepared.path.read_text()) == {"problem": "1+1?"}


def test_a_prepare_script_that_writes_another_file_is_named(checkout: Path) -> None:
    (checkout / "benchmarks/quiz/prepare.py").write_text(SCRIPT.format(file="other.jsonl"))

    with pytest.raises(ConfigError, match=r"prepare.py: prepare\(\) has written .*other.jsonl, but jsonl_fpath is"):
        prepare(load_benchmark(str(checkout / "benchmarks/quiz")), checkout, say=lambda text: None)


def test_a_prepare_script_that_needs_what_is_not_installed_says_so(checkout: Path) -> None:
    (checkout / "benchmarks/quiz/prepare.py").write_text("import not_to_be_found\n")

    with pytest.raises(ConfigError, match=r"prepare.py: No module named 'not_to_be_found'; install what"):
        prepare(load_benchmark(str(checkout / "benchmarks/quiz")), checkout, say=lambda text: None)


def test_its_script_takes_no_folder_of_published_files(checkout: Path) -> None:
    with pytest.raises(UsageError, match="leave --source out"):
        prepare(load_benchmark(str(checkout / "benchmarks/quiz")), checkout, source_dir=checkout, say=lambda text: None)


def test_a_checkout_can_be_listed(checkout: Path) -> None:
    (checkout / "benchmarks/broken").mkdir()
    (checkout / "benchmarks/broken/config.yaml").write_text("a: ???\n")

    infos = {info.name: info for info in list_benchmarks(checkout, [checkout / "benchmarks"])}

    assert (infos["quiz"].verifier, infos["quiz"].num_repeats, infos["quiz"].prepared) == ("mcqa", 8, False)
    assert "missing values: a" in infos["broken"].error


def test_a_file_of_ones_own_gives_what_a_benchmark_leaves_open(checkout: Path) -> None:
    edit(checkout, "grading_mode: lenient_boxed", "grading_mode: ???")
    mine = checkout / "mine.yaml"
    mine.write_text(
        "config_paths: [benchmarks/quiz/config.yaml]\n"
        "quiz_resources_server: {resources_servers: {mcqa: {grading_mode: lenient_answer_colon}}}\n"
    )

    assert load_benchmark(str(mine)).spec.verifier.options == {"grading_mode": "lenient_answer_colon"}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (
            "name: quiz_resources_server",
            "name: quiz_resource_server",
            r"config.yaml:15: .*no resources server 'quiz_resource_server': did you mean 'quiz_resources_server'",
        ),
        ("_inherit_from: mcqa\n", "_inherit_from: mcqaa\n", r"config.yaml:5: .*no block 'mcqaa': did you mean 'mcqa'"),
        (
            "grading_mode: lenient_boxed",
            "grading_mode: ???",
            r"missing values: quiz_resources_server.*give it in a file of your",
        ),
        (
            "grading_mode: lenient_boxed",
            "api_key: ${my_key}",
            r"\$\{my_key\} names no key of the benchmark; secrets have no",
        ),
        (
            "type: benchmark",
            "type: benchmarks",
            r"config.yaml:18: key 'datasets\[0\].type': unknown 'benchmarks': did you mean",
        ),
        ("      datasets:\n", "      datasets: []\n      other:\n", r"no agent in it has datasets"),
        (
            "      datasets:\n",
            "      datasets: [quiz]\n      other:\n",
            r"config.yaml:16: key .*expected datasets, each with",
        ),
        ("prompts/quiz.yaml", "prompts/quizz.yaml", r"no file 'benchmarks/prompts/quizz.yaml'"),
        ("    mcqa:\n      grading", "    other: {}\n    mcqa:\n      grading", r"expected one implementation"),
    ],
)
def test_what_is_wrong_in_it_is_named_with_file_and_line(checkout: Path, old: str, new: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_benchmark(edit(checkout, old, new))


def test_a_file_of_several_benchmarks_names_them(checkout: Path) -> None:
    second = BENCHMARK.replace("quiz_", "second_").replace("_inherit_from", "_copy")
    (checkout / "benchmarks/second.yaml").write_text(second)
    edit(checkout, "_inherit_from", "_copy")
    (checkout / "suite.yaml").write_text("config_paths: [benchmarks/second.yaml, benchmarks/quiz/config.yaml]\n")

    with pytest.raises(
        ConfigError, match=r"2 agents in it have datasets: second_agent \(.*second.yaml:10\), quiz_agent"
    ):
        load_benchmark(str(checkout / "suite.yaml"))


def test_a_judge_that_its_verifier_here_does_not_have_is_refused(checkout: Path) -> None:
    server = "resources_servers/mcqa/configs/mcqa.yaml"
    edit(checkout, "resources_servers:\n    mcqa:", "resources_servers:\n    math_with_judge:", server)
    edit(checkout, "    mcqa:\n      grading_mode: lenient_boxed", "    math_with_judge:\n      should_use_judge: true")

    with pytest.raises(ConfigError, match=r"config.yaml:8: the verifier 'math' has no judge: set it to false"):
        load_benchmark(str(checkout / "benchmarks/quiz"))
