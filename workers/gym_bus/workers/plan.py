"""From what the user asked for to a job: everything looked up, checked and written down before anything runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from gym_bus.agents.registry import AGENTS
from gym_bus.benchmarks.dataset import expand, materialize, materialized_line
from gym_bus.benchmarks.prepare import find_convert
from gym_bus.benchmarks.prompt import Prompt
from gym_bus.benchmarks.spec import Benchmark, data_path, load_benchmark
from gym_bus.config import Config
from gym_bus.errors import DataError, UsageError, did_you_mean
from gym_bus.jobs import Counts, JobRecord
from gym_bus.origins import Layer
from gym_bus.results.files import JobFiles
from gym_bus.results.lock import FileLock
from gym_bus.results.manifest import Manifest, differences, new_job_id
from gym_bus.settings import ModelConfig
from gym_bus.verifiers.registry import VERIFIERS
from gym_bus.verifiers.service import VerifierService
from gym_bus.workers.publish import Order, order_of, read_inputs


class Shard(msgspec.Struct, frozen=True):
    """Of `count` shards, the tasks whose index leaves the remainder `index`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard `i/n`. Raises UsageError where there is none such."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UsageError(f"--shard {text!r}: give i/n, such as 0/4 for the first of four, 3/4 for the last")
        return cls(int(index), int(count))

    def __contains__(self, task_index: int) -> bool:
        return task_index % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    benchmark: str
    model: str
    """Key in the configuration."""
    num_repeats: int | None = None
    """None for the benchmark's own."""
    limit: int | None = None
    """Tasks."""
    split: str | None = None
    """Type or name of the benchmark's dataset; None for its main one."""
    input: Path | None = None
    """Rows of this file instead."""
    agent: str | None = None
    """None for the benchmark's own."""
    shard: Shard | None = None
    """None for all tasks."""
    changes: tuple[Layer, ...] = ()
    """What is wanted otherwise than the benchmark's configuration says; see `load_benchmark`."""

    @property
    def own_prompt(self) -> bool:
        """Whether the prompt is the user's, not the benchmark's."""
        return any({"prompt", "prompt_config"} & layer.values.keys() for layer in self.changes)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job, ready to be written down and published."""

    wanted: Wanted
    benchmark: Benchmark
    data: Path
    repeats: int
    agent: str
    agent_options: dict[str, Any]
    verifier: str
    verifier_options: dict[str, Any]
    verifier_digest: str
    required: tuple[str, ...]
    model: ModelConfig
    config: Config
    split: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job that is written down in its output folder."""

    manifest: Manifest
    record: JobRecord
    order: Order
    files: JobFiles
    resumed: bool


def plan_job(wanted: Wanted, config: Config) -> Plan:
    """Look everything up and check it.

    Raises:
        UsageError: an unknown name, an option that does not fit, data that is not prepared; says what to do.
    """
    other_agent = (Layer("--agent", {"agent": {"name": wanted.agent}}),) if wanted.agent else ()
    benchmark = load_benchmark(wanted.benchmark, (*other_agent, *wanted.changes))
    split = wanted.split or benchmark.main.name
    agent = benchmark.spec.agent.name
    agent_options = benchmark.spec.agent.options | config.job.agent_options
    make_agent(agent, agent_options)
    verifier = benchmark.spec.verifier.name
    verifier_options = benchmark.spec.verifier.options | config.job.verifier_options
    digest = check_verifier(verifier, verifier_options, config)
    if config.job.lane not in config.bus.lanes:
        raise UsageError(
            f"job.lane: unknown lane {config.job.lane!r}: {did_you_mean(config.job.lane, config.bus.lanes)}"
        )
    if wanted.model not in config.models:
        raise UsageError(f"unknown model {wanted.model!r}: {did_you_mean(wanted.model, config.models)}")
    return Plan(
        wanted=wanted,
        benchmark=benchmark,
        data=_find_data(benchmark, wanted, split, Path(config.data_dir)),
        repeats=wanted.num_repeats or benchmark.num_repeats or benchmark.dataset(split).num_repeats,
        agent=agent,
        agent_options=agent_options,
        verifier=verifier,
        verifier_options=verifier_options,
        verifier_digest=digest,
        required=tuple(VERIFIERS.load(verifier).required),
        model=config.models[wanted.model],
        config=config,
        split=split,
    )


def make_agent(name: str, options: dict[str, Any]) -> None:
    """Raise UsageError where there is no such agent, or it does not take these options."""
    agent = AGENTS.load(name)
    try:
        agent(**options)
    except TypeError as e:
        raise UsageError(f"options of agent {name!r}: {e}") from None


