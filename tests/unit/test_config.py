from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gym_bus.config import Layer, file_layers, load_config, merge_layers, resolve
from gym_bus.errors import ConfigError


def a_file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    return merge_layers([Layer(f"layer {i}", values) for i, values in enumerate(layers)])[0]


def refused(*arguments: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(*arguments, **more)
    return str(raised.value)


# -- files that include files


def test_an_including_file_wins_over_what_it_includes_and_a_later_sibling_over_an_earlier_one(tmp_path: Path) -> None:
    a_file(tmp_path / "a.yaml", "agent: {concurrency: 1, prefetch: 1, limit_s: 1}")
    a_file(tmp_path / "b.yaml", "agent: {concurrency: 2, prefetch: 2}")
    top = a_file(tmp_path / "top.yaml", "config_paths: [a.yaml, b.yaml]\nagent: {concurrency: 3}")

    agent = load_config([top]).agent

    assert (agent.concurrency, agent.prefetch, agent.limit_s) == (3, 2, 1)


def test_a_file_that_two_others_include_wins_over_neither(tmp_path: Path) -> None:
    a_file(tmp_path / "base.yaml", "agent: {concurrency: 1, prefetch: 1}")
    a_file(tmp_path / "a.yaml", "config_paths: [base.yaml]\nagent: {concurrency: 2}")
    a_file(tmp_path / "b.yaml", "config_paths: [base.yaml]\nagent: {prefetch: 3}")

    layers = file_layers([tmp_path / "a.yaml", tmp_path / "b.yaml"])
    agent = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml"]).agent

    assert [Path(layer.name).name for layer in layers] == ["base.yaml", "a.yaml", "b.yaml"]
    assert (agent.concurrency, agent.prefetch) == (2, 3)


def test_included_files_are_found_beside_the_file_in_the_working_directory_and_in_folders_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    a_file(tmp_path / "here" / "mine.yaml", "data_dir: here")
    a_file(tmp_path / "checkout" / "servers" / "one.yaml", "log_level: info")
    deep = a_file(tmp_path / "checkout" / "sets" / "deep" / "top.yaml", "config_paths: [mine.yaml, servers/one.yaml]")

    config = load_config([deep])

    assert (config.data_dir, config.log_level) == ("here", "info")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("config_paths: [gone.yaml]", r"top.yaml:1: no file 'gone.yaml' in .*write the whole path"),
        ("\nconfig_paths: one.yaml", r"top.yaml:2: key 'config_paths': expected a list"),
        ("config_paths: [top.yaml]", r"config_paths include each other"),
        ("agent: 1\nagent: 2", r"top.yaml:2: not valid YAML: .*duplicate"),
        ("- a", r"top.yaml: expected a mapping"),
        ("1: 2", r"top.yaml: key 1 is no text but int: quote it"),
        ("models:\n  m: {headers: {on: x}}", r"top.yaml: key True of 'models.m.headers' is no text but bool"),
        ("a: " + "[" * 2000 + "]" * 2000, r"top.yaml: not valid YAML: .*recursion"),
        ("models:\n  m: {base_url: '${'}", r"top.yaml:2: key 'models.m.base_url': .*write `\\\$\{`"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    a_file(tmp_path / "one.yaml", "log_level: info")

    with pytest.raises(ConfigError, match=what):
        load_config([a_file(tmp_path / "top.yaml", text)])


# -- blocks that inherit


def test_an_inheriting_block_takes_over_its_source_which_moves_away() -> None:
    made = merged(
        {"a": {"x": 1, "y": {"p": 1, "q": 1}, "l": [1, 2]}, "b": {"_inherit_from": "a", "y": {"q": 2}, "l": [3]}}
    )

    assert made == {"b": {"x": 1, "y": {"p": 1, "q": 2}, "l": [3]}}


def test_a_copying_block_leaves_its_source_where_it_is() -> None:
    assert merged({"a": {"x": 1}, "b": {"_copy": "a"}}) == {"a": {"x": 1}, "b": {"x": 1}}


def test_two_blocks_may_inherit_from_one_and_a_source_may_inherit_itself() -> None:
    made = merged(
        {
            "second": {"_inherit_from": "first", "z": 3},
            "first": {"_inherit_from": "base", "y": 2},
            "base": {"x": 1},
            "other": {"_inherit_from": "base"},
        }
    )

    assert made == {"second": {"x": 1, "y": 2, "z": 3}, "other": {"x": 1}}


def test_a_source_may_stand_deep_in_another_layer_and_text_forms_stand_for_whole_blocks() -> None:
    made = merged(
        {"a": {"b": {"x": 1}, "keep": 0}},
        {"c": "${inherit_from:a.b}", "d": ["${copy:a.keep}"]},
    )

    assert made == {"a": {"keep": 0}, "c": {"x": 1}, "d": [0]}


def test_deleted_keys_are_not_taken_over() -> None:
    made = merged({"a": {"x": 1, "y": 2, "z": 3}, "b": {"_copy": "a", "_delete_key": "x, y"}})

    assert made["b"] == {"z": 3}


def test_what_inherits_from_a_missing_value_is_missing() -> None:
    assert merged({"a": "???", "b": {"_inherit_from": "a", "x": 1}}) == {"b": "???"}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (
            {"basis": {}, "b": {"_inherit_from": "base"}},
            r"key 'b._inherit_from': there is no block 'base': did you mean 'basis'",
        ),
        ({"a": {"_copy": "b"}, "b": {"_copy": "a"}}, r"blocks inherit from each other: b -> a"),
        ({"a": {"name": 1}, "b": {"_copy": "a", "_delete_key": "nam"}}, r"key 'b._delete_key': .*did you mean 'name'"),
        ({"a": 1, "b": {"_copy": "a", "x": 1}}, r"it names no block of keys"),
        ({"b": {"_copy": 3}}, r"expected the dotted key of a block"),
    ],
)
def test_an_inheritance_that_cannot_be_is_named_with_its_key(values: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"layer 0: .*{what}"):
        merged(values)


