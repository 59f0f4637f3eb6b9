"""The bus against a real nats-server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from conftest import NatsServer, until, wait_for_port

from gym_bus import subjects
from gym_bus.bus import Bus, Delivery, Follower, Pull, asking, pull
from gym_bus.config import load_config
from gym_bus.errors import BodyLost, BusError, FailureKind, UsageError
from gym_bus.messages import Failed, Failure, Policy, Request, RolloutId, Scored
from gym_bus.server import find_binary
from gym_bus.settings import BusConfig, MiB, StreamConfig

BUCKETS = (subjects.JOBS, subjects.WORKERS, subjects.LIMITS, subjects.TRAINERS)


def a_request(job: str = "job", task: int = 0, rollout: int = 0, row: bytes = b'{"q":1}') -> Request:
    return Request(
        rollout=RolloutId(job, task, rollout), agent="simple", model="policy", verifier="string_match", row=row
    )


def a_result(task: int, reward: float = 1.0, job: str = "job", row: bytes = b"{}") -> Scored:
    return Scored(
        rollout=RolloutId(job, task, 0),
        agent="simple",
        verifier="math",
        reward=reward,
        row=row,
        response=b"{}",
        policy=Policy(model="m"),
    )


async def test_init_twice_changes_nothing_and_updates_limits(bus: Bus) -> None:
    await bus.init()
    changed = BusConfig(url=bus.config.url, requests=StreamConfig(max_msgs=1000))
    async with await Bus.connect(changed) as other:
        await other.init()
    assert (await bus.js.stream_info(subjects.REQUESTS)).config.max_msgs == 1000
    await bus.init()
    assert (await bus.js.stream_info(subjects.REQUESTS)).config.max_msgs == bus.config.requests.max_msgs


async def test_everything_on_the_server_is_kept_where_the_settings_say(bus: Bus) -> None:
    for stream in await bus.js.streams_info():
        await bus.js.delete_stream(str(stream.config.name))
    with pytest.raises(BusError, match=r"reserve their max_bytes: lower .* with bus\.storage=memory more memory"):
        async with await Bus.connect(BusConfig(url=bus.config.url, storage="memory")) as too_large:
            await too_large.init()
    shipped = load_config([Path(__file__).parents[2] / "configs" / "memory.yaml"], []).bus
    async with await Bus.connect(msgspec.structs.replace(shipped, url=bus.config.url)) as forgetful:
        names = await forgetful.init()
        assert await forgetful.init() == names  # there is no room for all of it a second time
        kept = {str(s.config.name): str(s.config.storage) for s in await forgetful.js.streams_info()}
        for name in kept:
            await forgetful.js.delete_stream(name)  # what a stream is kept in cannot be changed: others want files

    await bus.js.add_stream(name=subjects.REQUESTS, subjects=["gym.request.>"], storage="memory", max_bytes=1000)
    with pytest.raises(BusError, match="a stream keeps its storage"):
        await bus.init()
    await bus.js.delete_stream(subjects.REQUESTS)
    assert set(kept) == {f"KV_{n}" if n in BUCKETS else f"OBJ_{n}" if n == subjects.BLOBS else n for n in names}
    assert set(kept.values()) == {"memory"}


async def test_a_repeat_under_the_same_id_is_stored_once(bus: Bus) -> None:
    assert await bus.publish(a_request(), "job.0.0#1") is True
    assert await bus.publish(a_request(), "job.0.0#1") is False
    assert await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 1


async def test_a_second_result_of_a_rollout_is_refused_whatever_its_id(bus: Bus) -> None:
    assert await bus.publish(a_result(0, 1.0), "job.0.0#1") is True
    assert await bus.publish(a_result(0, 0.0), "job.0.0#2") is False
    assert await bus.streams.count(subjects.RESULTS, subjects.results_of("job")) == 1


async def test_a_full_stream_makes_the_publisher_wait(nats_server: NatsServer, bus: Bus) -> None:
    small = BusConfig(url=nats_server.url, requests=StreamConfig(max_msgs=1))
    async with await Bus.connect(small) as tight:
        await tight.init()
        try:
            await tight.publish(a_request(task=0), "job.0.0#1")
            second = asyncio.create_task(tight.publish(a_request(task=1), "job.1.0#1"))
            done, _ = await asyncio.wait({second}, timeout=0.3)
            assert not done
            await tight.streams.purge(subjects.REQUESTS, subjects.requests_of("job"))
            assert await asyncio.wait_for(second, 60) is True
        finally:
            await bus.init()


async def test_a_body_over_the_inline_limit_travels_as_a_claim(nats_server: NatsServer, bus: Bus) -> None:
    small = BusConfig(url=nats_server.url, inline_limit_bytes=1000)
    row = b'{"text":"' + b"x" * 200_000 + b'"}'
    async with await Bus.connect(small) as claiming:
        await claiming.publish(a_request(row=row), "job.0.0#1")
        got = await receive(claiming, 1)
        assert len(got[0].data) == 0
        message = await got[0].message()
        assert isinstance(message, Request)
        assert message.row == row
        assert await claiming.blobs.delete_of("job") == 1
        assert await claiming.blobs.delete_of("job") == 0
        with pytest.raises(BodyLost, match="not found"):
            await got[0].message()


async def test_the_bodies_of_results_outlive_their_job_for_as_long_as_their_messages(bus: Bus) -> None:
    row = b'{"text":"' + b"x" * 5000 + b'"}'
    async with await Bus.connect(BusConfig(url=bus.config.url, inline_limit_bytes=1000)) as keeping:
        await keeping.publish(a_result(0, row=row), "job.0.0#1")
        assert await keeping.blobs.delete_of("job") == 0
    short = BusConfig(url=bus.config.url, results=StreamConfig(max_age_s=0.001))
    async with await Bus.connect(short) as forgetting:
        assert await forgetting.blobs.delete_of("another") == 1


async def receive(bus: Bus, count: int, wanted: int = 1000, max_deliver: int = 5) -> list[Delivery]:
    got: list[Delivery] = []
    await bus.consumers.ensure(
        subjects.REQUESTS,
        "test",
        subjects.request("batch", "simple", "*"),
        max_ack_pending=10_000,
        max_deliver=max_deliver,
    )
    pull = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: wanted - len(got))
    await pull.start()
    await until(lambda: len(got) >= count)
    await pull.stop()
    return got


async def test_a_pull_asks_for_no_more_than_there_is_room_for(bus: Bus) -> None:
    await asyncio.gather(*(bus.publish(a_request(task=i), f"job.{i}.0#1") for i in range(50)))
    got = await receive(bus, 10, wanted=10)
    info = await bus.consumers.info(subjects.REQUESTS, "test")
    assert len(got) == 10
    assert info.num_pending == 40


async def test_what_is_not_acked_comes_again_and_what_is_acked_does_not(bus: Bus) -> None:
    for i in range(2):
        await bus.publish(a_request(task=i), f"job.{i}.0#1")
    first, second = await receive(bus, 2)
    assert first.deliveries == 1
    await first.ack()
    await second.nak()
    (again,) = await receive(bus, 1)
    assert again.message_id == second.message_id
    assert again.deliveries == 2
    assert again.rollout == RolloutId("job", 1, 0)


async def test_publishing_and_pulling_survive_a_killed_server(own_server: NatsServer) -> None:
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        await bus.init()
        got: list[Delivery] = []
        await bus.consumers.ensure(subjects.REQUESTS, "t", "gym.request.>", max_ack_pending=10_000, max_deliver=5)
        pull = Pull(bus, subjects.REQUESTS, "t", got.append, lambda: 100_000 - len(got))
        await pull.start()
        publishing = asyncio.gather(*(bus.publish(a_request(task=i), f"job.{i}.0#1") for i in range(3000)))
        await until(lambda: len(got) > 300)
        own_server.kill()
        own_server.start()
        await asyncio.wait_for(publishing, 60)
        await until(lambda: len({d.message_id for d in got}) == 3000)
        await pull.stop()


async def test_a_follower_reads_all_results_in_order_across_a_killed_server(own_server: NatsServer) -> None:
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        await bus.init()
        follower = Follower(bus, subjects.RESULTS, subjects.results_of("job"), 1)
        seen: list[int] = []

        async def read(count: int) -> None:
            deadline = time.monotonic() + 60
            while len(seen) < count and time.monotonic() < deadline:
                try:
                    seen.extend(d.sequence for d in await follower.batch(0.2))
                except BusError:
                    continue

        for i in range(20):
            await bus.publish(a_result(i), f"job.{i}.0#1")
        await read(20)
        own_server.kill()
        own_server.start()
        for i in range(20, 40):
            await bus.publish(a_result(i), f"job.{i}.0#1")
        await read(40)
        assert seen == list(range(1, 41))
        assert await follower.pending() == 0
        await follower.close()


async def test_values_are_swapped_only_at_the_known_revision(bus: Bus) -> None:
    revision = await bus.state.swap(subjects.JOBS, "k", {"a": 1}, 0)
    assert revision
    assert await bus.state.swap(subjects.JOBS, "k", {"a": 2}, 0) is None
    newer = await bus.state.swap(subjects.JOBS, "k", {"a": 3}, revision)
    assert newer
    assert await bus.state.swap(subjects.JOBS, "k", {"a": 4}, revision) is None
    assert await bus.state.get(subjects.JOBS, "k") == {"a": 3}
    assert "k" in await bus.state.keys(subjects.JOBS)
    await bus.state.remove(subjects.JOBS, "k")
    assert await bus.state.get(subjects.JOBS, "k") is None
    assert await bus.state.keys(subjects.JOBS) == []
    assert await bus.state.swap(subjects.JOBS, "k", {"a": 5}, 0)


async def test_all_keys_of_a_bucket_are_found_however_often_it_is_asked(bus: Bus) -> None:
    names = {f"k.{number}" for number in range(20)}
    await asyncio.gather(*(bus.state.put(subjects.TRAINERS, name, 1) for name in names))

    found = await asyncio.gather(*(bus.state.keys(subjects.TRAINERS) for _ in range(30)))

    assert [set(keys) for keys in found] == [names] * 30
    assert await bus.state.keys(subjects.TRAINERS, "*") == []


async def test_more_keys_than_a_server_lists_are_not_taken_for_all(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b.c", "d"):
        await bus.state.put(subjects.JOBS, name, 1)
    assert set(await bus.state.keys(subjects.JOBS, "*")) == {"a", "d"}
    monkeypatch.setattr("gym_bus.bus.state.LISTED_KEYS", 2)

    with pytest.raises(BusError, match="more keys than a server lists"):
        await bus.state.keys(subjects.JOBS, "*")


async def test_stored_messages_are_listed_with_their_ids(bus: Bus) -> None:
    for i in range(3):
        await bus.publish(a_request(task=i), f"job.{i}.0#1")
    await bus.publish(a_request(job="other"), "other.0.0#1")
    found = [m async for m in bus.streams.messages(subjects.REQUESTS, subjects.requests_of("job"))]
    assert [message.message_id for message in found] == ["job.0.0#1", "job.1.0#1", "job.2.0#1"]
    await bus.streams.delete(subjects.REQUESTS, found[0].sequence)
    assert await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 2
    assert await bus.streams.at(subjects.REQUESTS, found[0].sequence) is None


async def test_deleting_what_is_gone_already_is_no_error(bus: Bus) -> None:
    for i in range(3):
        await bus.publish(a_request(task=i), f"job.{i}.0#1")
    for sequence in (2, 2, 1, 1, 3, 3, 4711):  # between others, the first, the last, none
        await bus.streams.delete(subjects.REQUESTS, sequence)
    assert await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 0


async def test_only_what_has_used_up_its_deliveries_is_stuck(bus: Bus) -> None:
    await bus.consumers.ensure(
        subjects.REQUESTS, "test", subjects.request("batch", "simple", "*"), max_ack_pending=100, max_deliver=1
    )
    for i in range(3):
        await bus.publish(a_request(task=i), f"job.{i}.0#1")
    dropped, done, leased = await receive(bus, 3, max_deliver=1)
    await dropped.nak()
    await done.ack()
    await until(lambda: used_up(bus))
    assert leased.sequence not in await bus.consumers.stuck(subjects.REQUESTS, subjects.requests_of("job"))
    await bus.publish(a_request(task=3), "job.3.0#1")
    await bus.ack_confirmed(leased.reply)
    await until(lambda: only_stuck(bus, dropped))
    assert await bus.consumers.stuck(subjects.REQUESTS, subjects.requests_of("other")) == []


async def only_stuck(bus: Bus, dropped: Delivery) -> bool:
    """An acked message leaves its stream when the server comes to it."""
    return await bus.consumers.stuck(subjects.REQUESTS, subjects.requests_of("job")) == [dropped.sequence]


async def used_up(bus: Bus) -> bool:
    """Whether the consumer has seen the nak and waits for one ack only."""
    nudge = Pull(bus, subjects.REQUESTS, "test", lambda _: None, lambda: 1)  # looks at the message: it is not delivered
    await nudge.start()
    info = await bus.consumers.info(subjects.REQUESTS, "test")
    await nudge.stop()
    return bool(info.num_ack_pending == 1)


async def test_healthy_traffic_is_never_stuck(bus: Bus) -> None:
    answers: list[asyncio.Task[None]] = []
    await bus.consumers.ensure(
        subjects.REQUESTS, "test", subjects.request("batch", "simple", "*"), max_ack_pending=1000, max_deliver=5
    )
    pull = Pull(bus, subjects.REQUESTS, "test", lambda d: answers.append(asyncio.ensure_future(d.ack())), lambda: 200)
    await pull.start()

    async def publish() -> None:
        for i in range(1500):
            await bus.publish(a_request(task=i), f"job.{i}.0#1")

    publishing = asyncio.create_task(publish())
    while not publishing.done():
        assert await bus.consumers.stuck(subjects.REQUESTS, subjects.requests_of("job")) == []
    await publishing
    await pull.stop()


async def test_a_stopped_pull_leaves_nothing_leased_to_nobody(bus: Bus) -> None:
    await asyncio.gather(*(bus.publish(a_request(task=i), f"job.{i}.0#1") for i in range(2000)))
    await bus.consumers.ensure(
        subjects.REQUESTS, "test", subjects.request("batch", "simple", "*"), max_ack_pending=10_000, max_deliver=-1
    )
    taken = 0
    for moment in range(10):
        got: list[Delivery] = []
        pull = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: 1000, takes_late=True)
        await pull.start()
        for _ in range(3 * moment):
            await asyncio.sleep(0)
        await pull.stop()
        info = await bus.consumers.info(subjects.REQUESTS, "test")
        assert info.num_ack_pending == len(got)
        await asyncio.gather(*(bus.ack_confirmed(delivery.reply) for delivery in got))
        taken += len(got)
    assert taken


async def test_a_pull_of_a_process_that_stalls_while_it_stops_takes_what_was_leased(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "STOP_LOOK_S", 0.05)
    await bus.consumers.ensure(
        subjects.REQUESTS, "test", subjects.request("batch", "simple", "*"), max_ack_pending=10_000, max_deliver=-1
    )
    got: list[Delivery] = []
    stalling = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: 200, takes_late=True)
    await stalling.start()
    loop = asyncio.get_running_loop()
    clock = loop.time
    async with await Bus.connect(BusConfig(url=bus.config.url)) as other:
        await asyncio.gather(*(other.publish(a_request(task=i), f"job.{i}.0#1") for i in range(100)))
        stopping = asyncio.create_task(stalling.stop())
        await asyncio.sleep(0)
        time.sleep(2 * pull.STOP_LOOK_S)  # noqa: ASYNC251 - nothing of this process runs meanwhile
        monkeypatch.setattr(loop, "time", lambda: clock() + 2 * pull.STOP_LOOKS * pull.STOP_LOOK_S)  # and for long
        await asyncio.gather(*(other.publish(a_request(task=i), f"job.{i}.0#1") for i in range(100, 150)))
        await stopping
        left = await receive(other, 150 - len(got))
    assert sorted(d.message_id for d in [*got, *left]) == sorted(f"job.{i}.0#1" for i in range(150))
    assert {d.deliveries for d in left} <= {1}


async def test_what_comes_while_a_pull_stops_is_handed_back(bus: Bus) -> None:
    await asyncio.gather(*(bus.publish(a_request(task=i), f"job.{i}.0#1") for i in range(300)))
    await bus.consumers.ensure(
        subjects.REQUESTS, "test", subjects.request("batch", "simple", "*"), max_ack_pending=10_000, max_deliver=-1
    )
    got: list[Delivery] = []
    pull = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: 300)
    await pull.start()
    await pull.stop()
    assert len({d.sequence for d in await receive(bus, 300 - len(got))} | {d.sequence for d in got}) == 300


async def test_a_reader_is_bounded_in_bytes(bus: Bus) -> None:
    count, row = 90, b'{"text":"' + b"x" * 1_500_000 + b'"}'
    for i in range(count):
        await bus.publish(a_result(i, row=row), f"job.{i}.0#1")
    follower = Follower(bus, subjects.RESULTS, subjects.results_of("job"), 1)
    batches, most = [await follower.batch(60.0)], 0
    while sum(map(len, batches)) < count:
        await until(lambda: has_all_it_wants(follower, count))
        most = max(most, follower._queued_bytes)
        batches.append(await follower.batch(60.0))
    await follower.close()
    assert max(sum(d.size_bytes for d in batch) for batch in batches) <= pull.BATCH_BYTES
    assert 2 * pull.BATCH_BYTES < most <= pull.HELD_BYTES + pull.PULL_BYTES
    assert [d.sequence for batch in batches for d in batch] == list(range(1, count + 1))


def has_all_it_wants(follower: Follower, last: int) -> bool:
    assert follower._pull
    return not follower._pull.outstanding or bool(follower._queue and follower._queue[-1].sequence == last)


async def test_a_claimed_body_counts_where_its_message_is_held(nats_server: NatsServer, bus: Bus) -> None:
    async with await Bus.connect(BusConfig(url=nats_server.url, inline_limit_bytes=1000)) as claiming:
        await claiming.publish(a_request(row=b"x" * 5000), "job.0.0#1")
        (delivery,) = await receive(claiming, 1)
        assert len(delivery.data) == 0
        assert delivery.size_bytes > 5000


@contextlib.asynccontextmanager
async def stock_server(folder: Path, more: str = "") -> AsyncIterator[str]:
    """The address of a nats-server with `more` configured; where nothing is, it takes messages of 1 MB."""
    server = NatsServer(folder)
    (folder / "more.conf").write_text(more)
    process = server.process = subprocess.Popen(  # noqa: ASYNC220
        [find_binary(), "-c", "more.conf", "-js", "-a", "127.0.0.1", "-p", str(server.port), "-sd", "js"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(server.port)
        yield server.url
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    ("more", "length"),
    [("", 1024 * 1024 - 200), ("", 1_500_000), ("max_payload: 64KB\n", 200_000)],
    ids=["just below 1 MB", "more than 1 MB", "more than a part of an object"],
)
async def test_a_server_that_takes_less_gets_claims(tmp_path: Path, more: str, length: int) -> None:
    async with stock_server(tmp_path, more) as url, await Bus.connect(BusConfig(url=url)) as bus:
        await bus.init()
        await bus.publish(a_request(row=b"x" * length), "job.0.0#1")
        (delivery,) = await receive(bus, 1)
        message = await delivery.message()
        assert isinstance(message, Request)
        assert len(message.row) == length


async def test_a_body_as_large_as_the_stream_takes_is_claimed(nats_server: NatsServer, bus: Bus) -> None:
    async with await Bus.connect(BusConfig(url=nats_server.url, inline_limit_bytes=64 * MiB)) as roomy:
        assert await roomy.publish(a_request(row=b"x" * (8 * MiB - 100)), "job.0.0#1")


async def test_a_server_that_is_away_is_a_bus_error(own_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        await bus.init()
        own_server.kill()
        monkeypatch.setattr(asking, "API_LIMIT_S", 0.3)
        for call in (bus.announce("gym.control.x"), bus.state.bucket("another"), bus.state.put("a-third", "k", 1)):
            with pytest.raises(BusError):
                await call


async def test_setting_up_waits_for_a_server_that_stands_still(
    own_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = own_server.process
    assert process
    async with await Bus.connect(BusConfig(url=own_server.url)) as bus:
        patience_s, ask = bus.js._timeout, bus.js.account_info
        unanswered: list[TimeoutError] = []

        async def asked() -> object:
            try:
                return await ask()
            except TimeoutError as e:
                unanswered.append(e)
                process.send_signal(signal.SIGCONT)
                bus.js._timeout = patience_s
                raise

        monkeypatch.setattr(bus.js, "account_info", asked)
        bus.js._timeout = 0.3
        process.send_signal(signal.SIGSTOP)
        await until(lambda: stands_still(process.pid))
        assert subjects.REQUESTS in await bus.init()
        assert unanswered


def stands_still(pid: int) -> bool:
    """Whether every thread has seen that the process is stopped; until then some go on."""
    states = [stat.read_text().rpartition(") ")[2] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(state.startswith("T") for state in states)


async def test_one_server_of_several_is_enough(own_server: NatsServer) -> None:
    async with await Bus.connect(BusConfig(url=f"nats://127.0.0.1:1, {own_server.url}")) as bus:
        await bus.init()


async def test_an_unreachable_server_is_named_without_its_password() -> None:
    with pytest.raises(BusError) as e:
        url = "nats://me:secret@127.0.0.1:1,nats://me:secret@127.0.0.1:2"
        await Bus.connect(BusConfig(url=url, connect_limit_s=1.0))
    assert "nats://127.0.0.1:1,nats://127.0.0.1:2" in str(e.value)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tls://127.0.0.1:{port}", "the server does not offer TLS"),
        ("http://me:secret@127.0.0.1:{port}", "http://127.0.0.1:[0-9]+: not the address of a NATS server"),
    ],
)
async def test_an_address_that_does_not_fit_its_server_is_refused(
    nats_server: NatsServer, address: str, said: str
) -> None:
    with pytest.raises((BusError, UsageError), match=said):
        await Bus.connect(BusConfig(url=address.format(port=nats_server.port), connect_limit_s=60.0))


async def test_a_server_that_wants_a_password_says_so(tmp_path: Path) -> None:
    async with stock_server(tmp_path, "authorization { user: me, password: secret }") as url:
        with pytest.raises(BusError, match="give user and password in the address"):
            await Bus.connect(BusConfig(url=url, connect_limit_s=60.0))
        async with await Bus.connect(BusConfig(url=url.replace("://", "://me:secret@"))) as bus:
            await bus.init()


async def test_a_pull_goes_on_when_streams_that_were_gone_are_there_again(bus: Bus) -> None:
    got: list[Delivery] = []
    unheard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    tries: list[bool] = []

    async def ensure() -> None:
        subject = subjects.request("batch", "simple", "*")
        tries.append(False)
        await bus.consumers.ensure(subjects.REQUESTS, "test", subject, max_ack_pending=10, max_deliver=5)
        tries[-1] = True

    await ensure()
    pull = Pull(bus, subjects.REQUESTS, "test", got.append, lambda: 10, on_lost=ensure)
    await pull.start()
    await bus.js.delete_stream(subjects.REQUESTS)
    pull.reset()  # as after a reconnect: the server was away, and has lost its store
    await until(lambda: tries.count(False) > 1)
    await bus.init()
    await until(lambda: tries[-1])
    await bus.publish(a_request(), "job.0.0#1")
    await until(lambda: got)
    await pull.stop()
    gc.collect()  # tasks report what nobody has heard when they are collected
    assert not unheard


def test_a_failed_result_has_no_reward_by_type() -> None:
    failed = Failed(rollout=RolloutId("j", 0, 0), failure=Failure(kind=FailureKind.POISON, detail="x"))
    assert not hasattr(failed, "reward")
