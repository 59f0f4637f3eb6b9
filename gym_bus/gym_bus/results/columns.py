"""The numbers of a job's files, column by column: what is left of a rollout once its texts are forgotten."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from math import isinf, nan
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from gym_bus.errors import DataError
from gym_bus.results.lines import Fields
from gym_bus.results.metrics import NO_ANSWER
from gym_bus.results.reader import decode_lines
from gym_bus.results.statistics import Floats, Ints

Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]

_fields: msgspec.json.Decoder[Fields] = msgspec.json.Decoder(Fields)


class _Agent(msgspec.Struct, frozen=True):
    name: str = ""


class _Ours(msgspec.Struct, frozen=True):
    agent: str = ""


class _Response(msgspec.Struct, frozen=True):
    usage: Fields | None = None


class _Head(msgspec.Struct, frozen=True):
    """What says whose line this is."""

    task: Index = msgspec.field(name="_ng_task_index")
    rollout: Index = msgspec.field(name="_ng_rollout_index")
    agent_ref: _Agent = _Agent()
    gym_bus: _Ours = _Ours()

    def agent(self) -> str:
        return self.agent_ref.name or self.gym_bus.agent or "agent"


class _FailedHead(_Head, frozen=True, kw_only=True):
    kind: str = msgspec.field(name="_ng_failure_class")


class _ScoredHead(_Head, frozen=True, kw_only=True):
    reward: float | bool  # as the other numbers: a truth value counts as 0 or 1
    response: _Response | None = None


class Keys:
    """Indices and agent of a file's lines, in the order of the file."""

    def __init__(self, agents: dict[str, int]) -> None:
        self.agents = agents
        """Number of each agent's name; shared by all files of a job."""
        self._task, self._rollout, self._agent = array("q"), array("q"), array("q")
        self._line, self._offset = array("q"), array("q")

    def add(self, task: int, rollout: int, agent: str, line: int, offset: int = 0) -> None:
        """One more line."""
        self._task.append(task)
        self._rollout.append(rollout)
        self._agent.append(self.agents.setdefault(agent, len(self.agents)))
        self._line.append(line)
        self._offset.append(offset)

    @property
    def task(self) -> Ints:
        """Task indices, shape [lines]."""
        return np.array(self._task, np.int64)

    @property
    def rollout(self) -> Ints:
        """Rollout indices, shape [lines]."""
        return np.array(self._rollout, np.int64)

    @property
    def agent(self) -> Ints:
        """Numbers of the agents, shape [lines]."""
        return np.array(self._agent, np.int64)

    @property
    def line(self) -> Ints:
        """Line numbers, from 1; shape [lines]."""
        return np.array(self._line, np.int64)

    @property
    def offset(self) -> Ints:
        """Where the lines begin in the file; shape [lines]."""
        return np.array(self._offset, np.int64)

    def joint(self) -> Ints:
        """Task and rollout index as one number, shape [lines]."""
        return (self.task << 31) | self.rollout


INDICES = frozenset({"_ng_task_index", "_ng_rollout_index"})
"""Numbers that say whose line it is, and nothing about the rollout."""


