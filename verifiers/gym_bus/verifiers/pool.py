"""A pool of Ray actors: `executor: ray`. The only module that imports Ray.

A Ray of the worker's own takes 2 to 4 s to start and 180 MB, and 80 MB more for each actor. An actor call costs 0.5 ms
of the caller's CPU, which is why checks travel in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Self, TypeVar

import gym_bus
from gym_bus.deadline import within
from gym_bus.errors import SandboxError
from gym_bus.logs import get_logger
from gym_bus.registry import Offers, offered, take_over
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.batching import BatchingPool, WorkerLost, workers_of
from gym_bus.verifiers.runner import VerifierRunner

log = get_logger(__name__)

T = TypeVar("T")

ACTOR_LIMIT_S = 60.0
CLOSE_LIMIT_S = 5.0
LOOK_S = 0.5
"""How often the processes that hold Ray together are looked at."""
LOST_AFTER_S, CLUSTER_LOST_AFTER_S = 1.0, 20.0
"""How long they may be away. A cluster's may come back; a minute without them, and Ray ends the whole process."""
PREFIX = "gymray-"


class _Actor:
    """The actor's class; made remote when Ray is up."""

    def __init__(self, sandbox_level: str, preload: tuple[str, ...], offers: Offers) -> None:
        take_over(offers)
        self._runner = VerifierRunner(sandbox_level, preload)

    def pid(self) -> int:
        return os.getpid()

    def batch(self, checks: bytes) -> bytes:
        return self._runner.batch(checks)

    def close(self) -> None:
        self._runner.close()


class _Cluster:
    """A Ray that this process has joined, or has started for itself; blocks, so it is used from threads."""

    def __init__(self, config: RayConfig, actors: int) -> None:
        self._config, self._actors = config, actors
        self.local = config.address is None
        self.doors: list[tuple[str, int]] = []
        """Where the processes listen without which nothing goes on: the control store, and our node's scheduler."""
        self._joined = False
        self._folder: str | None = None
        self._class: Any = None

    def join(self) -> None:
        """Connect to the cluster, or start a small one, which takes seconds. Raises what Ray raises."""
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        if ray.is_initialized():
            raise RuntimeError("this process has joined a Ray already")
        self._joined = True
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "gym_bus"}
        if self.local:
            # Ray's processes know each other by a token, which it would else keep in the user's home.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init("local", **common, **self._small())
            _end_helpers()
            asked, there = self._config.memory_bytes_per_actor, ray.cluster_resources().get("memory", 0)
            if asked > there:
                raise RuntimeError(f"an actor asks for {asked:,} bytes of memory, and there are {there:,.0f}")
        else:
            _use_token()
            # The cluster's nodes run this very code; what it imports, Ray and msgspec above all, they must have.
            code = {"py_modules": list(gym_bus.__path__), "excludes": ["**/__pycache__"]}
            ray.init(self._config.address, runtime_env=code, **common)
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        self.doors = [(host.strip("[]"), int(port)), (node["NodeManagerAddress"], node["NodeManagerPort"])]

    def _small(self) -> dict[str, Any]:
        """What makes a Ray of our own the smallest that there is."""
        import ray.job_config

        _sweep()
        # Ray puts Unix sockets below this folder, and their paths are limited to 107 bytes.
        self._folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/tmp")
        return {
            "num_cpus": max(1, math.ceil(self._actors * self._config.cpus_per_actor)),
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": self._config.object_store_bytes,
            # The actors find what this process finds: verifiers of installed packages included.
            "job_config": ray.job_config.JobConfig(code_search_path=[path for path in sys.path if path]),
            "_temp_dir": self._folder,
            # No metrics, and no record of every call, which the control store would keep.
            "_system_config": {"enable_metrics_collection": False, "task_events_report_interval_ms": 0},
        }

    def actor(self, config: VerifierConfig) -> Any:
        """A new actor's handle; it may have to wait for its place in the cluster."""
        import ray

        if self._class is None:  # once: it is written to the control store, and to wait for a dead one never ends
            self._class = ray.remote(_Actor).options(
                num_cpus=config.ray.cpus_per_actor,
                memory=config.ray.memory_bytes_per_actor or None,
                max_restarts=0,  # a lost actor is replaced by the pool, which knows what was in it
                max_concurrency=1,
            )
        return self._class.remote(config.sandbox_level, config.preload, offered())

    def room(self) -> str:
        """What there is for actors, and what of it is free."""
        import ray

        total, free = ray.cluster_resources(), ray.available_resources()
        return ", ".join(f"{free.get(kind, 0):,.0f} of {total.get(kind, 0):,.0f} {kind}" for kind in ("CPU", "memory"))

    def leave(self) -> None:
        """Disconnect; a Ray of our own ends."""
        if not self._joined:
            return
        import ray

        with contextlib.suppress(Exception):  # Ray raises all sorts where parts of it are gone
            ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _use_token() -> None:
    """Where the user has a Ray token, use it: Ray's heads do, while a driver that is given an address does not."""
    with contextlib.suppress(ImportError):  # of a Ray before 2.59, which asks for none
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _end_helpers() -> None:
    """End what serves displays, logs and autoscaling: a third of a small Ray's memory, and nothing here uses it."""
    from ray._private import worker

    with contextlib.suppress(Exception):  # private to Ray: where it has changed, Ray is larger, and nothing else
        node: Any = worker._global_node
        for end in (node.kill_monitor, node.kill_log_monitor, node.kill_dashboard):
            end(check_alive=False)


