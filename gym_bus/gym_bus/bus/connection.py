"""The connection to the NATS server and everything gym_bus does with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js.kv import KeyValue
from nats.js.object_store import ObjectStore

from gym_bus import subjects
from gym_bus.bus.client import Client
from gym_bus.bus.publish import Publisher, trouble
from gym_bus.bus.pull import CLAIM_BYTES_HEADER, CLAIM_HEADER, FAILURE_HEADER, ID_HEADER, Delivery, Follower
from gym_bus.deadline import within
from gym_bus.errors import BodyLost, BusError, UsageError
from gym_bus.logs import get_logger
from gym_bus.messages import Attempt, Failed, Message, Request, Result, encode
from gym_bus.settings import BusConfig, MiB, StreamConfig

log = get_logger(__name__)

API_LIMIT_S = 10.0
INIT_TRIES = 3
FILE_LIMIT_S = 600.0
DEDUPE_WINDOW_S = 120.0
MAX_MESSAGE_BYTES = 8 * MiB
HEADER_ROOM_BYTES = 4096
"""What the headers of one message may take: servers and streams count them with the body."""
DELIVERIES = "gym.delivery"
"""What workers note of single deliveries: that work on one began, or that it was handed back."""
HAND_BACK_LIMIT_S = 2.0
SECOND_LOOK_S = 0.5
"""An acked message leaves its stream a moment after the ack."""
MESSAGE_GONE = (10037, 10043, 10057)
"""err_codes of a deletion: nothing at this sequence, in two ways; it failed, for one of many reasons."""
FREE_DELIVERIES = 2
"""A worker may be killed for any reason: so many deliveries of a message raise no suspicion, and nothing is noted."""
IDS_MESSAGES = 4096
IDS_BYTES = 8 * MiB
"""Of one request for stored messages: their bodies come along."""
WORKER_AGE_S = 30.0
"""A worker that has not reported for so long is forgotten."""


class Outcome(NamedTuple):
    """What a result says without its body."""

    task_index: int
    rollout_index: int
    message_id: str
    failure: str | None
    """The failure's class, None where the rollout was scored."""


