"""Programs in the real sandbox: what they may do, how they end, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import until
from sessions import alive, with_children

from gym_bus.errors import SandboxError, SandboxRefused, UsageError
from gym_bus.sandbox import languages
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program
from gym_bus.sandbox.slot import Slot

pytestmark = pytest.mark.asyncio(loop_scope="session")

REPOSITORY = Path(__file__).resolve().parents[2]


async def run(slot: Slot, source: str, stdin: bytes = b"", **limits: Any) -> Outcome:
    bounds = Limits(**{"wall_s": 60.0, "cpu_s": 30.0, **limits})
    return await slot.run(Program(source=textwrap.dedent(source).encode()), stdin, bounds)


def need_forks(slot: Slot) -> None:
    if not slot._forks:
        pytest.skip("without a cgroup of its own a sandbox lets no program fork")


async def test_a_program_reads_its_input_and_prints(slot: Slot) -> None:
    outcome = await run(slot, "print(int(input()) + 1); print(repr(input()))", "41\nä\n".encode())

    assert outcome.ok
    assert outcome.stdout == "42\n'ä'\n".encode()
    assert (outcome.exit_code, outcome.signal, outcome.stderr) == (0, None, b"")
    assert outcome.max_rss_bytes > 2**20


async def test_a_program_gets_its_arguments_and_files(slot: Slot) -> None:
    program = Program(
        source=b"import sys; print(sys.argv[1:], open('deep/a').read(), open('b', 'rb').read())",
        arguments=("x", "é"),
        files={"deep/a": b"A", "b": b"\xff"},
    )

    assert (await slot.run(program)).stdout.decode() == "['x', 'é'] A b'\\xff'\n"


@pytest.mark.parametrize(
    ("source", "exit_code", "stdout", "stderr"),
    [
        ("", 0, b"", b""),
        ("import sys; print(1); sys.exit()", 0, b"1\n", b""),
        ("raise SystemExit(3)", 3, b"", b""),
        ("raise SystemExit('bye')", 1, b"", b"bye\n"),
        ("import os; os._exit(258)", 2, b"", b""),
        ("import sys; sys.stderr.write('said')", 0, b"", b"said"),
        ("import atexit; atexit.register(print, 'at the end')", 0, b"at the end\n", b""),
        ("import threading; threading.Timer(0.01, print, ['late']).start()", 0, b"late\n", b""),
        ("import os; os.write(1, b'\\xff\\xfe')", 0, b"\xff\xfe", b""),
        ("print('lost'); import os; os.close(1)", 120, b"", b""),
        ("if __name__ == '__main__': print('main')", 0, b"main\n", b""),
    ],
)
async def test_a_program_that_ends_by_itself_says_how(
    slot: Slot, source: str, exit_code: int, stdout: bytes, stderr: bytes
) -> None:
    outcome = await run(slot, source)

    assert (outcome.ended, outcome.exit_code) == (Ended.FINISHED, exit_code)
    assert (outcome.stdout, outcome.stderr) == (stdout, stderr)
    assert outcome.ok is (exit_code == 0)


async def test_a_traceback_shows_the_program_alone(slot: Slot) -> None:
    outcome = await run(slot, "def f():\n    return 1 / 0\nf()")

    assert (outcome.ended, outcome.exit_code) == (Ended.FINISHED, 1)
    assert outcome.stderr.startswith(b'Traceback (most recent call last):\n  File "main.py", line 3')
    assert outcome.stderr.endswith(b"ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("source", "limits", "ended"),
    [
        ("import time; time.sleep(60)", {"wall_s": 0.2}, Ended.WALL_LIMIT),
        (
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
            {"wall_s": 0.2},
            Ended.WALL_LIMIT,
        ),
        ("while True: pass", {"cpu_s": 1.0, "wall_s": 60.0}, Ended.CPU_LIMIT),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            {"cpu_s": 1.0, "wall_s": 60.0},
            Ended.CPU_LIMIT,
        ),
        ("x = bytearray(2**40)", {}, Ended.MEMORY),
        ("x = [bytearray(2**20) for _ in range(10**6)]", {"memory_bytes": 64 * 2**20}, Ended.MEMORY),
        ("print('x' * 2**20)", {"output_bytes": 2**16}, Ended.OUTPUT_LIMIT),
        ("while True: print('x' * 1000)", {"output_bytes": 2**16}, Ended.OUTPUT_LIMIT),
        (
            "import os\nwhile True:\n    try: os.write(1, b'x' * 1000)\n    except OSError: pass",
            {"output_bytes": 2**16, "cpu_s": 1.0},
            Ended.OUTPUT_LIMIT,
        ),
        ("import os; os.abort()", {}, Ended.SIGNALLED),
        ("import ctypes; ctypes.string_at(0)", {}, Ended.SIGNALLED),
        ("def (", {}, Ended.COMPILE_ERROR),
        ("\0", {}, Ended.COMPILE_ERROR),
    ],
)
async def test_every_end_has_its_one_cause(slot: Slot, source: str, limits: dict[str, Any], ended: Ended) -> None:
    outcome = await run(slot, source, **limits)

    assert outcome.ended is ended
    assert not outcome.ok
    assert (outcome.signal is not None) is (outcome.exit_code is None)


async def test_time_that_setting_up_takes_is_not_the_programs(slot: Slot) -> None:
    ends = [(await run(slot, "pass", wall_s=1e-6)).ended for _ in range(20)]  # it takes longer than that to begin

    assert set(ends) <= {Ended.FINISHED, Ended.WALL_LIMIT}


async def test_what_does_not_compile_says_why_and_a_program_cannot_pretend_it(slot: Slot) -> None:
    assert b"SyntaxError" in (await run(slot, "x ===")).stderr
    assert (await run(slot, "import os; os._exit(65)")).ended is Ended.FINISHED
    assert (await run(slot, "import os; os._exit(66)")).ended is Ended.FINISHED


async def test_a_program_that_catches_its_memory_error_may_go_on(slot: Slot) -> None:
    outcome = await run(slot, "try:\n    x = bytearray(2**40)\nexcept MemoryError:\n    print('none left')")

    assert (outcome.ok, outcome.stdout) == (True, b"none left\n")


async def test_output_is_cut_at_its_limit(slot: Slot) -> None:
    outcome = await run(
        slot,
        """
        import os
        for fd in (1, 2):
            try:
                while True:
                    os.write(fd, b"x" * 5000)
            except OSError:
                pass
        """,
        output_bytes=2**15,
    )

    assert 2**15 - 4096 <= len(outcome.stdout) <= 2**15
    assert 2**16 - 5000 <= len(outcome.stderr) <= 2**16


@pytest.mark.parametrize(("size", "cut"), [(0, False), (100, False), (4095, False), (4096, False), (4097, True)])
async def test_output_at_its_limit_is_whole_and_one_byte_more_is_cut(slot: Slot, size: int, cut: bool) -> None:
    outcome = await run(slot, f"import os; os.write(1, b'x' * {size})", output_bytes=4096)

    assert (outcome.ended is Ended.OUTPUT_LIMIT, len(outcome.stdout)) == (cut, min(size, 4096))


async def test_standard_error_is_cut_and_the_program_goes_on(slot: Slot) -> None:
    outcome = await run(slot, "import sys; print('x' * 2**17, file=sys.stderr); sys.stderr.write('y'); print('done')")

    assert (outcome.ok, outcome.stdout, len(outcome.stderr)) == (True, b"done\n", 64 * 1024)


async def test_a_file_is_bounded(slot: Slot) -> None:
    outcome = await run(slot, "open('big', 'wb').write(bytes(2**22))", output_bytes=2**16, file_bytes=2**20)

    assert outcome.exit_code == 1
    assert b"File too large" in outcome.stderr


async def test_the_scratch_folder_is_bounded(slot: Slot) -> None:
    source = "for i in range(100): open(f'f{i}', 'wb', buffering=0).write(bytes(2**20))"

    assert b"No space left" in (await run(slot, source)).stderr


@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import os; os.kill(2, 0)",
        "import os; os.setuid(0)",
        "import os; os.unshare(0x10000000) if hasattr(os, 'unshare') else os.setuid(0)",
        "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])",
        "import os; os.listdir('/proc')",
        "import os; os.mknod('/tmp/device', 0o20666, os.makedev(1, 1))",
        "open('/written', 'w')",
        "open('/dev/shm/written', 'w')",
        "import os; open(os.__file__, 'a')",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    ],
)
async def test_what_reaches_beyond_the_sandbox_is_refused(slot: Slot, source: str) -> None:
    outcome = await run(slot, source)

    assert (outcome.ended, outcome.exit_code) == (Ended.FINISHED, 1)
    assert outcome.stderr.rstrip().rpartition(b"\n")[2].split(b":")[0] in (
        b"PermissionError",
        b"FileNotFoundError",
        b"ProcessLookupError",
        b"OSError",
        b"ValueError",
        b"socket.gaierror",
    )


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/etc/shadow",
        "/proc/self/environ",
        "/proc/1/cmdline",
        "/sys/kernel/notes",
        "/root/.bashrc",
        "/dev/mem",
        str(REPOSITORY / "pyproject.toml"),
        str(REPOSITORY / "verifiers/gym_bus/verifiers/code_gen.py"),
    ],
)
async def test_the_hosts_files_are_not_there(slot: Slot, path: str) -> None:
    assert b"FileNotFoundError" in (await run(slot, f"open({path!r})")).stderr


async def test_a_temporary_file_of_the_host_is_not_there(slot: Slot, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")

    assert b"FileNotFoundError" in (await run(slot, f"open({str(tmp_path / 'secret')!r})")).stderr


async def test_the_home_folder_holds_the_interpreter_at_most(slot: Slot) -> None:
    home, prefix = Path.home(), Path(sys.base_prefix)
    seen = [prefix.relative_to(home).parts[0]] if prefix.is_relative_to(home) else []

    outcome = await run(
        slot,
        f"""
        import os
        try:
            print(os.listdir({str(home)!r}))
        except OSError:
            print([])
        """,
    )

    assert outcome.stdout.decode() == f"{seen}\n"


async def test_nothing_of_the_hosts_environment_gets_in(monkeypatch: pytest.MonkeyPatch, slot: Slot) -> None:
    monkeypatch.setenv("GYM_BUS_SECRET", "secret")
    fresh = await Slot.start()
    try:
        outcome = await run(fresh, "import os; print(sorted(os.environ), os.getcwd(), os.getpid())")
    finally:
        await fresh.close()

    assert outcome.stdout == b"['HOME', 'LANG', 'PATH', 'TMPDIR'] /tmp 1\n"


async def test_a_program_has_its_three_streams_and_no_other_descriptor(slot: Slot) -> None:
    source = """
        import os
        def is_open(fd):
            try:
                os.fstat(fd)
            except OSError:
                return False
            return True
        print([fd for fd in range(64) if is_open(fd)])
        """

    assert (await run(slot, source)).stdout == b"[0, 1, 2]\n"


async def test_only_the_standard_library_can_be_imported(slot: Slot) -> None:
    assert b"ModuleNotFoundError" in (await run(slot, "import msgspec")).stderr
    assert b"ModuleNotFoundError" in (await run(slot, "import gym_bus.verifiers.code_gen")).stderr


async def test_processes_are_bounded(slot: Slot) -> None:
    source = """
        import os
        forks = 0
        try:
            while os.fork():
                forks += 1
            os._exit(0)
        except OSError:
            print(forks < 8)
        """

    assert (await run(slot, source, processes=8)).stdout == b"True\n"


async def test_threads_are_bounded(slot: Slot) -> None:
    source = """
        import threading
        stop = threading.Event()
        started = 0
        try:
            while True:
                threading.Thread(target=stop.wait).start()
                started += 1
        except RuntimeError:
            print(started < 8)
        stop.set()
        """

    assert (await run(slot, source, processes=8)).stdout == b"True\n"


async def test_a_fork_bomb_ends_with_its_time_and_the_next_program_runs(slot: Slot) -> None:
    source = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """

    assert (await run(slot, source, processes=8, wall_s=0.3)).ended is Ended.WALL_LIMIT
    assert (await run(slot, "print(1)")).stdout == b"1\n"


