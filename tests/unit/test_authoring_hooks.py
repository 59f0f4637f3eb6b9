"""The git hooks: what they write, when they are content, and that the configuration runs them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from gym_bus.benchmarks import hooks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("name: a\ndomain: math\n", "name: a\ndomain: math\nverified: false\n"),
        ("name: a\ndomain: math\nverified: true\n", None),
        ("verified: false\nname: a\nagent:\n  name: b\ndomain: math\n", None),
        (
            "a:\n  servers:\n    b:\n      domain: math\n      value: x\nc:\n  d:\n    e:\n      verified: false\n",
            "a:\n  servers:\n    b:\n      domain: math\n      verified: false\n      value: x\n"
            "c:\n  d:\n    e:\n      verified: false\n",
        ),
        ("no: benchmark\n", None),
    ],
)
def test_the_flag_is_added_where_it_is_missing(text: str, wanted: str | None, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)

    code = hooks.main(["verified", str(config)])

    assert config.read_text() == (wanted or text)
    assert code == (1 if wanted else 0)
    assert hooks.main(["verified", str(config)]) == 0


def test_the_table_follows_the_benchmarks(tmp_path: Path) -> None:
    folder, readme = tmp_path / "all" / "tiny", tmp_path / "README.md"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "name: tiny\ndomain: math\ndescription: Small.\nverifier: {name: math}\n"
        "datasets: [{name: tiny, type: benchmark, jsonl_fpath: a.jsonl, license: MIT}]\n"
    )
    readme.write_text(f"before\n{hooks.BEGIN}\nold\n{hooks.END}\nafter\n")

    codes = [hooks.main(["table", str(readme), "--folder", str(tmp_path / "all")]) for _ in range(2)]

    assert codes == [1, 0]
    assert "\n| [tiny](all/tiny/README.md) | math | no | MIT | Small. |\n" in readme.read_text()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")


def test_a_readme_without_a_place_for_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text\n")

    with pytest.raises(SystemExit, match="put these two lines"):
        hooks.main(["table", str(tmp_path / "README.md")])


def test_the_readme_and_the_benchmarks_of_this_checkout_are_in_order(tmp_path: Path) -> None:
    assert hooks.table(Path(hooks.__file__).parent, ROOT) in (ROOT / "README.md").read_text()
    for config in sorted((ROOT / "benchmarks").rglob("config.yaml")):
        copy = tmp_path / "config.yaml"
        copy.write_text(config.read_text())
        assert not hooks.add_verified(copy), config


def test_the_hooks_that_are_configured_run(tmp_path: Path) -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    by_id = {hook["id"]: hook for hook in repo["hooks"]}
    assert {hook["language"] for hook in by_id.values()} == {"system"}
    config = tmp_path / "config.yaml"
    config.write_text("domain: math\n")
    message = tmp_path / "message"
    message.write_text("A change\n\nSigned-off-by: A Name <a@example.org>\n")
    unsigned = tmp_path / "unsigned"
    unsigned.write_text("A change\n")
    codes = {
        (name, file.name): subprocess.run(
            ["bash", "-c", f"{by_id[name]['entry']} {file}"], cwd=ROOT, capture_output=True, check=False, timeout=100
        ).returncode
        for name, file in [
            ("verified-flag", config),
            ("sign-off", message),
            ("sign-off", unsigned),
            ("ruff-check", ROOT / "benchmarks/gym_bus/benchmarks/hooks.py"),
            ("ruff-format", ROOT / "benchmarks/gym_bus/benchmarks/hooks.py"),
        ]
        if name == "sign-off" or (ROOT / by_id[name]["entry"].split()[0]).exists()
    }
    assert codes.pop(("sign-off", "unsigned")) == 1
    assert codes.pop(("verified-flag", "config.yaml"), 1) == 1
    assert set(codes.values()) == {0}
