"""The object store: bodies that are too large for a message, and whole files."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

from nats.js import JetStreamContext, api
from nats.js.errors import NotFoundError
from nats.js.object_store import OBJ_DEFAULT_CHUNK_SIZE, ObjectStore

from gym_bus import subjects
from gym_bus.bus.asking import answered
from gym_bus.bus.client import Client
from gym_bus.errors import BodyLost
from gym_bus.settings import BusConfig

FILE_LIMIT_S = 600.0
BODY_LIMIT_S = 60.0
"""Of a body, up to 64 MB of it."""


class Blobs:
    """The object store of a server. Every call raises BusError where the server does not answer."""

    def __init__(self, client: Client, js: JetStreamContext, config: BusConfig) -> None:
        self._client, self._js, self._config = client, js, config
        self._open: ObjectStore | None = None

    async def _store(self) -> ObjectStore:
        if self._open is None:
            self._open = await answered(self.opened(), f"object store {subjects.BLOBS}")
        return self._open

    async def opened(self) -> ObjectStore:
        """The store, created on first use; with the client's own errors, and no deadline."""
        try:
            return await self._js.object_store(subjects.BLOBS)
        except NotFoundError:
            storage, replicas = api.StorageType(self._config.storage), self._config.replicas
            config = api.ObjectStoreConfig(storage=storage, replicas=replicas)
            return await self._js.create_object_store(subjects.BLOBS, config=config)

    def _in_chunks(self) -> api.ObjectMeta:
        """In parts that the server takes; the client's own are 128 KB."""
        size_bytes = min(OBJ_DEFAULT_CHUNK_SIZE, self._client.max_payload)
        return api.ObjectMeta(options=api.ObjectMetaOptions(max_chunk_size=size_bytes))

    async def put(self, subject: str, message_id: str, body: bytes) -> str:
        """Store the body of a message; returns the claim that fetches it."""
        job = message_id.split(".", 1)[0]
        key = f"{job}/{subject}/{message_id}"
        await answered((await self._store()).put(key, body, self._in_chunks()), f"object {key}", limit_s=BODY_LIMIT_S)
        return key

    async def get(self, key: str) -> bytes:
        """The body behind a claim. Raises BodyLost where there is none."""
        store, body = await self._store(), io.BytesIO()  # else the client adds chunk to chunk: minutes for 60 MB
        call = store.get(key, body)
        if await answered(call, f"object {key}", none_for=NotFoundError, limit_s=BODY_LIMIT_S) is None:
            raise BodyLost(f"object {key}: not found")
        return body.getvalue()

    async def put_file(self, key: str, path: Path) -> None:
        """Store a file."""
        store = await self._store()
        with path.open("rb") as file:
            await answered(store.put(key, file, self._in_chunks()), f"object {key}", limit_s=FILE_LIMIT_S)

    async def get_file(self, key: str, path: Path) -> None:
        """Write a stored file to `path`. Raises BusError where it is not there."""
        store = await self._store()
        with path.open("wb") as file:
            await answered(store.get(key, file), f"object {key}", limit_s=FILE_LIMIT_S)

    async def delete_of(self, job: str) -> int:
        """Delete a finished job's objects, but the bodies of results: trainers may still read those.

        They go when the stream has let go of their messages: with the first job that ends after `results.max_age_s`.
        Returns how many objects were deleted.
        """
        store = await self._store()
        what = f"object store {subjects.BLOBS}"
        entries = await answered(store.list(ignore_deletes=True), what, none_for=NotFoundError)  # it says so when empty
        names = [str(entry.name) for entry in entries or () if self._outlived(entry, job)]
        for name in names:
            await answered(store.delete(name), f"object {name}")
        return len(names)

    def _outlived(self, entry: api.ObjectInfo, job: str) -> bool:
        owner, _, rest = str(entry.name).partition("/")
        if not rest.startswith("gym.result."):
            return owner == job
        oldest_s, stored = self._config.results.max_age_s, str(entry.mtime or "")
        if not oldest_s or not stored:
            return False
        age = datetime.now(UTC) - datetime.fromisoformat(stored)
        return age.total_seconds() > oldest_s
