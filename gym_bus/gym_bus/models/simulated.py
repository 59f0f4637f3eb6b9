"""A model made of distributions: latency, length and faults, drawn per call; every run draws the same."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np

from gym_bus.errors import ModelError, ModelTimeout, RateLimited
from gym_bus.messages import Call, Usage
from gym_bus.models.api import CallInfo, Reply, ResponseHead
from gym_bus.models.body import count_tokens, response_body
from gym_bus.models.prompts import prompt_text
from gym_bus.settings import Distribution, SimulatedConfig

VOCABULARY = 32_000
MOST_TOKENS = 1_000_000
_WORDS = ("so", "we", "add", "and", "then", "take", "the", "next", "part", "as", "given", "to", "be", "shown", "again")

_head = msgspec.json.Decoder(ResponseHead)


class Draw(msgspec.Struct, frozen=True):
    """What one call will be like."""

    latency_s: float
    tokens: int
    fault: str
    """rate_limited, server_error, hang, or empty."""
    ending: str
    """The text that ends the answer."""


class SimulatedModel:
    """A model without weights."""

    def __init__(self, config: SimulatedConfig, *, name: str = "simulated") -> None:
        self.name, self._config = name, config
        self._endings = (config.text,) if isinstance(config.text, str) else config.text
        self._texts: dict[tuple[int, str], str] = {}
        self._in_flight = 0
        self._begun: deque[float] = deque()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """The time of one call at an endpoint that takes only so many.

        Raises:
            RateLimited: it is one too many.
        """
        c, now = self._config, time.monotonic()
        if c.most_in_flight and self._in_flight >= c.most_in_flight:
            raise self._refusal(f"{c.most_in_flight} calls are in flight")
        if c.most_per_s and not self._counts(now):
            raise self._refusal(f"{c.most_per_s:g} calls have begun within a second")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _counts(self, now: float) -> bool:
        begun = self._begun
        while begun and begun[0] <= now - 1:
            begun.popleft()
        if len(begun) >= self._config.most_per_s:
            return False
        begun.append(now)
        return True

    def _refusal(self, why: str) -> RateLimited:
        return RateLimited(f"simulated: too many requests: {why}", 429, self._config.retry_after_s or None)

    def draw(self, key: str) -> Draw:
        """The call of this identity; the same for the same seed, in any process."""
        c = self._config
        plain = not (c.rate_limited or c.server_error or c.hang) and len(self._endings) == 1
        if plain and c.latency_s.kind == "constant" and c.output_tokens.kind == "constant":
            return Draw(c.latency_s.mean, _whole(c.output_tokens.mean), "", self._endings[0])
        rng = random.Random(f"{c.seed}:{key}")
        dice, fault = rng.random(), ""
        for kind, share in (("rate_limited", c.rate_limited), ("server_error", c.server_error), ("hang", c.hang)):
            if dice < share:
                fault = kind
                break
            dice -= share
        latency, tokens = sample(c.latency_s, rng), _whole(sample(c.output_tokens, rng))
        return Draw(latency, tokens, fault, rng.choice(self._endings))

    def fault(self, draw: Draw) -> ModelError | None:
        """The error that the call ends in, as drawn."""
        if draw.fault == "rate_limited":
            return self._refusal("as drawn")
        return ModelError("simulated: internal error", 500) if draw.fault == "server_error" else None

    def text(self, tokens: int, ending: str) -> str:
        """An answer of so many words, `ending` included."""
        key = (tokens, ending)
        if key not in self._texts:
            if len(self._texts) > 256:
                self._texts.clear()
            filler = max(0, tokens - count_tokens(ending))
            words = [_WORDS[i % len(_WORDS)] for i in range(filler)]
            self._texts[key] = " ".join([*words, ending])
        return self._texts[key]

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        """Wait as drawn, then answer or fail as drawn.

        Raises:
            RateLimited, ModelError, ModelTimeout: as the shares say.
        """
        with self.admitted():
            return await self._answer(params, info)

    async def _answer(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        draw = self.draw(f"{info.rollout}/{info.number}/{info.step}")
        if draw.fault == "hang" or draw.latency_s > info.limit_s:
            await asyncio.sleep(info.limit_s)
            raise ModelTimeout(f"simulated model {self.name!r} did not answer within {info.limit_s:g} s")
        if draw.latency_s:
            await asyncio.sleep(draw.latency_s)
        if fault := self.fault(draw):
            raise fault
        spent = count_tokens(prompt_text(params.get("input")))
        usage = Usage(input_tokens=spent, output_tokens=draw.tokens, total_tokens=spent + draw.tokens)
        name = f"{info.rollout.task_index}_{info.rollout.rollout_index}_{info.step}"
        body = response_body(
            name=name,
            model=self.name,
            text=self.text(draw.tokens, draw.ending),
            usage=usage,
            created_at=int(time.time()),
        )
        call = self.tokens(spent, draw.tokens)
        return Reply(body=body, head=_head.decode(body), usage=usage, call=call)

    def tokens(self, prompt: int, sampled: int) -> Call | None:
        """Ids and log-probabilities of so many tokens, always the same; None where it is to give none."""
        if not self._config.tokens:
            return None
        rng = np.random.default_rng(self._config.seed + 65_537 * prompt + sampled)
        return Call(
            prompt_token_ids=rng.integers(0, VOCABULARY, prompt, dtype="<u4").tobytes(),
            token_ids=rng.integers(0, VOCABULARY, sampled, dtype="<u4").tobytes(),
            logprobs=(-rng.exponential(1.0, sampled)).astype("<f4").tobytes(),
        )

    async def close(self) -> None:
        """Nothing is held."""


def sample(d: Distribution, rng: random.Random) -> float:
    """One draw, never negative; in the quantity's unit."""
    if d.kind == "uniform":
        return max(0.0, rng.uniform(d.mean - d.spread, d.mean + d.spread))
    if d.kind == "exponential":
        return rng.expovariate(1 / d.mean) if d.mean > 0 else 0.0
    if d.kind == "lognormal":
        # `mean` is the mean of the quantity, not of its logarithm.
        return rng.lognormvariate(math.log(d.mean) - d.spread**2 / 2, d.spread) if d.mean > 0 else 0.0
    return d.mean


def _whole(tokens: float) -> int:
    return min(MOST_TOKENS, max(1, round(tokens)))
