"""Python sessions in the real sandbox: what lasts from call to call, what is shown, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import psutil
import pytest
import pytest_asyncio
from conftest import until
from sessions import SAYS_SO, alive, time_begins_when_it_says_so, with_children

from gym_bus.errors import SandboxError
from gym_bus.sandbox import session as session_module
from gym_bus.sandbox.session import DEFAULT_SESSION_LIMITS, PRINTED_BYTES, Answer, Session
from gym_bus.sandbox.session_side import RESULT_BYTES

LIMIT_S = 60.0
"""Of calls that are to end by themselves."""


@contextlib.asynccontextmanager
async def started(memory_bytes: int = 512 * 2**20) -> AsyncIterator[Session]:
    try:
        made = await Session.start(msgspec.structs.replace(DEFAULT_SESSION_LIMITS, memory_bytes=memory_bytes))
    except SandboxError as e:
        pytest.skip(f"no sandbox on this machine: {e}")
    try:
        yield made
    finally:
        await made.close()


@pytest_asyncio.fixture
async def session() -> AsyncIterator[Session]:
    async with started() as made:
        yield made


def need_forks(session: Session) -> None:
    if session._slot._zygote.group is None:
        pytest.skip("without a cgroup of its own a sandbox lets no program fork, and bounds no tree's memory")


def processes(session: Session) -> list[psutil.Process]:
    assert session._slot._zygote.pid
    return with_children([psutil.Process(session._slot._zygote.pid)])


async def test_variables_functions_files_and_the_last_value_last_from_call_to_call(session: Session) -> None:
    await session.call("x = 20\ndef f(y): return x + y\nopen('kept', 'w').write('here')", LIMIT_S)

    assert (await session.call("x += 1; f(1)", LIMIT_S)).result == "22"
    assert (await session.call("_ + 1", LIMIT_S)).result == "23"
    assert (await session.call("open('/tmp/kept').read()", LIMIT_S)).result == "'here'"


async def test_two_sessions_see_nothing_of_each_other(session: Session) -> None:
    async with started() as other:
        await session.call("import os; mine = 1; open('mine', 'w').close()", LIMIT_S)

        assert "NameError" in (await other.call("mine", LIMIT_S)).result
        assert (await other.call("import os; os.listdir('.'), os.getpid()", LIMIT_S)).result == "([], 1)"


@pytest.mark.parametrize(
    ("code", "printed", "result"),
    [
        ("", "", ""),
        ("1 + 1", "", "2"),
        ("x = 5", "", ""),
        ("None", "", ""),
        ("print('a'); 'b'", "a\n", "'b'"),
        ("if True:\n    5", "", ""),
        ("'\\ud800'", "", "'\\ud800'"),
        ("print('\\ud800ä')", "\\ud800ä\n", ""),
        ("from __future__ import annotations\ndef f(x: nowhere): return x\nf(3)", "", "3"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nA(1)", "", "A(x=1)"),
    ],
)
async def test_a_call_shows_what_was_printed_and_the_last_expression(
    session: Session, code: str, printed: str, result: str
) -> None:
    assert await session.call(code, LIMIT_S) == Answer(printed=printed, cut=False, result=result)


async def test_output_and_error_come_in_the_order_in_which_they_were_written(session: Session) -> None:
    code = """
        import os, sys
        print("a", end="")
        sys.stderr.write("b")
        os.write(1, b"c")
        sys.stdout.buffer.write(b"d")
        sys.stderr.flush()
        os.write(2, b"e")
        print("f")
    """
    assert (await session.call("if True:" + code, LIMIT_S)).printed == "abcdef\n"


async def test_output_over_its_bound_is_dropped_and_the_code_goes_on(session: Session) -> None:
    code = "import os\nfor _ in range(1000): print('ä' * 1000)\n'done'"

    answer = await session.call(code, LIMIT_S)

    assert (answer.cut, answer.result, answer.over) == (True, "'done'", "")
    assert len(answer.printed.encode()) <= PRINTED_BYTES + 4
    assert await session.call("print('next')", LIMIT_S) == Answer(printed="next\n", cut=False)


async def test_a_long_value_shows_its_beginning_and_a_long_traceback_its_end(session: Session) -> None:
    value = await session.call("list(range(100_000))", LIMIT_S)
    error = await session.call("raise ValueError('x' * 100_000 + 'the end')", LIMIT_S)

    assert value.result.startswith("[0, 1, 2,") and "[cut: it is 688890 bytes long]" in value.result
    assert error.result.endswith("the end")
    assert max(len(value.result), len(error.result)) < RESULT_BYTES + 100


async def test_a_traceback_shows_the_submitted_code_alone(session: Session) -> None:
    await session.call("import json\ndef load(text):\n    return json.loads(text)", LIMIT_S)

    answer = await session.call("x = 1\nload('{')", LIMIT_S)

    lines = [line for line in answer.result.splitlines() if set(line) - set(" ^~")]  # 3.13 marks other parts
    assert lines == [
        "Traceback (most recent call last):",
        '  File "<call 2>", line 2, in <module>',
        "    load('{')",
        '  File "<call 1>", line 3, in load',
        "    return json.loads(text)",
        answer.result.splitlines()[-1],
    ]
    assert lines[-1].startswith("json.decoder.JSONDecodeError: Expecting property name")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def (", "SyntaxError"),
        ("x = '\0'", "null bytes"),
        ("(" * 10_000, "too many nested parentheses"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    missing", "During handling of the above exception"),
        ("raise ExceptionGroup('all', [ValueError('one')])", "ValueError: one"),
        ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "E: <exception str() failed>"),
        ("class A:\n    def __repr__(self): return 1 / 0\nA()", "ZeroDivisionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import sys; sys.exit('why')", "exit('why')"),
        ("exit()", "The code called exit() and stopped there"),
        ("x = bytearray(2**40)", "MemoryError"),
    ],
)
async def test_an_error_is_shown_and_the_session_goes_on(session: Session, code: str, says: str) -> None:
    await session.call("kept = 1", LIMIT_S)

    answer = await session.call(code, LIMIT_S)

    assert says in answer.result
    assert (answer.over, (await session.call("kept", LIMIT_S)).result) == ("", "1")


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import sys; sys.stdout.detach()",
        "import sys; sys.stdout = None",
        "import os; os.close(1); os.close(2)",
        "import os, sys; null = os.open('/dev/null', os.O_WRONLY); os.dup2(null, 1); os.dup2(null, 2)",
    ],
)
async def test_what_a_call_did_to_its_output_does_not_last(session: Session, code: str) -> None:
    await session.call(code, LIMIT_S)

    assert (await session.call("import sys; print('out'); print('err', file=sys.stderr)", LIMIT_S)).printed == (
        "out\nerr\n"
    )


async def test_a_call_over_its_limit_ends_the_session_and_keeps_what_it_had_printed(session: Session) -> None:
    held = processes(session)

    with time_begins_when_it_says_so():
        answer = await session.call(f"print('so far', end='')\n{SAYS_SO}while True: pass", 0.1)

    assert (answer.printed, answer.over) == ("so far", "the call ran longer than 0.1 s")
    assert session.over
    await until(lambda: not any(map(alive, held)))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; print('last'); os._exit(3)", "the code ended the interpreter, exit code 3"),
        ("import ctypes; print('last'); ctypes.string_at(0)", "the interpreter crashed (SIGSEGV)"),
        ("import os; print('last'); os.close(3)", "the code ended the interpreter"),
        ("import os; print('last'); os.write(3, b'forged')", "messages of its own"),
        ("import os; print('last'); os.write(3, b'x' * 60_000)", "messages of its own"),
        ("import gc, os, socket; print('last'); os.close(3); os.read(0, 1); os._exit(0)", "exit code 0"),
    ],
)
async def test_an_end_of_the_interpreter_is_told_and_is_no_error(session: Session, code: str, why: str) -> None:
    answer = await session.call(code, LIMIT_S)

    assert why in answer.over
    assert (answer.printed, answer.result) == ("last\n", "")


async def test_code_that_closes_its_socket_and_goes_on_is_ended(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "DEATH_S", 0.1)

    answer = await session.call("import os, time; os.close(3); time.sleep(1000)", LIMIT_S)

    assert answer.over == "the code closed the session's socket"


async def test_too_much_memory_ends_the_session() -> None:
    async with started(memory_bytes=128 * 2**20) as session:
        need_forks(session)

        answer = await session.call("x = b'x' * (300 * 2**20)", LIMIT_S)

        assert answer.over == "it used more than 128 MiB of memory"


async def test_a_session_that_died_between_two_calls_says_why(session: Session) -> None:
    await session.call(
        "import os, sys, threading; threading.Thread(target=lambda: sys.stdin.read() or os._exit(4)).start()", LIMIT_S
    )
    await until(lambda: session.over)

    assert await session.last_words() == "the code ended the interpreter, exit code 4"
    assert "exit code 4" in (await session.call("1", LIMIT_S)).over


async def test_processes_that_a_call_leaves_are_ended_with_it(session: Session) -> None:
    need_forks(session)
    await session.call("", LIMIT_S)  # all of its processes are there
    before = processes(session)
    code = "import os, signal\nchildren = [os.fork()]\nif not children[0]:\n    os.setsid(); os.fork(); signal.pause()"

    answer = await session.call(code, LIMIT_S)

    assert (answer.result, answer.over) == ("", "")
    await until(lambda: processes(session) == before)
    assert (await session.call("import os\nos.kill(children[0], 0)", LIMIT_S)).result.startswith("Traceback")


async def test_a_forked_child_that_comes_to_the_codes_end_does_not_answer_for_the_call(session: Session) -> None:
    need_forks(session)

    answer = await session.call(
        "import os\nchild = os.fork()\nif child: os.waitpid(child, 0)\n'it' if child else ''", LIMIT_S
    )

    assert (answer.printed, answer.result) == ("''", "'it'")


async def test_there_is_no_network_and_nothing_of_the_host(session: Session) -> None:
    connect = await session.call("import socket; socket.create_connection(('127.0.0.1', 80))", LIMIT_S)
    look = await session.call(
        "import os; sorted(set(os.listdir('/')) & {'work', 'home', 'proc', 'etc', 'sys'})", LIMIT_S
    )
    write = await session.call("open('/here', 'w')", LIMIT_S)
    environment = await session.call("import os; sorted(os.environ)", LIMIT_S)

    assert "Operation not permitted" in connect.result
    assert look.result == "[]"
    assert "Read-only file system" in write.result
    assert environment.result == "['HOME', 'LANG', 'PATH', 'TMPDIR']"


async def test_closing_kills_the_processes_and_ends_a_call_that_runs(session: Session) -> None:
    held = processes(session)
    running = asyncio.create_task(session.call("while True: pass", LIMIT_S))
    await until(lambda: session._lock.locked())

    await session.close()

    assert (await running).over == "it was closed"
    await until(lambda: not any(map(alive, held)))
    await session.close()


async def test_a_call_whose_caller_is_cancelled_ends_the_session(session: Session) -> None:
    running = asyncio.create_task(session.call("while True: pass", LIMIT_S))
    await until(lambda: session._lock.locked())
    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert session.over


async def test_a_start_that_is_cancelled_leaves_no_process(zygotes: list[psutil.Process]) -> None:
    starting = asyncio.create_task(Session.start())
    await until(lambda: zygotes)
    held = with_children(zygotes)
    starting.cancel()

    with contextlib.suppress(asyncio.CancelledError):
        await (await starting).close()  # it was ready before the cancellation came
    await until(lambda: not any(map(alive, [*held, *zygotes])))


async def test_twenty_sessions_run_at_once() -> None:
    async with contextlib.AsyncExitStack() as stack:
        sessions = await asyncio.gather(*(stack.enter_async_context(started()) for _ in range(20)))
        await asyncio.gather(*(s.call(f"x = {i}", LIMIT_S) for i, s in enumerate(sessions)))

        answers = await asyncio.gather(*(s.call("x * x", LIMIT_S) for s in sessions))

    assert [answer.result for answer in answers] == [str(i * i) for i in range(20)]
