"""Every setting there is: typed structs whose defaults are the configuration. `config.py` reads files over them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
MOST_REPEATS = 1_000_000
Repeats = Annotated[int, Meta(ge=1, le=MOST_REPEATS)]
"""Rollouts per task; all are written down before the first one runs, so a slip must not fill the disk."""
Seed = Annotated[int, Meta(ge=0, le=2**62)]
"""The seeds of all rollouts that are counted from it fit 64 bits, as endpoints want."""
Seconds = Annotated[float, Meta(gt=0)]
Bytes = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]

MiB = 2**20
GiB = 2**30


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings."""


class StreamConfig(_Section, frozen=True):
    """Limits of one stream."""

    max_msgs: Annotated[int, Meta(ge=-1)] = 262_144
    """Messages the stream holds before it refuses publishers; -1 for no limit."""
    max_bytes: Annotated[int, Meta(ge=-1)] = 2 * GiB
    max_age_s: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds after which a message is dropped; 0 keeps it."""


class EmbeddedConfig(_Section, frozen=True):
    """The nats-server that a local run starts for itself."""

    store_dir: str | None = None
    """Folder of the JetStream store; by default inside the job's output folder."""
    sync_interval: str = "1s"
    """How often the store is fsynced; `always` before every ack."""
    max_file_bytes: Bytes = 64 * GiB
    memory_bytes: Bytes = 320 * MiB
    """What the server's garbage collector aims for (Go's `GOMEMLIMIT`): it drops cached blocks of its streams first. It
    uses more where that many messages cannot be held in less, and works more for it."""
    start_limit_s: Seconds = 20.0


class BusConfig(_Section, frozen=True):
    """The NATS server and what is kept on it."""

    url: str | None = None
    """`nats://host:port` of a running server, version 2.11 or newer, or of several servers of one cluster with commas
    between them; null starts an embedded one."""
    credentials: str | None = None
    """Path of a NATS credentials file."""
    embedded: EmbeddedConfig = EmbeddedConfig()
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Servers of a cluster that keep each stream, bucket and large body."""
    storage: Literal["file", "memory"] = "file"
    """What they are kept in, from their creation on; memory takes smaller limits (`configs/memory.yaml`)."""
    inline_limit_bytes: Bytes = 4 * MiB
    """Larger bodies go to the object store; the message carries their key."""
    lanes: tuple[str, ...] = ("interactive", "batch")
    """Priority classes, first served first."""
    requests: StreamConfig = StreamConfig()
    attempts: StreamConfig = StreamConfig(max_bytes=8 * GiB)
    results: StreamConfig = StreamConfig(max_msgs=-1, max_bytes=16 * GiB, max_age_s=7 * 86400.0)
    advisories: StreamConfig = StreamConfig(max_msgs=1_000_000, max_bytes=GiB, max_age_s=7 * 86400.0)
    ack_wait_s: Seconds = 60.0
    """A worker that has not been heard of for so long loses what it holds."""
    heartbeat_s: Seconds = 20.0
    """How often a worker extends what it holds; well below `ack_wait_s`."""
    max_deliver: PositiveInt = 5
    """Times that work on one message may begin and come to no end, as its worker dies or hangs, before it counts as
    poison; what a worker hands back, at a restart, does not count."""
    held_bytes: Bytes = 256 * MiB
    """Bodies that a worker holds, those being worked on included, before it pulls no more."""
    connect_limit_s: Seconds = 5.0
    publish_limit_s: Seconds = 120.0
    """Seconds that one publish may take, waiting for a full stream included."""


class RetryConfig(_Section, frozen=True):
    """Retries of one model call, per kind of error, with jittered exponential waits."""

    unreachable: Count = 3
    rate_limited: Count = 20
    server_error: Count = 3
    timeout: Count = 1
    wait_s: Seconds = 0.5
    """The first wait; it doubles with every further try."""
    max_wait_s: Seconds = 30.0
    """Bound of one wait, `Retry-After` included."""
    budget_s: Seconds = 600.0
    """Bound of all waits and tries of one call."""


class Distribution(_Section, frozen=True):
    """A random non-negative quantity."""

    kind: Literal["constant", "uniform", "exponential", "lognormal"] = "constant"
    mean: Annotated[float, Meta(ge=0)] = 0.0
    """Mean, in the quantity's unit."""
    spread: Annotated[float, Meta(ge=0)] = 0.0
    """uniform: half-width; lognormal: sigma of the logarithm; ignored otherwise."""


