from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from gym_bus.agents.registry import TOOLBOXES
from gym_bus.benchmarks import spec as spec_module
from gym_bus.benchmarks.prompt import Prompt
from gym_bus.benchmarks.spec import Benchmark, brings_code, data_path, list_benchmarks, load_benchmark
from gym_bus.errors import ConfigError, UsageError
from gym_bus.origins import Layer

BUILTIN = {"aime24", "example_multi_step", "gsm8k", "humaneval", "math500", "mbpp", "mmlu_stem"}

GOOD = """\
name: mine
domain: math
verifier: {name: math}
prompt: {user: "{question}"}
datasets:
  - {name: test, type: benchmark, jsonl_fpath: test.jsonl, prepare_script: prepare.py, num_repeats: 4}
  - {name: example, type: example, jsonl_fpath: data/example.jsonl}
"""


def a_folder(path: Path, text: str = GOOD) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(text)
    return path


def installed(monkeypatch: pytest.MonkeyPatch, root: Path, **packages: str) -> None:
    """Entry points as installed packages declare them; `root` is where the packages lie."""
    monkeypatch.syspath_prepend(str(root))
    points = [EntryPoint(name, package, spec_module.GROUP) for name, package in packages.items()]
    monkeypatch.setattr(spec_module, "entry_points", lambda group: points if group == spec_module.GROUP else [])


def test_every_built_in_benchmark_is_in_the_catalogue_without_errors(tmp_path: Path) -> None:
    infos = {info.name: info for info in list_benchmarks(tmp_path)}

    assert infos.keys() >= BUILTIN
    assert [info.error for info in infos.values() if info.error] == []
    assert (infos["aime24"].num_repeats, infos["aime24"].verifier, infos["aime24"].domain) == (32, "math", "math")
    assert infos["aime24"].description


def test_the_catalogue_tells_what_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question":"1"}\n\n{"question":"2"}\n')

    infos = {info.name: info for info in list_benchmarks(tmp_path)}

    assert (infos["gsm8k"].prepared, infos["gsm8k"].rows) == (True, 2)
    assert (infos["math500"].prepared, infos["math500"].rows) == (False, None)
    assert (infos["example_multi_step"].prepared, infos["example_multi_step"].rows) == (True, 5)


@pytest.mark.parametrize("target", ["mine", "mine/config.yaml"])
def test_a_benchmark_is_loaded_from_a_folder_or_its_config_file(tmp_path: Path, target: str) -> None:
    a_folder(tmp_path / "mine")

    benchmark = load_benchmark(str(tmp_path / target))

    assert benchmark.spec.name == "mine"
    assert benchmark.folder == tmp_path / "mine"
    assert benchmark.package is None
    assert benchmark.main.num_repeats == 4


def test_a_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "gsm8k")
    monkeypatch.chdir(tmp_path)

    assert load_benchmark("gsm8k").spec.name == "gsm8k"
    assert load_benchmark("./gsm8k").spec.name == "mine"


def test_a_benchmark_of_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder(tmp_path / "acme_mine")
    (tmp_path / "acme_mine" / "__init__.py").write_text("raise AssertionError('imported')")
    installed(monkeypatch, tmp_path, mine="acme_mine")

    benchmark = load_benchmark("mine")

    assert (benchmark.spec.name, benchmark.package) == ("mine", "acme_mine")
    assert "acme_mine" not in sys.modules
    assert "mine" in {info.name for info in list_benchmarks(tmp_path)}


def test_an_installed_benchmark_cannot_take_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "acme_other")
    installed(monkeypatch, tmp_path, gsm8k="acme_other")

    assert load_benchmark("gsm8k").package == "gym_bus.benchmarks.gsm8k"


@pytest.mark.parametrize("package", ["acme_gone", "acme_gone.part"])
def test_a_broken_installed_benchmark_is_listed_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    installed(monkeypatch, tmp_path, broken=package)

    errors = {info.name: info.error for info in list_benchmarks(tmp_path) if info.error}

    assert list(errors) == ["broken"]
    assert "config.yaml: no such file" in errors["broken"]


def test_an_unknown_name_is_answered_with_close_matches() -> None:
    with pytest.raises(UsageError, match="unknown benchmark 'gsm8': did you mean 'gsm8k'"):
        load_benchmark("gsm8")


def test_a_path_that_is_no_benchmark_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder or file"):
        load_benchmark(str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"the folder has no config.yaml"):
        load_benchmark(str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("domain: math", "domian: math", r"unknown key 'domian': did you mean 'domain'"),
        ("domain: math", "domain: maths", r"key 'domain': unknown 'maths': did you mean 'math'"),
        ("domain: math\n", "", r"missing required field `domain`"),
        ("name: mine", "name: my bench", r"key 'name': benchmark 'my bench' must be letters"),
        ("num_repeats: 4", "num_repeat: 4", r"did you mean 'num_repeats'"),
        ("num_repeats: 4", "num_repeats: 0", r"num_repeats"),
        ("type: benchmark", "type: test", r"key 'datasets\[0\]\.type': unknown 'test': known: benchmark, example"),
        ("type: benchmark", "type: train", r"key 'datasets\[0\]\.license': train data needs a licence"),
        ("name: example", "name: test", r"key 'datasets\[1\]\.name': 'test' is taken"),
        ("type: example", "type: benchmark", r"key 'datasets': at most one may be of type benchmark"),
        ("{question}", "{}", r"key 'prompt.user'"),
        ("{name: math}", "{nam: math}", r"unknown key 'verifier.nam': did you mean 'name'"),
    ],
)
def test_a_mistake_in_the_config_is_named_with_file_and_key(tmp_path: Path, old: str, new: str, what: str) -> None:
    a_folder(tmp_path / "mine", GOOD.replace(old, new, 1))

    with pytest.raises(ConfigError, match=what) as raised:
        load_benchmark(str(tmp_path / "mine"))

    assert str(tmp_path / "mine" / "config.yaml") in str(raised.value)


