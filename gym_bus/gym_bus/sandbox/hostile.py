"""Programs that try to get out, to reach each other, or to exhaust the machine: the sandbox's own examination.

Each prints `BROKEN` where it has got what it wanted. It is held where it has not, where it ended in a way that is
foreseen, and where an honest program right behind it runs as if nothing had been. What a level does not protect is
not tried on it, and reported as such.
"""

from __future__ import annotations

import textwrap
from collections.abc import AsyncIterator, Iterable

import msgspec

from gym_bus.errors import SandboxError
from gym_bus.sandbox.api import Ended, Limits, Outcome, Program, Sandbox
from gym_bus.sandbox.protections import NAMES, Protection

LIMITS = Limits(wall_s=30.0, cpu_s=1.0, memory_bytes=128 * 2**20, output_bytes=2**16)
BRIEF = Limits(wall_s=0.3, cpu_s=1.0, memory_bytes=64 * 2**20, output_bytes=2**16)
"""Of programs that any limit may end: many of them just wait for it."""
HONEST = Program(
    source=b"""
import builtins, gc, json, os, random, signal, sys, threading, time
seen = {
    "input": input() == "[1, 2]" and json.loads("[1, 2]") == [1, 2] and sum([1, 2]) == 3 and 1 + 1 == 2,
    "scratch folder": os.listdir(".") == [] and os.path.samefile(".", os.environ["HOME"]),
    "environment": sorted(os.environ) == ["HOME", "LANG", "PATH", "TMPDIR"],
    "priority": os.getpriority(os.PRIO_PROCESS, 0) == 0,
    "signals": signal.getsignal(signal.SIGINT) is signal.default_int_handler
    and signal.pthread_sigmask(signal.SIG_BLOCK, []) == set() and signal.getitimer(signal.ITIMER_REAL)[0] == 0,
    "interpreter": sys.getrecursionlimit() == 1000 and sys.gettrace() is None and gc.isenabled() and not gc.callbacks,
    "threads": threading.active_count() == 1,
    "modules": not [m for m in (builtins, json, os, sys, time) if hasattr(m, "left")],
    "files": open(os.__file__).read(3) != "",
    "umask": os.umask(0o22) == 0o22,
}
print([name for name, held in seen.items() if not held] or "as ever")
"""
)
HONEST_INPUT, HONEST_SAYS = b"[1, 2]\n", b"as ever\n"

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
    cases: int = 1
    """How often it is run; more than once: from one process that holds the program, and that it must not disturb."""
    needs: str = ""
    """The protection without which a level promises nothing."""

    @property
    def limits(self) -> Limits:
        """What it gets."""
        return BRIEF if self.ends == _ANY_LIMIT else LIMITS

    def program(self) -> Program:
        """The whole text."""
        return Program(source=(_PRELUDE + textwrap.dedent(self.source)).encode("utf-8", "surrogatepass"))


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """How one attack went."""

    name: str
    group: str
    held: bool | None
    """None where this level does not protect from it; `detail` says why."""
    detail: str
    ended: Ended


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
            "have a protocol loaded": (
                "import _socket\nfor family in (2, 10, 16, 17, 30, 31, 38, 40, 43, 44): "
                "tries(lambda: _socket.socketpair(family, 1))"
            ),
            "send to a socket of the host": """
                import socket
                def send(path):
                    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', path)
                for path in ('/run/systemd/notify', '/dev/log', '/run/docker.sock'):
                    tries(lambda: send(path) or path)
                """,
            "use a descriptor as a socket": (
                "import _socket\nfor fd in range(256): tries(lambda: _socket.socket(fileno=fd).getsockname())"
            ),
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
            "read its keeper's files": (
                "for name in ('environ', 'cmdline', 'mem', 'maps', 'root/etc/passwd', 'cwd/x', 'fd/3'):\n"
                "    for pid in (1, 2, os.getppid(), 'self', 'thread-self'): "
                "tries(lambda: open(f'/proc/{pid}/{name}', 'rb').read(1))"
            ),
            "see the environment": "if set(os.environ) - {'HOME', 'PATH', 'LANG', 'TMPDIR'}: print('BROKEN')",
            "see how it was started": "if len(sys.orig_argv) > 1: print('BROKEN', sys.orig_argv)",
            "open a file by its number": (
                "tries(lambda: call(303 if X86 else 264, -100, b'/', b'x' * 200, b'x' * 8, 0))\n"
                "tries(lambda: call(304 if X86 else 265, -100, b'x' * 200, 0))"
            ),
            "link a file of the host": "tries(lambda: os.link(os.__file__, 'l')); tries(lambda: open('l', 'r+'))",
            "write through a link": "os.symlink(os.__file__, 'l'); tries(lambda: open('l', 'a'))",
            "change what the interpreter's files are": (
                "tries(lambda: os.chmod(os.__file__, 0o777)); tries(lambda: os.utime(os.__file__, (0, 0)))\n"
                "tries(lambda: os.setxattr(os.__file__, 'user.x', b'x')); tries(lambda: os.truncate(os.__file__, 0))"
            ),
            "move the root": "tries(lambda: os.rename('/usr', '/tmp/usr')); tries(lambda: os.symlink('/tmp', '/evil'))",
        },
    ),
    Attack(
        "ask which files the host has",
        "files",
        "print(['BROKEN' for file in ('/etc/passwd', '/proc/1', '/sys/kernel', '/var') if os.path.exists(file)])",
        needs=NAMES,
    ),
    *_all(
        "kernel",
        {
            "become someone else": """
                was = os.getresuid() + os.getresgid()
                for user in (0, 1, 2, 1000, 65534):
                    for change in (os.setresgid, os.setresuid):
                        try: change(user, user, user)
                        except OSError: pass
                if os.getresuid() + os.getresgid() != was: print('BROKEN', os.getresuid(), os.getresgid())
                tries(lambda: os.setgroups([0]))
                """,
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
            "have the host write its disks": """
                for number in (306, 74, 75, 277) if X86 else (267, 82, 83, 84):
                    try:
                        call(number, 63)  # no descriptor, which only the kernel would notice
                    except OSError:
                        print('BROKEN', number)
                """,
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
            "make any other namespace": """
                for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x20000000, 0x40000000):
                    tries(lambda: call(272 if X86 else 97, flag))
                    tries(lambda: call(56 if X86 else 220, flag | 17, 0))
                tries(lambda: call(272 if X86 else 97, 0x80))
                """,
            "enter a namespace": "for fd in range(64): tries(lambda: call(308 if X86 else 268, fd, 0))",
            "keep a capability": """
                import ctypes
                header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
                libc().syscall(125 if X86 else 90, ctypes.byref(header), ctypes.byref(data))
                if any(data): print('BROKEN', list(data))
                """,
            "get a capability": """
                for option, arguments in ((47, (2, 21)), (28, (0,)), (24, (21,)), (35, (1, 4096)), (38, (0,))):
                    tries(lambda: None if libc().prctl(option, *arguments, 0, 0) == 0 else open('/none'))
                import ctypes
                everything = (ctypes.c_uint32 * 6)(*[2**32 - 1] * 6)
                header = (ctypes.c_uint32 * 2)(0x20080522, 0)
                tries(lambda: call(126 if X86 else 91, ctypes.byref(header), ctypes.byref(everything)))
                """,
            "choose its processors": "tries(lambda: os.sched_setaffinity(0, {0}))",
            "change its personality": "tries(lambda: call(135 if X86 else 92, 0x0400000))",
            "write another's memory": (
                "tries(lambda: call(311 if X86 else 271, os.getppid() or 1, 0, 0, 0, 0, 0))\n"
                "tries(lambda: call(312 if X86 else 272, 1, os.getpid(), 0, 0, 0))"
            ),
            "take another's descriptor": (
                "for pid in {1, os.getppid()} - {0, os.getpid()}: tries(lambda: call(438, os.pidfd_open(pid), 3, 0))"
            ),
            "use messages and semaphores": """
                tries(lambda: call(64 if X86 else 190, 1, 1, 0o1777))
                tries(lambda: call(68 if X86 else 186, 1, 0o1777))
                tries(lambda: call(240 if X86 else 180, b'/x', 0o102, 0o600, 0))
                """,
            "adjust the clock": """
                tries(lambda: call(159 if X86 else 171, b'\\x01' * 208))
                tries(lambda: call(164 if X86 else 170, b'x' * 16, 0))
                """,
            "lift any limit": """
                import resource
                for kind in range(resource.RLIM_NLIMITS):
                    hard = resource.getrlimit(kind)[1]
                    if hard != resource.RLIM_INFINITY:
                        tries(lambda: resource.setrlimit(kind, (hard + 1, hard + 1)))
                """,
            "come before others": "tries(lambda: os.nice(-5)); tries(lambda: call(251 if X86 else 30, 1, 0, 1 << 13))",
            "have its calls let through by a filter": """
                import ctypes, struct
                allow = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))
                program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 1, ctypes.addressof(allow)))
                libc().prctl(22, 2, ctypes.c_ulong(ctypes.addressof(program)), 0, 0)
                import _socket
                tries(lambda: _socket.socket(2, 1))
                """,
        },
    ),
    *_all(
        "processes",
        {
            "signal its keeper": "tries(lambda: os.kill(2, 9)); tries(lambda: os.kill(os.getppid() or 2, 0))",
            "kill everything": "tries(lambda: os.kill(-1, 9))",
            "stop its group": "try: os.killpg(0, 19)\nexcept OSError: pass\n",
            "interrupt its group": (
                "import signal\nfor s in (1, 2, 3, 15, 10, 12, 14): signal.signal(s, signal.SIG_IGN)\n"
                "for s in (1, 2, 3, 15, 10, 12, 14):\n    try: os.kill(0, s)\n    except OSError: pass\n"
            ),
            "kill its group": "try: os.kill(0, 9)\nexcept OSError: pass\n",
            "slow its group down": (
                "for kind in (os.PRIO_PGRP, os.PRIO_USER, os.PRIO_PROCESS):\n"
                "    try: os.setpriority(kind, 0, 19)\n    except OSError: pass\n"
            ),
            "outlive its main thread": """
                import threading, time
                def on():
                    while True:
                        try: os.write(1, b'.')
                        except OSError: time.sleep(0.01)
                threading.Thread(target=on).start()
                """,
            "leave a thread that spins": """
                import threading
                def on():
                    while True: pass
                threading.Thread(target=on, daemon=True).start()
                print('done')
                """,
            "fork at its end": """
                import atexit, time
                def late():
                    try:
                        if os.fork() == 0: time.sleep(10**6)
                    except OSError: pass
                for _ in range(50): atexit.register(late)
                """,
            "be deaf in C": """
                import signal
                signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
                signal.alarm(1)
                10 ** 10 ** 9
                """,
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
                threading.stack_size(2**16)
                made = 0
                try:
                    while made < 2000:
                        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                        made += 1
                    print('BROKEN', made)
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
    Attack("interrupt its holder", "processes", "os.kill(os.getppid(), 2)", _ANY_LIMIT, cases=2),
    Attack(
        "signal everyone around its holder",
        "processes",
        """
        import signal
        deadly = (9, 19)
        for s in set(range(1, 32)).difference(deadly):
            signal.signal(s, signal.SIG_IGN)
        for s in range(1, 65):
            for pid in (-1, 1, os.getppid(), *([] if s in deadly else [0])):
                try: os.kill(pid, s)
                except OSError: pass
        """,
        _ANY_LIMIT,
        cases=2,
    ),
    Attack(
        "speak for its holder",
        "processes",
        "for fd in range(3, 256):\n    tries(lambda: os.write(fd, bytes(40)))",
        cases=2,
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
                    while made < 10**6:
                        open(f'/tmp/{made}', 'w').close()
                        made += 1
                except OSError:
                    pass
                if made > 10**4: print('BROKEN', made)
                """,
            "make a huge file of nothing": """
                try:
                    with open('sparse', 'wb') as f:
                        f.truncate(2**40)
                        print('BROKEN')
                except OSError:
                    pass
                """,
            "nest folders": "for _ in range(2000): os.mkdir('d'); os.chdir('d')",
            "print for ever on both": """
                while True:
                    for fd in (1, 2):
                        try: os.write(fd, b'x' * 10**5)
                        except OSError: pass
                """,
            "print from many processes": """
                for _ in range(6):
                    try: os.fork()
                    except OSError: pass
                for _ in range(100):
                    try: os.write(1, b'x' * 10**4)
                    except OSError: pass
                """,
            "make room for more output": (
                "tries(lambda: os.ftruncate(1, 2**40)); tries(lambda: os.posix_fallocate(1, 0, 2**30))\n"
                "import fcntl; tries(lambda: fcntl.fcntl(1, 1033, 8))"
            ),
            "print at the end of the world": """
                for place in (2**40, 2**20):
                    os.lseek(1, place, 0)
                    tries(lambda: os.write(1, b'x'))
                """,
            "swell its input": """
                os.lseek(0, 0, 0)
                try:
                    while True: os.write(0, bytes(2**20))
                except OSError: pass
                """,
            "take memory in pipes and sockets": """
                import fcntl, socket
                try:
                    while True:
                        r, w = os.pipe()
                        fcntl.fcntl(w, 1031, 2**20)
                        os.set_blocking(w, False)
                        while os.write(w, bytes(2**16)): pass
                except OSError: pass
                try:
                    while True: socket.socketpair()[0].setblocking(False)
                except OSError: pass
                """,
            "map memory without end": """
                import mmap
                maps = []
                try:
                    while True:
                        maps.append(mmap.mmap(-1, 2**24))
                        maps[-1].write(b'x' * 2**24)
                except OSError: pass
                """,
            "lock memory": "tries(lambda: call(149 if X86 else 228, id(tries) & ~4095, 2**20) or 'locked')",
            "set timers and queue signals without end": """
                import ctypes, signal
                made, c, timer = 0, libc(), (ctypes.c_long * 4)()
                while made < 10**5 and c.syscall(222 if X86 else 107, 1, None, timer) == 0: made += 1
                signal.pthread_sigmask(signal.SIG_BLOCK, {34})
                for _ in range(10**5):
                    if c.syscall(129 if X86 else 138, os.getpid(), 34, timer): break
                """,
            "print for ever": "while True: print('x' * 10**6)",
            "print errors for ever": (
                "import time\nend = time.time() + 1\nwhile time.time() < end: sys.stderr.write('x' * 10**5)"
            ),
            "compute for ever in C": "10 ** 10 ** 9",
            "match for ever": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
            "recurse for ever": "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
            "recurse for ever in C": "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
            "give the compiler too much": "eval('-' * 10**6 + '1')",
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
    Attack("compute for ever", "resources", "while True: pass", (Ended.CPU_LIMIT,)),
    Attack(
        "have its own limit kill it",
        "resources",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
        (Ended.CPU_LIMIT, Ended.SIGNALLED),
    ),
    *_all(
        "next program",
        {
            "leave files behind": "open('/tmp/.hidden', 'w').write('x'); os.mkdir('/tmp/d'); os.chmod('/tmp/d', 0)",
            "leave a file that cannot be read": "open('/tmp/x', 'w').close(); os.chmod('/tmp/x', 0)",
            "leave a lock": "import fcntl; fcntl.flock(os.open('/dev/null', os.O_RDONLY), fcntl.LOCK_EX)",
            "change built-ins": "import builtins; builtins.sum = lambda *_: 46; builtins.print = lambda *_: None",
            "change modules": "import os; os.listdir = lambda *_: ['x']; sys.modules['os'] = None",
            "change what was loaded before": """
                import builtins, json, time
                json.loads = lambda *_: ['left']
                builtins.open = builtins.__import__ = lambda *_: None
                for module in (builtins, json, os, sys, time): module.left = 'left'
                sys.path[:] = ['/tmp']; sys.meta_path.clear(); sys.modules.clear()
                """,
            "change numbers": """
                import ctypes
                ctypes.c_uint32.from_address(id(2) + 24).value = 3
                if 1 + 1 == 2: print('not even here')
                """,
            "change how the interpreter runs": """
                import gc, threading
                sys.settrace(lambda *_: None); sys.setprofile(lambda *_: None); threading.settrace(lambda *_: None)
                sys.setrecursionlimit(50); sys.setswitchinterval(100)
                gc.disable(); gc.callbacks.append(lambda *_: None); gc.set_threshold(1)
                os.umask(0o777)
                """,
            "change its end": """
                import atexit, threading
                sys.exit = os._exit = os.abort = lambda *_: None
                threading._shutdown = atexit._run_exitfuncs = lambda: None
                """,
            "end strangely": """
                class Odd(BaseException):
                    def __str__(self): raise SystemExit(self)
                    __repr__ = __str__
                class OddExit(SystemExit):
                    @property
                    def code(self): raise Odd
                raise OddExit(Odd())
                """,
            "end with a huge number": "raise SystemExit(10**5000)",
            "print at its end": "import atexit; atexit.register(print, 'late'); sys.stdout = None",
            "leave by the back door": "os._exit(0)",
            "close its streams": "os.close(0); os.close(1); os.close(2)",
            "close everything": "for fd in range(256):\n    try: os.close(fd)\n    except OSError: pass\n",
            "write to everything": (
                "for fd in range(3, 256):\n    tries(lambda: os.write(fd, bytes(40) + b'R'))\n"
                "    tries(lambda: os.pwrite(fd, b'x', 0))"
            ),
            "close its scratch folder": (
                "import time\nfor do in (lambda: os.chmod('.', 0), lambda: os.utime('.', (1, 1)), "
                "lambda: os.setxattr('.', 'user.x', b'x'), lambda: os.chmod('/', 0)):\n"
                "    try: do()\n    except OSError: pass"
            ),
            "leave links behind": "for to in ('/', '.', '/none', '/usr'): os.symlink(to, 'l' + str(len(to)) + to[-1:])",
            "leave pipes and sockets behind": "os.mkfifo('f'); import _socket; _socket.socketpair()",
            "leave names that are no text": "for name in (b'\\xff\\xfe', b'\\n\\xff', b'-rf'): os.mkdir(name)",
            "leave open files": "f = open('f', 'w'); os.unlink('f'); f.write('x' * 10**7); f.flush(); os.abort()",
            "set an alarm": "import signal; signal.alarm(1); signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)",
            "move its working folder": "os.mkdir('/tmp/w'); os.chdir('/tmp/w'); os.rmdir('/tmp/w')",
            "take its exit hooks": "import atexit\nfor _ in range(1000): atexit.register(lambda: None)",
        },
        _ANY_LIMIT,
    ),
)


async def examine(
    sandbox: Sandbox,
    protections: Iterable[Protection] = (),
    attacks: Iterable[Attack] = ATTACKS,
) -> AsyncIterator[Held]:
    """Run every attack, an honest program behind each; yields as they end.

    Args:
        sandbox: to be examined.
        protections: what it says of itself; attacks that need one which is not active are left out.
        attacks: in this order.
    """
    absent = {one.name: one.how for one in protections if not one.active}
    for attack in attacks:
        if attack.needs in absent:
            why = f"no protection of {attack.needs} here: {absent[attack.needs]}"
            yield Held(name=attack.name, group=attack.group, held=None, detail=why, ended=Ended.NOT_RUN)
        else:
            yield await _try(attack, sandbox)


async def _try(attack: Attack, sandbox: Sandbox) -> Held:
    try:
        outcomes = await sandbox.run_cases(attack.program(), [b""] * attack.cases, attack.limits)
        after = await sandbox.run(HONEST, HONEST_INPUT, LIMITS)
    except SandboxError as e:
        return Held(name=attack.name, group=attack.group, held=False, detail=str(e), ended=Ended.of(e))
    detail = next(filter(None, (_fault(attack, outcome, after) for outcome in outcomes)), "")
    return Held(name=attack.name, group=attack.group, held=not detail, detail=detail, ended=outcomes[0].ended)


def _fault(attack: Attack, outcome: Outcome, after: Outcome) -> str:
    if b"BROKEN" in outcome.stdout:
        return outcome.stdout[outcome.stdout.index(b"BROKEN") :][:200].decode(errors="replace")
    if outcome.ended not in attack.ends:
        return f"ended with {outcome.ended.value}: {outcome.stderr[-200:].decode(errors='replace')}"
    if after.stdout != HONEST_SAYS or not after.ok:
        return f"the next program: {after.ended.value}, {(after.stdout + after.stderr)[-200:]!r}"
    return ""
