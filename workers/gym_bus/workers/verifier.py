"""The verifier worker: an attempt in, a result out."""

from __future__ import annotations

import time

import msgspec

from gym_bus import subjects
from gym_bus.config import VerifierConfig
from gym_bus.errors import FailureKind, GymBusError, SandboxError
from gym_bus.messages import Attempt, Failed, Failure, Message, Result, Scored
from gym_bus.timing import since
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.service import VerifierService
from gym_bus.workers.loop import Cancellations, Source


class VerifierWorker:
    """Judges attempts; cheap verifiers run in the loop, the others on the service's pool."""

    stage = "verifier"

    def __init__(self, config: VerifierConfig, service: VerifierService, worker: str) -> None:
        self._config, self._service, self._worker = config, service, worker
        self.cancellations = Cancellations()

    def sources(self) -> list[Source]:
        """One consumer per verifier."""
        return [
            Source(stream=subjects.ATTEMPTS, consumer=f"verifier-{name}", subject=subjects.attempt(name, "*"))
            for name in (self._config.names or tuple(VERIFIERS))
        ]

    async def handle(self, message: Message, stored_at: float) -> Result:
        """Judge one attempt.

        Raises:
            SandboxError: worth another delivery.
        """
        if not isinstance(message, Attempt):
            raise TypeError(f"a {type(message).__name__} on the attempt stream")
        message.timings.publish_s = max(0.0, stored_at - message.published_at)
        message.timings.attempt_queue_s = since(stored_at)
        started = time.monotonic()
        try:
            verdict = await self._service.verify(
                message.verifier, message.verifier_options, message.row, message.response
            )
        except SandboxError:
            raise
        except GymBusError as e:  # a broken task or verifier: no reward, and no other delivery would help
            message.timings.verify_s = time.monotonic() - started
            return self._failed(message, e.kind or FailureKind.VERIFIER_ERROR, str(e))
        message.timings.verify_s = time.monotonic() - started
        return Scored(
            rollout=message.rollout,
            number=message.number,
            agent=message.agent,
            verifier=message.verifier,
            verifier_digest=self._service.digest(message.verifier, message.verifier_options),
            reward=verdict.reward,
            components=verdict.components,
            extra=_join(message.extra, verdict.extra),
            row=message.row,
            response=message.response,
            group_size=message.group_size,
            policy=message.policy,
            usage=message.usage,
            calls=message.calls,
            timings=message.timings,
            agent_worker=message.agent_worker,
            verifier_worker=self._worker,
        )

    def _failed(self, attempt: Attempt, kind: FailureKind, detail: str) -> Failed:
        return Failed(
            rollout=attempt.rollout,
            number=attempt.number,
            failure=Failure(kind=kind, detail=detail[:4000], stage=self.stage),
            agent=attempt.agent,
            verifier=attempt.verifier,
            row=attempt.row,
            response=attempt.response,
            extra=attempt.extra,
            group_size=attempt.group_size,
            policy=attempt.policy,
            usage=attempt.usage,
            calls=attempt.calls,
            timings=attempt.timings,
            agent_worker=attempt.agent_worker,
            verifier_worker=self._worker,
        )


def _join(agent_extra: bytes, verdict_extra: dict[str, object]) -> bytes:
    """Both parts as one JSON object; the verifier's keys win."""
    if agent_extra == b"{}":
        return msgspec.json.encode(verdict_extra)
    return msgspec.json.encode(msgspec.json.decode(agent_extra, type=dict[str, object]) | verdict_extra)