async def test_daemons_end_with_their_program(slot: Slot) -> None:
    need_forks(slot)
    source = """
        import os, time
        ready, mine = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(mine, b"x")
                time.sleep(600)
            os._exit(0)
        os.read(ready, 1)
        print("started")
        """
    await run(slot, "")
    zygote = psutil.Process(slot._zygote.pid)
    before = zygote.children(recursive=True)

    outcome = await run(slot, source)

    assert (outcome.ok, outcome.stdout) == (True, b"started\n")
    assert zygote.children(recursive=True) == before


async def test_a_tree_of_processes_shares_one_memory_limit(slot: Slot) -> None:
    need_forks(slot)
    source = """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                held = b"".join(bytes([i % 256]) * 2**20 for i in range(32))
                time.sleep(60)
        os.wait()
        """

    assert (await run(slot, source, memory_bytes=64 * 2**20)).ended is Ended.MEMORY
    assert (await run(slot, "print(1)")).stdout == b"1\n"


async def test_nothing_is_left_for_the_next_program(slot: Slot) -> None:
    leaves = """
        import os, builtins, sys, json
        os.makedirs("a/b/c")
        open("a/b/c/file", "w").write("left")
        os.symlink("/usr", "link")
        os.mkdir("closed", 0)
        os.mkdir("d")
        open("d/file", "w").close()
        os.chmod("d/file", 0)
        os.chmod("d", 0)
        builtins.left = json.left = sys.left = os.environ["LEFT"] = "left"
        """
    looks = """
        import os, builtins, sys, json
        print(os.listdir("/tmp"), [hasattr(m, "left") for m in (builtins, sys, json)], "LEFT" in os.environ)
        """

    assert (await run(slot, leaves)).ok
    assert (await run(slot, looks)).stdout == b"[] [False, False, False] False\n"


