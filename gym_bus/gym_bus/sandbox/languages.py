"""How programs of each language are run: in the warmed interpreter, or by the machine's tools inside the sandbox."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from gym_bus.errors import UsageError, did_you_mean


class Language(msgspec.Struct, frozen=True, kw_only=True):
    """A language that is run by a command."""

    file: str
    """What the program's text is called."""
    command: tuple[str, ...]
    """Absolute path of the tool, and its arguments; the program's own follow."""
    build: tuple[str, ...] = ()
    """Run once before; its failure is a compile error."""
    made: str = ""
    """What the build makes."""
    bounded_address_space: bool = True
    """False for runtimes that reserve far more than they use: the cgroup bounds those alone."""

    def missing(self) -> str:
        """The first tool that is not on this machine; empty where all are. Without, no program would be at fault."""
        tools = (self.build or self.command)[:1]
        return next((tool for tool in tools if not os.access(tool, os.X_OK)), "")

    def header(self) -> dict[str, Any]:
        """What the program's process has to know."""
        return {"argv": list(self.command), "build": list(self.build), "kept": [self.made] if self.made else []}


COMMANDS: dict[str, Language] = {
    "bash": Language(file="main.sh", command=("/usr/bin/bash", "main.sh")),
    "cpp": Language(
        file="main.cpp",
        build=("/usr/bin/g++", "-std=c++17", "-O2", "-o", "main", "main.cpp"),
        made="main",
        command=("/tmp/main",),
    ),
    "javascript": Language(file="main.js", command=("/usr/bin/node", "main.js"), bounded_address_space=False),
    "sql": Language(file="main.sql", command=("/usr/bin/sqlite3", "-bail", ":memory:", ".read main.sql")),
}
PYTHON = "python"
KNOWN = (PYTHON, *COMMANDS)


def find(name: str) -> Language | None:
    """The language's command; None for Python, which needs none. Raises UsageError for an unknown one."""
    if name == PYTHON:
        return None
    if name not in COMMANDS:
        raise UsageError(f"language {name!r} is not supported: {did_you_mean(name, KNOWN)}")
    return COMMANDS[name]
