"""Score stored rollouts again: attempts go onto the bus straight from the file, no model is asked."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import msgspec

from gym_bus.benchmarks.dataset import lacking
from gym_bus.benchmarks.nemo_gym import VERIFIERS as NEMO_GYM_NAMES
from gym_bus.bus import Bus
from gym_bus.config import Config
from gym_bus.errors import RETRYABLE, DataError, FailureKind, UsageError
from gym_bus.jobs import JobRecord
from gym_bus.messages import Attempt, Failure, Policy, Result, RolloutId, Scored
from gym_bus.results.files import JobFiles
from gym_bus.results.flips import Change, Flips, TaskFlips, Totals
from gym_bus.results.ledger import FailedRollout, Ledger, State
from gym_bus.results.manifest import Manifest, new_job_id
from gym_bus.results.reader import Joined, decode_line, decode_mended, iter_jsonl, join_rollouts
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.workers.again import stored_extra
from gym_bus.workers.local import LocalStack
from gym_bus.workers.plan import check_verifier
from gym_bus.workers.publish import message_id, publish_patiently, take_batch
from gym_bus.workers.results import ResultsConsumer
from gym_bus.workers.run import Progress, enrol, retire

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode

STAGE = "verifier"
NULL = msgspec.Raw(b"null")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be scored again, and by whom."""

    rollouts: Path
    inputs: Path | None
    """The materialized inputs, where the rollouts lack fields."""
    verifier: str
    """Its name here, or NeMo Gym's for it."""
    output: Path
    judge_failed_only: bool = False
    """Only rollouts without a reward of which there is an answer; all other lines are passed on as they are."""


class Reverified(msgspec.Struct, frozen=True, kw_only=True):
    """How a re-verification ended."""

    verifier: str
    verifier_digest: str
    verifier_options: dict[str, Any]
    rollouts: int
    """That were judged."""
    scored: int
    failed: int
    failed_by_class: dict[str, int]
    kept: int
    """Lines that were passed on as they are."""
    changed: int
    """Rollouts whose reward is not the stored one."""
    mean_reward: float | None
    """Over all that were judged and scored."""
    flips: Totals
    tasks: list[TaskFlips]
    """Those with a change."""
    output: str
    failures_file: str
    flips_file: str


class _Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    reward: float | None = None
    components: dict[str, float] = {}
    extra: bytes = b"{}"
    failure: Failure | None = None
    """Why there is no reward."""


_verdict: msgspec.msgpack.Decoder[_Verdict] = msgspec.msgpack.Decoder(_Verdict)


class _Verdicts:
    """A results writer into a file that is forgotten: the command can be run again at no cost.

    Memory: 8 bytes per rollout and the ledger's.
    """

    def __init__(self, job: str, count: int, digest: str, file: IO[bytes]) -> None:
        self.ledger = Ledger(job, count, 1)
        self.digest = digest
        self._file = file
        self._place = array("q", [-1]) * count

    def append(self, results: Sequence[tuple[int, Result]]) -> list[Result]:
        """Take results; returns those that were not known."""
        fresh: list[Result] = []
        for _, result in results:
            if not self.ledger.holds(result.rollout) or self.ledger.state(result.rollout) is not State.MISSING:
                continue
            fresh.append(result)
            if isinstance(result, Scored):
                self.ledger.record_scored(result.rollout, result.reward)
                verdict = _Verdict(reward=result.reward, components=result.components, extra=result.extra)
                self.digest = result.verifier_digest
            else:
                self.ledger.record_failed(result.rollout, FailedRollout(result.failure.kind.value, 1, True))
                verdict = _Verdict(failure=result.failure)
            self._store(result.rollout.task_index, verdict)
        return fresh

    def _store(self, order: int, verdict: _Verdict) -> None:
        data = msgspec.msgpack.encode(verdict)
        self._place[order] = self._file.seek(0, os.SEEK_END)
        self._file.write(len(data).to_bytes(4) + data)

    def of(self, order: int) -> _Verdict:
        """What became of a rollout that has a result."""
        self._file.seek(self._place[order])
        return _verdict.decode(self._file.read(int.from_bytes(self._file.read(4))))


class _Head(msgspec.Struct, frozen=True):
    """What decides whether a line is judged."""

    task: int | None = msgspec.field(default=None, name="_ng_task_index")
    rollout: int | None = msgspec.field(default=None, name="_ng_rollout_index")
    reward: msgspec.Raw = NULL
    response: msgspec.Raw = NULL
    kind: str | None = msgspec.field(default=None, name="_ng_failure_class")
    stage: str | None = msgspec.field(default=None, name="_ng_failure_stage")

    @property
    def has_answer(self) -> bool:
        return bytes(self.response) != b"null"

    @property
    def has_reward(self) -> bool:
        return self.kind is None and bytes(self.reward) != b"null"

    @property
    def only_the_check_failed(self) -> bool:
        return self.has_answer and (self.kind == FailureKind.JUDGE_FAILED or self.stage == STAGE)


