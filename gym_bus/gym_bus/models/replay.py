"""Recorded answers in place of a model: sample i of a task for its rollout i. Deterministic, and free.

The file is JSONL. Each line is keyed by `task_index` (row number in the dataset, from 0) or by `prompt` (the text of
the last user message), and holds `completions: [text, ...]` or `responses: [Responses object, ...]`, one per rollout.
In `responses`, a list in place of an object is a whole conversation: one object per model call.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gym_bus.errors import DataError, RequestRefused, did_you_mean
from gym_bus.messages import Usage
from gym_bus.models.api import CallInfo, Reply, ResponseHead
from gym_bus.models.body import count_tokens, response_body
from gym_bus.models.prompts import prompt_text
from gym_bus.models.wire import ResponsesUsage

CACHED_LINES = 64
NOT_FOUND = 404
BOM = b"\xef\xbb\xbf"

_KEYS = ("task_index", "prompt", "completions", "responses")


class _Line(msgspec.Struct, frozen=True):
    task_index: Annotated[int, Meta(ge=0)] | None = None
    prompt: str | None = None
    completions: list[str] | None = None
    responses: list[msgspec.Raw] | None = None


class _Recorded(msgspec.Struct, frozen=True):
    usage: ResponsesUsage | None = None


_line = msgspec.json.Decoder(_Line)
_keys = msgspec.json.Decoder(dict[str, msgspec.Raw])
_head = msgspec.json.Decoder(ResponseHead)
_recorded = msgspec.json.Decoder(_Recorded)


class ReplayModel:
    """A model that answers from a file. Memory: about 40 bytes per line, not the answers."""

    def __init__(self, file: str | Path, *, name: str = "replay", cycle: bool = False) -> None:
        """Index the file.

        Args:
            file: the recorded answers, JSONL.
            name: what it calls itself.
            cycle: begin again with a task's first answer where it has fewer than there are rollouts.

        Raises:
            DataError: a line is malformed or repeats a key; names file and line.
        """
        self.name, self._path, self._cycle = name, Path(file), cycle
        self._offsets, self._lengths = array("q"), array("q")
        self._by_task: dict[int, int] = {}
        self._by_prompt: dict[bytes, int] = {}
        self._cache: OrderedDict[int, _Line] = OrderedDict()
        try:
            self._index()
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise DataError(f"{self._path}: cannot be read: {e.strerror or e}") from None

    def _index(self) -> None:
        offset = 0
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1 and raw.startswith(BOM):
                    offset, raw = len(BOM), raw[len(BOM) :]
                if raw.strip():
                    self._add(number, raw, offset)
                offset += len(raw)
        if not self._offsets:
            raise DataError(f"{self._path}: no recorded answers in it")

    def _add(self, number: int, raw: bytes, offset: int) -> None:
        where = f"{self._path}:{number}"
        line = _checked(raw, where)
        if line.task_index is not None:
            if line.task_index in self._by_task:
                raise DataError(f"{where}: a second line for task {line.task_index}")
            self._by_task[line.task_index] = len(self._offsets)
        if line.prompt is not None:
            digest = _digest(line.prompt)
            if line.task_index is None and digest in self._by_prompt:
                raise DataError(f"{where}: a second line for the same prompt")
            self._by_prompt.setdefault(digest, len(self._offsets))
        self._offsets.append(offset)
        self._lengths.append(len(raw))

    def _read(self, at: int) -> _Line:
        if at in self._cache:
            self._cache.move_to_end(at)
            return self._cache[at]
        # A read of one line from the page cache takes microseconds: no thread is worth it.
        line = _line.decode(os.pread(self._fd, self._lengths[at], self._offsets[at]))
        self._cache[at] = line
        if len(self._cache) > CACHED_LINES:
            self._cache.popitem(last=False)
        return line

    async def respond(self, params: Mapping[str, Any], info: CallInfo) -> Reply:
        """The recorded answer.

        Raises:
            RequestRefused: there is none for this task, rollout or step.
        """
        return self.answer(params, info.rollout.task_index, info.rollout.rollout_index, info.step)

    def answer(self, params: Mapping[str, Any], task: int | None, rollout: int, step: int) -> Reply:
        """The answer for a task, or for a prompt where the task is None. Raises RequestRefused where there is none."""
        prompt = prompt_text(params.get("input"))
        at = self._by_task.get(task) if task is not None else None
        if at is None:
            at = self._by_prompt.get(_digest(prompt))
        if at is None:
            whose = f"task {task}" if task is not None else "this prompt"
            raise RequestRefused(f"{self._path.name}: no recorded answer for {whose}", NOT_FOUND)
        line = self._read(at)
        samples: list[Any] = line.completions if line.completions is not None else line.responses or []
        if self._cycle and samples:
            rollout %= len(samples)
        if rollout >= len(samples):
            raise RequestRefused(
                f"{self._path.name}: no sample {rollout} for task {task if task is not None else 'of this prompt'}: "
                f"it has {len(samples)}",
                NOT_FOUND,
            )
        if line.completions is not None:
            return self._from_text(line.completions[rollout], prompt, f"{at}_{rollout}_{step}")
        return self._from_recording(samples[rollout], step)

    def _from_text(self, text: str, prompt: str, name: str) -> Reply:
        spent, made = count_tokens(prompt), count_tokens(text)
        usage = Usage(input_tokens=spent, output_tokens=made, total_tokens=spent + made)
        body = response_body(name=name, model=self.name, text=text, usage=usage, created_at=int(time.time()))
        return Reply(body=body, head=_head.decode(body), usage=usage)

    def _from_recording(self, recorded: msgspec.Raw, step: int) -> Reply:
        body = bytes(recorded)
        if body.lstrip().startswith(b"["):
            steps = msgspec.json.decode(body, type=list[msgspec.Raw])
            if step >= len(steps):
                raise RequestRefused(
                    f"{self._path.name}: the recording has {len(steps)} model calls, the agent makes another", NOT_FOUND
                )
            body = bytes(steps[step])
        return Reply(body=body, head=_head.decode(body), usage=_usage(body))

    async def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _usage(body: bytes) -> Usage:
    usage = _recorded.decode(body).usage
    return usage.plain() if usage else Usage()


def _checked(raw: bytes, where: str) -> _Line:
    try:
        line = _line.decode(raw)
        unknown = [key for key in _keys.decode(raw) if key not in _KEYS]
        for recorded in line.responses or []:
            _check_recording(bytes(recorded), where)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{where}: not a line of recorded answers: {e}") from None
    if line.task_index is None and line.prompt is None:
        hint = f" ({did_you_mean(unknown[0], _KEYS)})" if unknown else ""
        raise DataError(f"{where}: neither `task_index` nor `prompt` says which task this is{hint}")
    if (line.completions is None) == (line.responses is None):
        raise DataError(
            f"{where}: expected `completions`, a list of texts, or `responses`, a list of Responses objects"
        )
    return line


def _check_recording(body: bytes, where: str) -> None:
    for one in msgspec.json.decode(body, type=list[msgspec.Raw]) if body.lstrip().startswith(b"[") else [body]:
        if "output" not in _keys.decode(one):
            raise DataError(f"{where}: a recorded response has no `output`")
        _head.decode(one)
        _recorded.decode(one)


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.strip().encode(errors="surrogatepass"), digest_size=16).digest()
