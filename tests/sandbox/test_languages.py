"""Programs in other languages, and programs that are run case by case."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from gym_bus.sandbox.api import Ended, Limits, Outcome, Program
from gym_bus.sandbox.languages import COMMANDS
from gym_bus.sandbox.slot import Slot

pytestmark = pytest.mark.asyncio(loop_scope="session")

LIMITS = Limits(wall_s=60.0, cpu_s=30.0)

DOUBLE = {
    "bash": 'read x; echo $((x * 2)); echo "$1" >&2',
    "cpp": "#include <iostream>\nusing namespace std;\n"
    "int main(int n, char** a) { int x; cin >> x; cout << x * 2; cerr << a[1]; }",
    "javascript": "const x = require('fs').readFileSync(0, 'utf8'); console.log(x * 2); console.error(process.argv[2])",
}
HOSTS_FILES = {
    "bash": "cat /etc/shadow /root/.bashrc; ls /home /proc; echo done",
    "cpp": "#include <fstream>\n#include <iostream>\n"
    'int main() { std::ifstream f("/etc/shadow"); std::cout << f.good() << "done"; }',
    "javascript": "try { console.log(require('fs').readdirSync('/proc')) } catch (e) { console.log('done') }",
    "sql": "select coalesce(readfile('/etc/shadow'), 'done');",
}


def need(language: str) -> None:
    command = COMMANDS[language]
    for tool in (command.command[0], *command.build[:1]):
        if not tool.startswith("/tmp/") and not Path(tool).exists():
            pytest.skip(f"no {tool} on this machine")


async def cases(slot: Slot, source: str, *stdins: str, language: str = "python", **limits: Any) -> list[Outcome]:
    bounds = Limits(**{"wall_s": 60.0, "cpu_s": 30.0, **limits})
    program = Program(source=source.encode(), language=language, arguments=("said",))
    return await slot.run_cases(program, [stdin.encode() for stdin in stdins], bounds)


@pytest.mark.parametrize("language", DOUBLE)
async def test_a_program_in_another_language_reads_prints_and_is_told_its_arguments(slot: Slot, language: str) -> None:
    need(language)
    outcomes = await cases(slot, DOUBLE[language], "21\n", "4\n", language=language)

    assert [(o.ended, o.exit_code, o.stdout.strip(), o.stderr.strip()) for o in outcomes] == [
        (Ended.FINISHED, 0, b"42", b"said"),
        (Ended.FINISHED, 0, b"8", b"said"),
    ]


async def test_a_script_of_sql_runs_on_an_empty_database(slot: Slot) -> None:
    need("sql")
    program = Program(
        source=b"create table t(x); insert into t values (20), (22); select sum(x) from t;", language="sql"
    )

    assert (await slot.run(program, limits=LIMITS)).stdout == b"42\n"


@pytest.mark.parametrize("language", HOSTS_FILES)
async def test_the_hosts_files_are_not_there_for_other_languages(slot: Slot, language: str) -> None:
    need(language)
    outcome = await slot.run(Program(source=HOSTS_FILES[language].encode(), language=language), limits=LIMITS)

    assert b"root" not in outcome.stdout + outcome.stderr.replace(b"/root", b"")
    assert outcome.stdout.strip().endswith(b"done") or language == "sql"


async def test_what_cannot_be_built_is_a_compile_error_with_the_compilers_words(slot: Slot) -> None:
    need("cpp")
    outcomes = await cases(slot, "int main() { return x; }", "", "", language="cpp")

    assert [o.ended for o in outcomes] == [Ended.COMPILE_ERROR] * 2
    assert b"was not declared" in outcomes[0].stderr


async def test_a_bash_fork_bomb_ends_and_the_next_program_runs(slot: Slot) -> None:
    need("bash")
    if slot._zygote.group is None:
        pytest.skip("without a cgroup of its own a sandbox lets no program fork")
    outcome = (await cases(slot, ":(){ :|:& };:; sleep 60", "", language="bash", wall_s=1.0))[0]

    assert outcome.ended in (Ended.WALL_LIMIT, Ended.FINISHED, Ended.SIGNALLED)
    assert (await cases(slot, "echo ok", "", language="bash"))[0].stdout == b"ok\n"


async def test_each_case_runs_afresh_with_its_own_outcome(slot: Slot) -> None:
    source = "x = globals().get('x', 0) + 1\nopen('left', 'a').write('x')\nprint(x, input(), open('left').read())"

    outcomes = await cases(slot, source, "a", "b", "c")

    assert [o.stdout for o in outcomes] == [b"1 a x\n", b"1 b x\n", b"1 c x\n"]


@pytest.mark.parametrize(
    ("source", "ended"),
    [
        ("import time; time.sleep(60)", Ended.WALL_LIMIT),
        ("while True: pass", Ended.CPU_LIMIT),
        ("x = [bytearray(2**20) for _ in range(10**6)]", Ended.MEMORY),
        ("while True: print('x' * 1000)", Ended.OUTPUT_LIMIT),
        ("import os; os.abort()", Ended.SIGNALLED),
        ("import os; os.kill(os.getppid(), 9)", Ended.FINISHED),
        ("import os; os.kill(-1, 9)", Ended.FINISHED),
        ("import os\nif os.fork() == 0:\n    while True: pass", Ended.FINISHED),
        ("import os, sys; sys.setrecursionlimit(10**9); f = lambda: f(); f()", Ended.MEMORY),
    ],
)
async def test_a_case_that_ends_badly_leaves_the_next_one_whole(slot: Slot, source: str, ended: Ended) -> None:
    bad = "if input() == 'bad':\n" + textwrap.indent(source, "    ") + "\n"
    limits: dict[str, Any] = {"memory_bytes": 128 * 2**20}
    if ended is Ended.WALL_LIMIT:
        limits["wall_s"] = 4.0  # which the good ones have, too: so long no machine stands still
    if ended is Ended.CPU_LIMIT:
        limits["cpu_s"] = 1.0

    outcomes = await cases(slot, bad + "print('good')", "good", "bad", "good", **limits)

    assert [o.ended for o in outcomes] == [Ended.FINISHED, ended, Ended.FINISHED]
    assert [o.stdout for o in outcomes[::2]] == [b"good\n", b"good\n"]


async def test_a_program_that_does_not_compile_fails_every_case(slot: Slot) -> None:
    outcomes = await cases(slot, "def (", "", "", "")

    assert [o.ended for o in outcomes] == [Ended.COMPILE_ERROR] * 3
    assert b"SyntaxError" in outcomes[0].stderr


async def test_the_holder_of_a_program_cannot_be_spoken_to_by_a_case(slot: Slot) -> None:
    source = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'x' * 32)
        print('wrote', fd)
    except OSError:
        pass
"""

    outcomes = await cases(slot, source, "", "")

    assert [(o.ended, o.stdout) for o in outcomes] == [(Ended.FINISHED, b"")] * 2