def test_inherited_values_remember_the_file_and_line_that_they_were_written_in(tmp_path: Path) -> None:
    base = a_file(tmp_path / "base.yaml", "models:\n  generic:\n    base_url: http://a/v1\n    model: m\n")
    top = a_file(tmp_path / "top.yaml", "models:\n  mine:\n    _copy: models.generic\n    model: n\n")

    origins = resolve([base, top]).origins

    assert origins["models.mine.base_url"] == f"{base}:3"
    assert origins["models.mine.model"] == f"{top}:4"
    assert origins["models.generic.model"] == f"{base}:4"


# -- values that are missing, or drawn from elsewhere


def test_all_missing_values_are_named_at_once(tmp_path: Path) -> None:
    path = a_file(tmp_path / "c.yaml", "models:\n  m: {base_url: '???'}\nbus:\n  lanes: [a, '???']\n  url: ???\n")

    said = refused([path], ["bus.url=nats://h:1"])

    assert said.startswith(
        f"missing values: models.m.base_url ({path}:2), bus.lanes[1] ({path}:4); give each as key=value"
    )


def test_an_interpolation_takes_its_value_from_env_yaml(tmp_path: Path) -> None:
    env = a_file(tmp_path / "env.yaml", "my_key: k\nhost: h\n")
    path = a_file(tmp_path / "c.yaml", "models: {m: {base_url: 'http://${host}/v1', api_key: '${my_key}'}}")

    config = load_config([path], env_file=env)

    assert (config.models["m"].base_url, config.models["m"].api_key) == ("http://h/v1", "k")


def test_every_interpolation_that_leads_nowhere_is_named_with_what_env_yaml_has(tmp_path: Path) -> None:
    env = a_file(tmp_path / "env.yaml", "policy_api_kee: secret-text\n")
    path = a_file(tmp_path / "c.yaml", "models:\n  m:\n    api_key: ${policy_api_key}\n    base_url: ${my_url}\n")

    said = refused([path], env_file=env)

    assert (
        f"{path}:3: key 'models.m.api_key': ${{policy_api_key}} names no key: add the line `policy_api_key: ...`"
        in said
    )
    assert "did you mean 'policy_api_kee'" in said
    assert f"{path}:4: key 'models.m.base_url'" in said
    assert "secret-text" not in said


