"""Prompts: texts whose `{field}` placeholders are filled from the top-level keys of a dataset row."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from gym_bus.checking import check, check_keys
from gym_bus.errors import ConfigError, DataError, did_you_mean
from gym_bus.origins import written_at

_formatter = string.Formatter()


class Prompt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NeMo Gym's prompt config. Literal braces are doubled: `{{ }}`."""

    user: str
    system: str | None = None

    def texts(self) -> dict[str, str]:
        """The templates by role, in the order of the conversation."""
        return {"system": self.system, "user": self.user} if self.system is not None else {"user": self.user}

    def fields(self) -> tuple[str, ...]:
        """The row keys that the templates need, each once."""
        return tuple(dict.fromkeys(name for text in self.texts().values() for name in _placeholders(text)))

    def render(self, row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
        """The conversation for one row, as Responses input items; values that are no text are shown as JSON.

        Raises:
            DataError: the row lacks a field, or has null there; named after `where`.
        """
        values = {name: _shown(name, row, where) for name in self.fields()}
        return [{"role": role, "content": text.format(**values)} for role, text in self.texts().items()]


def read_prompt(path: Path) -> Prompt:
    """The prompt in a YAML file, texts taken as they stand. Raises ConfigError naming the file, and the line or key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_keys(values, str(path))
    except OSError as e:
        raise ConfigError(f"{path}: {(e.strerror or str(e)).lower()}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(e, 'problem', None) or e}") from None
    prompt = check(Prompt, values, str(path))
    check_prompt(prompt, lambda role: written_at(path, role))
    return prompt


def check_prompt(prompt: Prompt, where: Callable[[str], str]) -> None:
    """Raise ConfigError for a template that no row could fill; `where` says where the text of a role was written."""
    for role, text in prompt.texts().items():
        try:
            names = _placeholders(text)
        except ValueError as e:
            raise _broken(where(role), role, str(e)) from None
        for name in names:
            if not name.isidentifier():
                raise _broken(where(role), role, f"{{{name}}} is no row key")


def _broken(source: str, role: str, what: str) -> ConfigError:
    return ConfigError(
        f"{source}: key 'prompt.{role}': {what}; write {{key}} for a key of the row and {{{{ }}}} for literal braces"
    )


def _placeholders(text: str) -> list[str]:
    """The field names in `text`. Raises ValueError where it is no template of plain `{name}` placeholders."""
    names = []
    for _, name, spec, conversion in _formatter.parse(text):
        if name is None:
            continue
        if spec or conversion:
            raise ValueError(f"placeholder {{{name}}} has a format or a conversion")
        names.append(name)
    return names


def _shown(name: str, row: Mapping[str, Any], where: str) -> str:
    if name not in row:
        raise DataError(f"{where}: the prompt needs the key {name!r}, which the row lacks: {did_you_mean(name, row)}")
    value = row[name]
    if value is None:
        raise DataError(f"{where}: the prompt needs the key {name!r}, which is null")
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