def check_verifier(name: str, options: dict[str, Any], config: Config) -> str:
    """The verifier's digest. Raises UsageError where there is no such verifier, or it does not take these options."""
    encoded = msgspec.json.encode(options, order="sorted")
    service = VerifierService(config.verifier)
    service.check(name, encoded)
    return service.digest(name, encoded)


def _find_data(benchmark: Benchmark, wanted: Wanted, split: str, data_dir: Path) -> Path:
    if wanted.input is not None:
        if not wanted.input.is_file():
            what = "a folder, no file" if wanted.input.is_dir() else "no such file"
            raise UsageError(f"--input {wanted.input}: {what}")
        return wanted.input
    path = data_path(benchmark, data_dir, split)
    if not path.is_file():
        other = f" --split {split}" if split != benchmark.main.name else ""
        command = f"gym-bus dataset prepare {benchmark.argument}{other}"
        raise UsageError(
            f"benchmark {benchmark.spec.name!r} is not prepared: run `{command}` (it fetches the data from its "
            f"public source, or reads a folder with --source DIR), or try its five example rows with --split example"
        )
    return path


def write_down(plan: Plan, output: Path) -> Job:
    """Write manifest and materialized inputs into `output`, or check that what lies there is the same job.

    Raises:
        DataError: a row of the dataset is broken; names file and line.
        UsageError: the folder holds another job (says what differs), or cannot be written.
    """
    files = JobFiles(output)
    try:
        str(output.absolute()).encode()
        output.mkdir(parents=True, exist_ok=True)
        part = files.inputs.with_suffix(f".{os.getpid()}.part")
        lock = FileLock(files.lock)  # two runs that start at once must not write a manifest each
        try:
            digests, counts = _write_inputs(_lines(plan), part, plan.wanted.shard)
            if not counts:
                raise DataError(f"{plan.data}: no rows in {'this shard of it' if plan.wanted.shard else 'it'}")
            manifest = _manifest(plan, digests, len(counts))
            resumed = files.manifest.exists()
            if resumed:
                manifest = _same_job(manifest, files)
                _check_inputs(files, part)
            if not resumed or not files.inputs.exists():
                part.replace(files.inputs)
                manifest.save(files.manifest)
        finally:
            part.unlink(missing_ok=True)
            lock.release()
    except UnicodeEncodeError:  # the bus is told where the files are, in UTF-8
        raise UsageError(f"{output}: its name is not UTF-8; choose another folder with --output") from None
    except OSError as e:
        raise UsageError(
            f"{output}: cannot be written: {e.strerror or e}; choose another folder with --output"
        ) from None
    # A job that is resumed may have got further rollouts since it was written down.
    spans = spans_of_file(files.inputs) if resumed else counts.spans()
    return _job(manifest, spans, files, plan.config.job.lane, resumed=resumed)


def open_job(folder: Path, lane: str) -> Job:
    """The job that is written down in `folder`, as it was ordered; `lane` is no part of what it is.

    Raises:
        DataError: there is none, or its files are broken; names the file.
    """
    files = JobFiles(folder)
    manifest = Manifest.load(files.manifest)
    return _job(manifest, spans_of_file(files.inputs), files, lane, resumed=True)


def _lines(plan: Plan) -> Iterator[tuple[int, int, bytes]]:
    tasks = materialize(
        plan.data,
        agent=plan.agent,
        prompt=plan.benchmark.spec.prompt,
        required=plan.required,
        overrides=plan.config.job.sampling,
        limit=plan.wanted.limit,
        convert=find_convert(plan.benchmark, plan.split) if plan.wanted.input else None,
        own_input=plan.wanted.input is not None and not plan.wanted.own_prompt,
    )
    for r in expand(tasks, plan.repeats, seeds=plan.config.job.seeds):
        yield r.task_index, r.rollout_index, materialized_line(r.row, r.task_index, r.rollout_index)


class Size(msgspec.Struct, frozen=True):
    """How much a job is."""

    tasks: int
    rollouts: int


def size_of(plan: Plan) -> Size:
    """Read the job's rows, write nothing. Raises DataError where a row is broken; names file and line."""
    shard = plan.wanted.shard
    counts, rollouts = Counts(), 0
    for task, rollout, _ in _lines(plan):
        if shard is None or task in shard:
            counts.add(task, rollout)
            rollouts += 1
    return Size(tasks=len(counts), rollouts=rollouts)