class Bus:
    """A connection to the NATS server and everything gym_bus does with it."""

    def __init__(self, client: Client, config: BusConfig) -> None:
        self.client, self.config = client, config
        self.js: JetStreamContext = client.jetstream(timeout=API_LIMIT_S)
        self.on_reconnect: list[Callable[[], None]] = []
        self._publisher = Publisher(client, config.publish_limit_s)
        self._stores: dict[str, Any] = {}

    @classmethod
    async def connect(cls, config: BusConfig, *, name: str = "gym-bus", url: str | None = None) -> Bus:
        """Connect, reconnecting for ever afterwards.

        Raises:
            BusError: no server answers at the address within `connect_limit_s`, or it has no JetStream.
        """
        address = url or config.url
        if not address:
            raise UsageError("no NATS server given: set bus.url, or pass --nats URL")
        holder: list[Bus] = []

        async def reconnected() -> None:
            for callback in list(holder[0].on_reconnect):
                callback()

        last_error: list[Exception] = []

        async def error(e: Exception) -> None:
            last_error[:] = [e]
            log.info("bus_error", error=repr(e))

        options: dict[str, Any] = {"user_credentials": config.credentials} if config.credentials else {}
        client = Client()
        try:
            async with asyncio.timeout(config.connect_limit_s):
                await client.connect(
                    [server.strip() for server in address.split(",")],
                    name=name,
                    connect_timeout=config.connect_limit_s / 2,  # of one try: the first may meet a dead connection
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=32 * MiB,
                    error_cb=error,
                    reconnected_cb=reconnected,
                    **options,
                )
        except (TimeoutError, OSError, nats.errors.Error, ValueError) as e:
            cause = last_error[0] if last_error else e
            why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            raise BusError(
                f"cannot reach a NATS server at {redact(address)} within {config.connect_limit_s:g} s: {why}; "
                "is it running, and is the address right?"
            ) from None
        bus = cls(client, config)
        holder.append(bus)
        await bus._publisher.start()
        return bus

    async def close(self) -> None:
        """Flush and disconnect."""
        await self._publisher.close()
        with contextlib.suppress(Exception):
            await within(2.0, self.client.flush())
        with contextlib.suppress(Exception):
            await within(2.0, self.client.close())

    async def __aenter__(self) -> Bus:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- streams ------------------------------------------------------------------------------------------------------

    async def init(self) -> list[str]:
        """Create or update streams, buckets and the object store; the same settings twice change nothing.

        Returns the names, for the user to see.

        Raises:
            BusError: the server has no JetStream or not enough room, or did not answer in any of a few tries.
        """
        streams = self._streams()
        for tries_left in reversed(range(INIT_TRIES)):
            try:
                await self._set_up(streams)
                break
            except (TimeoutError, nats.js.errors.Error, nats.errors.Error) as e:
                # A server that was restarted in between has swallowed the question.
                if not (isinstance(e, TimeoutError) and tries_left):
                    told = trouble("JetStream did not set up the streams", e)
                    raise BusError(f"{told}; {_remedy(e)}") from None
        return [*(str(s.name) for s in streams), subjects.JOBS, subjects.WORKERS, subjects.LIMITS, subjects.BLOBS]

    async def _set_up(self, streams: list[api.StreamConfig]) -> None:
        await self.js.account_info()
        for stream in streams:
            await self._ensure(stream)
        for bucket in (subjects.JOBS, subjects.WORKERS, subjects.LIMITS):
            await self._open_bucket(bucket)
        await self._open_blobs()

    def _streams(self) -> list[api.StreamConfig]:
        c = self.config
        work, limits = api.RetentionPolicy.WORK_QUEUE, api.RetentionPolicy.LIMITS
        advisories = [
            f"$JS.EVENT.ADVISORY.CONSUMER.{event}.{stream}.*"
            for event in ("MAX_DELIVERIES", "MSG_TERMINATED")
            for stream in (subjects.REQUESTS, subjects.ATTEMPTS)
        ]
        return [
            self._stream(subjects.REQUESTS, ["gym.request.>"], c.requests, retention=work),
            self._stream(subjects.ATTEMPTS, ["gym.attempt.>"], c.attempts, retention=work),
            self._stream(
                subjects.RESULTS,
                ["gym.result.>"],
                c.results,
                retention=limits,
                max_msgs_per_subject=1,
                discard_new_per_subject=True,
            ),
            self._stream(
                subjects.ADVISORIES,
                [*advisories, f"{DELIVERIES}.>"],
                c.advisories,
                retention=limits,
                discard=api.DiscardPolicy.OLD,
            ),
        ]

    def _stream(self, name: str, names: list[str], limits: StreamConfig, **more: Any) -> api.StreamConfig:
        settings: dict[str, Any] = {
            "discard": api.DiscardPolicy.NEW,
            "max_msgs": limits.max_msgs,
            "max_bytes": limits.max_bytes,
            "max_age": limits.max_age_s,
            "max_msg_size": MAX_MESSAGE_BYTES,
            "storage": api.StorageType(self.config.storage),
            "num_replicas": self.config.replicas,
            "duplicate_window": DEDUPE_WINDOW_S,
            "allow_direct": True,
        }
        return api.StreamConfig(name=name, subjects=names, **(settings | more))

    async def _ensure(self, config: api.StreamConfig) -> None:
        try:
            await self.js.add_stream(config)
        except nats.js.errors.APIError as e:
            if e.err_code != 10058:  # exists with other settings
                raise
            await self.js.update_stream(config)

    async def bucket(self, name: str) -> KeyValue:
        """A key-value bucket, created on first use. Raises BusError where the server does not answer."""
        store: KeyValue = await self._api(self._open_bucket(name), f"bucket {name}")
        return store

    async def _open_bucket(self, name: str) -> KeyValue:
        if name not in self._stores:
            try:
                self._stores[name] = await self.js.key_value(name)
            except nats.js.errors.NotFoundError:
                age_s = WORKER_AGE_S if name == subjects.WORKERS else None
                self._stores[name] = await self.js.create_key_value(
                    api.KeyValueConfig(bucket=name, history=1, replicas=self.config.replicas, ttl=age_s)
                )
        store: KeyValue = self._stores[name]
        return store

    async def _blobs(self) -> ObjectStore:
        store: ObjectStore = await self._api(self._open_blobs(), f"object store {subjects.BLOBS}")
        return store

    async def _open_blobs(self) -> ObjectStore:
        if subjects.BLOBS not in self._stores:
            try:
                self._stores[subjects.BLOBS] = await self.js.object_store(subjects.BLOBS)
            except nats.js.errors.NotFoundError:
                self._stores[subjects.BLOBS] = await self.js.create_object_store(
                    subjects.BLOBS, config=api.ObjectStoreConfig(replicas=self.config.replicas)
                )
        store: ObjectStore = self._stores[subjects.BLOBS]
        return store

    async def consumer(self, stream: str, name: str, subject: str, *, max_ack_pending: int, max_deliver: int) -> None:
        """A durable pull consumer with explicit acks, created or left as it is."""
        config = api.ConsumerConfig(
            durable_name=name,
            filter_subject=subject,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=self.config.ack_wait_s,
            max_ack_pending=max_ack_pending,
            max_deliver=max_deliver,
            max_waiting=4096,
        )
        await self._api(self.js.add_consumer(stream, config), f"consumer {name}")

    async def ephemeral_reader(
        self, stream: str, subject: str, start_sequence: int, *, headers_only: bool = False
    ) -> str:
        """A consumer without acks that vanishes when nobody reads; returns its name."""
        config = api.ConsumerConfig(
            filter_subject=subject,
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=max(1, start_sequence),
            ack_policy=api.AckPolicy.NONE,
            mem_storage=True,
            inactive_threshold=60.0,
            headers_only=headers_only,
            num_replicas=1,
        )
        info = await self._api(self.js.add_consumer(stream, config), f"a reader of {subject}")
        return str(info.name)

    async def _api(self, call: Any, what: str) -> Any:
        try:
            return await within(API_LIMIT_S, call)
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(what, e) from None

    async def consumer_info(self, stream: str, name: str) -> Any:
        """What the server says of a consumer."""
        return await self._api(self.js.consumer_info(stream, name), f"consumer {name}")

    async def forget_consumers(self) -> None:
        """Delete the consumers of the work queues: every unacked message is delivered anew, at once."""
        for stream in (subjects.REQUESTS, subjects.ATTEMPTS):
            try:
                consumers = await within(API_LIMIT_S, self.js.consumers_info(stream))
            except nats.js.errors.NotFoundError:
                continue
            except (TimeoutError, nats.errors.Error) as e:
                raise trouble(f"consumers of {stream}", e) from None
            for consumer in consumers:
                await self._api(self.js.delete_consumer(stream, str(consumer.name)), f"consumer {consumer.name}")

    async def stuck_sequences(self, stream: str, subject: str) -> list[int]:
        """Messages of `subject` (wildcards allowed) that their consumer will never deliver (again).

        A message whose deliveries are used up stays in its work queue like that. Subjects that no consumer serves yet
        are not stuck: they wait for a worker. While a consumer waits for acks only what lies below all of them counts,
        so that a stuck message of a busy queue may be found later. Where there are any, the call takes half a second
        more for a second look.

        Raises:
            BusError: the broker did not answer.
        """
        first = await self._passed_by(stream, subject)
        if not first:
            return []
        await asyncio.sleep(SECOND_LOOK_S)
        return sorted(first.keys() & (await self._passed_by(stream, subject)).keys())

    async def _passed_by(self, stream: str, subject: str) -> dict[int, str]:
        """Subjects by sequence of what lies where its consumer has delivered all and waits for no ack."""
        # The consumers first: what they had settled by now cannot be a message that comes later.
        settled = await self._settled(stream)
        info = await self._api(self.js.stream_info(stream, subjects_filter=subject), f"stream {stream}")
        found: dict[int, str] = {}
        for name in info.state.subjects or {}:
            settled_up_to = settled.get(name.rpartition(".")[0], 0)
            async for sequence, _, _ in self.messages(stream, name):
                if sequence > settled_up_to:
                    break
                found[sequence] = name
        return found

    async def _settled(self, stream: str) -> dict[str, int]:
        """By subject without its last token: the stream sequence up to which the consumer will do nothing more."""
        consumers = await self._api(self.js.consumers_info(stream), f"consumers of {stream}")
        return {
            str(c.config.filter_subject).rpartition(".")[0]: int(
                (c.ack_floor if c.num_ack_pending else c.delivered).stream_seq or 0
            )
            for c in consumers
            if c.ack_floor and c.delivered
        }

    # -- publishing ---------------------------------------------------------------------------------------------------

    async def publish(self, message: Message, message_id: str, *, lane: str = "batch") -> bool:
        """Publish and wait until the broker has stored it. Returns False where it had it before.

        Args:
            message: its subject follows from what it is.
            message_id: starts with the rollout's identity; a repeat under the same id is dropped by the broker.
            lane: the priority class, for requests.

        Raises:
            PayloadTooLarge, BusError not retryable: publishing it again cannot help.
            BusError: the broker did not take it within `publish_limit_s`; a full stream is waited for so long.
            msgspec.EncodeError, TypeError, ValueError: the message holds what cannot be encoded.
        """
        if isinstance(message, Request):
            subject = subjects.request(lane, message.agent, message.rollout.job)
        elif isinstance(message, Attempt):
            subject = subjects.attempt(message.verifier, message.rollout.job)
        else:
            r = message.rollout
            subject = subjects.result(r.job, r.task_index, r.rollout_index)
        payload = encode(message)
        headers = {ID_HEADER: message_id}
        if isinstance(message, Failed):
            headers[FAILURE_HEADER] = message.failure.kind.value
        if len(payload) > self.inline_limit_bytes:
            headers[CLAIM_HEADER] = await self._store_blob(subject, message_id, payload)
            headers[CLAIM_BYTES_HEADER] = str(len(payload))
            payload = b""
        return await self._publisher.publish(subject, payload, headers)

    @property
    def inline_limit_bytes(self) -> int:
        """The largest body that travels in its message: what is configured, or less where server or stream take less.

        A server closes the connection of whoever sends more than its `max_payload`, 1 MB as it comes.
        """
        taken = min(self.client.max_payload, MAX_MESSAGE_BYTES) - HEADER_ROOM_BYTES
        return max(0, min(self.config.inline_limit_bytes, taken))

    async def _store_blob(self, subject: str, message_id: str, payload: bytes) -> str:
        job = message_id.split(".", 1)[0]
        key = f"{job}/{subject}/{message_id}"
        await self._api((await self._blobs()).put(key, payload), f"object {key}")
        return key

    async def fetch_blob(self, key: str) -> bytes:
        """The body behind a claim.

        Raises:
            BodyLost: there is none.
            BusError: the object store did not answer.
        """
        blobs = await self._blobs()
        try:
            found = await within(API_LIMIT_S, blobs.get(key))
        except nats.js.errors.NotFoundError:
            raise BodyLost(f"object {key}: not found") from None
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(f"object {key}", e) from None
        return bytes(found.data or b"")

    async def store_file(self, key: str, path: Path) -> None:
        """Put a file into the object store."""
        store = await self._blobs()
        with path.open("rb") as file:
            try:
                await within(FILE_LIMIT_S, store.put(key, file))
            except (TimeoutError, nats.errors.Error) as e:
                raise trouble(f"object {key}", e) from None

    async def load_file(self, key: str, path: Path) -> None:
        """Get a file from the object store. Raises BusError where it is not there."""
        store = await self._blobs()
        with path.open("wb") as file:
            try:
                await within(FILE_LIMIT_S, store.get(key, file))
            except (TimeoutError, nats.errors.Error) as e:
                raise trouble(f"object {key}", e) from None

    async def delete_blobs(self, job: str) -> int:
        """Delete a finished job's objects, but the bodies of results: trainers may still read those.

        They go when the stream has let go of their messages: with the first job that ends after `results.max_age_s`.
        Returns how many objects were deleted.
        """
        store = await self._blobs()
        try:
            entries = await within(API_LIMIT_S, store.list(ignore_deletes=True))
        except nats.js.errors.NotFoundError:  # the client's word for an empty store
            return 0
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(f"object store {subjects.BLOBS}", e) from None
        names = [str(entry.name) for entry in entries if self._outlived(entry, job)]
        for name in names:
            await self._api(store.delete(name), f"object {name}")
        return len(names)

    def _outlived(self, entry: api.ObjectInfo, job: str) -> bool:
        owner, _, rest = str(entry.name).partition("/")
        if not rest.startswith("gym.result."):
            return owner == job
        oldest_s, stored = self.config.results.max_age_s, str(entry.mtime or "")
        if not oldest_s or not stored:
            return False
        age = datetime.now(UTC) - datetime.fromisoformat(stored)
        return age.total_seconds() > oldest_s

    async def respond(self, reply: str, body: bytes) -> None:
        """Answer a delivery. Where the connection is away the answer is dropped and the lease runs out."""
        with contextlib.suppress(nats.errors.Error):
            await self.client.publish(reply, body)

    async def hand_back(self, delivery: Delivery) -> None:
        """Return a leased message that this worker did not get done, through no fault of the message.

        The broker counts this delivery like any other, so it is noted beside (see `tries`): first the note, then
        the nak. A crash in between costs the message one further try. A note that cannot be stored costs it one less.
        """
        with contextlib.suppress(BusError, TimeoutError):
            await within(HAND_BACK_LIMIT_S, self._note(delivery, "returned"))
        await delivery.nak()

    async def note_try(self, delivery: Delivery) -> None:
        """Note that work on this delivery begins: should the worker die now, it counts. Raises BusError."""
        await self._note(delivery, "begun")

    async def _note(self, delivery: Delivery, what: str) -> None:
        note = f"{_notes_on(delivery)}.{delivery.deliveries}.{what}"
        await self._publisher.publish(note, b"", {ID_HEADER: note})

    async def tries(self, delivery: Delivery) -> int:
        """How many earlier deliveries of the message were worked on and came to no end.

        Of the first ones (`FREE_DELIVERIES`) every one counts that was not handed back: whether work on them began is
        not noted. A worker that died with a message still in its buffer makes no further try of it. A week's notes are
        known. Raises BusError.
        """
        notes = f"{_notes_on(delivery)}.>"
        info = await self._api(
            self.js.stream_info(subjects.ADVISORIES, subjects_filter=notes), f"stream {subjects.ADVISORIES}"
        )
        noted = {tuple(note.split(".")[-2:]) for note in info.state.subjects or {}}
        return sum(
            (number <= FREE_DELIVERIES or (str(number), "begun") in noted) and (str(number), "returned") not in noted
            for number in range(1, delivery.deliveries)
        )

    async def ack_confirmed(self, reply: str) -> None:
        """Ack a delivery and wait until the broker says that it has noted it. Raises BusError where it does not."""
        await self._api(self.client.request(reply, b"+ACK", timeout=API_LIMIT_S), "confirmed ack")

    # -- what lies on the streams -------------------------------------------------------------------------------------

    async def waiting(self, stream: str, subject: str) -> int:
        """Messages of `subject` (wildcards allowed) that a work queue holds, those in flight included."""
        info = await self._api(self.js.stream_info(stream, subjects_filter=subject), f"stream {stream}")
        return sum((info.state.subjects or {}).values())

    async def size(self, stream: str) -> tuple[int, int]:
        """(messages, bytes) of a stream."""
        info = await self._api(self.js.stream_info(stream), f"stream {stream}")
        return int(info.state.messages), int(info.state.bytes)

    async def count(self, stream: str, subject: str) -> int:
        """Messages of `subject` in the stream, however many subjects there are."""
        name = await self.ephemeral_reader(stream, subject, 1)
        info = await self.consumer_info(stream, name)
        with contextlib.suppress(Exception):
            await self.js.delete_consumer(stream, name)
        return int(info.num_pending or 0)

    async def messages(self, stream: str, subject: str) -> AsyncIterator[tuple[int, str, str]]:
        """(sequence, subject, message id) of every stored message of `subject`, in order; bodies are not decoded."""
        sequence = 1
        while True:
            try:
                found = await within(API_LIMIT_S, self.js.get_msg(stream, seq=sequence, subject=subject, next=True))
            except nats.js.errors.NotFoundError:
                return
            except (TimeoutError, nats.errors.Error) as e:
                raise trouble(f"stream {stream}", e) from None
            yield int(found.seq or 0), str(found.subject), (found.headers or {}).get(ID_HEADER, "")
            sequence = int(found.seq or 0) + 1

    async def ids(self, stream: str, subject: str) -> list[str]:
        """The message id of every stored message of `subject` (wildcards allowed), in order.

        Far fewer round trips than `messages`, but a replica may answer, which can be a moment behind its leader.

        Raises:
            BusError: the broker did not answer, or the connection broke off in between.
        """
        inbox = self.client.new_inbox()
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        subscription = await self.client.subscribe(inbox, cb=arrived.put, pending_bytes_limit=4 * IDS_BYTES)
        found: list[str] = []
        sequence: int | None = 1
        try:
            while sequence is not None:
                body = {"seq": sequence, "next_by_subj": subject, "batch": IDS_MESSAGES, "max_bytes": IDS_BYTES}
                await self.client.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body), inbox)
                sequence = await self._ids_of_batch(stream, arrived, found)
        except nats.errors.Error as e:
            raise trouble(f"stream {stream}", e) from None
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()
        return found

    async def _ids_of_batch(self, stream: str, arrived: asyncio.Queue[Msg], found: list[str]) -> int | None:
        """Take one batch into `found`; returns where the next one begins, None where there is none."""
        while True:
            try:
                headers = (await within(API_LIMIT_S, arrived.get())).headers or {}
            except TimeoutError:
                raise BusError(f"stream {stream}: no answer") from None
            status = headers.get("Status", "")
            if status == "204":
                return int(headers["Nats-Last-Sequence"]) + 1 if int(headers["Nats-Num-Pending"]) else None
            if status == "404":
                return None
            if status:
                raise BusError(f"stream {stream}: {headers.get('Description') or status}")
            found.append(headers.get(ID_HEADER, ""))

    async def outcomes(self, stream: str, subject: str) -> AsyncIterator[Outcome]:
        """What every stored result of `subject` is; bodies are not transferred. Raises BusError."""
        follower = Follower(self, stream, subject, 1, headers_only=True)
        try:
            while await follower.pending():
                for delivery in await follower.batch(1.0):
                    task, rollout = delivery.subject.split(".")[3:5]
                    yield Outcome(int(task), int(rollout), delivery.message_id, delivery.headers.get(FAILURE_HEADER))
        finally:
            await follower.close()

    async def outcome(self, stream: str, subject: str) -> tuple[int, Outcome] | None:
        """(sequence, what it is) of the one result of a rollout; None where it has none. Raises BusError."""
        try:
            found = await within(API_LIMIT_S, self.js.get_last_msg(stream, subject))
        except nats.js.errors.NotFoundError:
            return None
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(f"stream {stream}", e) from None
        headers = found.headers or {}
        task, rollout = subject.split(".")[3:5]
        outcome = Outcome(int(task), int(rollout), headers.get(ID_HEADER, ""), headers.get(FAILURE_HEADER))
        return int(found.seq or 0), outcome

    async def message_at(self, stream: str, sequence: int) -> tuple[str, bytes] | None:
        """(message id, body) at a sequence; None where there is nothing (any more)."""
        try:
            found = await within(API_LIMIT_S, self.js.get_msg(stream, seq=sequence))
        except nats.js.errors.NotFoundError:
            return None
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(f"stream {stream}", e) from None
        return (found.headers or {}).get(ID_HEADER, ""), found.data or b""

    async def delete(self, stream: str, sequence: int) -> None:
        """Remove one message; nothing happens where it is gone already. Raises BusError."""
        # Without erasing: overwriting the message on disk makes the server 200 times slower, and hides nothing from us.
        order = msgspec.json.encode({"seq": sequence, "no_erase": True})
        try:
            call = self.js._api_request(f"$JS.API.STREAM.MSG.DELETE.{stream}", order, timeout=API_LIMIT_S)
            await within(API_LIMIT_S, call)
        except (TimeoutError, nats.errors.Error) as e:
            may_be_gone = getattr(e, "err_code", None) in MESSAGE_GONE
            if not may_be_gone or await self.message_at(stream, sequence) is not None:
                raise trouble(f"stream {stream}", e) from None

    async def purge(self, stream: str, subject: str) -> None:
        """Remove every message of `subject`."""
        await self._api(self.js.purge_stream(stream, subject=subject), f"stream {stream}")

    # -- small state --------------------------------------------------------------------------------------------------

    async def put(self, bucket: str, key: str, value: Any) -> int:
        """Store a value as JSON; returns its revision."""
        store = await self.bucket(bucket)
        return int(await self._api(store.put(key, msgspec.json.encode(value)), f"{bucket}/{key}"))

    async def get(self, bucket: str, key: str, type_: Any = Any) -> Any:
        """The value of a key, None where there is none."""
        found = await self.get_entry(bucket, key, type_)
        return found[0] if found else None

    async def get_entry(self, bucket: str, key: str, type_: Any = Any) -> tuple[Any, int] | None:
        """(value, revision) of a key, None where there is none."""
        store = await self.bucket(bucket)
        try:
            entry = await within(API_LIMIT_S, store.get(key))
        except (nats.js.errors.KeyNotFoundError, nats.js.errors.KeyDeletedError):
            return None
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(f"{bucket}/{key}", e) from None
        return msgspec.json.decode(entry.value or b"null", type=type_), int(entry.revision or 0)

    async def swap(self, bucket: str, key: str, value: Any, revision: int) -> int | None:
        """Store a value only where the key still has `revision` (0: does not exist); None where it does not."""
        store = await self.bucket(bucket)
        data = msgspec.json.encode(value)
        try:
            if revision == 0:
                return int(await within(API_LIMIT_S, store.create(key, data)))
            return int(await within(API_LIMIT_S, store.update(key, data, last=revision)))
        except (nats.js.errors.KeyWrongLastSequenceError, nats.js.errors.BadRequestError):
            return None
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(f"{bucket}/{key}", e) from None

    async def remove(self, bucket: str, key: str) -> None:
        """Delete a key, its history included."""
        store = await self.bucket(bucket)
        await self._api(store.purge(key), f"{bucket}/{key}")

    async def keys(self, bucket: str) -> list[str]:
        """The keys of a bucket."""
        store = await self.bucket(bucket)
        try:
            return list(await within(API_LIMIT_S, store.keys()))
        except nats.js.errors.NoKeysError:
            return []
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(bucket, e) from None

    async def announce(self, subject: str, body: bytes = b"") -> None:
        """Tell whoever listens now; not stored. Raises BusError where the server does not confirm within 2 s."""
        try:
            await self.client.publish(subject, body)
            await self.client.flush(timeout=2)
        except (TimeoutError, nats.errors.Error) as e:
            raise trouble(subject, e) from None

    async def listen(self, subject: str, callback: Callable[[str, bytes], None]) -> None:
        """Call back for every announcement on `subject`."""

        async def on_message(message: Msg) -> None:
            callback(message.subject, message.data)

        await self.client.subscribe(subject, cb=on_message)


def _notes_on(delivery: Delivery) -> str:
    # The time tells the message from one at the same sequence of a stream that was made anew or rolled back.
    return f"{DELIVERIES}.{delivery.stream}.{delivery.sequence}.{delivery.stored_at_ns}"


def _remedy(error: Exception) -> str:
    if getattr(error, "err_code", 0) in (10023, 10047):
        return (
            "the streams reserve their max_bytes: lower bus.{requests,attempts,results}.max_bytes, or give it more disk"
        )
    return "gym_bus needs nats-server 2.11 or newer with JetStream enabled (`nats-server -js`)"


def redact(url: str) -> str:
    """The address, or several with commas, without user and password."""
    parts = (server.rpartition("://") for server in url.split(","))
    return ",".join(f"{scheme}{separator}{rest.rpartition('@')[2]}" for scheme, separator, rest in parts)


def as_result(message: Message) -> Result:
    """`message` as the result it must be."""
    if isinstance(message, Request | Attempt):
        raise BusError(f"expected a result on the result stream, found {type(message).__name__}")
    return message
