"""Secrets out of what is shown: by the name of the key, and by where a value was drawn from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "********"
LEAST_LENGTH = 6
"""Characters; a shorter secret is masked where it stands alone, not within a text, where it may stand by chance."""

_SECRET_KEY = re.compile(r"(^|[_-])(api[_-]?key|key|token|password|passwd|secret|authorization)$", re.IGNORECASE)
_PUBLIC_VARIABLE = re.compile(r"(_|^)(url|uri|endpoint|name|model|organization|prefix|collection|dir|host|port)$")
_ADDRESS_KEY = re.compile(r"(^|_)(url|uri|endpoint|address)(s|es)?$")

_CREDENTIALS = re.compile(r"(?:(?<=://)|^)(?!(?:[\w.-]+|\[[\w:.]+\])(?::\d+)?/)((?:(?!://).)*)@")
"""All up to the last `@`: what is not escaped, as it should be, is a secret, too. Behind a plain host it is a path."""


def split_credentials(address: str) -> tuple[str, str]:
    """The address without user and password, and what was taken out of it: `user:password`, or nothing."""
    found = _CREDENTIALS.search(address)
    return (address[: found.start()] + address[found.end() :], found[1]) if found else (address, "")


def redact(addresses: str) -> str:
    """The address, or several with commas, without user and password."""
    return _CREDENTIALS.sub("", addresses)


def is_secret_key(key: str) -> bool:
    """Whether what stands under a key of this name is secret."""
    return bool(_SECRET_KEY.search(key))


class Masking:
    """Masks secret values, alone or within a longer text."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        """Of the variables of `env.yaml`, all are secret but those that are named as an address or a name."""
        self._secrets = sorted(set(_texts(variables)), key=len, reverse=True)  # a longer one may contain a shorter one

    def shown(self, keys: Iterable[str | int], value: Any) -> Any:
        """A value that stands under these keys, outermost first, as it may be shown."""
        if isinstance(value, list):
            return [self.shown(keys, item) for item in value]
        if not isinstance(value, str) or not value:
            return value
        names = list(map(str, keys))
        if any(map(is_secret_key, names)) or "headers" in names or value in self._secrets:
            return MASK
        for secret in self._secrets:
            value = value.replace(secret, MASK) if len(secret) >= LEAST_LENGTH else value
        # An address may lack its `://`; in any other text, what stands before an `@` then is no password.
        is_address = any(map(_ADDRESS_KEY.search, names))
        return _CREDENTIALS.sub(lambda found: _masked(found) if found.start() or is_address else found[0], value)


def _masked(found: re.Match[str]) -> str:
    """The credentials of an address as they may be shown. A user that has no password is a token."""
    user, _, password = found[1].partition(":")
    return f"{user}:{MASK}@" if password else f"{MASK}@"


def _texts(variables: Mapping[str, Any]) -> Iterable[str]:
    for key, value in variables.items():
        if isinstance(value, Mapping):
            yield from _texts(value)
        elif isinstance(value, str | int) and not isinstance(value, bool) and not _PUBLIC_VARIABLE.search(str(key)):
            yield str(value)
