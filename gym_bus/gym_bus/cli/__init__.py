"""The `gym-bus` command."""

import sys


def start() -> None:
    """Run the command line; exit 2, and say what to install, where a command needs more than this install has."""
    try:
        from gym_bus.cli.main import main

        main()
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if not _is_declared(package):
            raise
        extras = "pip install 'gym-bus[cli]', or the extra of one role (agent, verifier, results, server)"
        print(f"error: this needs {package}, which is not installed: {extras}", file=sys.stderr)
        sys.exit(2)


def _is_declared(package: str) -> bool:
    """Whether some extra has it."""
    from importlib.metadata import requires  # these two take longer than a short command

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    declared = {canonicalize_name(Requirement(text).name) for text in requires("gym-bus") or ()}
    return canonicalize_name(package) in declared
