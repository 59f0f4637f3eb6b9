"""What an endpoint says instead of an answer: the class of the error, in the endpoint's own words, without secrets."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from gym_bus.errors import ContextTooLong, ModelError, ModelTimeout, Overloaded, RateLimited, RequestRefused
from gym_bus.models.gate import REFUSALS

MAX_ERROR_CHARS = 2000
TRANSIENT_4XX = (408, 409, 425)
OVERLOAD_WORDS = frozenset(
    ["429", "rate_limit_exceeded", "rate_limit_error", "too_many_requests", "overloaded_error", "server_overloaded"]
)
"""`type` or `code` of an error that says the same as status 429, whatever the status is."""
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for what is no JSON, or of too many levels, or of another shape."""
_CONTEXT_WORDS = (
    "context length",
    "context_length",
    "context window",
    "context size",
    "maximum context",
    "maximum model length",
    "maximum number of tokens",
    "too many tokens",
    "prompt is too long",
    "input is too long",
    "max_model_len",
    "max_new_tokens` must be",
)

_any = msgspec.json.Decoder()


class Refusals:
    """Makes errors of what one endpoint sent."""

    def __init__(self, url: str, secrets: Iterable[str]) -> None:
        """`secrets` are masked in this order; an endpoint may echo what it was sent."""
        patterns = [_spelled(secret) for secret in secrets]
        self._url = url
        self._in_text = [re.compile(pattern) for pattern in patterns]
        self._in_bytes = [re.compile(pattern.encode()) for pattern in patterns]

    def refusal(self, status: int, headers: Mapping[str, str], data: bytes) -> ModelError:
        """For a status other than 200."""
        error = _error_in(self._without_secrets(data))
        text = self.clean(_words(error) or "no error text")
        message = f"{self._url}: {text}"
        if status == 429:
            return RateLimited(message, status, _retry_after_s(headers.get("Retry-After")))
        if status in REFUSALS:
            return Overloaded(message, status, _retry_after_s(headers.get("Retry-After")))
        if status in (408, 504):
            return ModelTimeout(message, status)
        if 300 <= status < 400:
            to = self.clean(headers.get("Location", "nowhere"))
            return ModelError(f"{message}; it redirects to {to}: base_url must be the address itself", status)
        if status >= 500 or status in TRANSIENT_4XX or status < 400:
            return ModelError(message, status)
        said = " ".join((text, *_labels(error))).lower()
        if status in (400, 413, 422) and any(words in said for words in _CONTEXT_WORDS):
            return ContextTooLong(message, status)
        return RequestRefused(message, status)

    def error_in_200(self, error: Any, otherwise: str = "") -> ModelError:
        """For an error in a reply with status 200; `otherwise` is told where it has no words."""
        message = f"{self._url}: {self.clean(_words(error) or otherwise)}"
        if not OVERLOAD_WORDS.isdisjoint(_labels(error)):
            return RateLimited(message, 200)
        return ModelError(message, 200)

    def no_answer(self, what: str, data: bytes) -> ModelError:
        """For a reply with status 200 of which no answer can be made, with its beginning."""
        said = self._without_secrets(data)[:500].decode(errors="replace")
        return ModelError(f"{self._url}: {what}: {said}", 200)

    def clean(self, words: object) -> str:
        """As text: bounded, and without secrets."""
        text = str(words)
        for secret in self._in_text:
            text = secret.sub("***", text)
        return text[:MAX_ERROR_CHARS]

    def _without_secrets(self, data: bytes) -> bytes:
        """For what is cut before it is text: half a key is one, too."""
        for secret in self._in_bytes:
            data = secret.sub(b"***", data)
        return data


def _spelled(secret: str) -> str:
    """A pattern of the secret as it is and as JSON may spell it: each character itself, escaped, or as its number."""
    return "".join(f"(?:{'|'.join(_spellings(char))})" for char in secret)


def _spellings(char: str) -> Iterator[str]:
    units = char.encode("utf-16-be").hex()
    yield "".join(rf"\\u(?i:{units[at : at + 4]})" for at in range(0, len(units), 4))
    if char == "/":
        yield r"\\/"
    escaped = msgspec.json.encode(char).decode()[1:-1]
    yield re.escape(escaped)
    if escaped != char:
        yield re.escape(char)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds from a `Retry-After` header: a number, or an HTTP date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _error_in(data: bytes) -> Any:
    try:
        decoded = _any.decode(data)
    except UNREADABLE:
        return data[: 4 * MAX_ERROR_CHARS].decode(errors="replace").strip()
    return decoded.get("error", decoded) if isinstance(decoded, dict) else decoded


def _labels(error: Any) -> tuple[str, ...]:
    """The `type` and `code` of an error, where it has them."""
    labels = (error.get("type"), error.get("code")) if isinstance(error, Mapping) else ()
    return tuple(str(label) for label in labels if isinstance(label, str | int))


def _words(error: Any) -> str:
    try:
        if isinstance(error, Mapping):
            return str(error.get("message") or error.get("detail") or msgspec.json.encode(error).decode())
        return "" if error is None else str(error)
    except RecursionError:
        return "an error of more levels than can be shown"