def test_prepared_data_lies_in_the_data_folder_and_examples_beside_the_config(tmp_path: Path) -> None:
    benchmark = load_benchmark("gsm8k")

    assert data_path(benchmark, tmp_path) == tmp_path / "gsm8k" / "test.jsonl"
    assert data_path(benchmark, tmp_path, "train") == tmp_path / "gsm8k" / "train.jsonl"
    assert data_path(benchmark, tmp_path, "example") == benchmark.folder / "data" / "example.jsonl"


def test_the_first_dataset_is_the_main_one_where_none_is_a_benchmark(tmp_path: Path) -> None:
    benchmark = load_benchmark("example_multi_step")

    assert data_path(benchmark, tmp_path) == benchmark.folder / "data" / "example.jsonl"


def test_an_unknown_dataset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="benchmark 'gsm8k' has no dataset 'tran': did you mean 'train'"):
        load_benchmark("gsm8k").dataset("tran")


# what a job wants otherwise


def changed(folder: Path, *changes: dict[str, Any]) -> Benchmark:
    return load_benchmark(str(folder), [Layer(f"change {i}", change) for i, change in enumerate(changes)])


def test_a_job_may_change_parts_of_a_benchmark_later_changes_winning(tmp_path: Path) -> None:
    text = GOOD.replace("{name: math}", "{name: math, options: {strip_think: false, text_limit: 9}}")

    found = changed(
        a_folder(tmp_path, text),
        {"verifier": {"options": {"text_limit": 8}}, "num_repeats": 2, "agent": {"options": {"max_steps": 1}}},
        {"verifier": {"options": {"strip_think": True}}, "num_repeats": 3},
    )

    assert found.spec.verifier.options == {"strip_think": True, "text_limit": 8}
    assert (found.spec.agent.name, found.spec.agent.options, found.num_repeats) == ("simple", {"max_steps": 1}, 3)
    assert found.origins["verifier.options.text_limit"] == "change 0"
    assert load_benchmark(str(tmp_path)).spec.verifier.options == {"strip_think": False, "text_limit": 9}


def test_another_verifier_or_agent_does_not_get_the_options_of_the_one_before(tmp_path: Path) -> None:
    text = GOOD.replace("{name: math}", "{name: math, options: {strip_think: false}}")
    text += "agent: {name: simple, options: {max_steps: 4}}\n"

    spec = changed(a_folder(tmp_path, text), {"verifier": {"name": "mcqa"}, "agent": {"name": "other"}}).spec

    assert (spec.verifier.name, spec.verifier.options) == ("mcqa", {})
    assert (spec.agent.name, spec.agent.options) == ("other", {})


def test_a_changed_prompt_takes_the_place_of_the_whole_prompt(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, GOOD.replace('{user: "{question}"}', '{system: Be brief., user: "{question}"}'))
    (tmp_path / "mine.yaml").write_text("user: 'Q: {question}'\n")

    by_file = changed(folder, {"prompt_config": str(tmp_path / "mine.yaml")}).spec.prompt
    by_text = changed(folder, {"prompt": {"user": "{question}!"}}).spec.prompt

    assert by_file == Prompt(user="Q: {question}")
    assert by_text == Prompt(user="{question}!")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"verifer": {}}, "unknown key 'verifer': did you mean 'verifier'"),
        ({"datasets": []}, "unknown key 'datasets'"),
        ({"verifier": {"option": {}}}, "unknown key 'verifier.option': did you mean 'options'"),
        ({"num_repeats": 0}, "key 'num_repeats'"),
        ({"prompt": {"user": "{a b}"}}, "key 'prompt.user'"),
        ({"prompt_config": "none.yaml"}, "no file 'none.yaml'"),
    ],
)
def test_what_a_job_cannot_change_is_named(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as refused:
        changed(a_folder(tmp_path), change)

    assert str(refused.value).startswith("change 0: ")
    assert what in str(refused.value)


# tools of a folder's own


def test_a_folder_may_bring_the_tools_of_its_agent_along(tmp_path: Path) -> None:
    text = f"{GOOD}toolbox: {{name: {tmp_path.name}, code: 'tools.py:Tools'}}\n"
    (tmp_path / "tools.py").write_text("class Tools:\n    pass\n")

    spec = load_benchmark(str(a_folder(tmp_path, text))).spec

    assert spec.agent.options == {"toolbox": tmp_path.name}
    assert brings_code(spec)
    assert TOOLBOXES.load(tmp_path.name).__name__ == "Tools"
    other = changed(tmp_path, {"agent": {"options": {"toolbox": "python"}}}).spec
    assert other.agent.options == {"toolbox": "python"}


def test_tools_that_are_not_there_are_named_with_the_line(tmp_path: Path) -> None:
    a_folder(tmp_path, f"{GOOD}toolbox:\n  name: mine\n  code: tools.py:Tools\n")

    with pytest.raises(ConfigError, match=r"config\.yaml:10: key 'toolbox\.code': 'tools\.py:Tools' is not file\.py"):
        load_benchmark(str(tmp_path))