async def test_random_numbers_differ_from_program_to_program(slot: Slot) -> None:
    said = {(await run(slot, "import random; print(random.random())")).stdout for _ in range(3)}

    assert len(said) == 3


async def test_many_callers_of_one_slot_get_their_own_outcomes(slot: Slot) -> None:
    outcomes = await asyncio.gather(*(run(slot, f"print({i}, input())", b"%d" % i) for i in range(50)))

    assert [o.stdout for o in outcomes] == [b"%d %d\n" % (i, i) for i in range(50)]


async def test_cases_run_in_order_each_afresh(slot: Slot) -> None:
    program = Program(source=b"import os; print(input(), os.listdir()); open('left', 'w')")

    outcomes = await slot.run_cases(program, [b"a", b"b"])

    assert [o.stdout for o in outcomes] == [b"a []\n", b"b []\n"]


async def test_cases_after_a_stop_are_not_run(slot: Slot) -> None:
    asked: list[tuple[int, bytes]] = []

    def go_on(case: int, outcome: Outcome) -> bool:
        asked.append((case, outcome.stdout))
        return case < 1

    outcomes = await slot.run_cases(Program(source=b"print(input())"), [b"a", b"b", b"c", b"d"], go_on=go_on)

    assert asked == [(0, b"a\n"), (1, b"b\n")]
    assert [o.ended for o in outcomes] == [Ended.FINISHED, Ended.FINISHED, Ended.NOT_RUN, Ended.NOT_RUN]
    assert not outcomes[-1].ok


