"""Every command that the documentation shows is run, page by page, as a reader would paste it.

What differs from a reader's machine: ports are free ones; the model at 127.0.0.1:8000 is a simulated one where the page
starts none; `dataset prepare` needs the published files, so only its benchmarks' names are checked, and their example
rows stand in for the prepared data; `make test` and `make check` would run this test again, so make only plans them.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import pytest

from gym_bus.benchmarks.spec import data_path, list_benchmarks, load_benchmark
from gym_bus.cli.main import cli
from gym_bus.server import held_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]
LIMIT_S = 280
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
PLANNED = ("make test", "make chaos", "make check", "make setup", "make bench", "make lock")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *kinds: str) -> list[re.Match[str]]:
    return [m for m in BLOCK.finditer(page.read_text()) if m["kind"] in kinds]


def commands(page: Path) -> list[str]:
    """The page's commands, continuation lines joined."""
    joined = "\n".join(m["text"] for m in blocks(page, "sh")).replace("\\\n", " ")
    return [*_whole(joined.splitlines())]


def _whole(lines: list[str]) -> Iterator[str]:
    """Lines put together until their quotes are closed."""
    held = ""
    for line in lines:
        held = f"{held}\n{line}" if held else line
        try:
            shlex.split(held, comments=True)
        except ValueError:
            continue
        if held.strip():
            yield held
        held = ""
    assert not held, f"quotes are not closed: {held}"


TUTORIALS = [ROOT / "docs" / "how-to" / f"{name}-benchmark.md" for name in ("native", "external")]
"""Pages whose files and commands follow on each other: test_tutorials.py follows them."""
WITH_COMMANDS = [page for page in PAGES if commands(page) and page not in TUTORIALS]


