"""Programs that try to get out, to reach each other, or to exhaust the machine: the sandbox's own examination.

Each prints `BROKEN` where it has got what it wanted. It is held where it has not, where it ended in a way that is
foreseen, and where an honest program right behind it runs as if nothing had been.
"""

from __future__ import annotations

import textwrap
from collections.abc import AsyncIterator

import msgspec

from gym_bus.errors import SandboxError
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program, Sandbox

LIMITS = Limits(wall_s=5.0, cpu_s=2.0, memory_bytes=128 * 2**20, output_bytes=2**16)
HONEST = Program(source=b"import os\nprint(sum(range(10)), sorted(os.listdir('.')))\n")
HONEST_SAYS = b"45 []\n"

_PRELUDE = '''
import os, sys, errno
def tries(do, *allowed):
    """BROKEN where `do` works; any error of the system is as it should be."""
    try:
        found = do()
    except (OSError, MemoryError, ImportError, AttributeError, ValueError) as e:
        return
    print("BROKEN", found)
def libc():
    import ctypes
    return ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    import ctypes
    c = libc()
    if c.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return number
X86 = os.uname().machine == "x86_64"
'''


class Attack(msgspec.Struct, frozen=True):
    """One hostile program."""

    name: str
    group: str
    source: str
    ends: tuple[Ended, ...] = (Ended.FINISHED,)
    """How it may end; a program that has a memory or processor limit of its own hit is held by it."""

    def program(self) -> Program:
        """The whole text."""
        return Program(source=(_PRELUDE + textwrap.dedent(self.source)).encode("utf-8", "surrogatepass"))


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """How one attack went."""

    name: str
    group: str
    held: bool
    detail: str
    ended: str


_ANY_LIMIT = (Ended.FINISHED, Ended.MEMORY, Ended.CPU_LIMIT, Ended.WALL_LIMIT, Ended.SIGNALLED, Ended.OUTPUT_LIMIT)


def _all(group: str, sources: dict[str, str], ends: tuple[Ended, ...] = (Ended.FINISHED,)) -> list[Attack]:
    return [Attack(name, group, source, ends) for name, source in sources.items()]