class SimulatedConfig(_Section, frozen=True):
    """A model that needs no weights: for capacity planning, load tests and chaos."""

    seed: int = 0
    latency_s: Distribution = Distribution()
    output_tokens: Distribution = Distribution(mean=256)
    text: str | Annotated[tuple[str, ...], Meta(min_length=1)] = "\\boxed{A}"
    """Ends every answer, of several texts a drawn one; the words before it are filler of the drawn length."""
    rate_limited: Share = 0.0
    """Share of calls answered with 429."""
    server_error: Share = 0.0
    """Share of calls answered with 500."""
    hang: Share = 0.0
    """Share of calls never answered."""
    most_in_flight: Count = 0
    """Calls at a time, beyond which all are answered with 429; 0 for any number."""
    most_per_s: Annotated[float, Meta(ge=0)] = 0.0
    """Calls within a second, beyond which all are answered with 429; 0 for any number."""
    retry_after_s: Annotated[float, Meta(ge=0)] = 1.0
    """What a 429 asks for in `Retry-After`; 0 sends none."""
    tokens: bool = False
    """Return token ids and log-probabilities."""


class ModelConfig(_Section, frozen=True):
    """One named model."""

    kind: Literal["openai", "replay", "simulated"] = "openai"
    base_url: str = ""
    """With the `/v1`; openai only."""
    model: str = ""
    """The name the endpoint knows; defaults to the key of this entry."""
    api: Literal["responses", "chat"] = "responses"
    api_key: str = ""
    """From `env.yaml`, as `${policy_api_key}`; never leaves the worker."""
    headers: dict[str, str] = {}
    rollout_header: str | None = "X-Gym-Rollout"
    """Request header that carries `job/task/rollout/attempt`, for sticky routing and tracing; null sends none."""
    sampling: dict[str, Any] = {}
    """Create params that this model always gets, such as `temperature`; they win over the job's."""
    extra_body: dict[str, Any] = {}
    """Further keys of the request body, as vLLM's `chat_template_kwargs`."""
    split_think: bool = False
    """Chat only: make a leading `<think>` block of the answer a reasoning item."""
    return_tokens: bool = False
    """Ask for token ids and log-probabilities, vLLM style."""
    connect_limit_s: Seconds = 10.0
    read_limit_s: Seconds = 600.0
    """Seconds without a byte."""
    call_limit_s: Seconds = 1800.0
    """Seconds of one HTTP call."""
    retry: RetryConfig = RetryConfig()
    adaptive: bool = True
    """Find out how many calls the endpoint takes at a time, all workers together, and have the others wait."""
    file: str | None = None
    """Replay only: the JSONL file of recorded answers."""
    cycle: bool = False
    """Replay only: begin again with a task's first answer where it has fewer than rollouts; for load tests."""
    simulated: SimulatedConfig = SimulatedConfig()


class AgentConfig(_Section, frozen=True):
    """Agent workers."""

    concurrency: Annotated[int, Meta(ge=1, le=16_384)] = 1024
    """Rollouts in flight per process."""
    prefetch: Annotated[int, Meta(ge=0, le=4096)] = 256
    """Requests held ready beside those in flight, at most a quarter of the concurrency."""
    names: tuple[str, ...] = ()
    """Agents that this worker serves; empty for all it knows."""
    limit_s: Seconds = 3600.0
    """Wall-clock seconds of one rollout's generation."""


class RayConfig(_Section, frozen=True):
    """Ray, for the verifiers that need a pool."""

    address: Annotated[str, Meta(pattern=r"^(auto|[^/]+:[0-9]+)$")] | None = None
    """`host:port` of a running cluster's head, or `auto` for the cluster of this machine; null starts a small Ray of
    the worker's own on demand. The worker has to run on a node of that cluster, which may be one without CPUs to give
    (`ray start --num-cpus=0`). The cluster's machines need the worker's versions of Python and Ray, and what gym_bus
    imports; gym_bus itself is sent there."""
    actors: Annotated[int, Meta(ge=0)] = 0
    """Actors per verifier worker; 0 for one per core that the worker may run on, however little of them it gets."""
    cpus_per_actor: Annotated[float, Meta(ge=0)] = 1.0
    """CPUs that an actor asks the cluster for; it is placed where they are free."""
    memory_bytes_per_actor: Annotated[int, Meta(ge=0)] = 0
    """Memory that an actor asks the cluster for; 0 asks for none."""
    object_store_bytes: Annotated[int, Meta(ge=75 * MiB)] = 80 * MiB
    """Of the worker's own Ray; it is used for what waits between worker and actors."""


