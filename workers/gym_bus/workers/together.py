"""Several jobs over one server and one set of workers: all of them published, the workers shared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gym_bus.config import Config
from gym_bus.results.writer import ResultsWriter
from gym_bus.workers.local import STORE, LocalStack
from gym_bus.workers.plan import Job
from gym_bus.workers.publish import patiently
from gym_bus.workers.results import open_writer, worth_retrying
from gym_bus.workers.run import Progress, RunResult, close_books, retire, run_on


async def run_jobs(
    jobs: Sequence[Job],
    config: Config,
    folder: Path,
    *,
    at_once: int | None = None,
    workers: bool = True,
    last: bool = True,
    on_start: Callable[[Progress], None] = lambda _: None,
) -> list[RunResult]:
    """Run until every rollout of every job has its result.

    Args:
        jobs: written down, each in a folder of its own.
        config: of the server and the workers; `verifier.names` says what they serve, as for `run_job`.
        folder: of what the jobs share: the embedded server's store, and the workers' logs.
        at_once: so many jobs are published at a time, in their order; None for all.
        workers: start local workers.
        last: nothing else needs the embedded server's store any more.
        on_start: gets the progress of each job as it begins.

    Returns:
        How each job ended, in their order.

    Raises:
        BusError: no server, or a worker that keeps dying.
        UsageError: a folder is held by another run, or cannot be written.
    """
    with ExitStack() as opened:
        writers = [opened.enter_context(open_writer(job.record, job.files, config.results)) for job in jobs]
        pending = [_is_pending(writer, config) for writer in writers]
        if not any(pending):
            if last:
                await close_books([job.record for job in jobs], config, folder / STORE)
            return [_nothing_to_do(job, writer, on_start) for job, writer in zip(jobs, writers, strict=True)]
        async with LocalStack(config, folder, verifier="", workers=workers) as stack:
            turn = asyncio.Semaphore(at_once or len(jobs))

            async def one(job: Job, writer: ResultsWriter, is_pending: bool) -> RunResult:
                if not is_pending:
                    await patiently(lambda: retire(stack.bus, job.record), job.record.job)
                    return _nothing_to_do(job, writer, on_start)
                async with turn:
                    return await run_on(job, stack, writer, on_start)

            results = await _all(one(*given) for given in zip(jobs, writers, pending, strict=True))
            if last:
                stack.complete()
            return results


def _is_pending(writer: ResultsWriter, config: Config) -> bool:
    return bool(writer.ledger.missing_count or worth_retrying(writer.ledger, config.results.max_attempts))


def _nothing_to_do(job: Job, writer: ResultsWriter, on_start: Callable[[Progress], None]) -> RunResult:
    on_start(Progress(job.record, writer.ledger))
    return RunResult(ledger=writer.ledger, wall_s=0.0, finished=0)


async def _all(work: Iterable[Coroutine[Any, Any, RunResult]]) -> list[RunResult]:
    """As `asyncio.gather`; the first error ends the others before it is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