_head: msgspec.json.Decoder[_Head] = msgspec.json.Decoder(_Head)


class _AllBut(msgspec.Struct, frozen=True):
    """All numbers but some."""

    numbers: set[int]

    def __contains__(self, number: object) -> bool:
        return number not in self.numbers


class _Part(NamedTuple):
    """One file, and the numbers of its lines that are judged."""

    path: Path
    judged: Container[int]


def _all_with_answers(rollouts: Path) -> list[_Part]:
    """Every line, but for failures that have no answer which could be judged."""
    without: set[int] = set()
    for number, line in iter_jsonl(rollouts):
        head = decode_line(_head, line, rollouts, number)
        if head.kind is not None and not head.has_answer:
            without.add(number)
    return [_Part(rollouts, _AllBut(without))]


def _without_reward(rollouts: Path) -> list[_Part]:
    """The lines with an answer and no reward, of the rollouts and of the failures beside them."""
    failures = JobFiles.beside(rollouts).failures
    newest: dict[tuple[int | None, int | None], int] = {}
    for number, line in iter_jsonl(failures) if failures.exists() else ():
        head = decode_line(_head, line, failures, number)
        if head.only_the_check_failed:
            newest[-number if head.task is None else head.task, head.rollout] = number
    judged: set[int] = set()
    for number, line in iter_jsonl(rollouts):
        head = decode_line(_head, line, rollouts, number)
        if head.has_reward:
            newest.pop((head.task, head.rollout), None)
        elif head.has_answer:
            judged.add(number)
    return [_Part(rollouts, judged), *([_Part(failures, set(newest.values()))] if failures.exists() else [])]


class _Plan(NamedTuple):
    """The rows to judge."""

    parts: list[_Part]
    inputs: Path | None

    def rows(self) -> Iterator[tuple[int, Path, Joined]]:
        """Each with its number through all files, from 0, and its file."""
        orders = itertools.count()
        for path, judged in self.parts:
            for joined in join_rollouts(self.inputs, path, only=judged) if judged != set() else ():
                yield next(orders), path, joined


async def reverify_file(
    asked: Asked, config: Config, *, on_start: Callable[[Progress], None] = lambda _: None
) -> Reverified:
    """Score every rollout of a file and write the rows, with their new rewards, in the same order.

    Rows that cannot be judged go to `<output>_failures.jsonl` with their class: a failure is no reward. Tasks whose
    rewards changed go to `<output>_flips.jsonl`.

    The verifier's options are those of the job that made the rollouts, where it had the same verifier; for rollouts
    of NeMo Gym those that make it judge as NeMo Gym does. `job.verifier_options` wins over both.

    Raises:
        UsageError: no such verifier, or a file that cannot be written.
        DataError: a row that is no rollout; names file and line.
    """
    verifier = NEMO_GYM_NAMES.get(asked.verifier, asked.verifier)
    options = await asyncio.to_thread(options_for, asked.rollouts, verifier, config)
    digest = check_verifier(verifier, options, config)
    _check_output(asked)
    choose = _without_reward if asked.judge_failed_only else _all_with_answers
    plan = _Plan(await asyncio.to_thread(choose, asked.rollouts), asked.inputs)
    count = await asyncio.to_thread(_check_rows, plan, verifier)
    if not count and not asked.judge_failed_only:
        raise DataError(f"{asked.rollouts}: no rollouts in it")
    record = JobRecord(
        job=new_job_id("reverify"), benchmark="reverify", model=verifier, verifier=verifier, spans=[(0, count, 1)]
    )
    with tempfile.TemporaryFile(dir=asked.output.parent) as file:
        verdicts = _Verdicts(record.job, count, digest, file)
        if count:
            await _judge(record, verdicts, plan, asked.output, config, _encode(options), on_start)
        writer = _Writer(asked, verifier, verdicts)
        await asyncio.to_thread(writer.write, plan)
    tally, flips = verdicts.ledger.tally, writer.flips.totals()
    return Reverified(
        verifier=verifier,
        verifier_digest=verdicts.digest,
        verifier_options=options,
        rollouts=count,
        scored=tally.scored,
        failed=sum(tally.failed.values()),
        failed_by_class=dict(tally.failed),
        kept=writer.kept,
        changed=flips.up + flips.down + flips.newly_scored,
        mean_reward=tally.reward_sum / tally.scored if tally.scored else None,
        flips=flips,
        tasks=list(writer.flips.tasks()),
        output=str(asked.output),
        failures_file=str(writer.files.failures) if writer.files.failures.exists() else "",
        flips_file=str(writer.files.flips),
    )