ATTACKS: tuple[Attack, ...] = (
    *_all(
        "network",
        {
            "open a TCP socket": "import _socket; tries(lambda: _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM))",
            "open a UDP socket over IPv6": "import _socket; tries(lambda: _socket.socket(10, 2))",
            "open a socket to the hypervisor": "import _socket; tries(lambda: _socket.socket(40, 1))",
            "open a netlink socket": "import _socket; tries(lambda: _socket.socket(16, 3))",
            "open a raw socket": "import _socket; tries(lambda: _socket.socket(17, 3))",
            "reach an abstract Unix socket": (
                "import _socket; tries(lambda: _socket.socket(_socket.AF_UNIX).connect(chr(0) + 'x'))"
            ),
            "resolve a name": "import socket; tries(lambda: socket.create_connection(('localhost', 4222), 1))",
        },
    ),
    *_all(
        "files",
        {
            "read the password file": "for f in ('shadow', 'passwd'): tries(lambda: open('/etc/' + f).read())",
            "list the home folders": "tries(lambda: os.listdir('/home') or None) if os.path.isdir('/home') else None",
            "read the environment of others": "tries(lambda: open('/proc/1/environ', 'rb').read())",
            "list processes": "tries(lambda: os.listdir('/proc'))",
            "read the kernel's settings": "tries(lambda: os.listdir('/sys'))",
            "write into the interpreter": "tries(lambda: open(os.__file__, 'a'))",
            "write beside the interpreter": "tries(lambda: open(os.path.dirname(os.__file__) + '/evil.py', 'w'))",
            "write into the root": "tries(lambda: open('/evil', 'w')); tries(lambda: os.mkdir('/evil'))",
            "make a device": "tries(lambda: os.mknod('/tmp/sda', 0o60666, os.makedev(8, 0)))",
            "make a file of another user": "tries(lambda: os.chown(open('/tmp/x', 'w').name, 0, 0))",
            "make a program that runs as another user": (
                "open('/tmp/x', 'w').close()\nos.chmod('/tmp/x', 0o4755)\ntries(lambda: os.execve('/tmp/x', ['x'], {}))"
            ),
            "go up from the root": (
                "os.chdir('/')\nfor _ in range(40): os.chdir('..')\ntries(lambda: open('etc/shadow'))"
            ),
            "keep a folder of the host open": "for fd in range(3, 64): tries(lambda: os.listdir(fd))",
            "follow a link out": "os.symlink('/proc/self/root', '/tmp/l'); tries(lambda: os.listdir('/tmp/l/etc'))",
            "read the disk": "tries(lambda: open('/dev/sda', 'rb')); tries(lambda: open('/dev/mem', 'rb'))",
            "see the terminal": "tries(lambda: open('/dev/tty')); tries(lambda: os.openpty())",
            "use shared memory of the host": "tries(lambda: open('/dev/shm/x', 'w'))",
        },
    ),
    *_all(
        "kernel",
        {
            "become root": "tries(lambda: os.setresuid(0, 0, 0)); tries(lambda: os.setgroups([0]))",
            "make a user namespace": "if libc().unshare(0x10000000) == 0: print('BROKEN')",
            "make a namespace by clone": "tries(lambda: call(56 if X86 else 220, 0x10000000 | 17, 0, 0, 0, 0))",
            "mount a file system": "if libc().mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0: print('BROKEN')",
            "use the new mount calls": "tries(lambda: call(430, b'tmpfs', 0)); tries(lambda: call(428, -100, b'/', 1))",
            "change the root": "tries(lambda: os.chroot('/tmp'))",
            "trace a process": "if libc().ptrace(0, 0, 0, 0) == 0: print('BROKEN')",
            "read another's memory": "tries(lambda: call(310 if X86 else 270, 1, 0, 0, 0, 0, 0))",
            "load a program into the kernel": "tries(lambda: call(321 if X86 else 280, 0, 0, 0))",
            "measure the machine": "tries(lambda: call(298 if X86 else 241, 0, 0, -1, -1, 0))",
            "use the key ring": (
                "tries(lambda: call(250 if X86 else 219, 0, -3, 1)); tries(lambda: call(248 if X86 else 217))"
            ),
            "use io_uring": "tries(lambda: call(425, 8, b'x' * 256))",
            "handle page faults": "tries(lambda: call(323 if X86 else 282, 0))",
            "load a kernel module": "tries(lambda: call(175 if X86 else 105, 0, 0, 0))",
            "restart the machine": "tries(lambda: call(169 if X86 else 142, 0xfee1dead, 672274793, 0x1234567))",
            "set the clock": "import time; tries(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))",
            "name the machine": "import socket; tries(lambda: socket.sethostname('evil'))",
            "run before all others": "tries(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99)))",
            "lift its limits": (
                "import resource\nsoft, hard = resource.getrlimit(resource.RLIMIT_CPU)\n"
                "tries(lambda: resource.setrlimit(resource.RLIMIT_CPU, (hard + 100, hard + 100)))"
            ),
            "lift another's limits": "import resource; tries(lambda: resource.prlimit(2, resource.RLIMIT_CPU))",
            "use the 32-bit calls": "tries(lambda: call(0x40000000 + 41, 2, 1, 0))",
            "use System V shared memory": "tries(lambda: call(29 if X86 else 194, 1, 4096, 0o1777))",
            "watch for dumps": "if libc().prctl(3, 0, 0, 0, 0) == 1: print('BROKEN: dumpable')",
            "type into the terminal": "import fcntl; tries(lambda: fcntl.ioctl(0, 0x5412, b'x'))",
        },
    ),
    *_all(
        "processes",
        {
            "signal its keeper": "tries(lambda: os.kill(2, 9)); tries(lambda: os.kill(os.getppid() or 2, 0))",
            "kill everything": "tries(lambda: os.kill(-1, 9))",
            "stop its group": "try: os.killpg(0, 19)\nexcept OSError: pass\n",
            "leave its session": "try: os.setsid()\nexcept OSError: pass\n",
            "fork for ever": """
                import time
                def bomb():
                    while True:
                        try:
                            os.fork()
                        except OSError:
                            time.sleep(0.01)
                bomb()
                """,
            "start threads for ever": """
                import threading, time
                try:
                    while True:
                        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                except RuntimeError:
                    pass
                """,
            "leave a daemon": """
                try:
                    if os.fork() == 0:
                        os.setsid()
                        if os.fork() == 0:
                            import time
                            while True:
                                try:
                                    open('/tmp/daemon', 'a').write('x')
                                except OSError:
                                    pass
                                time.sleep(0.001)
                        os._exit(0)
                except OSError:
                    pass
                """,
            "ignore every signal": """
                import signal
                for s in range(1, 65):
                    try:
                        signal.signal(s, signal.SIG_IGN)
                    except (OSError, ValueError):
                        pass
                while True:
                    pass
                """,
            "sleep for ever": "import time; time.sleep(10**6)",
            "stop itself": "import signal; os.kill(os.getpid(), signal.SIGSTOP)",
        },
        _ANY_LIMIT,
    ),
    *_all(
        "resources",
        {
            "take all memory": "x = []\nwhile True: x.append(bytearray(2**20))",
            "take all memory in many processes": """
                for _ in range(16):
                    try:
                        if os.fork() == 0:
                            break
                    except OSError:
                        break
                x = bytearray(2**20 * 60)
                import time; time.sleep(1)
                """,
            "take memory as files": """
                try:
                    fds = [os.memfd_create(str(i)) for i in range(40)]
                    for fd in fds:
                        os.write(fd, bytes(2**24))
                except OSError:
                    pass
                """,
            "fill the disk": """
                try:
                    with open('/tmp/big', 'wb') as f:
                        while True:
                            f.write(bytes(2**20))
                except OSError:
                    pass
                if os.path.getsize('/tmp/big') > 2**27: print('BROKEN')
                """,
            "fill the disk with names": """
                made = 0
                try:
                    while made < 10**5:
                        open(f'/tmp/{made}', 'w').close()
                        made += 1
                except OSError:
                    pass
                if made > 10**4: print('BROKEN', made)
                """,
            "nest folders": "for _ in range(2000): os.mkdir('d'); os.chdir('d')",
            "print for ever": "while True: print('x' * 10**6)",
            "print errors for ever": (
                "import time\nend = time.time() + 1\nwhile time.time() < end: sys.stderr.write('x' * 10**5)"
            ),
            "compute for ever": "while True: pass",
            "compute for ever in C": "10 ** 10 ** 9",
            "match for ever": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
            "recurse for ever": "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
            "recurse for ever in C": "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
            "unpack a bomb": "import zlib; d = zlib.compress(bytes(2**28)); zlib.decompress(d); zlib.decompress(d)",
            "crash the interpreter": "import ctypes; ctypes.string_at(0)",
            "open everything": """
                fds = []
                try:
                    while True:
                        fds.append(os.open('/dev/null', os.O_RDONLY))
                except OSError:
                    pass
                if len(fds) > 256: print('BROKEN', len(fds))
                """,
        },
        _ANY_LIMIT,
    ),
    *_all(
        "next program",
        {
            "leave files behind": "open('/tmp/.hidden', 'w').write('x'); os.mkdir('/tmp/d'); os.chmod('/tmp/d', 0)",
            "leave a file that cannot be read": "open('/tmp/x', 'w').close(); os.chmod('/tmp/x', 0)",
            "leave a lock": "import fcntl; fcntl.flock(os.open('/dev/null', os.O_RDONLY), fcntl.LOCK_EX)",
            "change built-ins": "import builtins; builtins.sum = lambda *_: 46; builtins.print = lambda *_: None",
            "change modules": "import os; os.listdir = lambda *_: ['x']; sys.modules['os'] = None",
            "leave by the back door": "os._exit(0)",
            "close its streams": "os.close(0); os.close(1); os.close(2)",
            "move its working folder": "os.mkdir('/tmp/w'); os.chdir('/tmp/w'); os.rmdir('/tmp/w')",
            "take its exit hooks": "import atexit\nfor _ in range(1000): atexit.register(lambda: None)",
        },
        _ANY_LIMIT,
    ),
)


async def examine(sandbox: Sandbox, attacks: tuple[Attack, ...] = ATTACKS) -> AsyncIterator[Held]:
    """Run every attack, an honest program behind each; yields as they end."""
    for attack in attacks:
        try:
            outcome = await sandbox.run(attack.program(), limits=LIMITS)
            after = await sandbox.run(HONEST, limits=LIMITS)
        except SandboxError as e:
            yield Held(name=attack.name, group=attack.group, held=False, detail=str(e), ended="sandbox lost")
            continue
        detail = _fault(attack, outcome, after)
        yield Held(name=attack.name, group=attack.group, held=not detail, detail=detail, ended=outcome.ended.value)


def _fault(attack: Attack, outcome: Outcome, after: Outcome) -> str:
    if b"BROKEN" in outcome.stdout:
        return outcome.stdout[outcome.stdout.index(b"BROKEN") :][:200].decode(errors="replace")
    if outcome.ended not in attack.ends:
        return f"ended with {outcome.ended.value}: {outcome.stderr[-200:].decode(errors='replace')}"
    if after.stdout != HONEST_SAYS or not after.ok:
        return f"the next program: {after.ended.value}, {(after.stdout + after.stderr)[-200:]!r}"
    return ""