class _Digests(msgspec.Struct, frozen=True):
    written: str
    of_all_shards: str


def _write_inputs(lines: Iterable[tuple[int, int, bytes]], path: Path, shard: Shard | None) -> tuple[_Digests, Counts]:
    """Write the shard's lines; returns the digests and the number of rollouts by task."""
    written, of_all = hashlib.sha256(), hashlib.sha256()
    counts = Counts()
    with path.open("wb") as out:
        for task, rollout, line in lines:
            if shard is not None:
                of_all.update(line + b"\n")
                if task not in shard:
                    continue
            out.write(line + b"\n")
            written.update(line + b"\n")
            counts.add(task, rollout)
        out.flush()
        os.fsync(out.fileno())
    return _Digests(written.hexdigest(), of_all.hexdigest() if shard else ""), counts


def _manifest(plan: Plan, digests: _Digests, tasks: int) -> Manifest:
    return Manifest(
        job=new_job_id(plan.benchmark.spec.name),
        created_at=time.time(),
        benchmark=plan.benchmark.spec.name,
        dataset_digest=digests.written,
        rows=tasks,
        num_repeats=plan.repeats,
        agent=plan.agent,
        agent_options=plan.agent_options,
        model=plan.wanted.model,
        model_kind=plan.model.kind,
        model_name=Path(plan.model.file).name if plan.model.file else plan.model.model or plan.wanted.model,
        verifier=plan.verifier,
        verifier_options=plan.verifier_options,
        verifier_digest=plan.verifier_digest,
        config_digest=config_digest(plan.model, plan.config.job.limit_s),
        sampling=plan.config.job.sampling,
        seeds=plan.config.job.seeds,
        prompt=_prompt_digest(plan.benchmark.spec.prompt),
        limit_s=plan.config.job.limit_s,
        gym_bus_version=version("gym-bus"),
        shard=str(plan.wanted.shard or ""),
        shard_of=digests.of_all_shards,
    )


def _prompt_digest(prompt: Prompt | None) -> str:
    return hashlib.sha256(msgspec.json.encode(prompt, order="sorted")).hexdigest() if prompt else ""


def config_digest(model: ModelConfig, limit_s: float) -> str:
    """Over the settings that change results; the rows' own sampling parameters are in the dataset's digest."""
    parts: dict[str, Any] = {
        "limit_s": limit_s,
        "model": [model.sampling, model.extra_body, model.return_tokens, model.api],
    }
    if model.kind == "replay" and model.file:
        parts["replay"] = hashlib.sha256(Path(model.file).read_bytes()).hexdigest()
        if model.cycle:
            parts["cycle"] = True
    if model.kind == "simulated":  # its latency and its faults change when an answer comes, not what it is
        s = model.simulated
        parts["simulated"] = [s.seed, s.output_tokens, s.text, s.tokens]
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _same_job(manifest: Manifest, files: JobFiles) -> Manifest:
    old = Manifest.load(files.manifest)
    if different := differences(old, manifest):
        raise UsageError(
            f"{files.folder} holds another job ({old.job}); what differs: {'; '.join(different)}. "
            "Choose another folder with --output, or run with the settings of that job to resume it"
        )
    return old


def _check_inputs(files: JobFiles, ordered: Path) -> None:
    """Raise UsageError where the materialized inputs do not begin with the rows that were ordered."""
    if not files.inputs.exists():
        return
    with files.inputs.open("rb") as there, ordered.open("rb") as wanted:
        while chunk := wanted.read(1 << 20):
            if there.read(len(chunk)) != chunk:
                raise UsageError(
                    f"{files.inputs}: not the rows that the job was written down with: it was changed or cut since. "
                    "Remove it, and the same command writes it anew"
                )


def _job(manifest: Manifest, spans: list[tuple[int, int, int]], files: JobFiles, lane: str, *, resumed: bool) -> Job:
    record = JobRecord(
        job=manifest.job,
        benchmark=manifest.benchmark,
        agent=manifest.agent,
        model=manifest.model,
        verifier=manifest.verifier,
        spans=spans,
        lane=lane,
        limit_s=manifest.limit_s,
        created_at=manifest.created_at,
        manifest=msgspec.to_builtins(manifest),
    )
    return Job(manifest=manifest, record=record, order=order_of(record, manifest), files=files, resumed=resumed)


def spans_of_file(path: Path) -> list[tuple[int, int, int]]:
    """The spans of a file of materialized inputs."""
    counts = Counts()
    for row in read_inputs(path):
        counts.add(row.task_index, row.rollout_index)
    return counts.spans()
