"""Agents and toolboxes by name. A new one is a new file and one line here (or an entry point of another package)."""

from __future__ import annotations

from gym_bus.agents.base import Agent
from gym_bus.agents.tools import Toolbox
from gym_bus.registry import Registry

AGENTS: Registry[type[Agent]] = Registry("agent", "gym_bus.agents", {"simple": "gym_bus.agents.simple:SimpleAgent"})

TOOLBOXES: Registry[type[Toolbox]] = Registry(
    "toolbox",
    "gym_bus.toolboxes",
    {
        "example_multi_step": "gym_bus.agents.example_multi_step:ExampleMultiStep",
        "python": "gym_bus.agents.python_tool:PythonTool",
    },
)
