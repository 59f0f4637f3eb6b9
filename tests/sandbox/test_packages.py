"""Installed packages that programs may import: those that were asked for, with what they require, and no others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from gym_bus.agents.python_tool import PythonTool
from gym_bus.errors import SandboxError, UsageError
from gym_bus.messages import RolloutId
from gym_bus.sandbox import packages
from gym_bus.sandbox.api import Ended, Limits, Program
from gym_bus.sandbox.slot import Slot
from gym_bus.sandbox.zygote import PRELOAD
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.service import VerifierService, require_sandbox

session_loop = pytest.mark.asyncio(loop_scope="module")
NUMPY = "numpy numpy.random"
SMALL = Limits(wall_s=60, cpu_s=30, memory_bytes=64 * 2**20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def numeric() -> AsyncIterator[Slot]:
    try:
        made = await Slot.start(f"{PRELOAD} {NUMPY}")
    except SandboxError as e:
        pytest.skip(f"no sandbox on this machine: {e}")
    yield made
    await made.close()


async def printed(slot: Slot, source: str, limits: Limits = SMALL) -> str:
    outcome = await slot.run(Program(source=source.encode()), limits=limits)
    assert outcome.ended is Ended.FINISHED, outcome.stderr
    return (outcome.stdout or outcome.stderr.strip().rpartition(b"\n")[2]).decode().strip()


@session_loop
async def test_programs_find_a_preloaded_package_imported_and_its_lazy_parts_readable(numeric: Slot) -> None:
    assert await printed(numeric, "import sys; print('numpy' in sys.modules)") == "True"
    assert await printed(numeric, "import numpy as np; print(np.linalg.inv(2 * np.eye(2))[0, 0])") == "0.5"
    assert await printed(numeric, "import numpy.polynomial as p; print(p.Polynomial([1, 2])(3))") == "7.0"


@session_loop
async def test_other_packages_of_the_worker_are_not_there(numeric: Slot) -> None:
    assert metadata.version("msgspec")
    assert await printed(numeric, "import msgspec") == "ModuleNotFoundError: No module named 'msgspec'"
    listed = await printed(numeric, "import os, numpy; print(os.listdir(os.path.dirname(numpy.__path__[0])))")
    assert "numpy" in listed
    assert "msgspec" not in listed
    folder = Path(msgspec.__file__).parents[1]
    assert "No such file" in await printed(numeric, f"import os; os.listdir({str(folder)!r})")


@session_loop
async def test_a_package_cannot_be_changed_by_a_program(numeric: Slot) -> None:
    assert await printed(numeric, "import numpy, os; print(os.access(numpy.__file__, os.W_OK))") == "False"
    await printed(numeric, "import numpy; numpy.sum = None; print(1)")
    assert await printed(numeric, "import numpy; print(numpy.sum([1, 2]))") == "3"


@session_loop
async def test_each_program_draws_random_numbers_of_its_own(numeric: Slot) -> None:
    draw = "import numpy; print(numpy.random.rand())"
    assert await printed(numeric, draw) != await printed(numeric, draw)


@session_loop
async def test_what_the_package_takes_itself_is_not_taken_from_programs(numeric: Slot) -> None:
    assert await printed(numeric, f"print(len(bytearray({58 * 2**20})))") == str(58 * 2**20)
    greedy = Program(source=b"x = []\nwhile True: x.append(bytearray(2**20))")
    assert (await numeric.run(greedy, limits=SMALL)).ended is Ended.MEMORY


def test_what_a_package_requires_comes_with_it() -> None:
    found = packages.find("json pandas")
    assert found.modules == ("pandas",)
    names = {name for names in found.folders.values() for name in names}
    assert {"pandas", "numpy", "dateutil"} <= names
    assert names.isdisjoint({"..", "bin", "msgspec"})


def test_optional_packages_are_taken_as_far_as_they_are_installed() -> None:
    found = packages.find("json", "nunpy numpy")
    assert found.modules == ()
    assert {name for names in found.folders.values() for name in names} >= {"numpy", "numpy.libs"}


async def test_a_module_that_is_not_installed_is_named() -> None:
    with pytest.raises(UsageError, match="no installed package has a module 'nunpy'"):
        await Slot.start("nunpy")
    with pytest.raises(UsageError, match="no installed package has a module 'nunpy'"):
        await require_sandbox(VerifierConfig(names=("code_gen",), preload=("nunpy",)))


def installed(folder: Path, name: str, source: str, *more: str) -> None:
    """A package in `folder`, whose list of files has `more`."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in (f"{name}.py", f"{info.name}/METADATA", *more)))


def test_of_a_packages_list_of_files_only_what_is_there_and_beside_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("gone.py", "/usr/share/odd", "../../bin/odd", "odd.pth", "__pycache__/odd.pyc")
    installed(tmp_path, "odd_package", "", *more)
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.find("odd_package").folders == {str(tmp_path): ["odd_package-1.dist-info", "odd_package.py"]}


async def test_a_package_that_cannot_be_imported_keeps_the_slot_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, "broken_package", "1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SandboxError, match="package broken_package: ZeroDivisionError: division by zero"):
        await Slot.start("broken_package")


async def judged(verifier: str, source: str, **settings: Any) -> float:
    row = {"verifier_metadata": {"unit_tests": {"inputs": ["4"], "outputs": ["6"]}}, "entry_point": "f"}
    row |= {"prompt": "def f(n):\n", "test": "def check(f):\n    assert f(4) == 6"}
    content = [{"type": "output_text", "text": f"```python\n{source}\n```"}]
    response = {"output": [{"type": "message", "role": "assistant", "content": content}]}
    service = VerifierService(VerifierConfig(executor="local", ray=RayConfig(actors=1), **settings))
    try:
        return (await service.verify(verifier, b"{}", msgspec.json.encode(row), msgspec.json.encode(response))).reward
    finally:
        await service.close()


async def test_programs_have_the_packages_of_their_verifier_and_of_the_workers_setting() -> None:
    function = "import numpy as np\ndef f(n): return int(np.arange(n).sum())"
    assert await judged("code_gen", f"{function}\nprint(f(int(input())))") == 1.0
    assert await judged("humaneval", function) == 0.0
    assert await judged("humaneval", function, preload=("numpy",)) == 1.0


async def test_a_python_tool_gives_its_sessions_packages() -> None:
    class Plain(PythonTool):
        call_limit_s = 60.0

    class Prepared(Plain):
        preload = "numpy"

    for kind in (Plain, Prepared):
        tool = kind({}, RolloutId("job", 0, 0))
        try:
            found = await tool.call("python", {"code": "import sys\n'numpy' in sys.modules"})
            assert found == str(kind is Prepared)
            assert await tool.call("python", {"code": "import numpy as np\nnp.arange(4).sum().item()"}) == "6"
            assert "No module named 'msgspec'" in await tool.call("python", {"code": "import msgspec"})
        finally:
            await tool.close()
