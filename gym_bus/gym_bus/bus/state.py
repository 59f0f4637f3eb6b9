"""Small values that all may change: key-value buckets."""

from __future__ import annotations

from typing import Any

import msgspec
from nats.js import JetStreamContext, api
from nats.js.errors import BadRequestError, KeyDeletedError, KeyNotFoundError, NotFoundError
from nats.js.kv import KeyValue

from gym_bus import subjects
from gym_bus.bus.asking import answered
from gym_bus.errors import BusError
from gym_bus.settings import BusConfig

WORKER_AGE_S = 30.0
"""A worker that has not reported for so long is forgotten."""
LISTED_KEYS = 100_000
"""A server lists no more subjects of a stream at once."""


class State:
    """The buckets of a server. Every call raises BusError where the server does not answer."""

    def __init__(self, js: JetStreamContext, config: BusConfig) -> None:
        self._js, self._config = js, config
        self._open: dict[str, KeyValue] = {}

    async def bucket(self, name: str) -> KeyValue:
        """A bucket, created on first use."""
        if name not in self._open:
            self._open[name] = await answered(self.opened(name), f"bucket {name}")
        return self._open[name]

    async def opened(self, name: str) -> KeyValue:
        """The same with the client's own errors, and no deadline."""
        try:
            return await self._js.key_value(name)
        except NotFoundError:
            age_s = WORKER_AGE_S if name == subjects.WORKERS else None
            storage, replicas = api.StorageType(self._config.storage), self._config.replicas
            return await self._js.create_key_value(
                api.KeyValueConfig(bucket=name, history=1, storage=storage, replicas=replicas, ttl=age_s)
            )

    async def put(self, bucket: str, key: str, value: Any) -> int:
        """Store a value as JSON; returns its revision."""
        store = await self.bucket(bucket)
        return int(await answered(store.put(key, msgspec.json.encode(value)), f"{bucket}/{key}"))

    async def get(self, bucket: str, key: str, type_: Any = Any) -> Any:
        """The value of a key, None where there is none."""
        found = await self.get_entry(bucket, key, type_)
        return found[0] if found else None

    async def get_entry(self, bucket: str, key: str, type_: Any = Any) -> tuple[Any, int] | None:
        """(value, revision) of a key, None where there is none."""
        store = await self.bucket(bucket)
        entry = await answered(store.get(key), f"{bucket}/{key}", none_for=(KeyNotFoundError, KeyDeletedError))
        if entry is None:
            return None
        return msgspec.json.decode(entry.value or b"null", type=type_), int(entry.revision or 0)

    async def swap(self, bucket: str, key: str, value: Any, revision: int) -> int | None:
        """Store a value only where the key still has `revision` (0: does not exist); None where it does not."""
        store = await self.bucket(bucket)
        data = msgspec.json.encode(value)
        call = store.create(key, data) if revision == 0 else store.update(key, data, last=revision)
        changed = await answered(call, f"{bucket}/{key}", none_for=BadRequestError)
        return None if changed is None else int(changed)

    async def remove(self, bucket: str, key: str) -> None:
        """Delete a key, its history included; nothing is left in its place."""
        await self.bucket(bucket)
        await answered(self._js.purge_stream(_stream(bucket), subject=_subject(bucket, key)), f"{bucket}/{key}")

    async def keys(self, bucket: str, pattern: str = ">") -> list[str]:
        """The keys of a bucket that match `pattern`, in which `*` stands for one part and `>` for all that follow.

        Raises:
            BusError: no answer, or more keys than a server lists.
        """
        await self.bucket(bucket)
        # Not the client's `keys`: it finds none where all of them are on their way when it asks how many there are.
        asked = self._js.stream_info(_stream(bucket), subjects_filter=_subject(bucket, pattern))
        found = (await answered(asked, bucket)).state.subjects or {}
        if len(found) >= LISTED_KEYS:
            raise BusError(f"{bucket} has more keys than a server lists, {LISTED_KEYS:,}: name the one you mean")
        return [subject.removeprefix(_subject(bucket, "")) for subject in found]


def _stream(bucket: str) -> str:
    return f"KV_{bucket}"


def _subject(bucket: str, key: str) -> str:
    return f"$KV.{bucket}.{key}"
