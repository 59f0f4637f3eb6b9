"""Ordering rollouts again: from the start, or only the check of an attempt that the failures file still holds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from gym_bus.bus import Bus
from gym_bus.jobs import JobRecord
from gym_bus.messages import Attempt, Call, Policy, RolloutId, Timings, Usage
from gym_bus.results.files import JobFiles
from gym_bus.results.writer import ResultsWriter
from gym_bus.workers.publish import (
    Order,
    input_row,
    is_cancelled,
    make_room,
    message_id,
    publish_patiently,
    publish_requests,
    take_batch,
)


class _Stored(msgspec.Struct, frozen=True):
    extra: msgspec.Raw = msgspec.Raw(b"{}")
    calls: tuple[Call, ...] = ()


class _Ours(msgspec.Struct, frozen=True):
    model: str | None = None
    policy_version_start: int | None = None
    policy_version_end: int | None = None
    temperature: float | None = None
    agent_worker: str = ""
    timings: Timings = msgspec.field(default_factory=Timings)
    usage: Usage | None = None
    stored: _Stored = _Stored()


class _Line(msgspec.Struct, frozen=True):
    response: msgspec.Raw
    gym_bus: _Ours


_line: msgspec.json.Decoder[_Line] = msgspec.json.Decoder(_Line)


class _ExtraOurs(msgspec.Struct, frozen=True):
    stored: _Stored = _Stored()


class _ExtraLine(msgspec.Struct, frozen=True):
    gym_bus: _ExtraOurs | None = None


_extra_line: msgspec.json.Decoder[_ExtraLine] = msgspec.json.Decoder(_ExtraLine)


def stored_extra(line: bytes) -> bytes:
    """What an attempt had beside its response, from its line in a failures file, ours or another's: a JSON object.

    Raises:
        msgspec.DecodeError: the line is none of a rollout.
    """
    ours = _extra_line.decode(line).gym_bus
    return bytes(ours.stored.extra) if ours else b"{}"


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Failed rollouts that are to be tried again."""

    attempts: dict[RolloutId, int]
    """The number of the attempt to order, by rollout."""
    afresh: set[RolloutId] = set()
    """Those to be generated again although an answer of theirs is stored."""
    from_verifier: int = 0
    """Those of which only the check is made again."""
    without_answer: int = 0
    """Rollouts that were left out: only their check was wanted, and there is no answer to check."""

    @property
    def from_agent(self) -> int:
        """Those that are generated again."""
        return len(self.attempts) - self.from_verifier


Wanted = Mapping[RolloutId, tuple[int, int]]
"""By rollout: the attempt's number, and how often that attempt was ordered before."""


class Again:
    """Publishes further attempts of one job, for whoever holds its files open."""

    def __init__(self, bus: Bus, record: JobRecord, order: Order, files: JobFiles, writer: ResultsWriter) -> None:
        self._bus, self._record, self._order, self._files, self._writer = bus, record, order, files, writer
        self._limit_s = order.limit_s
        self.afresh: set[RolloutId] = set()
        """Rollouts to be generated again although an answer of theirs is stored."""

    def use_limit(self, limit_s: float | None) -> None:
        """The wall-clock limit of what is generated again, seconds; None for the job's own."""
        self._order = msgspec.structs.replace(self._order, limit_s=limit_s or self._limit_s)

    def from_verifier(self, rollout: RolloutId) -> bool:
        """Whether only the check is made again: generation had succeeded, and its answer is stored."""
        failed = self._writer.ledger.failure(rollout)
        return failed is not None and failed.stored_at >= 0 and rollout not in self.afresh

    async def order(self, wanted: Wanted) -> None:
        """Publish the attempts, after clearing the places of the failed results on the stream.

        A queue that is full is waited for, and so is a broker that is away.
        """
        stored = sorted(filter(self.from_verifier, wanted), key=self._place)
        if stored:
            await self._verify_again(stored, wanted)
        if len(stored) < len(wanted):
            known = set(stored)
            await publish_requests(
                self._bus,
                self._order,
                self._files.inputs,
                lambda rollout: wanted[rollout][0] if rollout in wanted and rollout not in known else 0,
                self._record.group_size,
                issue_of=lambda rollout: wanted[rollout][1],
                watermark=False,
            )

    def _place(self, rollout: RolloutId) -> int:
        failed = self._writer.ledger.failure(rollout)
        return failed.stored_at if failed else -1

    async def _verify_again(self, stored: list[RolloutId], wanted: Wanted) -> None:
        attempts = filter(None, (self._attempt(rollout, wanted[rollout][0]) for rollout in stored))
        while batch := await asyncio.to_thread(take_batch, attempts, lambda a: len(a.row) + len(a.response)):
            await asyncio.gather(*(self._publish(attempt, wanted) for attempt in batch))
            if await is_cancelled(self._bus, self._record.job):
                break

    async def _publish(self, attempt: Attempt, wanted: Wanted) -> None:
        number, issue = wanted[attempt.rollout]
        if not await make_room(self._bus, attempt.rollout, number):
            return
        await publish_patiently(self._bus, attempt, message_id(attempt.rollout, number, issue))

    def _attempt(self, rollout: RolloutId, number: int) -> Attempt | None:
        line, row = self._writer.stored_line(rollout), self._writer.input_line(rollout)
        if line is None or row is None:  # it was scored meanwhile
            return None
        found = _line.decode(line)
        ours = found.gym_bus
        return Attempt(
            rollout=rollout,
            number=number,
            agent=self._order.agent,
            verifier=self._order.verifier,
            row=input_row(row, self._files.inputs).row,
            response=bytes(found.response),
            verifier_options=self._order.verifier_options,
            group_size=self._record.group_size(rollout.task_index),
            policy=Policy(
                model=ours.model or self._order.model,
                version_start=ours.policy_version_start or 0,
                version_end=ours.policy_version_end or 0,
                temperature=ours.temperature,
            ),
            usage=ours.usage or Usage(),
            calls=ours.stored.calls,
            extra=bytes(ours.stored.extra),
            timings=ours.timings,
            agent_worker=ours.agent_worker,
        )
