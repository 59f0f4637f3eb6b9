"""A chaos run: two jobs through real processes, while those processes and their connections are broken at random."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import psutil
import yaml
from chaos.checks import faults_of
from chaos.jobs import Play, choices, programs
from chaos.model import FaultyModel, Manners
from chaos.processes import Player
from chaos.proxy import Proxy
from chaos.sampler import Sampler
from conftest import NatsServer

from gym_bus.bus import Bus
from gym_bus.settings import BusConfig, Distribution

SETTLE_LIMIT_S = 60.0
LEFTOVER_LIMIT_S = {"local": 30.0, "ray": 90.0}
"""Two helpers of Ray look for their parent once a minute only."""
PROGRAMS_SHARE = 0.1
"""Of the rollouts, those whose programs run in the sandbox."""


class Chaos(msgspec.Struct, frozen=True, kw_only=True):
    """What to break, and how hard."""

    seed: int
    rollouts: int
    limit_s: float
    """Then nothing more is broken; what is left must come to its end."""
    period_s: float = 1.0
    """Mean time between two blows."""
    latency_s: float = 0.4
    executor: str = "local"
    """local or ray."""


class Report(msgspec.Struct, kw_only=True):
    """What a run came to."""

    seed: int
    faults: list[str]
    wall_s: float
    rollouts: int
    blows: dict[str, int]
    calls: int
    repeated_share: float
    """Of the model calls, those that had been made before; the endpoint's own faults and their retries not counted."""
    samples: int
    most_in_flight: int
    events: list[str]

    def __str__(self) -> str:
        head = (
            f"chaos seed {self.seed}: {self.rollouts} rollouts in {self.wall_s:.1f} s, {sum(self.blows.values())} blows"
            f" ({', '.join(f'{n} {what}' for what, n in sorted(self.blows.items()))}), {self.calls} model calls, "
            f"{self.repeated_share:.1%} of them repeats, books read {self.samples} times, "
            f"at most {self.most_in_flight} in flight"
        )
        return "\n".join([head, *self.faults])


class Blow(msgspec.Struct, frozen=True):
    """One thing to break."""

    after_s: float
    """Since the last one."""
    what: str
    lasting_s: float
    """Until it comes back, or is mended."""
    dice: float
    """Which one of several."""


DECK = {
    "agent": 3,
    "verifier": 2,
    "results": 2,
    "publisher": 2,
    "server": 2,
    "slow disk": 1,
    "pause": 1,
    "cut": 1,
    "delay": 1,
    "stall": 1,
    "refuse": 1,
    "everything": 1,
}
"""How often each blow falls in one round; within a round their order is drawn."""


def blows(chaos: Chaos) -> Iterator[Blow]:
    """The blows of a seed, without end."""
    drawn = random.Random(chaos.seed)
    deck = Counter(DECK | ({"ray actor": 3} if chaos.executor == "ray" else {}))
    while True:
        for what in drawn.sample([*deck.elements()], deck.total()):
            yield Blow(drawn.uniform(0.5, 1.5) * chaos.period_s, what, drawn.uniform(0.1, 1.0), drawn.random())


