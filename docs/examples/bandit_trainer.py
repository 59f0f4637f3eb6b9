"""Learn a softmax policy over A to D for each task of a running job: python bandit_trainer.py NATS_ADDRESS JOB."""

import math
import sys
from collections import defaultdict

import msgspec

from gym_bus.rewards import RewardStream


def softmax(logits: dict[str, float]) -> dict[str, float]:
    """Shares that add up to 1."""
    total = sum(math.exp(logit) for logit in logits.values())
    return {letter: math.exp(logit) / total for letter, logit in logits.items()}


policy: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys("ABCD", 0.0))
sampled, learned = [], []
for group in RewardStream(sys.argv[1], job=sys.argv[2], durable="bandit"):
    logits, mean = policy[group.task_index], sum(group.rewards) / max(1, len(group.rewards))
    for result in group.results:  # a failed rollout is in group.failures: it teaches nothing
        answer = msgspec.json.decode(result.extra)["extracted_answer"]
        for letter, share in softmax(logits).items() if answer in logits else ():
            logits[letter] += (result.reward - mean) * ((letter == answer) - share)  # REINFORCE
    right = {msgspec.json.decode(result.row)["expected_answer"] for result in group.results}
    sampled.append(mean)
    learned += [softmax(logits)[letter] for letter in right]
    group.ack()
print(f"{len(sampled)} groups; mean reward sampled {sum(sampled) / len(sampled):.2f}, ", end="")
print(f"expected of the learned policy {sum(learned) / len(learned):.2f}")