class _Job(msgspec.Struct, frozen=True):
    job: str = ""


class _Source(msgspec.Struct, frozen=True):
    gym_bus: _Job | None = None


_source: msgspec.json.Decoder[_Source] = msgspec.json.Decoder(_Source)


def options_for(rollouts: Path, verifier: str, config: Config) -> dict[str, Any]:
    """The options that stored rollouts are judged by: the job's own, or NeMo Gym's way, and what is set wins."""
    return {**_usual_options(rollouts, verifier), **config.job.verifier_options}


def _usual_options(rollouts: Path, verifier: str) -> dict[str, Any]:
    manifest = JobFiles.beside(rollouts).manifest
    if manifest.exists():
        made = Manifest.load(manifest)
        return made.verifier_options if made.verifier == verifier else {}
    for number, line in iter_jsonl(rollouts):
        ours = decode_line(_source, line, rollouts, number).gym_bus
        return {} if ours and ours.job else getattr(VERIFIERS.load(verifier), "nemo_gym_options", {})
    return {}


def _check_output(asked: Asked) -> None:
    output, files = asked.output, JobFiles.beside(asked.output)
    read = {path.resolve() for path in (asked.rollouts, asked.inputs) if path}
    read |= {JobFiles.beside(asked.rollouts).failures.resolve()}
    for path in (output, files.failures, files.flips):
        if path.resolve() in read:
            raise UsageError(f"--output {output} would overwrite {path}, which it is made from")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        known = output.exists()
        with output.open("ab"):
            pass
        if not known:
            output.unlink()
    except OSError as e:
        raise UsageError(f"--output {output}: cannot be written: {e.strerror or e}") from None


def _check_rows(plan: _Plan, verifier: str) -> int:
    """Read everything once, so that a broken file is told before anything runs; returns the number of rows.

    A row here and there that the verifier cannot judge becomes a failure; where all are so, something is missing.
    """
    required = VERIFIERS.load(verifier).required
    count = broken = 0
    complaint = ""
    for _, path, joined in plan.rows():
        count += 1
        row = _fields.decode(joined.row)
        if missing := lacking(required, row.__contains__):
            broken += 1
            complaint = complaint or (
                f"{path}:{joined.number}: verifier {verifier!r} needs {', '.join(map(repr, missing))}, "
                "which the row lacks, as do all others"
            )
    if count and broken == count:
        raise DataError(complaint + ("" if plan.inputs else "; --inputs FILE joins the materialized inputs"))
    return count


async def _judge(
    record: JobRecord,
    verdicts: _Verdicts,
    plan: _Plan,
    output: Path,
    config: Config,
    options: bytes,
    on_start: Callable[[Progress], None],
) -> None:
    work = output.with_name(f".{output.name}.{os.getpid()}.work")
    try:
        async with LocalStack(config, work, verifier=record.verifier, verifiers_only=True) as stack:
            await _run(stack, record, verdicts, plan, options, on_start)
            stack.complete()
    finally:
        shutil.rmtree(work, ignore_errors=True)


