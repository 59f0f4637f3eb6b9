"""Where a model's requests go, and in whose name."""

from __future__ import annotations

from base64 import b64encode
from typing import NamedTuple
from urllib.parse import unquote

from gym_bus.masking import split_credentials
from gym_bus.settings import ModelConfig

SHORTEST_SECRET = 8
"""Characters of a word in a header; a shorter one may stand anywhere by chance."""


class Endpoint(NamedTuple):
    """An endpoint as it is asked, and as it may be spoken of."""

    address: str
    """Its `base_url` without user and password."""
    headers: dict[str, str]
    """Of every request: who asks, and what the configuration adds."""
    secrets: list[str]
    """What must not be shown, the longest first: one may contain another."""


def endpoint_of(config: ModelConfig) -> Endpoint:
    """The endpoint of a model.

    `api_key` goes before a header of the configuration, and that before a user and a password in `base_url`, which are
    sent as basic authentication, in UTF-8.
    """
    address, credentials = split_credentials(config.base_url)
    headers: dict[str, str] = {}
    secrets = [config.api_key]
    if credentials:
        user, _, password = credentials.partition(":")
        secrets += [password or user, unquote(password or user)]
        headers["Authorization"] = f"Basic {b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}"
        secrets.append(headers["Authorization"].removeprefix("Basic "))
    headers |= config.headers
    if config.api_key:
        headers["Authorization"] = f"Bearer {config.api_key}"
    secrets += [word for value in config.headers.values() for word in value.split() if len(word) >= SHORTEST_SECRET]
    return Endpoint(address, headers, sorted(filter(None, secrets), key=len, reverse=True))