class VerifierConfig(_Section, frozen=True):
    """Verifier workers."""

    concurrency: PositiveInt = 256
    """Attempts in flight per process."""
    prefetch: Annotated[int, Meta(ge=0, le=4096)] = 128
    names: tuple[str, ...] = ()
    """Verifiers that this worker serves; empty for all it knows."""
    executor: Literal["ray", "local"] = "ray"
    """Where CPU-heavy and sandboxed verifiers run: Ray actors, or child processes of the worker."""
    sandbox_level: Literal["namespaces", "landlock"] = "namespaces"
    """The lowest level of isolation that will do for programs: `landlock` is for containers that allow no namespaces.
    The highest that the machine gives is used; where it does not give this one, nothing is run."""
    preload: tuple[str, ...] = ()
    """Modules that programs find imported already, besides those that verifiers choose: of the standard library, or of
    installed packages such as `numpy`, which programs cannot import otherwise. Each costs every program a little."""
    limit_s: Seconds = 30.0
    """Wall-clock seconds of one verification on the pool, beyond the sandbox's own limits for its programs."""
    batch: PositiveInt = 16
    """Verifications per call of a pool worker."""
    tries: PositiveInt = 3
    """Tries of a check whose sandbox or pool worker was lost."""
    recycle_after: PositiveInt = 100_000
    """Checks after which a pool worker is replaced by a fresh one."""
    recycle_bytes: Bytes = 2 * GiB
    """Resident memory beyond which a pool worker is replaced."""
    ray: RayConfig = RayConfig()


class ResultsConfig(_Section, frozen=True):
    """The results consumer."""

    tokens: bool = False
    """Write token ids and log-probabilities into the rollouts file."""
    max_attempts: PositiveInt = 3
    """Attempts at one rollout over all runs of the same command."""
    idle_s: Seconds = 5.0
    """Seconds without progress after which the job is reconciled with the bus."""
    issue_limit: PositiveInt = 3
    """Times that a rollout lost by the bus is issued before it counts as lost."""
    compat: Literal["gym_bus", "nemo_gym"] = "gym_bus"
    """Whose way to follow where NeMo Gym's is disputed."""


class JobConfig(_Section, frozen=True):
    """What one job asks of its rollouts; part of the job's identity."""

    sampling: dict[str, Any] = {}
    """Responses create params that win over the rows' own, such as `temperature`; NeMo Gym's top-level
    `responses_create_params` is the same."""
    agent_options: dict[str, Any] = {}
    """Win over the benchmark's agent options."""
    verifier_options: dict[str, Any] = {}
    """Win over the benchmark's verifier options."""
    seeds: Seed | None = None
    """Rollout i of each task asks the model for the seed `seeds + i`, in the request's extra body; null for none."""
    limit_s: Seconds = 3600.0
    """Wall-clock seconds of one rollout's generation."""
    lane: str = "batch"
    """Priority class; one of `bus.lanes`."""


class LocalConfig(_Section, frozen=True):
    """The worker processes of a local run."""

    agents: Count = 1
    verifiers: Count = 1
    keep_bus: bool = False
    """Keep the embedded server's store after the job is complete."""


class RegistryConfig(_Section, frozen=True):
    """Where data sets are kept: `gym-bus dataset upload`, `download` and `rm`. The tokens belong into `env.yaml`."""

    mlflow_tracking_uri: str = ""
    """Of a GitLab project's model registry, `https://host/api/v4/projects/ID/ml/mlflow`, or of an MLflow server."""
    mlflow_tracking_token: str = ""
    hf_token: str = ""
    hf_endpoint: str = "https://huggingface.co"
    hf_organization: str = ""
    """Owner of data sets that are named without one."""
    hf_dataset_prefix: str = ""
    """Begins the names of uploaded data sets that are named after their benchmark."""
    hf_collection: str = ""
    """Slug of the collection that uploaded data sets are added to; empty for none."""
    limit_s: Seconds = 60.0
    """Seconds that a registry may take to answer one request."""


class Config(_Section, frozen=True):
    """Everything that can be set."""

    bus: BusConfig = BusConfig()
    models: dict[str, ModelConfig] = {}
    agent: AgentConfig = AgentConfig()
    verifier: VerifierConfig = VerifierConfig()
    results: ResultsConfig = ResultsConfig()
    job: JobConfig = JobConfig()
    local: LocalConfig = LocalConfig()
    registry: RegistryConfig = RegistryConfig()
    data_dir: str = ".gym_bus/data"
    """Where prepared data sets lie."""
    benchmark_paths: tuple[str, ...] = ()
    """Folders of benchmarks, or folders that hold such: their names are known, and their code is run by this machine's
    workers."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
