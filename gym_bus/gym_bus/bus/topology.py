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
_OTHER_SETTINGS, _NO_SUCH_STREAM = 10058, 10059
"""err_codes: the stream exists, not as it was asked for; it does not exist."""
NO_ROOM = (10023, 10028, 10047)
"""err_codes of a server without the disk or the memory that streams reserve."""


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
        if e.err_code == _OTHER_SETTINGS:
            await js.update_stream(config)
        elif e.err_code in NO_ROOM:
            await _update_what_is_there(js, config, e)
        else:
            raise


async def _update_what_is_there(js: JetStreamContext, config: api.StreamConfig, refusal: APIError) -> None:
    """The server asks for room twice before it sees that it has the stream already."""
    try:
        await js.update_stream(config)
    except APIError as e:
        raise (refusal if e.err_code == _NO_SUCH_STREAM else e) from None


async def ensure_replicas(js: JetStreamContext, name: str, replicas: int) -> None:
    """Have the stream behind a bucket or an object store kept so many times. Raises the client's own errors."""
    config = (await js.stream_info(name)).config
    if config.num_replicas != replicas:
        await js.update_stream(config, num_replicas=replicas)