@pytest.fixture(scope="module")
def model() -> Iterator[int]:
    """The port of a simulated model that answers with a boxed 18."""
    held, port = held_port()
    command = ["gym-bus", "model", "serve", "--port", str(port), "models.simulated.simulated.text='\\boxed{18}'"]
    with held, subprocess.Popen([str(BIN / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "serving" in process.stdout.readline()
        yield port
        process.terminate()


def lay_out(folder: Path, page: Path, port: int) -> None:
    """What a reader has: the checkout's folders, their env.yaml, the files that the page shows, prepared data."""
    for name in ("benchmarks", "docs", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "env.yaml").write_text(
        f"policy_base_url: http://127.0.0.1:{port}/v1\npolicy_model_name: m\npolicy_api_key: k\n"
    )
    for match in blocks(page, "yaml", "json"):
        heading = re.match(r"# (\S+\.yaml)\n", match["text"])
        target = match["file"] or (heading and heading[1])
        if target:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_text(match["text"].replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    if not (folder / "models.yaml").exists():
        (folder / "models.yaml").write_text("models: {policy: {base_url: '${policy_base_url}'}}\n")
    for info in list_benchmarks(folder):
        benchmark = load_benchmark(info.name)
        target = data_path(benchmark, folder / ".gym_bus" / "data")
        if target != data_path(benchmark, folder, "example"):
            target.parent.mkdir(parents=True)
            shutil.copy(benchmark.folder / "data" / "example.jsonl", target)
    publish_gsm8k(folder / "gsm8k-source")


def publish_gsm8k(folder: Path) -> None:
    """The five example rows in the form in which GSM8K was published, and their four models' answers."""
    data = load_benchmark("gsm8k").folder / "data"
    folder.mkdir()
    rows = [msgspec.json.decode(line) for line in (data / "example.jsonl").read_text().splitlines()]
    answers = [msgspec.json.decode(line)["completions"] for line in (data / "example_replay.jsonl").open()]
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    published = [
        {"question": r["question"], "answer": f"{r['reference_solution']}\n#### {r['expected_answer']}"} for r in rows
    ]
    solutions = [
        p | {"ground_truth": p["answer"]} | {m: {"solution": text} for m, text in zip(models, texts, strict=True)}
        for p, texts in zip(published, answers, strict=True)
    ]
    for name, lines in (("test.jsonl", published), ("example_model_solutions.jsonl", solutions)):
        (folder / name).write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def script(page: Path, folder: Path, own_ports: list[int], port: int) -> str:
    """The page's commands as one bash script that waits for what it started in the background.

    The servers of the page listen on `own_ports`; a simulated model does on `port`.
    """
    lines = ["set -euo pipefail"]
    served = any("--port 8000" in line for line in commands(page))
    bus, other, model = own_ports
    ports = {"4222": str(bus), "8001": str(other), "8000": str(model if served else port)}
    for line in commands(page):
        line = re.sub(r"\b(4222|8000|8001)\b", lambda m: ports[m[0]], line)
        if line.startswith(PLANNED):
            line = line.replace("make ", f"make -n -C {ROOT} ", 1) + " >/dev/null"
        elif line.startswith("make demo"):
            line = f"make -C {ROOT} demo READY=Makefile BIN={BIN} RUNS={folder}/runs"
        elif line.startswith("gym-bus dataset prepare"):
            for name in shlex.split(line.partition("--source")[0])[3:]:
                load_benchmark(name)
            continue
        if page.name == "recorded-answers.md" and "gsm8k_recorded.py" in line:
            line += " --limit 5"
        lines.append(line)
        if line.endswith("&") and (listening := re.search(r" serve .*--port (\d+)", line)):
            lines.append(f"until (exec 3<>/dev/tcp/127.0.0.1/{listening[1]}) 2>/dev/null; do sleep 0.05; done")
    return "\n".join(lines) + "\n"


QUICK = (
    "benchmarks/gym_bus/benchmarks/gsm8k/README.md",
    *(f"docs/how-to/{name}.md" for name in ("extend", "train", "configuration")),
)


def _marked(page: Path) -> Any:
    return pytest.param(page, marks=() if name_of(page) in QUICK else pytest.mark.slow, id=name_of(page))


@pytest.mark.parametrize("page", [_marked(page) for page in WITH_COMMANDS])
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, model: int) -> None:
    lay_out(tmp_path, page, model)
    held, ports = zip(*(held_port() for _ in range(3)), strict=True)
    path = f"{BIN}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", script(page, tmp_path, [*ports], model)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdout=(tmp_path / "said").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for port in held:
            port.close()
    assert code == 0, (tmp_path / "said").read_text()[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_are_of_kinds_that_these_tests_know(page: Path) -> None:
    assert {m["kind"] for m in BLOCK.finditer(page.read_text())} <= {"", "json", "python", "sh", "text", "yaml"}


def only_named(page: Path) -> list[str]:
    """Commands that are not run: within a sentence or a table, or in a block of text as they need what is not here."""
    shown = "".join(m["text"] for m in blocks(page, "text", "")).replace("\\\n", " ")
    named = re.findall(r"`gym-bus ([^`]+)`", page.read_text())
    return [*re.findall(r"^gym-bus (.+)$", shown, re.MULTILINE), *(text.replace("\n", " ") for text in named)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_the_commands_that_a_page_only_names_are_there_with_their_options(page: Path) -> None:
    for line in only_named(page):
        words, command = line.split(), cast(click.Command, cli)
        while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z]+", words[0]):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, line
            command = found
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= {*options, "--help"}, line


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_python_of_a_page_is_valid(page: Path) -> None:
    for match in blocks(page, "python"):
        ast.parse("async def shown():\n" + textwrap.indent(match["text"], "    "))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_reference_pages_are_those_that_the_code_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", tmp_path], check=True, timeout=60)
    for made in sorted(tmp_path.iterdir()):
        assert made.read_text() == (ROOT / "docs" / "reference" / made.name).read_text(), (
            f"docs/reference/{made.name} is not up to date: python docs/generate.py"
        )


def test_the_verifier_that_the_how_to_shows_judges() -> None:
    from gym_bus.verifiers.base import Task

    (shown,) = [m["text"] for m in blocks(ROOT / "docs" / "how-to" / "extend.md", "python")]
    made: dict[str, type] = {}
    exec(compile(shown, "extend.md", "exec"), made)
    message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so 42"}]}
    verdict = made["LastNumber"]().verify(Task({"expected_answer": 42}, {"output": [message]}))
    assert (verdict.reward, verdict.extra) == (1.0, {"extracted_answer": "42"})