async def test_a_pair_talks_through_descriptor_3_and_shares_nothing_else(slot: Slot) -> None:
    solution = b"import os; open('mine', 'w'); os.write(3, b'ask'); print(os.read(3, 9), os.listdir('/tmp'))"
    tester = b"import os; print(os.read(3, 9), os.listdir('/tmp')); os.write(3, b'reply')"

    first, second = await slot.run_pair(Program(source=solution), Program(source=tester))

    assert (first.stdout, second.stdout) == (b"b'reply' ['mine']\n", b"b'ask' []\n")


async def test_the_end_of_one_of_a_pair_is_seen_by_the_other(slot: Slot) -> None:
    first, second = await slot.run_pair(
        Program(source=b"import os; os.abort()"), Program(source=b"import os; print(os.read(3, 1))")
    )

    assert (first.ended, second.stdout) == (Ended.SIGNALLED, b"b''\n")


async def test_an_unknown_language_is_a_usage_error(slot: Slot) -> None:
    perl = Program(source=b"print 1", language="perl")

    with pytest.raises(UsageError, match="language 'perl' is not supported: known: bash"):
        await slot.run(perl)
    with pytest.raises(UsageError, match="perl"):
        await slot.run_pair(perl, perl)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a//b", "."])
async def test_a_file_outside_the_scratch_folder_is_wrong_usage(slot: Slot, name: str) -> None:
    with pytest.raises(UsageError, match="expected a path below the program's working folder"):
        await slot.run(Program(source=b"", files={name: b""}))


