"""Train a softmax policy over the letters A to D, one per task, on the rewards of a job that is running.

python bandit_trainer.py nats://127.0.0.1:4222 JOB
"""

import asyncio
import math
import sys
from collections import defaultdict

import msgspec

from gym_bus.rewards import RewardStream


def softmax(logits: dict[str, float]) -> dict[str, float]:
    """Shares that add up to 1."""
    weights = {letter: math.exp(logit) for letter, logit in logits.items()}
    return {letter: weight / sum(weights.values()) for letter, weight in weights.items()}


async def train(nats: str, job: str, lr: float = 1.0) -> None:
    """Learn from every group once."""
    policy: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys("ABCD", 0.0))
    sampled, learned = [], []
    async with RewardStream(nats, job=job, durable="bandit") as groups:
        async for group in groups:
            logits, mean = policy[group.task_index], sum(group.rewards) / max(1, len(group.rewards))
            for result in group.results:  # a failed rollout is in group.failures: it teaches nothing
                answer = msgspec.json.decode(result.extra)["extracted_answer"]
                for letter, share in softmax(logits).items() if answer in logits else ():
                    logits[letter] += lr * (result.reward - mean) * ((letter == answer) - share)  # REINFORCE
            right = {msgspec.json.decode(r.row)["expected_answer"] for r in group.results}
            sampled.append(mean)
            learned += [softmax(logits)[letter] for letter in right]
            await group.ack()
    print(
        f"{len(sampled)} groups; mean reward sampled {sum(sampled) / len(sampled):.2f}, "
        f"expected of the learned policy {sum(learned) / len(learned):.2f}"
    )


if __name__ == "__main__":
    asyncio.run(train(sys.argv[1], sys.argv[2]))
