"""Write the reference pages that are made from the code: commands, configuration, messages, failure classes.

python docs/generate.py [FOLDER]
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import msgspec

from gym_bus import errors, messages, settings
from gym_bus.cli.main import COMMANDS, cli

NOTE = "<!-- written by docs/generate.py -->\n"


def field_docs(module: ModuleType) -> dict[str, dict[str, tuple[str, str, str]]]:
    """Per class: field name to (type as written, default as written, docstring)."""
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields: dict[str, tuple[str, str, str]] = {}
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                kind, name = ast.unparse(statement.annotation), statement.target.id
                default = ast.unparse(statement.value) if statement.value else ""
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                kind, name, default = "", statement.targets[0].id, ast.unparse(statement.value)
            else:
                continue
            is_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = inspect.cleandoc(after.value.value) if is_doc else ""  # type: ignore[union-attr,attr-defined]
            fields[name] = (kind, default, " ".join(text.split()))
        found[node.name] = fields
    return found


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


def shown(value: Any) -> str:
    """A default as YAML would have it."""
    return f"`{msgspec.json.encode(value).decode()}`" if value != {} else "`{}`"


PLAIN = {"PositiveInt": "int >= 1", "Count": "int >= 0", "Seconds": "seconds > 0", "Bytes": "bytes >= 1"}
PLAIN |= {"Count | None": "int >= 0 or null", "Seed | None": "int >= 0, <= 2^62, or null"}
PLAIN |= {"Share": "share 0 to 1", "str | None": "text or null", "str": "text", "dict[str, Any]": "mapping"}


def kind_of(annotation: str) -> str:
    """A type as a reader of YAML understands it."""
    if match := re.match(r"Annotated\[(\w+), Meta\((.*)\)\]", annotation):
        bounds = match[2].replace("ge=", ">= ").replace("gt=", "> ").replace("le=", "<= ")
        return f"{match[1]} {bounds}"
    return PLAIN.get(annotation, annotation)


def configuration() -> str:
    """Every setting, with its default."""
    docs = field_docs(settings)
    lines = [
        "# Configuration\n",
        NOTE,
        "Settings are read from YAML files (`--config FILE`, may be repeated, later ones win), then `env.yaml` of the",
        "working directory, which supplies `${name}` values such as keys, then `key=value` arguments. Unknown keys and",
        "wrong types are errors that name the key and its file. Environment variables configure nothing.\n",
    ]

    def section(struct: type[msgspec.Struct], path: str) -> None:
        nested: list[tuple[type[msgspec.Struct], str]] = []
        lines.append(f"## {path or 'Top level'}\n\n{inspect.cleandoc(struct.__doc__ or '')}\n")
        lines.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        for field in msgspec.structs.fields(struct):
            kind, _, text = docs[struct.__name__][field.name]
            where = f"{path}.{field.name}" if path else field.name
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                nested.append((field.type, where))
                if field.type not in (settings.StreamConfig, settings.Distribution):
                    continue
                values = msgspec.to_builtins(field.default)
                lines.append(f"| `{where}` | {field.type.__name__} | {shown(values)} | {cell(text)} |")
                continue
            default = "" if field.default is msgspec.NODEFAULT else shown(field.default)
            lines.append(f"| `{where}` | {cell(kind_of(kind))} | {cell(default)} | {cell(text)} |")
        if path == "":
            nested.append((settings.ModelConfig, "models.NAME"))
        lines.append("")
        done: set[type[msgspec.Struct]] = set()
        for inner, where in nested:
            if inner in (settings.StreamConfig, settings.Distribution):
                if inner not in done:
                    done.add(inner)
                    section(inner, where.rpartition(".")[0] + "." + inner.__name__)
                continue
            section(inner, where)

    section(settings.Config, "")
    return "\n".join(lines)


def commands() -> str:
    """The help of every command."""
    lines = [
        "# Commands\n",
        NOTE,
        "Exit codes: 0 done, 1 there are failures, 2 nothing could be run, 130 interrupted.\n",
    ]

    def add(command: click.Command, name: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        lines.append(f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n")
        if isinstance(command, click.Group):
            for inner in sorted(command.commands):
                add(command.commands[inner], inner, context)

    root = click.Context(cli, info_name="gym-bus")
    for name, (module, _) in sorted(COMMANDS.items()):
        add(import_module(module).command, name, root)
    return "\n".join(lines)


def message_page() -> str:
    """Every message and its fields."""
    docs = field_docs(messages)
    lines = [
        "# Messages\n",
        NOTE,
        "What crosses a subject: MessagePack maps with a `type` tag. Rows and responses travel as the JSON bytes they",
        "arrived in.\n",
    ]
    for name, fields in docs.items():
        struct = getattr(messages, name)
        if not issubclass(struct, msgspec.Struct):
            continue
        tag = struct.__struct_config__.tag
        lines.append(f"## {name}" + (f" (`{tag}`)" if tag else "") + f"\n\n{inspect.cleandoc(struct.__doc__ or '')}\n")
        lines.append("| field | type | meaning |\n| --- | --- | --- |")
        lines += [f"| `{field}` | `{cell(kind)}` | {cell(text)} |" for field, (kind, _, text) in fields.items()]
        lines.append("")
    return "\n".join(lines)


def default_of(path: str) -> str:
    """The default of a setting, by its dotted path; raises KeyError or AttributeError where there is none."""
    value: Any = settings.Config()
    for name in path.split("."):
        value = settings.ModelConfig() if isinstance(value, dict) else getattr(value, name)  # any name of `models`
    return f"{value:g}"


def repeated(kind: errors.FailureKind) -> str:
    """What is repeated before a rollout fails with a class, how often and with which delay."""
    said = []
    for repeat in errors.TREATMENTS[kind].repeats:
        delay = re.sub(r"\{([\w.]+)\}", lambda m: default_of(m[1]), repeat.delay)
        said.append(f"{repeat.what}: `{repeat.limit}` ({default_of(repeat.limit)}); delay: {delay}")
    return "<br>".join(said) or "nothing"


def failures() -> str:
    """The failure classes."""
    docs = field_docs(errors)["FailureKind"]
    lines = [
        "# Failure classes\n",
        NOTE,
        "A rollout that ends without a reward has one of these classes, in `rollouts_failures.jsonl` as",
        "`_ng_failure_class`.\n",
        "*Repeated* is what gym_bus does by itself before the rollout counts as failed: what, the setting that says",
        "how often (its default), and the delay in between. All tries of one model call end with its",
        "`models.NAME.retry.budget_s`, and everything ends with the rollout's `job.limit_s`.",
        "*Tried again* is what the next run of the same command does: another attempt at the rollout,",
        f"`results.max_attempts` ({default_of('results.max_attempts')}) in all, at once. Where an answer is stored, as",
        "of a failure in the verifier, only the check is made again. [`eval replay`](../how-to/replay.md) tries any",
        "failure again.\n",
        "A tool call is made once per delivery of its rollout, whatever comes of it. A request whose worker died is",
        "delivered again and its rollout starts over, with fresh tools; see",
        "[tools with effects elsewhere](../how-to/extend.md#tools-with-effects-elsewhere).\n",
        "| class | meaning | repeated | tried again | what to do |\n| --- | --- | --- | --- | --- |",
    ]
    for kind in errors.FailureKind:
        treatment = errors.TREATMENTS[kind]
        again = "yes" if treatment.again else "no"
        meaning = cell(docs[kind.name][2])
        lines.append(f"| `{kind.value}` | {meaning} | {repeated(kind)} | {again} | {cell(treatment.advice)} |")
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "cli.md": commands, "messages.md": message_page, "failures.md": failures}


def main() -> None:
    """Write every page."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference"
    for name, make in PAGES.items():
        (folder / name).write_text(textwrap.dedent(make()).rstrip() + "\n")


if __name__ == "__main__":
    main()