async def test_a_program_that_cannot_be_set_up_is_an_infrastructure_fault_and_costs_the_zygote(slot: Slot) -> None:
    before = slot._zygote.pid

    with pytest.raises(SandboxError, match=r"the program could not be set up: .*File exists"):
        await slot.run(Program(source=b"", files={"a": b"", "a/b": b""}))

    assert (await run(slot, "print(1)")).stdout == b"1\n"
    assert slot._zygote.pid != before


async def test_a_tool_that_this_machine_lacks_is_no_fault_of_the_program(
    slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_forks(slot)
    missing = languages.Language(file="main.x", build=("/usr/bin/no-such-compiler", "main.x"), command=("/tmp/main",))
    monkeypatch.setitem(languages.COMMANDS, "cpp", missing)

    with pytest.raises(SandboxRefused, match="cpp needs /usr/bin/no-such-compiler"):
        await slot.run(Program(source=b"", language="cpp"))


async def test_the_size_of_the_scratch_folder_is_a_limit() -> None:
    source = """
        import os
        try:
            open('f', 'wb').write(bytes(2**20))
        except OSError as e:
            print(e.strerror)
        """
    own = await Slot.start()
    try:
        said = [(await run(own, source, disk_bytes=size)).stdout for size in (2**16, 2**21, 0)]
    finally:
        await own.close()

    assert said == [b"No space left on device\n", b"", b"No space left on device\n"]


async def test_the_cpu_time_of_all_processes_together_is_limited(slot: Slot) -> None:
    need_forks(slot)
    source = """
        import os, time
        children = [os.fork() for _ in range(2)]
        while time.process_time() < 0.15:
            pass
        if all(children):
            for child in children:
                os.waitpid(child, 0)
            print("done")
        """

    assert (await run(slot, source)).ok
    assert (await run(slot, source, cpu_s=0.3)).ended is Ended.CPU_LIMIT


async def test_a_limit_of_less_than_a_second_of_cpu_time_holds(slot: Slot) -> None:
    source = "import time\nwhile time.process_time() < 0.2: pass\nprint('done')"

    assert (await run(slot, source, cpu_s=0.1)).ended is Ended.CPU_LIMIT


@pytest.mark.parametrize("limit", ["(0, 0)", "(0, 1)"])
async def test_a_program_that_lowers_its_own_limit_of_cpu_time_ends_by_it(slot: Slot, limit: str) -> None:
    source = f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, {limit})\nwhile True: pass"

    assert (await run(slot, source, cpu_s=30.0)).ended is Ended.CPU_LIMIT


async def test_a_program_that_is_killed_from_outside_is_an_infrastructure_fault() -> None:
    own = await Slot.start()
    try:
        holder = psutil.Process(own._zygote.pid)
        source = "import _thread, time\n_thread.start_new_thread(time.sleep, (600,))\ntime.sleep(600)"
        # So much CPU time as it can by no account have used up, however slow the machine is.
        running = asyncio.ensure_future(run(own, source, wall_s=600.0, cpu_s=3600.0))
        await until(lambda: [p.num_threads() for p in holder.children(recursive=True)][1:] == [2])  # the program runs
        holder.children(recursive=True)[-1].kill()

        with pytest.raises(SandboxError, match="killed from outside"):
            await running
        assert (await run(own, "print(1)")).stdout == b"1\n"
    finally:
        await own.close()


