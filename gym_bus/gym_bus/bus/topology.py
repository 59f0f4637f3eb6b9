"""The streams as the server is to have them."""

from __future__ import annotations

from typing import Any

from nats.js import JetStreamContext, api
from nats.js.errors import APIError

from gym_bus import subjects
from gym_bus.settings import BusConfig, MiB, StreamConfig

DEDUPE_WINDOW_S = 120.0
MAX_MESSAGE_BYTES = 8 * MiB
DELIVERIES = "gym.delivery"
"""What workers note of single deliveries: that work on one began, or that it was handed back."""
_OTHER_SETTINGS = 10058
"""err_code: the stream exists, not as it was asked for."""


def stream_configs(config: BusConfig) -> list[api.StreamConfig]:
    """All streams."""
    work, limits = api.RetentionPolicy.WORK_QUEUE, api.RetentionPolicy.LIMITS
    advisories = [
        f"$JS.EVENT.ADVISORY.CONSUMER.{event}.{stream}.*"
        for event in ("MAX_DELIVERIES", "MSG_TERMINATED")
        for stream in (subjects.REQUESTS, subjects.ATTEMPTS)
    ]

    def stream(name: str, names: list[str], bounds: StreamConfig, **more: Any) -> api.StreamConfig:
        settings: dict[str, Any] = {
            "discard": api.DiscardPolicy.NEW,
            "max_msgs": bounds.max_msgs,
            "max_bytes": bounds.max_bytes,
            "max_age": bounds.max_age_s,
            "max_msg_size": MAX_MESSAGE_BYTES,
            "storage": api.StorageType(config.storage),
            "num_replicas": config.replicas,
            "duplicate_window": DEDUPE_WINDOW_S,
            "allow_direct": True,
        }
        return api.StreamConfig(name=name, subjects=names, **(settings | more))

    return [
        stream(subjects.REQUESTS, ["gym.request.>"], config.requests, retention=work),
        stream(subjects.ATTEMPTS, ["gym.attempt.>"], config.attempts, retention=work),
        stream(
            subjects.RESULTS,
            ["gym.result.>"],
            config.results,
            retention=limits,
            max_msgs_per_subject=1,
            discard_new_per_subject=True,
        ),
        stream(
            subjects.ADVISORIES,
            [*advisories, f"{DELIVERIES}.>"],
            config.advisories,
            retention=limits,
            discard=api.DiscardPolicy.OLD,
        ),
    ]


async def ensure_stream(js: JetStreamContext, config: api.StreamConfig) -> None:
    """Create a stream, or give it these settings. Raises the client's own errors."""
    try:
        await js.add_stream(config)
    except APIError as e:
        if e.err_code != _OTHER_SETTINGS:
            raise
        await js.update_stream(config)


async def ensure_replicas(js: JetStreamContext, name: str, replicas: int) -> None:
    """Have the stream behind a bucket or an object store kept so many times. Raises the client's own errors."""
    config = (await js.stream_info(name)).config
    if config.num_replicas != replicas:
        await js.update_stream(config, num_replicas=replicas)
