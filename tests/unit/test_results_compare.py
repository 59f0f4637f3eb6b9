"""Comparing jobs from their files: which tasks are paired, what differs, what was varied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gym_bus.errors import DataError, UsageError
from gym_bus.results.compare import Comparison, compare_jobs
from gym_bus.results.files import JobFiles
from gym_bus.results.manifest import Manifest


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(**changes: Any) -> Manifest:
    defaults: dict[str, Any] = {
        "job": "job-1",
        "created_at": 0.0,
        "benchmark": "choices",
        "dataset_digest": "d",
        "rows": 4,
        "num_repeats": 1,
        "agent": "simple",
        "model": "small",
        "model_kind": "openai",
        "model_name": "small-7b",
        "verifier": "mcqa",
        "verifier_digest": "v" * 64,
        "config_digest": "c" * 64,
        "gym_bus_version": "0",
    }
    return Manifest(**(defaults | changes))


class Job:
    """A folder with the files of a job: `rewards[task]` are its rollouts', None where one failed."""

    def __init__(
        self, folder: Path, rewards: dict[int, list[float | None]], *, inputs: bool = True, **changes: Any
    ) -> None:
        folder.mkdir()
        self.files = JobFiles(folder)
        self.params: dict[str, Any] = {"input": "?", "temperature": 0.7}
        self.rows: dict[int, dict[str, Any]] = {task: {"question": f"q{task}", "level": task % 2} for task in rewards}
        self.rewards, self._inputs = rewards, inputs
        self.manifest: Manifest | None = manifest(**changes)

    def written(self) -> JobFiles:
        keys = [(task, i) for task, values in self.rewards.items() for i in range(len(values))]
        full = {
            (task, i): {"_ng_task_index": task, "_ng_rollout_index": i, "agent_ref": {"name": "simple"}}
            for task, i in keys
        }
        if self._inputs:
            rows = [full[key] | self.rows[key[0]] | {"responses_create_params": self.params} for key in keys]
            write(self.files.inputs, rows)
        scored = [(key, self.rewards[key[0]][key[1]]) for key in keys]
        write(
            self.files.rollouts,
            [full[k] | {"reward": r, "response": {"model": "told"}} for k, r in scored if r is not None],
        )
        write(self.files.failures, [full[k] | {"_ng_failure_class": "deadline"} for k, r in scored if r is None])
        if self.manifest:
            self.manifest.save(self.files.manifest)
        return self.files


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Job, Job]:
    """Two jobs of eight tasks; B has three more right, and lost one."""
    before = {task: [1.0] if task < 4 else [0.0] for task in range(8)}
    after = {**before, 0: [0.0], 4: [1.0], 5: [1.0], 6: [1.0]}
    return Job(tmp_path / "a", before), Job(tmp_path / "b", after, model_name="small-8b")  # type: ignore[arg-type]


def compared(pair: tuple[Job, Job], **options: Any) -> Comparison:
    return compare_jobs(pair[0].written(), pair[1].written(), resamples=99, **options)


def varied(found: Comparison) -> list[tuple[str, str, str]]:
    return [(change.what, change.a, change.b) for change in found.varied]


def test_single_binary_rewards_are_paired_and_the_flips_listed(pair: tuple[Job, Job]) -> None:
    found = compared(pair)

    assert (found.difference.mean_a, found.difference.mean_b, found.difference.difference) == (0.5, 0.75, 0.25)
    assert found.difference.p_value == pytest.approx(2 * 5 / 2**4)  # one lost of four changed
    assert (found.gained, found.lost) == (3, 1)
    assert [(flip.task, flip.a, flip.b) for flip in found.flips] == [(0, 1, 0), (4, 0, 1), (5, 0, 1), (6, 0, 1)]
    assert (found.pairing.paired, found.pairing.by) == (8, "index and row")
    assert varied(found) == [("model", "small (small-7b)", "small (small-8b)")]
    assert found.warnings == []


def test_the_value_of_a_task_is_the_mean_of_its_repeats(tmp_path: Path) -> None:
    a = Job(tmp_path / "a", {0: [1.0, 0.0], 1: [1.0, 1.0], 2: [0.0, 0.5]})
    b = Job(tmp_path / "b", {0: [1.0], 1: [1.0], 2: [0.5]}, model="large")

    found = compared((a, b))

    assert found.difference.method.startswith("paired permutation")
    assert [(flip.task, flip.a, flip.b, flip.rollouts_a, flip.rollouts_b) for flip in found.flips] == [
        (0, 0.5, 1.0, 2, 1),
        (2, 0.25, 0.5, 2, 1),
    ]
    assert found.difference.difference == pytest.approx(0.25)


def test_tasks_that_are_not_the_same_in_both_are_left_out_and_counted(tmp_path: Path) -> None:
    a = Job(tmp_path / "a", {task: [1.0] for task in range(6)})
    b = Job(tmp_path / "b", {task: [0.0] for task in range(1, 8)}, model="large")
    b.rows[2] = {"question": "another one", "level": 0}
    b.rewards[3] = [None]

    found = compared((a, b))

    p = found.pairing
    assert (p.paired, p.only_a, p.only_b, p.changed, p.unscored) == (3, 1, 2, 1, 1)
    assert found.difference.tasks == 3
    assert "5 tasks are left out" in " ".join(found.warnings)
    assert "1 of 7 rollouts of B have no reward" in " ".join(found.warnings)
    assert found.b.counts.failed_by_class == {"deadline": 1}


def test_jobs_without_a_common_task_cannot_be_compared(tmp_path: Path) -> None:
    pair = Job(tmp_path / "a", {0: [1.0]}), Job(tmp_path / "b", {1: [1.0], 2: [0.0]})

    with pytest.raises(DataError, match=r"no task in common .*1 are in the first only, 2 in the second only"):
        compared(pair)