@pytest.mark.parametrize("send", ["os.kill(os.getpid(), signal.SIGINT)", "signal.raise_signal(signal.SIGINT)"])
async def test_an_interrupt_is_python_s_own_exception(slot: Slot, send: str) -> None:
    source = f"import os, signal, time\ntry:\n    {send}\n    time.sleep(9)\nexcept KeyboardInterrupt:\n    print('ok')"

    assert (await run(slot, source)).stdout == b"ok\n"


async def test_a_folder_as_deep_as_the_disk_allows_is_cleaned_up(slot: Slot) -> None:
    await run(slot, "")
    before = slot._zygote.pid

    outcome = await run(
        slot, "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\nopen('f', 'w').close()"
    )

    assert (outcome.ended, slot._zygote.pid) == (Ended.FINISHED, before)
    assert (await run(slot, "import os; print(os.listdir('/tmp'))")).stdout == b"[]\n"


async def test_a_zygote_killed_under_a_program_is_an_infrastructure_fault_and_the_next_program_runs() -> None:
    own = await Slot.start()
    try:
        running = asyncio.ensure_future(run(own, "import time; time.sleep(600)", wall_s=600.0))
        await asyncio.sleep(0)  # it is now waiting for the program's end
        assert own._zygote.pid
        os.kill(own._zygote.pid, signal.SIGKILL)

        with pytest.raises(SandboxError, match="the zygote is gone"):
            await running
        assert (await run(own, "print(1)")).stdout == b"1\n"
    finally:
        await own.close()


async def test_a_cancelled_program_is_killed_and_the_next_one_runs() -> None:
    own = await Slot.start()
    try:
        running = asyncio.ensure_future(run(own, "import time; time.sleep(600)", wall_s=600.0))
        await asyncio.sleep(0)
        pid = own._zygote.pid
        running.cancel()

        with pytest.raises(asyncio.CancelledError):
            await running
        assert not psutil.pid_exists(pid or 0)
        assert (await run(own, "print(1)")).stdout == b"1\n"
    finally:
        await own.close()


async def test_a_closed_slot_leaves_no_process() -> None:
    own = await Slot.start()
    await own.run_pair(Program(source=b""), Program(source=b""))
    assert own._zygote.pid and own._partner and own._partner.pid
    processes = with_children([psutil.Process(zygote.pid) for zygote in (own._zygote, own._partner)])
    assert len(processes) >= 2

    await own.close()

    await until(lambda: not any(alive(process) for process in processes))


async def test_a_module_that_cannot_be_loaded_stops_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(SandboxError, match="the sandbox cannot start: No module named 'a_module_that_nobody_has'"):
        await Slot.start(modules=["needs_more"])


NAMES = "from math import *\nimport string, sys\nsys.setrecursionlimit(5000)\n"
USES_NAMES = b"""
def area(r): return pi * r ** 2
assert string.digits and sys.getrecursionlimit() == 5000 and isqrt(10) == 3
try:
    print(forged)
except NameError:
    print(round(area(1), 2))
pi = 3
import builtins
builtins.forged = builtins.pi = 1
if isinstance(__builtins__, dict):
    __builtins__.update(forged=1, pi=1)
"""


@pytest.mark.parametrize("known", ["", NAMES])
async def test_names_are_found_whether_a_slot_knows_them_or_not_and_no_program_changes_them(known: str) -> None:
    slot = await Slot.start(names=known)
    try:
        program = Program(source=USES_NAMES, names=NAMES)

        outcomes = [await slot.run(program), await slot.run(program), *await slot.run_cases(program, [b""])]
        broken = await slot.run(Program(source=b"def (", names=NAMES))
    finally:
        await slot.close()

    assert [(outcome.stdout, outcome.stderr) for outcome in outcomes] == [(b"3.14\n", b"")] * 3
    assert broken.ended is Ended.COMPILE_ERROR
