"""Single rollouts in full, as the page shows them: read from the files one by one, bounded in size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from gym_bus.errors import TREATMENTS, DataError
from gym_bus.results.frame import NOT_FIELDS
from gym_bus.results.report.choose import Pick
from gym_bus.results.report.items import MOST_CHARS, MOST_ITEMS, Json, clip, input_of, items_of, shown
from gym_bus.results.report.jobs import QUEUED, WORKED, Entry

MOST_FIELD_CHARS = 3_000
"""Of one field of the row or of the verifier."""
EXPECTED = frozenset({"answer", "ground_truth", "label", "outputs", "reference", "target"})
"""Fields of a row that say what is right, like all that begin with `expected`."""


def read_transcripts(entries: Sequence[Entry], picks: Sequence[Pick], most_chars: int) -> list[Json]:
    """The picked rollouts, as many of the first ones as fit into `most_chars` characters.

    Raises:
        DataError: a file has changed meanwhile.
    """
    read: list[Json] = []
    used = 0
    with ExitStack() as opened:
        sources = [_Source(entry, opened) for entry in entries]
        for pick in picks:
            transcript = sources[pick.entry].transcript(pick)
            used += len(json.dumps(transcript))
            if used > most_chars and read:
                break
            read.append(transcript)
    return read


class _Source:
    """The open files of one job."""

    def __init__(self, entry: Entry, opened: ExitStack) -> None:
        self._entry, self._opened = entry, opened
        self._files: dict[Path, BinaryIO] = {}
        table = entry.table
        keys = zip(table.task.tolist(), table.rollout.tolist(), strict=True)
        self._inputs = dict(zip(keys, table.input_offset.tolist(), strict=True)) if table.has_inputs else {}

    def transcript(self, pick: Pick) -> Json:
        """One rollout."""
        row = self._entry.frame.iloc[pick.at]
        failed = row["outcome"] == "failed"
        line = self._line(self._entry.files.failures if failed else self._entry.files.rollouts, int(row["line_offset"]))
        task, rollout = int(row["task_index"]), int(row["rollout_index"])
        at = self._inputs.get((task, rollout))
        given = self._line(self._entry.files.inputs, at) if at is not None else {}
        made: Json = {
            "job": pick.entry,
            "task": task,
            "rollout": rollout,
            "attempt": int(row["attempt"]),
            "why": pick.reasons,
            "outcome": outcome(None if failed else float(row["reward"])),
            "reward": None if failed else float(row["reward"]),
            "tokens": _whole(row["output_tokens"]),
            "work": _rounded(self._entry.work_s[pick.at]),
            "cut": None if row["incomplete"] != row["incomplete"] else row["incomplete"],
        }
        if failed:
            made["failure"] = _failure(line)
        names = (*QUEUED, *WORKED, "model_queue_s", "model_s", "tools_s")
        stages = {name.removesuffix("_s"): _rounded(row[name]) for name in names}
        made["stages"] = {name: seconds for name, seconds in stages.items() if seconds}
        return made | _told_and_said(line, given) | _fields(line, given)

    def _line(self, path: Path, offset: int) -> Json:
        if path not in self._files:
            self._files[path] = self._opened.enter_context(path.open("rb"))
        file = self._files[path]
        file.seek(offset)
        try:
            read: Json = json.loads(file.readline().decode("utf-8-sig", "replace"))
        except ValueError:
            raise DataError(f"{path}: has changed while it was read") from None
        return read


def outcome(reward: float | None) -> str:
    """pass, partial or fail by the reward; failed without one."""
    if reward is None:
        return "failed"
    if reward >= 1.0:
        return "pass"
    return "fail" if reward <= 0.0 else "partial"


def _whole(value: float) -> int | None:
    return None if value != value else int(value)


def _rounded(seconds: float) -> float | None:
    return None if seconds != seconds else round(float(seconds), 3)


def _failure(line: Json) -> Json:
    kind = str(line.get("_ng_failure_class"))
    ours = line.get("gym_bus")
    history = ours.get("history") if isinstance(ours, dict) else None
    return {
        "class": kind,
        "stage": str(line.get("_ng_failure_stage") or ""),
        "detail": clip(str(line.get("_ng_failure_detail") or line.get("_ng_failure_judge_error") or ""), MOST_CHARS),
        "advice": advice(kind),
        "earlier": [
            clip(f"{past.get('class')}: {past.get('detail')}", MOST_FIELD_CHARS)
            for past in (history or [])[:-1]
            if isinstance(past, dict)
        ],
    }


def advice(kind: str) -> str:
    """What to do about a class of failure; empty for those of other tools."""
    return next((treatment.advice for known, treatment in TREATMENTS.items() if known == kind), "")


def _told_and_said(line: Json, given: Json) -> Json:
    params = line.get("responses_create_params") or given.get("responses_create_params") or {}
    response = line.get("response") or {}
    tools = params.get("tools") if isinstance(params, dict) else None
    names = [str(tool.get("name") or tool.get("type")) for tool in tools or [] if isinstance(tool, dict)]
    return {
        "input": items_of(input_of(params)),
        "output": items_of(response.get("output") if isinstance(response, dict) else None),
        **({"tools": names[:MOST_ITEMS]} if names else {}),
    }


def _fields(line: Json, given: Json) -> Json:
    """What the verifier said beside what was expected, and the row's own fields.

    Without the inputs nobody can tell the verifier's from the row's.
    """
    told = {key: value for key, value in line.items() if _is_field(key)}
    row = {key: value for key, value in given.items() if _is_field(key)}
    verdict = {key: value for key, value in told.items() if key not in row}
    expected = {key: value for key, value in row.items() if key in EXPECTED or key.startswith("expected")}
    components = line.get("reward_components")
    return {
        "verdict": _pairs(verdict | expected | (components if isinstance(components, dict) else {})),
        "row": _pairs(row),
    }


def _is_field(key: str) -> bool:
    return key not in NOT_FIELDS and not key.startswith(("_ng_", "ng_"))


def _pairs(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, clip(shown(value), MOST_FIELD_CHARS)) for key, value in fields.items()]