def test_layout_and_order_of_a_row_do_not_matter(pair: tuple[Job, Job]) -> None:
    b = pair[1].written()
    lines = [json.loads(line) for line in b.inputs.read_text().splitlines()]
    b.inputs.write_text("".join(json.dumps(dict(reversed(line.items())), indent=None) + "\n" for line in lines))

    assert compare_jobs(pair[0].written(), b, resamples=99).pairing.paired == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"agent": "other"}, ("agent", "simple", "other")),
        ({"agent_options": {"turns": 2}}, ("agent", "simple", 'simple {"turns":2}')),
        ({"verifier": "math"}, ("verifier", "mcqa", "math")),
        ({"verifier_digest": "w" * 64}, ("verifier", "mcqa vvvvvvvv", "mcqa wwwwwwww")),
        ({"benchmark": "other"}, ("data", "choices", "other")),
        ({"limit_s": 60.0, "config_digest": "x" * 64}, ("limit", "3600 s", "60 s")),
        ({"config_digest": "x" * 64}, ("sampling", "settings cccccccc", "settings xxxxxxxx")),
        ({"model": "large", "model_name": "large"}, ("model", "small (small-7b)", "large")),
    ],
)
def test_what_the_manifests_say_differently_is_named(
    tmp_path: Path, changes: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    pair = Job(tmp_path / "a", {0: [1.0]}), Job(tmp_path / "b", {0: [0.0]}, **changes)

    assert varied(compared(pair)) == [expected]


def test_other_recorded_answers_are_another_model(tmp_path: Path) -> None:
    recorded = {"model": "replay", "model_kind": "replay", "model_name": "answers.jsonl"}
    a = Job(tmp_path / "a", {0: [1.0]}, **recorded)
    b = Job(tmp_path / "b", {0: [0.0]}, **recorded, config_digest="x" * 64)

    assert varied(compared((a, b))) == [("model", "answers cccccccc", "answers xxxxxxxx")]


def test_prompt_and_sampling_are_read_from_the_rows(pair: tuple[Job, Job]) -> None:
    pair[1].manifest = pair[0].manifest
    pair[1].params = {"input": "say: ?", "temperature": 0.0, "max_output_tokens": 9}

    found = compared(pair)

    assert varied(found) == [
        ("prompt", "its own", "another one for 8 of 8 tasks"),
        ("sampling", "max_output_tokens not set", "max_output_tokens 9"),
        ("sampling", "temperature 0.7", "temperature 0.0"),
    ]
    assert found.warnings[0].startswith("2 things differ at once (prompt, sampling)")


def test_two_runs_of_the_same_are_called_noise_and_other_verifiers_are_warned_of(tmp_path: Path) -> None:
    rewards: dict[int, list[float | None]] = {0: [1.0], 1: [0.0]}
    same = compared((Job(tmp_path / "a", rewards), Job(tmp_path / "b", rewards)))
    other = compared((Job(tmp_path / "c", rewards), Job(tmp_path / "d", rewards, verifier="math")))

    assert "nothing is known to differ" in same.warnings[0]
    assert "scored by different verifiers" in other.warnings[0]


def test_files_of_nemo_gym_are_compared_by_index_and_say_what_goes_unchecked(tmp_path: Path) -> None:
    a, b = (Job(tmp_path / name, {0: [1.0], 1: [0.0]}, inputs=False) for name in "ab")
    a.manifest = b.manifest = None
    b.rewards[1] = [1.0]
    text = b.written().rollouts.read_text().replace("told", "another")
    b.files.rollouts.write_text(text)
    b.files.failures.unlink()

    found = compare_jobs(a.written(), b.files, resamples=99)

    assert (found.pairing.by, found.difference.difference) == ("index", 0.5)
    assert varied(found) == [("model", "told", "another")]
    assert "paired by index" in " ".join(found.warnings)
    assert "no job.json" in " ".join(found.warnings)


def test_files_that_do_not_say_what_was_run_are_not_called_two_runs_of_the_same(tmp_path: Path) -> None:
    job = Job(tmp_path / "a", {0: [1.0], 1: [0.0]}, inputs=False)
    job.manifest = None

    found = compare_jobs(job.written(), job.files, resamples=99)

    assert not any("nothing is known to differ" in warning for warning in found.warnings)


def test_the_subsets_add_up_to_the_difference_and_the_largest_is_first(pair: tuple[Job, Job]) -> None:
    found = compared(pair, by="level")

    assert sum(change.contribution for change in found.subsets) == pytest.approx(found.difference.difference)
    # Even tasks: 0 was lost, 4 and 6 gained. Odd ones: 5 gained.
    assert [(c.subset, c.difference.tasks, c.contribution) for c in found.subsets] == [("0", 4, 0.125), ("1", 4, 0.125)]
    assert all(c.adjusted_p_value == 1.0 for c in found.subsets)
    assert [flip.subset for flip in found.flips] == ["0", "0", "1", "0"]


def test_tasks_without_the_field_are_a_subset_of_their_own(pair: tuple[Job, Job]) -> None:
    for job in pair:
        job.rows = {task: {"question": "?"} | ({"level": "hard"} if task > 3 else {}) for task in job.rows}

    assert [(c.subset, c.contribution) for c in compared(pair, by="level").subsets] == [("hard", 0.375), (None, -0.125)]


def test_an_unknown_field_is_refused(pair: tuple[Job, Job]) -> None:
    with pytest.raises(UsageError, match="did you mean 'level'"):
        compared(pair, by="levels")
