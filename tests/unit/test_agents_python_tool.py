"""The `python` tool: what the model reads, when a session is fresh, and that none is left over."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio
from aiohttp import web
from conftest import until
from sessions import SAYS_SO, alive, time_begins_when_it_says_so, with_children

from gym_bus.agents.base import Context, Task
from gym_bus.agents.python_tool import PythonTool
from gym_bus.agents.registry import TOOLBOXES
from gym_bus.agents.simple import SimpleAgent
from gym_bus.agents.tools import ToolError, call_tool
from gym_bus.errors import SandboxError
from gym_bus.messages import RolloutId
from gym_bus.models.registry import Models
from gym_bus.models.serve import serve
from gym_bus.sandbox.session import DEFAULT_SESSION_LIMITS, Session
from gym_bus.settings import ModelConfig

ROLLOUT = RolloutId("job", 3, 1)
LOST = "Its variables are lost; the next call starts a fresh session.]"


@pytest_asyncio.fixture(autouse=True, scope="module", loop_scope="module")
async def _sandbox() -> None:
    try:
        await (await Session.start()).close()
    except SandboxError as e:
        pytest.skip(f"no sandbox on this machine: {e}")


class Box(PythonTool):
    """Loses its session at a touch."""

    call_limit_s = 60.0
    limits = msgspec.structs.replace(DEFAULT_SESSION_LIMITS, memory_bytes=128 * 2**20)


HASTY_S = 0.5
"""For calls that are to go past it, and no others: a slow machine takes its time to do anything at all."""


@contextlib.asynccontextmanager
async def opened(kind: type[PythonTool] = Box) -> AsyncIterator[PythonTool]:
    box = kind({}, ROLLOUT)
    try:
        yield box
    finally:
        await box.close()


async def run(box: PythonTool, code: str) -> str:
    return await box.call("python", {"code": code})


async def run_hastily(box: PythonTool, code: str) -> str:
    box.call_limit_s = HASTY_S  # type: ignore[misc]
    try:
        return await run(box, code)
    finally:
        del box.call_limit_s


async def test_the_tool_is_registered_and_has_one_name() -> None:
    assert TOOLBOXES.load("python") is PythonTool
    assert PythonTool({}, ROLLOUT).names() == ("python",)


async def test_a_toolbox_that_is_not_used_starts_nothing(zygotes: list[psutil.Process]) -> None:
    async with opened():
        assert zygotes == []
    assert zygotes == []


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('a', end='')\n'b'", "a\n'b'"),
        ("print('a')", "a"),
        ("x = 1", "[No output.]"),
        ("print('a' * 16_385); 5", f"{'a' * 16_384}\n[Output cut: only its beginning is shown.]\n5"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
async def test_the_model_reads_output_then_value_or_traceback(code: str, text: str) -> None:
    async with opened() as box:
        assert (await run(box, code)).endswith(text)


async def test_variables_last_and_concurrent_calls_run_one_after_the_other() -> None:
    async with opened() as box:
        await run(box, "x = []")

        await asyncio.gather(*(run(box, f"x.append({i})") for i in range(5)))

        assert await run(box, "x") == "[0, 1, 2, 3, 4]"


@pytest.mark.parametrize("arguments", [{}, {"code": 1}, {"code": None}, {"code": "#" * (2**20 + 1)}])
async def test_a_call_without_fitting_code_is_told_so(arguments: dict[str, Any]) -> None:
    async with opened() as box:
        with pytest.raises(ToolError, match="argument 'code'"):
            await box.call("python", arguments)


async def test_a_call_over_its_limit_is_told_and_the_next_starts_afresh() -> None:
    async with opened() as box:
        await run(box, "x = 1")

        with time_begins_when_it_says_so():
            told = await run_hastily(box, f"print('so far')\n{SAYS_SO}while True: pass")
        after = await run(box, "x")

    assert told == f"so far\n[The session has ended: the call ran longer than 0.5 s. {LOST}"
    assert after.startswith("[This is a fresh session, earlier variables are lost: the call ran longer than 0.5 s.]\n")
    assert after.endswith("NameError: name 'x' is not defined")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os._exit(7)", "the code ended the interpreter, exit code 7"),
        ("import ctypes; ctypes.string_at(0)", "the interpreter crashed (SIGSEGV)"),
        ("import os; os.write(3, b'{}')", "the code sent messages of its own over the session's socket"),
    ],
)
async def test_an_end_of_the_interpreter_is_told_in_words(code: str, why: str) -> None:
    async with opened() as box:
        assert await run(box, code) == f"[The session has ended: {why}. {LOST}"
        assert await run(box, "2") == f"[This is a fresh session, earlier variables are lost: {why}.]\n2"
        assert await run(box, "3") == "3"


async def test_too_much_memory_is_told_in_words() -> None:
    async with opened() as box:
        text = await run(box, "x = b'x' * (300 * 2**20); len(x)")

        assert "it used more than 128 MiB of memory" in text or "MemoryError" in text or text == str(300 * 2**20)


async def test_a_session_that_died_between_two_calls_is_replaced() -> None:
    async with opened() as box:
        await run(box, "import os, threading; threading.Timer(0, os._exit, [5]).start()")
        await until(lambda: box._session is None or box._session.over)

        assert await run(box, "1") == (
            "[This is a fresh session, earlier variables are lost: the code ended the interpreter, exit code 5.]\n1"
        )


async def test_a_call_that_the_agent_gives_up_ends_the_session_and_the_next_call_says_so() -> None:
    async with opened() as box:
        await run(box, "0")

        given_up = await call_tool(box, "python", '{"code": "while True: pass"}', limit_s=0.5)

        assert "did not answer within 0.5 s" in given_up
        assert await run(box, "1") == (
            "[This is a fresh session, earlier variables are lost: the last call was given up.]\n1"
        )


async def test_an_idle_session_ends_by_itself(zygotes: list[psutil.Process]) -> None:
    class Idle(Box):
        idle_limit_s = 0.05

    async with opened(Idle) as box:
        await run(box, "x = 1")
        await until(lambda: not any(map(alive, zygotes)))

        assert await run(box, "2") == (
            "[This is a fresh session, earlier variables are lost: there was no call for 0.05 s.]\n2"
        )


async def test_a_call_keeps_an_idle_session_from_ending_under_it() -> None:
    class Idle(Box):
        idle_limit_s = 0.05

    async with opened(Idle) as box:
        await run(box, "x = 1")

        assert (await run(box, "import time; time.sleep(0.2); 'slept'")).endswith("'slept'")


async def test_sessions_are_bounded_and_a_call_waits_for_a_place() -> None:
    class One(Box):
        most_sessions = 1

    async with opened(One) as first, opened(One) as second, opened(One) as third:
        await run(first, "1")
        with pytest.raises(ToolError, match=r"no Python session was free within 0\.5 s"):
            await run_hastily(third, "3")

        waiting = asyncio.create_task(run(second, "2"))
        await until(lambda: second._lock.locked())
        await first.close()

        assert await waiting == "2"
        await second.close()
        assert await run(third, "3") == "3"


async def test_a_place_is_given_back_however_a_session_ends() -> None:
    class One(Box):
        most_sessions = 1

    for code, call in (("1", run), ("import os; os._exit(1)", run), ("while True: pass", run_hastily)):
        async with opened(One) as box:
            await call(box, code)
            assert (await run(box, "5")).endswith("5")


async def test_a_session_that_cannot_start_is_told_and_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class One(Box):
        most_sessions = 1

    async def refuse(limits: object, **_: object) -> Session:
        raise SandboxError("no namespaces")

    async with opened(One) as box:
        with monkeypatch.context() as patched:
            patched.setattr(Session, "start", refuse)
            for _ in range(2):
                with pytest.raises(ToolError, match="no Python session could be started: no namespaces"):
                    await run(box, "1")

        assert await run(box, "1") == "1"


async def test_closing_leaves_no_process_and_takes_no_more_calls(zygotes: list[psutil.Process]) -> None:
    box = Box({}, ROLLOUT)
    await run(box, "1")
    running, queued = (asyncio.create_task(run(box, "while True: pass")) for _ in range(2))
    await until(lambda: box._session is not None and box._session._lock.locked())
    held = with_children(zygotes)

    await box.close()

    assert "[The session has ended: it was closed." in await running
    for late in (queued, run(box, "1")):
        with pytest.raises(ToolError, match="the rollout is over"):
            await late
    assert len(held) >= 3  # the process that holds the zygote, the zygote, the session
    await until(lambda: not any(map(alive, held)))
    await box.close()


WORKER = """
import asyncio, sys
from gym_bus.agents.python_tool import PythonTool
from gym_bus.messages import RolloutId

