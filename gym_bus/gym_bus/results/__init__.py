"""Result files: writing, reading, profiling. Plain synchronous code over local files."""

from gym_bus.results.frame import load

__all__ = ["load"]
