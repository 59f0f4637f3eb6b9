"""The `gym-bus` command."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def start() -> None:
    """Run the command line; exit 2, and say what to install, where a command needs more than this install has."""
    try:
        from gym_bus.cli.main import main

        main()
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if canonicalize_name(package) not in {
            canonicalize_name(Requirement(r).name) for r in requires("gym-bus") or ()
        }:
            raise
        extras = "pip install 'gym-bus[cli]', or the extra of one role (agent, verifier, results, server)"
        print(f"error: this needs {package}, which is not installed: {extras}", file=sys.stderr)
        sys.exit(2)
