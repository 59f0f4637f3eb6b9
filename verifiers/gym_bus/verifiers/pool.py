"""A pool of Ray actors: `executor: ray`. The only module that imports Ray.

Measured on 2 cores with Ray 2.60: `ray.init` takes 2 to 5 s and about 600 MB; an unbatched actor call costs 0.5 ms of
the caller's CPU, which is why checks travel in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from gym_bus.errors import SandboxError
from gym_bus.settings import RayConfig, VerifierConfig
from gym_bus.verifiers.batching import BatchingPool, WorkerLost
from gym_bus.verifiers.runner import VerifierRunner

START_LIMIT_S = 120.0
PREFIX = "gymray-"


def _start_ray(config: RayConfig, actors: int) -> str | None:
    """Connect to the cluster, or start a small one; blocks for seconds. Returns the folder that it made."""
    import ray
    import ray.job_config

    logging.getLogger("ray").setLevel(logging.ERROR)
    if config.address:
        ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR, namespace="gym_bus")
        return None
    # Ray puts Unix sockets below this folder, and their paths are limited to 107 bytes.
    _sweep()
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/tmp")
    ray.init(
        num_cpus=max(1, actors),
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=config.object_store_bytes,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        namespace="gym_bus",
        # The actors find what this process finds: verifiers of installed packages included.
        job_config=ray.job_config.JobConfig(code_search_path=[path for path in sys.path if path]),
        _temp_dir=folder,
        _system_config={"enable_metrics_collection": False},
    )
    return folder


def _sweep() -> None:
    """Remove what Rays of processes that were killed have left."""
    for folder in Path("/tmp").glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


class _Actor:
    """The actor's class; made remote when Ray is up."""

    def __init__(self, sandbox_level: str) -> None:
        self._runner = VerifierRunner(sandbox_level)

    def batch(self, checks: bytes) -> bytes:
        return self._runner.batch(checks)


class _RayWorker:
    """One actor as the pool sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def run(self, batch: bytes, limit_s: float) -> bytes:
        import ray.exceptions

        try:
            answers: bytes = await asyncio.wait_for(self._actor.batch.remote(batch), limit_s)
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError) as e:
            raise WorkerLost(str(e).partition("\n")[0]) from None
        except ray.exceptions.RayError as e:
            raise WorkerLost(f"{type(e).__name__}: {e}".partition("\n")[0]) from None
        return answers

    async def kill(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # it may be dead, and so may the cluster
            await asyncio.to_thread(ray.kill, self._actor, no_restart=True)


class RayPool(BatchingPool):
    """`BatchingPool` on Ray actors, one per core unless `ray.actors` says otherwise."""

    def __init__(self, config: VerifierConfig, folder: str | None, actors: int) -> None:
        import ray

        self._folder = folder
        self._remote = ray.remote(_Actor).options(
            num_cpus=config.ray.cpus_per_actor,
            memory=config.ray.memory_bytes_per_actor or None,
            max_restarts=0,  # a lost actor is replaced by the pool, which knows what was in it
            max_concurrency=1,
        )
        self._lock = asyncio.Lock()

        async def start() -> _RayWorker:
            async with self._lock:
                await self._revive(config, actors)
                actor = await asyncio.to_thread(self._remote.remote, config.sandbox_level)
            return _RayWorker(actor)

        super().__init__(config, actors, start)

    async def _revive(self, config: VerifierConfig, actors: int) -> None:
        """Start Ray again where the local cluster died under us."""
        import ray

        if ray.is_initialized() and await asyncio.to_thread(_alive):
            return
        await asyncio.to_thread(_stop_ray, self._folder)
        self._folder = await _init(config, actors)

    @classmethod
    async def start(cls, config: VerifierConfig) -> RayPool:
        """Bring up Ray and the pool.

        Raises:
            SandboxError: no cluster at `ray.address`, or the local one did not start.
        """
        actors = config.ray.actors or os.cpu_count() or 1
        return cls(config, await _init(config, actors), actors)

    async def close(self) -> None:
        """Kill the actors and leave the cluster; a local one ends with us."""
        await super().close()
        await asyncio.to_thread(_stop_ray, self._folder)


async def _init(config: VerifierConfig, actors: int) -> str | None:
    where = config.ray.address or "a local Ray"
    try:
        return await asyncio.wait_for(asyncio.to_thread(_start_ray, config.ray, actors), START_LIMIT_S)
    except ImportError as e:
        raise SandboxError(
            f"Ray is not installed ({e}): install gym-bus[verifier], or set verifier.executor=local"
        ) from None
    except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as e:
        raise SandboxError(f"cannot reach {where}: {e or type(e).__name__}") from None


def _alive() -> bool:
    import ray

    try:
        return bool(ray.nodes())
    except Exception:  # Ray raises all sorts when its control store is gone; each means the same here
        return False


def _stop_ray(folder: str | None) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.shutdown()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
