"""Code out of an answer: the extraction rules of EvalPlus and of NeMo Gym's `code_gen`."""

from __future__ import annotations

import re


def last_block(text: str) -> str | None:
    """The last fenced block: behind the last "```python", else behind the last opening fence; EvalPlus's rule.

    Returns the text itself where it has no fence at all (a raw completion), None where the block does not close.
    Leading blanks of a raw completion are kept: it may be a function's body.
    """
    text = text.replace("\r", "")
    if "```" not in text:
        return text if text.strip() else None
    start = text.rfind("```python")
    if start >= 0:
        start += len("```python")
    else:
        fences = [found.end() for found in re.finditer("```", text)]
        if len(fences) % 2:
            return None
        start = fences[-2]
    body, closing, _ = text[start:].partition("```")
    if not closing:
        return None
    first, newline, rest = body.partition("\n")
    code = rest if newline and _INFO.fullmatch(first) else body.lstrip(" ")
    return code if code.strip() else None


_INFO = re.compile(r"[\w+.#-]*\s*")
"""What may stand behind an opening fence: a language, or the rest of its name."""


def closed_block(text: str) -> str | None:
    """What stands between the last "```python", else the last "```", and the next "```"; EvalPlus's rule in NeMo Gym.

    None where that is empty or there is no such fence: unlike `last_block`, it takes no raw completion.
    """
    _, fence, behind = text.replace("\r", "").rpartition("```python" if "```python" in text else "```")
    code, closing, _ = behind.partition("```")
    return code.strip() or None if fence and closing else None


def between_last_fences(text: str) -> str | None:
    """The lines strictly between the last two lines that contain "```": `code_gen`'s rule; None without two such."""
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return None
    return "\n".join(lines[fences[-2] + 1 : fences[-1]])


def defines(code: str, name: str) -> bool:
    """Whether the code defines a function of that name at its top level."""
    return re.search(rf"(?m)^(?:async\s+)?def\s+{re.escape(name)}\s*\(", code) is not None