async def _run(
    stack: LocalStack,
    record: JobRecord,
    verdicts: _Verdicts,
    plan: _Plan,
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
        await _publish(bus, record, plan, options, lambda order: wanted.get(order))

    publishing: asyncio.Task[None] | None = None

    async def published() -> bool:
        return publishing is not None and publishing.done()

    consumer = ResultsConsumer(
        bus,
        record,
        JobFiles(plan.parts[0].path.parent),
        verdicts,
        stack.config.results,
        reissue,
        published=published,
        on_results=recorded,
    )
    on_start(progress)
    progress.published = record.total
    publishing = asyncio.create_task(_publish(bus, record, plan, options, lambda _: 0), name="publisher")
    try:
        await stack.until(consumer.run(), publishing)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    await retire(bus, record)


async def _publish(
    bus: Bus, record: JobRecord, plan: _Plan, options: bytes, issue_of: Callable[[int], int | None]
) -> None:
    rows = plan.rows()
    while batch := await asyncio.to_thread(take_batch, rows, _size_of):
        attempts = [
            (_attempt(record, order, joined, options), issue)
            for order, _, joined in batch
            if (issue := issue_of(order)) is not None
        ]
        await asyncio.gather(*(publish_patiently(bus, a, message_id(a.rollout, 1, issue)) for a, issue in attempts))


def _size_of(row: tuple[int, Path, Joined]) -> int:
    return len(row[2].row) + len(row[2].response)


def _attempt(record: JobRecord, order: int, joined: Joined, options: bytes) -> Attempt:
    return Attempt(
        rollout=RolloutId(record.job, order, 0),
        agent="recorded",
        verifier=record.verifier,
        row=joined.row,
        response=joined.response,
        verifier_options=options,
        policy=Policy(model="recorded"),
    )


class _Writer:
    """Writes the judged rows, and passes the others on."""

    def __init__(self, asked: Asked, verifier: str, verdicts: _Verdicts) -> None:
        self._output = asked.output
        self._verifier, self._verdicts = verifier, verdicts
        self.files = JobFiles.beside(asked.output)
        self.flips = Flips(verdicts.digest)
        self.kept = 0

    def write(self, plan: _Plan) -> None:
        """Put all three files in place, each whole."""
        failures = self.files.failures
        paths = (self._output, failures, self.files.flips)
        parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
        try:
            with parts[0].open("wb") as scored, parts[1].open("wb") as failed, parts[2].open("wb") as flips:
                self._rows(plan, scored, failed)
                flips.writelines(_encode(task) + b"\n" for task in self.flips.tasks())
                for file in (scored, failed, flips):
                    file.flush()
                    os.fsync(file.fileno())
                any_failed = failed.tell() > 0
            for part, path in zip(parts, paths, strict=True):
                if path != failures or any_failed:
                    part.replace(path)
            if not any_failed:
                failures.unlink(missing_ok=True)  # of an earlier run of the same command
        except OSError as e:
            raise UsageError(f"--output {self._output}: cannot be written: {e.strerror or e}") from None
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    def _rows(self, plan: _Plan, scored: BinaryIO, failed: BinaryIO) -> None:
        orders = itertools.count()
        for path, judged in plan.parts:
            for place, (number, line) in enumerate(iter_jsonl(path)):
                if number in judged:
                    verdict = self._verdicts.of(next(orders))
                    row = self._judged(place, decode_mended(_fields, line), verdict)
                    (failed if verdict.failure else scored).write(row)
                else:
                    self.kept += 1
                    kind = decode_line(_head, line, path, number).kind
                    (scored if kind is None else failed).write(line + b"\n")

    def _judged(self, place: int, line: tuple[bytes, dict[str, msgspec.Raw]], verdict: _Verdict) -> bytes:
        """The row with its new verdict."""
        head = _head.decode(line[0])
        stored: dict[str, Any] = dict(line[1])
        ours = _object(stored.get("gym_bus"))
        before = _number(head.reward) if head.kind is None else None
        change = Change(
            rollout_index=head.rollout or 0,
            reward_before=before,
            reward_after=verdict.reward,
            verifier_digest_before=str(ours.get("verifier_digest") or ""),
        )
        self.flips.add(place if head.task is None else head.task, change)
        fields = {key: value for key, value in stored.items() if key not in _OLD_VERDICT}
        fields["gym_bus"] = self._provenance(ours, change)
        if verdict.failure:
            fields.pop("reward", None)
            return _encode(fields | _failed(verdict.failure)) + b"\n"
        if "stored" in ours:  # what the attempt had beside its answer is the row's own from now on
            fields |= _fields.decode(stored_extra(line[0]))
            del fields["gym_bus"]["stored"]
        fields |= _fields.decode(verdict.extra)
        if verdict.components:
            fields["reward_components"] = verdict.components
        fields["reward"] = verdict.reward  # in the place of the old one
        return _encode(fields) + b"\n"

    def _provenance(self, ours: dict[str, Any], change: Change) -> dict[str, Any]:
        now = {"verifier": self._verifier, "verifier_digest": self._verdicts.digest}
        before = {
            "verifier_before": ours.get("verifier"),
            "verifier_digest_before": change.verifier_digest_before or None,
            "reward_before": change.reward_before,
        }
        return {**ours, **now, "reverified": now | before}


_OLD_VERDICT = frozenset(
    {
        "reward_components",
        "_ng_failure_class",
        "_ng_failure_terminal",
        "_ng_failure_stage",
        "_ng_failure_detail",
        "_ng_failure_judge_error",
    }
)


def _failed(failure: Failure) -> dict[str, Any]:
    told = {
        "_ng_failure_class": failure.kind.value,
        "_ng_failure_terminal": failure.terminal or failure.kind not in RETRYABLE,
        "_ng_failure_stage": failure.stage or STAGE,
        "_ng_failure_detail": failure.detail,
    }
    return told | ({"_ng_failure_judge_error": failure.detail} if failure.kind is FailureKind.JUDGE_FAILED else {})


def _number(stored: msgspec.Raw) -> float | None:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(stored, type=float | None)
    return None


def _object(stored: msgspec.Raw | None) -> dict[str, Any]:
    if stored is not None:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            return msgspec.json.decode(stored, type=dict[str, Any])
    return {}