async def main():
    PythonTool.call_limit_s = 600.0
    idle, busy = (PythonTool({}, RolloutId("job", 0, n)) for n in range(2))
    await idle.call("python", {"code": "x = 1"})
    await busy.call("python", {"code": "x = 1"})
    running = asyncio.create_task(busy.call("python", {"code": "while True: pass"}))
    while not busy._session._lock.locked():
        await asyncio.sleep(0)
    print("running", flush=True)
    await running

asyncio.run(main())
"""


async def test_a_worker_that_is_killed_leaves_no_process() -> None:
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"running\n"
    held = psutil.Process(worker.pid).children(recursive=True)

    worker.kill()
    await worker.wait()

    assert len(held) >= 6  # of each session: the process that holds the zygote, the zygote, the session
    await until(lambda: not any(map(alive, held)))


class Scripted:
    """A Responses endpoint that calls the tool with each code in turn, and then answers in words."""

    def __init__(self, *codes: str) -> None:
        self._codes = list(codes)

    async def answer(self, request: web.Request) -> web.Response:
        await request.read()
        item: dict[str, Any]
        if self._codes:
            arguments = msgspec.json.encode({"code": self._codes.pop(0)}).decode()
            item = {"type": "function_call", "call_id": "c", "name": "python", "arguments": arguments}
        else:
            content = [{"type": "output_text", "text": "done", "annotations": []}]
            item = {"type": "message", "role": "assistant", "content": content}
        usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
        head = {"id": "r", "object": "response", "created_at": 1, "model": "m"}
        return web.json_response({**head, "output": [item], "usage": usage})


@contextlib.asynccontextmanager
async def context_of(endpoint: Scripted) -> AsyncIterator[Context]:
    app = web.Application()
    app.router.add_post("/v1/responses", endpoint.answer)
    runner, port = await serve(app, "127.0.0.1", 0)
    models = Models({"m": ModelConfig(base_url=f"http://127.0.0.1:{port}/v1")})
    try:
        yield Context(models.get("m"), ROLLOUT, 1, 60.0, partial(models.client, "m"))
    finally:
        await models.close()
        await runner.cleanup()


async def test_the_simple_agent_works_with_one_session_per_rollout_and_closes_it(
    zygotes: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PythonTool, "call_limit_s", 60.0)
    codes = ("x = 20", "print('hi')\nx + 1", "1 / 0", "import os; os._exit(1)", "x", "exit()")

    async with context_of(Scripted(*codes)) as context:
        task = Task(rollout=ROLLOUT, row={}, params={"input": "go"})
        produced = await SimpleAgent(toolbox="python").run(task, context)

    items = msgspec.json.decode(produced.response)["output"]
    outputs = [item["output"] for item in items if item["type"] == "function_call_output"]
    assert outputs[:2] == ["[No output.]", "hi\n21"]
    assert outputs[2].endswith("ZeroDivisionError: division by zero")
    assert outputs[3].startswith("[The session has ended: the code ended the interpreter, exit code 1.")
    assert outputs[4].startswith("[This is a fresh session") and outputs[4].endswith("name 'x' is not defined")
    assert outputs[5].startswith("[The code called exit()")
    assert items[-1]["content"][0]["text"] == "done"
    assert len(zygotes) == 2  # a second one after the end of the first
    await until(lambda: not any(map(alive, zygotes)))