class Columns:
    """Every top-level number and truth value of the scored rollouts, and those of their `response.usage`."""

    def __init__(self, keys: Keys, answer_keys: Sequence[str]) -> None:
        self.keys = keys
        self._answer_keys = tuple(answer_keys)
        self._answered: Counter[str] = Counter()
        self._numbers: dict[str, array[float]] = {"reward": array("d")}
        self._fractional: set[str] = set()
        self._answers = {key: array("q") for key in answer_keys}
        self._answer_ids: dict[bytes, int] = {}
        self._rows = 0

    def add(self, fields: Fields, usage: Fields) -> None:
        """The numbers of one more rollout. Where a field and a usage key share a name, usage wins."""
        done = self._rows
        self._rows += 1
        for key in self._answer_keys:
            self._answers[key].append(self._answer_id(fields.get(key)))
            self._answered[key] += key in fields
        for source in (fields, usage):
            for name, value in source.items():
                if name not in INDICES and (number := self._number(name, bytes(value))) is not None:
                    column = self._numbers.get(name)
                    if column is None:
                        column = self._numbers[name] = array("d", [nan]) * done
                    column[done:] = array("d", [number])
        for column in self._numbers.values():
            if len(column) == done:
                column.append(nan)

    def _number(self, name: str, value: bytes) -> float | None:
        if value[0] not in b"-0123456789tf":
            return None
        if value in (b"true", b"false"):
            return float(value == b"true")
        number = float(value)
        if not value.lstrip(b"-").isdigit():
            self._fractional.add(name)
        return nan if isinf(number) else number

    def _answer_id(self, value: msgspec.Raw | None) -> int:
        answer = bytes(value) if value is not None else b"null"
        if answer == b"null":
            return NO_ANSWER
        key = answer if len(answer) <= 32 else blake2b(answer, digest_size=32).digest()
        return self._answer_ids.setdefault(key, len(self._answer_ids))

    def is_whole(self, name: str) -> bool:
        """Whether a column holds whole numbers only."""
        return name not in self._fractional

    def numbers(self) -> dict[str, Floats]:
        """By name, shape [lines]; NaN where a rollout has no such field."""
        return {name: np.array(column) for name, column in self._numbers.items()}

    @property
    def answer_key(self) -> str | None:
        """The answer key that most rollouts have, None where no rollout has any; of several the first."""
        key = max(self._answer_keys, key=lambda key: self._answered[key], default=None)
        return key if key is not None and self._answered[key] else None

    def answers(self) -> Ints | None:
        """Equal numbers for equal answers, shape [lines]; None where no rollout has an answer key."""
        key = self.answer_key
        return None if key is None else np.array(self._answers[key], np.int64)


def read_scored(path: Path, agents: dict[str, int], answer_keys: Sequence[str]) -> Columns:
    """The columns of a rollouts file; a torn last line is passed over."""
    columns = Columns(Keys(agents), answer_keys)
    head = msgspec.json.Decoder(_ScoredHead)
    for line, scored in decode_lines(path, head, unended_ok=True):
        columns.keys.add(scored.task, scored.rollout, scored.agent(), line.number, line.offset)
        columns.add(_fields.decode(line.data), (scored.response and scored.response.usage) or {})
    return columns


class FailedLine(NamedTuple):
    """What a failures file says of a rollout."""

    kind: str
    """The failure's class."""
    agent: str
    number: int
    """Of the line, from 1."""


class FailedLines:
    """The newest failure of every rollout of a failures file."""

    def __init__(self) -> None:
        self.newest: dict[tuple[int, int], FailedLine] = {}
        """By (task, rollout)."""

    def without(self, scored: Keys) -> None:
        """Forget the rollouts that were scored after all."""
        for key in zip(scored.task.tolist(), scored.rollout.tolist(), strict=True):
            self.newest.pop(key, None)


def read_failed(path: Path) -> FailedLines:
    """The failures of a job; none where the file is missing, as NeMo Gym writes none without a failure."""
    failed = FailedLines()
    if path.exists():
        for line, head in decode_lines(path, msgspec.json.Decoder(_FailedHead), unended_ok=True):
            failed.newest[head.task, head.rollout] = FailedLine(head.kind, head.agent(), line.number)
    return failed


def read_inputs(path: Path, agents: dict[str, int]) -> Keys:
    """The indices of the materialized inputs. Raises DataError where two lines share theirs."""
    keys = Keys(agents)
    for line, head in decode_lines(path, msgspec.json.Decoder(_Head), unended_ok=True):
        keys.add(head.task, head.rollout, head.agent(), line.number, line.offset)
    refuse_repeats(keys, path)
    return keys


def refuse_repeats(keys: Keys, path: Path) -> None:
    """Raise DataError where two lines are of one rollout."""
    joint = keys.joint()
    order = np.argsort(joint, kind="stable")
    again = np.flatnonzero(joint[order][1:] == joint[order][:-1])
    if len(again):
        at = order[again + 1].min()
        where = f"task {keys.task[at]}, rollout {keys.rollout[at]}"
        raise DataError(f"{path}:{keys.line[at]}: a second line for {where}; remove one of the two")


def refuse_strangers(keys: Keys, expected: Keys, path: Path, expected_in: Path) -> None:
    """Raise DataError where a line is of no expected rollout."""
    strange = np.flatnonzero(~np.isin(keys.joint(), expected.joint()))
    if len(strange):
        at = strange[0]
        where = f"task {keys.task[at]}, rollout {keys.rollout[at]}"
        raise DataError(
            f"{path}:{keys.line[at]}: {where} is not in {expected_in.name}; the files are of different jobs"
        )
