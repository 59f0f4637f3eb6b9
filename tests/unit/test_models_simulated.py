"""The model made of distributions: every run draws the same, and the draws have the shape that was asked for."""

from __future__ import annotations

import asyncio
import random
import statistics
from array import array
from collections import Counter
from typing import Any

import msgspec
import pytest

from gym_bus.errors import FailureKind, ModelError, ModelTimeout, RateLimited
from gym_bus.messages import RolloutId, Usage
from gym_bus.models.api import CallInfo, Reply
from gym_bus.models.body import chat_body, count_tokens
from gym_bus.models.registry import Models
from gym_bus.models.simulated import MOST_TOKENS, VOCABULARY, SimulatedModel, sample
from gym_bus.settings import Distribution, ModelConfig, SimulatedConfig

UNIFORM = Distribution(kind="uniform", mean=100, spread=50)


def model(**config: Any) -> SimulatedModel:
    return SimulatedModel(SimulatedConfig(**config), name="sim")


def info(task: int = 0, rollout: int = 0, *, number: int = 1, step: int = 0, limit_s: float = 60.0) -> CallInfo:
    return CallInfo(rollout=RolloutId("job", task, rollout), number=number, step=step, limit_s=limit_s)


def text_of(reply: Reply) -> str:
    return str(msgspec.json.decode(reply.head.output[0])["content"][0]["text"])


async def test_an_answer_has_the_drawn_length_and_ends_with_the_configured_text() -> None:
    reply = await model(output_tokens=Distribution(mean=5), text="the answer").respond({"input": "a b c"}, info(3, 1))

    body = msgspec.json.decode(reply.body)
    assert text_of(reply) == "so we add the answer"
    assert reply.usage == Usage(input_tokens=3, output_tokens=5, total_tokens=8)
    assert (body["id"], body["model"], body["status"]) == ("resp_3_1_0", "sim", "completed")
    assert body["usage"]["total_tokens"] == 8
    assert reply.call is None


async def test_a_text_longer_than_the_draw_is_kept_whole() -> None:
    simulated = model(text="one two three", output_tokens=Distribution(mean=1))

    assert text_of(await simulated.respond({"input": "x"}, info())) == "one two three"


async def test_answers_of_many_lengths_are_right_whatever_is_kept_of_them() -> None:
    simulated = model(output_tokens=Distribution(kind="uniform", mean=500, spread=499))

    replies = [await simulated.respond({"input": "x"}, info(i)) for i in [*range(600), *range(600)]]

    assert all(count_tokens(text_of(reply)) == reply.usage.output_tokens for reply in replies)
    assert len({reply.usage.output_tokens for reply in replies}) > 300
    assert len(simulated._texts) <= 257


async def test_of_several_endings_one_is_drawn_and_the_same_again() -> None:
    simulated = model(text=("yes", "no"))

    found = [[text_of(await simulated.respond({"input": "x"}, info(i))) for i in range(20)] for _ in range(2)]

    assert {text.split()[-1] for text in found[0]} == {"yes", "no"}
    assert found[0] == found[1]


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    settings: dict[str, Any] = {"latency_s": UNIFORM, "output_tokens": UNIFORM, "rate_limited": 0.3}
    keys = [f"job.{i}.0/1/0" for i in range(50)]

    def draws(seed: int) -> list[Any]:
        return [model(seed=seed, **settings).draw(key) for key in keys]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert len(set(draws(7))) > 25


def test_a_draw_is_pinned_across_processes_and_versions() -> None:
    draw = model(seed=1, latency_s=UNIFORM, output_tokens=UNIFORM, rate_limited=0.5).draw("job.0.0/1/0")

    rng = random.Random("1:job.0.0/1/0")
    assert draw.fault == ("rate_limited" if rng.random() < 0.5 else "")
    assert draw.latency_s == rng.uniform(50, 150)
    assert draw.tokens == round(rng.uniform(50, 150))


async def test_every_rollout_attempt_and_step_draws_for_itself() -> None:
    simulated = model(output_tokens=Distribution(kind="uniform", mean=5000, spread=5000))
    calls = [info(), info(1), info(0, 1), info(number=2), info(step=1)]

    lengths = [(await simulated.respond({"input": "x"}, call)).usage.output_tokens for call in calls]
    again = [(await simulated.respond({"input": "x"}, call)).usage.output_tokens for call in reversed(calls)]

    assert len(set(lengths)) == len(calls)
    assert again == lengths[::-1]


