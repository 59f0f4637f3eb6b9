"""What git hooks keep in order: a `verified` key in every benchmark, the table of benchmarks in a README.

    python -m gym_bus.benchmarks.hooks verified CONFIG...
    python -m gym_bus.benchmarks.hooks table README

Like the hooks of others, they mend what they can and end with 1 where they changed something, so that it is looked at.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from gym_bus.benchmarks.spec import CONFIG, load_benchmark

BEGIN, END = "<!-- benchmarks: written by gym_bus.benchmarks.hooks -->", "<!-- benchmarks: end -->"

_DOMAIN = re.compile(r"^( *)domain:")


def add_verified(path: Path) -> bool:
    """Write `verified: false` after each `domain` that has no `verified` beside it; whether there was one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    made: list[str] = []
    for at, line in enumerate(lines):
        made.append(line)
        if (found := _DOMAIN.match(line)) and not _has_verified(lines, at, found[1]):
            made.append(f"{found[1]}verified: false\n")
    if made == lines:
        return False
    path.write_text("".join(made), encoding="utf-8")
    return True


def _has_verified(lines: Sequence[str], at: int, indent: str) -> bool:
    """Whether the block of the line has the key."""
    around = (lines[at + 1 :], lines[:at][::-1])
    for direction in around:
        for line in direction:
            if line.strip() and len(line) - len(line.lstrip(" ")) < len(indent):
                break
            if line.startswith(f"{indent}verified:"):
                return True
    return False


def table(folder: Path, beside: Path) -> str:
    """The benchmarks in the folders of `folder` as a Markdown table; links start at the folder `beside`."""
    rows = ["| benchmark | domain | verified | licence | |", "| --- | --- | --- | --- | --- |"]
    for config in sorted(folder.glob(f"*/{CONFIG}")):
        benchmark = load_benchmark(str(config.parent))
        spec, link = benchmark.spec, config.parent.resolve().relative_to(beside.resolve()).as_posix()
        verified = "yes" if spec.verified else "no"
        rows.append(
            f"| [{spec.name}]({link}/README.md) | {spec.domain} | {verified} | {benchmark.main.license} | "
            f"{spec.description} |"
        )
    return "\n".join(rows)


def update_table(readme: Path, folder: Path) -> bool:
    """Write the table between the two marks; whether it was another one.

    Raises:
        SystemExit: the file has no such marks.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{readme}: put these two lines where the table belongs:\n{BEGIN}\n{END}")
    made = f"{before}{BEGIN}\n{table(folder, readme.parent)}\n{END}{after}"
    if made == text:
        return False
    readme.write_text(made, encoding="utf-8")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one hook; 1 where it changed a file."""
    parser = argparse.ArgumentParser(prog="python -m gym_bus.benchmarks.hooks", description=__doc__)
    hooks = parser.add_subparsers(dest="hook", required=True)
    verified = hooks.add_parser("verified", help="add `verified: false` where it is missing")
    verified.add_argument("configs", nargs="*", type=Path)
    of_readme = hooks.add_parser("table", help="bring a README's table of benchmarks up to date")
    of_readme.add_argument("readme", type=Path)
    of_readme.add_argument("--folder", type=Path, default=Path(__file__).parent, help="default: the built-in ones")
    given = parser.parse_args(arguments)
    if given.hook == "verified":
        changed = [path for path in given.configs if add_verified(path)]
    else:
        changed = [given.readme] if update_table(given.readme, given.folder) else []
    for path in changed:
        print(f"{path}: changed")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