def test_without_env_yaml_the_advice_is_to_make_one(tmp_path: Path) -> None:
    path = a_file(tmp_path / "c.yaml", "models: {m: {api_key: '${my_key}'}}")

    assert "there is no env.yaml in the working directory: make one with the line `my_key: ...`" in refused([path])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("${oc.env:HOME}", "environment variables configure nothing"),
        ("${nope:1}", "Unsupported interpolation type nope"),
    ],
)
def test_other_interpolations_are_refused(tmp_path: Path, text: str, what: str) -> None:
    path = a_file(tmp_path / "c.yaml", f"data_dir: {text}\n")

    assert refused([path]).startswith(f"{path}:1: key 'data_dir': {what}")


def test_nemo_gyms_flat_keys_make_a_model_and_the_registry_wherever_they_stand(tmp_path: Path) -> None:
    env = a_file(tmp_path / "env.yaml", "policy_base_url: http://a/v1\npolicy_api_key: k\nhf_token: t\nmine: 1\n")

    config = load_config([], ["policy_model_name=m", "++policy_base_url=http://b/v1"], env_file=env)

    policy = config.models["policy"]
    assert (policy.base_url, policy.model, policy.api_key) == ("http://b/v1", "m", "k")
    assert config.registry.hf_token == "t"


def test_env_yaml_may_name_the_files_that_are_read_when_none_are_given(tmp_path: Path) -> None:
    env = a_file(tmp_path / "env.yaml", "config_paths: [usual.yaml]\n")
    a_file(tmp_path / "usual.yaml", "agent: {concurrency: 5}")
    other = a_file(tmp_path / "other.yaml", "agent: {prefetch: 6}")

    assert load_config([], env_file=env).agent.concurrency == 5
    assert load_config([other], env_file=env).agent.concurrency == 1024


def test_a_key_alone_makes_no_model(tmp_path: Path) -> None:
    env = a_file(tmp_path / "env.yaml", "policy_api_key: k\n")

    assert load_config([], env_file=env).models == {}


# -- keys and values that are none


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("agnt: {}", r"unknown key 'agnt': did you mean 'agent'"),
        (
            "bus:\n  storage: flie",
            r"c.yaml:2: key 'bus.storage': unknown 'flie': did you mean 'file'\? known: file, memory",
        ),
        ("models:\n  m:\n    kind: opnai", r"c.yaml:3: key 'models.m.kind': unknown 'opnai': did you mean 'openai'"),
        (
            "models:\n  m:\n    retry: {wait: 1}",
            r"c.yaml:3: unknown key 'models.m.retry.wait': did you mean .*'wait_s'",
        ),
        ("bus:\n  lanes: [a, 1]", r"c.yaml:2: key 'bus.lanes\[1\]': expected `str`, got `int`"),
        ("agent: {concurrency: 0}", r"c.yaml:1: key 'agent.concurrency': expected `int` >= 1"),
        ("job:\n  limit_s: .inf", r"c.yaml:2: key 'job.limit_s': expected a finite number, not inf"),
        ("models:\n  m:\n    sampling: {top_p: .nan}", r"c.yaml:3: key 'models.m.sampling.top_p': expected a finite"),
        ("job: {seeds: 5000000000000000000}", r"c.yaml:1: key 'job.seeds': expected `int` <= 4611686018427387904"),
        ("m:\n  responses_api_models: {}", r"c.yaml:1: key 'm' is a server of NeMo Gym"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_file_line_and_what_could_be_meant(
    tmp_path: Path, text: str, what: str
) -> None:
    path = a_file(tmp_path / "c.yaml", text)

    with pytest.raises(ConfigError, match=what):
        load_config([path])


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("agent", "argument 'agent': expected key=value"),
        ("sk-Secret+1", "argument without a key"),
        ("config_paths=[a.yaml]", "files are given with --config"),
        ("agent={", "the value is not valid YAML"),
        ("agent=" + "[" * 2000, "the value is not valid YAML"),
        ("models.m.extra_body={1: 2}", "key 1 of 'models.m.extra_body' is no text"),
        ("log_level=loud", r"argument log_level=...: key 'log_level': unknown 'loud'"),
    ],
)
def test_an_argument_that_is_no_setting_is_refused_without_its_value(argument: str, what: str) -> None:
    said = refused([], [argument])

    assert what in said
    assert "Secret" not in said