class Stage:
    """Everything that takes part in a run."""

    def __init__(self, chaos: Chaos, folder: Path) -> None:
        self.chaos, self.folder = chaos, folder
        self.events: list[str] = []
        self.blows: Counter[str] = Counter()
        self._started = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._everyone: dict[psutil.Process, str] = {}
        drawn = random.Random(chaos.seed + 1)
        few = max(4, int(chaos.rollouts * PROGRAMS_SHARE))
        self.plays = [choices(folder, chaos.rollouts - few, drawn), programs(folder, few, drawn)]
        latency = Distribution(kind="lognormal", mean=chaos.latency_s, spread=0.7)
        self.model = FaultyModel(chaos.seed, Manners(latency_s=latency))
        self.server = NatsServer(folder)
        self.proxy = Proxy(self.server.port)
        self.players: dict[str, Player] = {}

    def say(self, event: str) -> None:
        """Into the event log."""
        self.events.append(f"{time.monotonic() - self._started:7.2f} {event}")

    @contextlib.asynccontextmanager
    async def set_up(self) -> AsyncIterator[None]:
        """Server, proxy and model up, every process running; all gone afterwards."""
        await asyncio.to_thread(self.server.start)
        for play in self.plays:
            self.model.add(play.name, play.answers, play.always)
        try:
            async with self.proxy, self.model:
                self._configure()
                self._cast()
                await asyncio.gather(*(player.start() for player in self.players.values()))
                yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(player.stop() for player in self.players.values()))
            self.server.stop()

    def _configure(self) -> None:
        """Short leases, so that the dead are soon replaced; narrow queues, so that they are full all the time."""
        models = {
            play.name: {
                "base_url": f"http://127.0.0.1:{self.model.port}/{play.name}/v1",
                "retry": {"wait_s": 0.05, "server_error": 4, "rate_limited": 20, "unreachable": 3},
            }
            for play in self.plays
        }
        config = {
            "bus": {
                "url": f"nats://127.0.0.1:{self.proxy.port}",
                "ack_wait_s": 3.0,
                "heartbeat_s": 1.0,
                "max_deliver": 20,
                "connect_limit_s": 15.0,
                "requests": {"max_msgs": 128},
                "attempts": {"max_msgs": 64},
            },
            "models": models,
            "agent": {"concurrency": 24, "prefetch": 8},
            "verifier": {"executor": self.chaos.executor, "concurrency": 32, "prefetch": 8, "ray": {"actors": 1}},
            "results": {"idle_s": 1.0},
            "log_level": "info",
        }
        (self.folder / "chaos.yaml").write_text(yaml.safe_dump(config))

    def _cast(self) -> None:
        run, submitted = self.plays

        def job(command: str, play: Play, *more: str) -> list[str]:
            options = ["--model", play.name, "--num-repeats", str(play.repeats), "--output", f"{play.name}.out"]
            return ["eval", command, str(play.folder), *options, *more, "--config", "chaos.yaml"]

        for number in (1, 2):
            self._add(f"agent-{number}", ["worker", "agent", "--config", "chaos.yaml"])
            self._add(f"verifier-{number}", ["worker", "verifier", "--config", "chaos.yaml"])
            self._add(f"results-{number}", ["worker", "results", "--output", "shared", "--config", "chaos.yaml"])
        self._add(
            "publisher-run",
            job("run", run, "--no-workers"),
            through=lambda code, said: code in (0, 1) and "Traceback" not in said,
        )
        self._add(
            "publisher-submit",
            job("submit", submitted),
            through=lambda code, said: code == 0 or "is done already" in said,
        )

    def _add(self, name: str, arguments: list[str], **more: object) -> None:
        self.players[name] = Player(name, arguments, self.folder, self.say, **more)  # type: ignore[arg-type]

    # -- breaking things ----------------------------------------------------------------------------------------------

    async def break_things(self) -> None:
        """Deal out blows until the time is up."""
        deadline = time.monotonic() + self.chaos.limit_s
        for blow in blows(self.chaos):
            await asyncio.sleep(blow.after_s)
            if time.monotonic() > deadline:
                return
            self.blows[blow.what] += 1
            self.say(f"{blow.what} ({blow.lasting_s:.2f} s, {blow.dice:.2f})")
            self._deal(blow)

    def _deal(self, blow: Blow) -> None:
        self._remember()
        drawn = random.Random(blow.dice)
        if blow.what in ("agent", "verifier", "results", "publisher"):
            self._one_of(blow, blow.what).kill(blow.lasting_s)
        elif blow.what == "pause":
            self._spawn(self._one_of(blow, "agent", "verifier", "results").pause(5 * blow.lasting_s))
        elif blow.what == "server":
            self._spawn(self._restart_server(blow.lasting_s))
        elif blow.what == "everything":
            for player in self.players.values():
                player.kill(blow.lasting_s)
            self._spawn(self._restart_server(blow.lasting_s))
        elif blow.what == "slow disk":
            self._spawn(self._slow_server(blow.lasting_s))
        elif blow.what == "ray actor":
            self._kill_ray_actor(drawn)
        elif blow.what == "cut":
            self.proxy.cut(0.5, drawn)
        elif blow.what == "delay":
            self.proxy.delay_s = 0.1 * blow.lasting_s
            self._spawn(self._mend(3 * blow.lasting_s))
        elif blow.what == "stall":
            self.proxy.stall(0.5, drawn)
            self._spawn(self._mend(6 * blow.lasting_s))
        elif blow.what == "refuse":
            self.proxy.refusing = True
            self.proxy.cut(0.5, drawn)
            self._spawn(self._mend(3 * blow.lasting_s))

    def _one_of(self, blow: Blow, *roles: str) -> Player:
        players = [player for name, player in sorted(self.players.items()) if name.startswith(roles)]
        return players[int(blow.dice * len(players))]

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _restart_server(self, after_s: float) -> None:
        if self.server.process and self.server.process.poll() is None:
            self.server.kill()
            await asyncio.sleep(after_s)
            await asyncio.to_thread(self.server.start)

    async def _slow_server(self, seconds: float) -> None:
        """As on a disk that stands still every now and then: the server stops, and goes on, several times."""
        for _ in range(4):
            process = self.server.process
            if process is None or process.poll() is not None:
                return
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds / 2)
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(seconds / 8)

    async def _mend(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.proxy.flow()

    def _kill_ray_actor(self, drawn: random.Random) -> None:
        found = [p for p in self._everyone if p.is_running() and "_Actor" in "".join(_command(p))]
        if found:
            drawn.choice(found).kill()

    def _remember(self) -> None:
        """Who is there, to see later that nobody was left behind."""
        for player in self.players.values():
            for process in player.descendants():
                self._everyone[process] = f"{player.name}: {' '.join(_command(process))[:120]}"

    async def left_behind(self) -> list[str]:
        """Processes whose parent was killed and that did not follow it."""
        deadline = time.monotonic() + LEFTOVER_LIMIT_S[self.chaos.executor]
        while True:
            now = {process for player in self.players.values() for process in player.descendants()}
            left = [f"left behind by {who}" for p, who in self._everyone.items() if p not in now and _runs(p)]
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.2)

    # -- the end ------------------------------------------------------------------------------------------------------

    async def all_done(self) -> None:
        """Both jobs have run to their end, each in its way."""
        await self.players["publisher-run"].finished.wait()
        await self.players["publisher-submit"].finished.wait()
        done = self.files(self.plays[1]) / "rollouts_aggregate_metrics.json"
        while not done.exists():  # noqa: ASYNC110 - a file of another process sets no event
            await asyncio.sleep(0.1)

    def files(self, play: Play) -> Path:
        """The folder of a job's result files."""
        out = self.folder / f"{play.name}.out"
        if play is self.plays[0]:
            return out
        return self.folder / "shared" / json.loads((out / "job.json").read_text())["job"]


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def run_chaos(chaos: Chaos, folder: Path) -> Report:
    """Run it once in an empty folder."""
    stage = Stage(chaos, folder)
    started = time.monotonic()
    faults: list[str] = []
    async with stage.set_up():
        async with await Bus.connect(BusConfig(url=stage.server.url)) as bus:
            sampler = Sampler(bus, stage.say)
            sampling = asyncio.create_task(sampler.run())
            breaking = asyncio.create_task(stage.break_things())
            try:
                async with asyncio.timeout(chaos.limit_s + SETTLE_LIMIT_S):
                    await stage.all_done()
            except TimeoutError:
                faults.append(f"not done {SETTLE_LIMIT_S:g} s after the last blow: {sampler.last}")
            wall_s = time.monotonic() - started
            breaking.cancel()
            stage.proxy.flow()
            sampling.cancel()
            await asyncio.gather(breaking, sampling, return_exceptions=True)
            if not faults:
                await sampler.sample()
                faults += [f"not settled: {a}" for a in sampler.last.values() if a.in_flight or a.accepted != a.total]
        for play in stage.plays:
            with contextlib.suppress(FileNotFoundError):
                faults += faults_of(play, stage.files(play))
        faults += [fault for player in stage.players.values() for fault in player.faults]
        faults += await stage.left_behind()
    faults += [f"the books were wrong: {wrong}" for wrong in sampler.wrong]
    return Report(
        seed=chaos.seed,
        faults=faults,
        wall_s=wall_s,
        rollouts=chaos.rollouts,
        blows=dict(stage.blows),
        calls=stage.model.asked.total(),
        repeated_share=stage.model.repeated_share,
        samples=sampler.taken,
        most_in_flight=sampler.most_in_flight,
        events=stage.events,
    )