def _sweep() -> None:
    """Remove what Rays of processes that were killed have left."""
    for folder in Path("/tmp").glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class _Connection:
    """A cluster while it holds."""

    def __init__(self, cluster: _Cluster) -> None:
        self.cluster = cluster
        self.lost = asyncio.Event()
        """It holds no longer."""
        self._leaving: asyncio.Task[None] | None = None
        self._watch = asyncio.create_task(self._look(), name="ray watch")

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        patience_s = LOST_AFTER_S if self.cluster.local else CLUSTER_LOST_AFTER_S
        seen = loop.time()
        while loop.time() - seen < patience_s:
            await asyncio.sleep(LOOK_S)
            if all(await asyncio.gather(*(_answers(*door) for door in self.cluster.doors))):
                seen = loop.time()
        log.warning("ray_lost", silent_s=round(loop.time() - seen, 1))
        self.leave()

    def leave(self) -> asyncio.Task[None]:
        """Leave the cluster, at once: a driver that stays when the control store is gone is killed by Ray."""
        self._watch.cancel()
        self.lost.set()
        if self._leaving is None:
            self._leaving = asyncio.create_task(asyncio.to_thread(self.cluster.leave), name="ray leave")
        return self._leaving

    async def unless_lost(self, work: Awaitable[T], limit_s: float) -> T:
        """What `work` gives.

        Raises:
            WorkerLost: Ray was lost meanwhile.
            TimeoutError: it took longer than `limit_s` seconds.
        """
        working, losing = asyncio.ensure_future(work), asyncio.ensure_future(self.lost.wait())
        try:
            done, _ = await asyncio.wait({working, losing}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if losing in done or working.cancelled():
                raise WorkerLost("Ray was lost")
            if not done:
                raise TimeoutError
            return working.result()
        finally:
            working.cancel()
            losing.cancel()


async def _answers(host: str, port: int) -> bool:
    try:
        _, writer = await within(2.0, asyncio.open_connection(host, port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


class _Ray:
    """This process's connection to Ray: made when it is needed, and made again after a loss."""

    def __init__(self, config: RayConfig, actors: int) -> None:
        self._config, self._actors = config, actors
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[_Connection] | None = None

    async def connection(self) -> _Connection:
        """The one that holds. Raises SandboxError where there is no cluster at `ray.address`, or none starts."""
        if self._connection is not None and not self._connection.lost.is_set():
            return self._connection
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect(), name="ray connect")
        return await asyncio.shield(self._connecting)  # whoever gives up waiting does not end it for the others

    async def _connect(self) -> _Connection:
        await self._leave()
        address = self._config.address
        host, colon, port = (address or "").rpartition(":")
        if colon and not await _answers(host.strip("[]"), int(port)):  # Ray itself would go on trying for minutes
            raise SandboxError(f"cannot reach a Ray at {address}: nothing answers there")
        cluster = _Cluster(self._config, self._actors)
        try:
            await asyncio.to_thread(cluster.join)
        except ImportError as e:
            raise SandboxError(
                f"Ray is not installed ({e}): install gym-bus[verifier], or set verifier.executor=local"
            ) from None
        except Exception as e:  # Ray has no root for what it raises when it does not come up
            await asyncio.to_thread(cluster.leave)
            what = f"cannot join the Ray at {address}" if address else "a local Ray does not start"
            raise SandboxError(f"{what}: {' '.join(str(e).split()) or type(e).__name__}") from None
        finally:
            _keep_signals()
        self._connection = _Connection(cluster)
        return self._connection

    async def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.shield(connection.leave())

    async def close(self) -> None:
        """Leave the cluster; a local one ends with us."""
        if self._connecting is not None:
            await asyncio.wait({self._connecting}, timeout=CLOSE_LIMIT_S)
        await self._leave()


def _keep_signals() -> None:
    """Put Python's handler of SIGTERM back: Ray's core has laid its own over it, which prints a stack trace."""
    with contextlib.suppress(ValueError):  # not the main thread, where no handler of ours can be
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _in_short(error: Exception) -> str:
    """The last line: of a traceback from an actor it is the cause, and else the only one."""
    return f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"


class _RayWorker:
    """One actor as the pool sees it."""

    def __init__(self, connection: _Connection, actor: Any) -> None:
        self._connection, self._actor = connection, actor
        self._process: int | None = None
        self._ended = False

    @classmethod
    async def start(cls, connection: _Connection, config: VerifierConfig) -> Self:
        """An actor that is up. Raises SandboxError where the cluster does not start it, WorkerLost where it dies."""
        try:
            creating = asyncio.to_thread(connection.cluster.actor, config)
            worker = cls(connection, await connection.unless_lost(creating, ACTOR_LIMIT_S))
        except WorkerLost:
            raise
        except Exception as e:  # of whatever kind: this connection is of no use, as when the cluster is another one now
            connection.leave()
            raise SandboxError(f"Ray does not take an actor: {_in_short(e)}") from None
        try:
            pid = await worker._call("pid", ACTOR_LIMIT_S)
            if connection.cluster.local:
                with contextlib.suppress(OSError):  # of kernels without it
                    worker._process = os.pidfd_open(pid)
        except TimeoutError:
            await worker.kill()
            raise SandboxError(
                f"no actor came up within {ACTOR_LIMIT_S:g} s: one asks for {config.ray.cpus_per_actor:g} CPU and "
                f"{config.ray.memory_bytes_per_actor:,} bytes of memory; free are {await _room(connection)}"
            ) from None
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def _call(self, method: str, limit_s: float, *arguments: Any) -> Any:
        if self._connection.lost.is_set():  # another one has taken its place, which does not know the actor
            raise WorkerLost("Ray was lost")
        try:
            answer = getattr(self._actor, method).remote(*arguments)
            return await self._connection.unless_lost(answer, limit_s)
        except (TimeoutError, WorkerLost):
            raise
        except Exception as e:  # what Ray raises for a lost actor has no root, and some of it no class of its own
            raise WorkerLost(_in_short(e)) from None

    async def run(self, batch: bytes, limit_s: float) -> bytes:
        """See `PoolWorker.run`."""
        answers: bytes = await self._call("batch", limit_s, batch)
        return answers

    async def close(self) -> None:
        """See `PoolWorker.close`."""
        if not self._ended:
            with contextlib.suppress(WorkerLost, TimeoutError):
                await self._call("close", CLOSE_LIMIT_S)
        await self.kill()

    async def kill(self) -> None:
        """See `PoolWorker.kill`."""
        import ray

        self._ended = True
        if not self._connection.lost.is_set():
            with contextlib.suppress(Exception):  # it may be dead, and so may the cluster
                await asyncio.to_thread(ray.kill, self._actor, no_restart=True)
        process, self._process = self._process, None
        if process is not None:
            try:
                if self._connection.lost.is_set() or not await _ends(process, CLOSE_LIMIT_S):
                    signal.pidfd_send_signal(process, signal.SIGKILL)  # without its Ray, nobody else does it
            except ProcessLookupError:
                pass
            finally:
                os.close(process)


async def _ends(process: int, limit_s: float) -> bool:
    """Whether the process of the descriptor ends within `limit_s` seconds."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process, ended.set)
    try:
        await within(limit_s, ended.wait())
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(process)
    return True


async def _room(connection: _Connection) -> str:
    try:
        return await connection.unless_lost(asyncio.to_thread(connection.cluster.room), CLOSE_LIMIT_S)
    except Exception:  # it is asked for the sake of a message
        return "an unknown number"


class RayPool(BatchingPool):
    """`BatchingPool` on Ray actors, one per core unless `ray.actors` says otherwise."""

    def __init__(self, config: VerifierConfig) -> None:
        actors = workers_of(config)
        self._ray = _Ray(config.ray, actors)

        async def start() -> _RayWorker:
            while True:
                connection = await self._ray.connection()
                try:
                    return await _RayWorker.start(connection, config)
                except WorkerLost:
                    if not connection.lost.is_set():  # else not the actor's doing: once more, on a new Ray
                        raise

        super().__init__(config, actors, start)

    async def close(self) -> None:
        """End the actors and leave the cluster; a local one ends with us."""
        await super().close()
        await self._ray.close()
