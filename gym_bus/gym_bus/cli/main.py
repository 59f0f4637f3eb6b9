"""The `gym-bus` command."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

import click

from gym_bus.errors import GymBusError, did_you_mean

FAILURES, USAGE, INTERRUPTED = 1, 2, 130

COMMANDS = {
    "audit": ("gym_bus.cli.audit", "Check that a job adds up: its account, its files, the bus."),
    "bench": ("gym_bus.cli.bench", "Measure the pipeline on this machine with a simulated model."),
    "bus": ("gym_bus.cli.bus", "Set up and look at the bus."),
    "config": ("gym_bus.cli.config", "Show the configuration, and where each value comes from."),
    "dataset": ("gym_bus.cli.dataset", "Prepare, check, bring together, and keep data sets."),
    "env": ("gym_bus.cli.env", "Author benchmarks: init, test, validate, audit."),
    "eval": ("gym_bus.cli.eval", "Run and compare: run, submit, status, replay, reverify, profile, compare, ..."),
    "list": ("gym_bus.cli.catalogue", "List benchmarks, agents, verifiers, environments and models."),
    "model": ("gym_bus.cli.model", "Serve recorded or simulated models over HTTP."),
    "sandbox": ("gym_bus.cli.sandbox", "Show what protects this machine from programs, and run one."),
    "search": ("gym_bus.cli.search", "Search everything that can be listed."),
    "why": ("gym_bus.cli.why", "Tell what a job waits for."),
    "worker": ("gym_bus.cli.worker", "Join a bus as a worker."),
}
"""Module and help line by command: a command imports only what it needs."""


class LazyGroup(click.Group):
    """Loads a command's module when it is called, and suggests names for unknown ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, without importing them."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command's module, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click does, with suggestions."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}: {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help lines, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(COMMANDS.items())])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("gym-bus"), prog_name="gym-bus")
def cli() -> None:
    """Rollouts of language-model agents and their rewards, over a bus."""


def hold_standard_streams() -> None:
    """Have the three standard streams there, and no character that they cannot show.

    Where one was closed by whoever started us, its number would go to the next file or pipe that is opened.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line; exit 0 done, 1 failures present, 2 wrong usage or nothing could be run."""
    hold_standard_streams()
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as e:
        e.show()
        code = USAGE
    except GymBusError as e:
        click.echo(f"error: {e}", err=True)
        code = USAGE
    except OSError as e:  # what nobody on the way knew better about: a full disk, standard output that takes no more
        where = f"{e.filename}: " if e.filename else ""
        click.echo(f"error: {where}{e.strerror or str(e) or type(e).__name__}", err=True)
        code = USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command resumes where it stopped", err=True)
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
