"""The verifiers by name. A new verifier is a new file and one line here (or an entry point of another package)."""

from __future__ import annotations

from gym_bus.registry import Registry
from gym_bus.verifiers.base import AnyVerifier

VERIFIERS: Registry[type[AnyVerifier]] = Registry(
    "verifier",
    "gym_bus.verifiers",
    {
        "code_gen": "gym_bus.verifiers.code_gen:CodeGen",
        "example_multi_step": "gym_bus.verifiers.example_multi_step:ExampleMultiStep",
        "humaneval": "gym_bus.verifiers.function_tests:HumanEval",
        "math": "gym_bus.verifiers.math:Math",
        "mbpp": "gym_bus.verifiers.function_tests:Mbpp",
        "mcqa": "gym_bus.verifiers.mcqa:Mcqa",
        "string_match": "gym_bus.verifiers.string_match:StringMatch",
    },
)
