"""Score stored rollouts again: attempts go onto the bus straight from the file, no model is asked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import DataError, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Attempt, Failed, Policy, Result, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.ledger import FailedRollout, Ledger, State
from gym_bus.results.manifest import new_job_id
from gym_bus.results.reader import Joined, iter_jsonl, join_rollouts
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.workers.local import LocalStack
from gym_bus.workers.plan import check_verifier
from gym_bus.workers.publish import BATCH, message_id, publish_patiently
from gym_bus.workers.results import ResultsConsumer
from gym_bus.workers.run import Progress, enrol, retire

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode


class Reverified(msgspec.Struct, frozen=True, kw_only=True):
    """How a re-verification ended."""

    verifier: str
    verifier_digest: str
    rollouts: int
    scored: int
    failed: int
    failed_by_class: dict[str, int]
    changed: int
    """Rollouts whose reward is not the stored one."""
    mean_reward: float | None
    output: str


class _Verdicts:
    """A results writer that keeps rewards and extra fields in memory: the command can be run again at no cost."""

    def __init__(self, job: str, count: int) -> None:
        self.ledger = Ledger(job, count, 1)
        self.results: dict[int, tuple[float, bytes] | Failed] = {}
        self.digest = ""

    def append(self, results: Sequence[tuple[int, Result]]) -> list[Result]:
        """Take results; returns those that were not known."""
        fresh: list[Result] = []
        for _, result in results:
            if not self.ledger.holds(result.rollout) or self.ledger.state(result.rollout) is not State.MISSING:
                continue
            fresh.append(result)
            if isinstance(result, Scored):
                self.ledger.record_scored(result.rollout, result.reward)
                self.results[result.rollout.task_index] = (result.reward, result.extra)
                self.digest = result.verifier_digest
            else:
                self.ledger.record_failed(result.rollout, FailedRollout(result.failure.kind.value, 1, True))
                self.results[result.rollout.task_index] = result
        return fresh


async def reverify_file(
    rollouts: Path,
    inputs: Path | None,
    verifier: str,
    output: Path,
    config: Config,
    *,
    on_start: Callable[[Progress], None] = lambda _: None,
) -> Reverified:
    """Score every rollout of a file and write the rows, with their new rewards, in the same order.

    Rows that cannot be judged go to `<output>_failures.jsonl` with their class: a failure is no reward.

    Raises:
        UsageError: no such verifier, or a file that cannot be written.
        DataError: a row that is no rollout; names file and line.
    """
    options = config.job.verifier_options
    digest = check_verifier(verifier, options, config)
    _check_output(output, rollouts)
    count = await asyncio.to_thread(_check_rows, rollouts, inputs, verifier)
    record = JobRecord(
        job=new_job_id("reverify"), benchmark="reverify", model=verifier, verifier=verifier, spans=[(0, count, 1)]
    )
    verdicts = _Verdicts(record.job, count)
    work = output.with_name(f".{output.name}.{os.getpid()}.work")
    try:
        async with LocalStack(config, work, verifier=verifier, verifiers_only=True) as stack:
            await _run(stack, record, verdicts, (rollouts, inputs), _encode(options), on_start)
            stack.complete()
        changed = await asyncio.to_thread(_write, rollouts, output, verdicts, verifier)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tally = verdicts.ledger.tally
    return Reverified(
        verifier=verifier,
        verifier_digest=verdicts.digest or digest,
        rollouts=count,
        scored=tally.scored,
        failed=sum(tally.failed.values()),
        failed_by_class=dict(tally.failed),
        changed=changed,
        mean_reward=tally.reward_sum / tally.scored if tally.scored else None,
        output=str(output),
    )


def _check_output(output: Path, rollouts: Path) -> None:
    if output.resolve() == rollouts.resolve():
        raise UsageError(f"--output {output} would overwrite the rollouts it is made from")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        known = output.exists()
        with output.open("ab"):
            pass
        if not known:
            output.unlink()
    except OSError as e:
        raise UsageError(f"--output {output}: cannot be written: {e.strerror or e}") from None


def _check_rows(rollouts: Path, inputs: Path | None, verifier: str) -> int:
    """Read everything once, so that a broken row is told before anything runs; returns the number of rows."""
    required = VERIFIERS.load(verifier).required
    count = 0
    for joined in join_rollouts(inputs, rollouts):
        count += 1
        row = _fields.decode(joined.row)
        if lacking := [key for key in required if key not in row]:
            more = "" if inputs else "; --inputs FILE joins the materialized inputs"
            raise DataError(
                f"{rollouts}:{joined.number}: verifier {verifier!r} needs {', '.join(map(repr, lacking))}, "
                f"which the row lacks{more}"
            )
    if not count:
        raise DataError(f"{rollouts}: no rollouts in it")
    return count


async def _run(
    stack: LocalStack,
    record: JobRecord,
    verdicts: _Verdicts,
    files: tuple[Path, Path | None],
    options: bytes,
    on_start: Callable[[Progress], None],
) -> None:
    bus = stack.bus
    await enrol(bus, record)
    progress = Progress(record, verdicts.ledger)

    def recorded(fresh: list[Result], _: Ledger) -> None:
        progress.finished += len(fresh)

    async def reissue(again: dict[RolloutId, tuple[int, int]]) -> None:
        wanted = {rollout.task_index: issue for rollout, (_, issue) in again.items()}
        await _publish(bus, record, files, options, lambda order: wanted.get(order))

    publishing: asyncio.Task[None] | None = None

    async def published() -> bool:
        return publishing is not None and publishing.done()

    consumer = ResultsConsumer(
        bus,
        record,
        JobFiles(files[0].parent),
        verdicts,
        stack.config.results,
        reissue,
        published=published,
        on_results=recorded,
    )
    on_start(progress)
    progress.published = record.total
    publishing = asyncio.create_task(_publish(bus, record, files, options, lambda _: 0), name="publisher")
    try:
        await stack.until(consumer.run(), publishing)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    await retire(bus, record)


async def _publish(
    bus: Bus,
    record: JobRecord,
    files: tuple[Path, Path | None],
    options: bytes,
    issue_of: Callable[[int], int | None],
) -> None:
    rows = join_rollouts(files[1], files[0])
    while batch := await asyncio.to_thread(_take, rows):
        attempts = [
            (_attempt(record, joined, options), issue)
            for joined in batch
            if (issue := issue_of(joined.order)) is not None
        ]
        await asyncio.gather(*(publish_patiently(bus, a, message_id(a.rollout, 1, issue)) for a, issue in attempts))


def _take(rows: Iterator[Joined]) -> list[Joined]:
    return list(itertools.islice(rows, BATCH))


def _attempt(record: JobRecord, joined: Joined, options: bytes) -> Attempt:
    return Attempt(
        rollout=RolloutId(record.job, joined.order, 0),
        agent="recorded",
        verifier=record.verifier,
        row=joined.row,
        response=joined.response,
        verifier_options=options,
        policy=Policy(model="recorded"),
    )


def _write(rollouts: Path, output: Path, verdicts: _Verdicts, verifier: str) -> int:
    """Write the scored rows and the failed ones; returns how many rewards changed."""
    changed = 0
    failures = JobFiles.beside(output).failures
    part, failed_part = (path.with_name(f".{path.name}.{os.getpid()}.part") for path in (output, failures))
    try:
        with part.open("wb") as scored, failed_part.open("wb") as failed:
            for order, (_, line) in enumerate(iter_jsonl(rollouts)):
                fields: dict[str, Any] = _fields.decode(line)
                verdict = verdicts.results[order]
                before = _reward(fields.pop("reward", None))
                fields.pop("reward_components", None)  # the old verdict's
                fields["gym_bus"] = _provenance(fields.get("gym_bus"), verifier, verdicts.digest, before)
                if isinstance(verdict, Failed):
                    failed.write(_failed_row(fields, verdict) + b"\n")
                    continue
                reward, extra = verdict
                changed += before != reward
                for key in [key for key in fields if key.startswith("_ng_failure")]:
                    del fields[key]
                own = _fields.decode(extra)
                scored.write(_encode({**fields, **own, "reward": reward}) + b"\n")
            _sync(scored, failed)
        part.replace(output)
        if failed_part.stat().st_size:
            failed_part.replace(failures)
        else:
            failures.unlink(missing_ok=True)  # of an earlier run of the same command
    finally:
        for path in (part, failed_part):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    return changed


def _sync(*files: Any) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _reward(stored: msgspec.Raw | None) -> float | None:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(stored, type=float) if stored is not None else None
    return None


def _provenance(stored: msgspec.Raw | None, verifier: str, digest: str, before: float | None) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    if stored is not None:
        with contextlib.suppress(msgspec.DecodeError):
            ours = dict(_fields.decode(stored))
    ours["reverified"] = {"verifier": verifier, "verifier_digest": digest, "reward_before": before}
    return ours


def _failed_row(fields: dict[str, Any], failed: Failed) -> bytes:
    failure = failed.failure
    return _encode({**fields, "_ng_failure_class": failure.kind.value, "_ng_failure_detail": failure.detail})