@pytest.mark.parametrize(
    ("distribution", "mean", "low", "high"),
    [
        (Distribution(mean=3.5), 3.5, 3.5, 3.5),
        (Distribution(kind="uniform", mean=10, spread=4), 10, 6, 14),
        (Distribution(kind="exponential", mean=2), 2, 0, float("inf")),
        (Distribution(kind="lognormal", mean=2, spread=0.5), 2, 0, float("inf")),
        (Distribution(kind="lognormal", mean=2), 2, 2 - 1e-9, 2 + 1e-9),
        (Distribution(kind="exponential"), 0, 0, 0),
        (Distribution(kind="lognormal", spread=1), 0, 0, 0),
    ],
)
def test_samples_have_the_mean_and_the_bounds_of_their_distribution(
    distribution: Distribution, mean: float, low: float, high: float
) -> None:
    rng = random.Random(0)

    drawn = [sample(distribution, rng) for _ in range(20_000)]

    assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)
    assert low <= min(drawn) and max(drawn) <= high


def test_no_sample_is_negative() -> None:
    rng = random.Random(0)

    assert min(sample(Distribution(kind="uniform", mean=1, spread=5), rng) for _ in range(1000)) == 0.0


@pytest.mark.parametrize(("mean", "tokens"), [(0.0, 1), (2.6, 3), (1e12, MOST_TOKENS)])
def test_a_number_of_tokens_is_whole_and_bounded(mean: float, tokens: int) -> None:
    assert model(output_tokens=Distribution(mean=mean)).draw("k").tokens == tokens


def test_faults_come_in_the_configured_shares() -> None:
    simulated = model(rate_limited=0.2, server_error=0.1, hang=0.05)

    found = Counter(simulated.draw(str(i)).fault for i in range(20_000))

    shares = {kind: count / 20_000 for kind, count in found.items()}
    assert shares == pytest.approx({"": 0.65, "rate_limited": 0.2, "server_error": 0.1, "hang": 0.05}, abs=0.01)


@pytest.mark.parametrize(
    ("config", "error", "status", "kind"),
    [
        ({"rate_limited": 1.0}, RateLimited, 429, FailureKind.RATE_LIMITED),
        ({"server_error": 1.0}, ModelError, 500, FailureKind.MODEL_ERROR),
        ({"hang": 1.0}, ModelTimeout, 0, FailureKind.MODEL_TIMEOUT),
        ({"latency_s": Distribution(mean=3600)}, ModelTimeout, 0, FailureKind.MODEL_TIMEOUT),
    ],
)
async def test_a_fault_is_raised_as_an_endpoints_would_be(
    config: dict[str, Any], error: type[ModelError], status: int, kind: FailureKind
) -> None:
    with pytest.raises(ModelError) as e:
        await asyncio.wait_for(model(**config).respond({"input": "x"}, info(limit_s=0.01)), 60)

    assert (type(e.value), e.value.status, e.value.kind) == (error, status, kind)
    assert getattr(e.value, "retry_after_s", 1.0) == SimulatedConfig().retry_after_s


async def test_the_drawn_latency_is_waited_for() -> None:
    simulated = model(latency_s=Distribution(mean=0.05))
    loop = asyncio.get_running_loop()
    started = loop.time()

    await simulated.respond({"input": "x"}, info())

    assert loop.time() - started >= 0.049


async def test_tokens_come_with_log_probabilities_and_are_the_same_in_every_run() -> None:
    def respond(seed: int) -> Any:
        return model(tokens=True, seed=seed, output_tokens=Distribution(mean=6)).respond({"input": "a b"}, info())

    first, again, other = [(await respond(seed)).call for seed in (0, 0, 1)]

    ids, logprobs = array("I", first.token_ids), array("f", first.logprobs)
    assert (len(array("I", first.prompt_token_ids)), len(ids), len(logprobs)) == (2, 6, 6)
    assert max(ids) < VOCABULARY and max(logprobs) <= 0.0
    assert first == again
    assert first != other


async def test_a_configured_simulation_is_built_by_name() -> None:
    models = Models({"s": ModelConfig(kind="simulated", simulated=SimulatedConfig(text="done"))})

    reply = await models.get("s").respond({"input": "x"}, info())
    await models.close()

    assert text_of(reply).endswith("done")
    assert models.get("s") is models.get("s")


@pytest.mark.parametrize(("truncated", "finish_reason"), [(False, "stop"), (True, "length")])
def test_a_chat_body_says_why_it_ended(truncated: bool, finish_reason: str) -> None:
    usage = Usage(input_tokens=1, output_tokens=2, total_tokens=3)

    body = chat_body(name="1", model='a "model"', text="é\n", usage=usage, created_at=1, truncated=truncated)

    chat = msgspec.json.decode(body)
    assert (chat["model"], chat["choices"][0]["message"]["content"]) == ('a "model"', "é\n")
    assert chat["choices"][0]["finish_reason"] == finish_reason
