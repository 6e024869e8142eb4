"""KafkaSink with a real broker, as another client sees what it sends."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

import anyio
import pytest
from anyio import to_thread
from confluent_kafka import Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it has them, and does not say so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)

from ebpfstream import outlet
from ebpfstream.errors import SinkError, SinkRejectedError, SinkUnavailableError
from ebpfstream.forwarding import Forwarding, forward
from ebpfstream.lost import Lost
from ebpfstream.sink import open_sink
from ebpfstream.sinks import kafka, kafka_producer
from ebpfstream.sinks.kafka import KafkaSink
from ebpfstream.sinks.kafka_records import Shape
from ebpfstream.stream import EventStream
from ebpfstream.testing import SinkCompliance, cancelled_at
from ebpfstream.testing.harness import at_each_await
from tests.kafka import certificates, client
from tests.kafka.broker import PASSWORD, USER, Cluster, Listener
from tests.kernel.test_cli import WITH_DEADLINE, running, true, wait_until
from tests.test_kafka_records import Plain, Step, batch, step
from tests.test_kafka_sink import BACKENDS
from tests.test_stream import Hand

if TYPE_CHECKING:
    from ebpfstream.batch import EventBatch
    from ebpfstream.sink import Delivery, Sink
    from ebpfstream.testing.cancelling import Outcome, Way
    from tests.kafka.proxy import Proxy

pytestmark = [pytest.mark.kafka, pytest.mark.anyio]

PROBE: Final = b"probe"  # the key of records that are not the sink's


@pytest.fixture(scope="module", params=BACKENDS, ids=["asyncio", "asyncio+uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Those that aiokafka knows."""
    return request.param


@pytest.fixture
def topic_of_one(broker: Cluster, request: pytest.FixtureRequest) -> str:
    """The same as `topic`, with one partition: there is an order of everything then."""
    name = f"one-{secrets.token_hex(4)}"
    client.create_topic(broker.servers, name, partitions=1)
    return name


# --- the contract


class TestKafkaSink(SinkCompliance):
    """Through a proxy."""

    backends = BACKENDS

    @pytest.fixture(autouse=True)
    def _destination(
        self, broker: Cluster, topic_of_one: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kafka, "_PATIENCE", 1.0)  # or opening while it is away takes its time
        self.broker, self.topic, self.proxy = broker, topic_of_one, proxy

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return KafkaSink(self.broker.servers_at(Listener.PROXIED), self.topic, **delivery)

    def address(self) -> str:
        return f"kafka://{self.broker.servers_at(Listener.PROXIED)}/{self.topic}"

    async def arrived(self) -> list[Any]:
        return [json.loads(record.value or b"") for record in await read(self.broker, self.topic)]

    async def _used(self) -> EventBatch[Any]:
        """The proxy's connections are this process's too, and end a little later."""
        batch = await super()._used()
        while self.proxy.connections:
            await anyio.sleep(0.01)
        await anyio.sleep(0.1)
        return batch

    @contextmanager
    def away(self) -> Iterator[None]:
        """Connections are cut, and new ones come to nothing: there is nobody who would answer."""
        self.proxy.hold()
        self.proxy.cut()
        yield
        self.proxy.release()

    @asynccontextmanager
    async def rejecting(self) -> AsyncIterator[None]:
        await to_thread.run_sync(limit, self.broker.servers, self.topic, 1)
        yield
        await to_thread.run_sync(limit, self.broker.servers, self.topic, 1 << 20)


def limit(servers: str, topic: str, size: int) -> None:
    """Let a topic take batches of so many bytes and no more; returns when that is so."""
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    with AdminClient({"bootstrap.servers": servers}) as admin:
        (done,) = admin.incremental_alter_configs([resource]).values()
        done.result(60)
    while takes_probe(topic, {"bootstrap.servers": servers}) != (size > 1000):
        pass


def takes_probe(topic: str, settings: dict[str, Any]) -> bool:
    """Whether a topic takes a record now: what it is told to take counts a little later."""
    errors: list[object] = []
    with Producer(settings) as producer:
        producer.produce(topic, b"", key=PROBE, on_delivery=lambda error, _: errors.append(error))
        producer.flush(60)
    return errors[0] is None


# --- what another client sees


def numbered(count: int, first: int = 0, processes: int = 50) -> EventBatch[Any]:
    """Events of processes in turn."""
    return batch(*(step(number, pid=number % processes) for number in range(first, first + count)))


async def deliver(sink: Sink, *batches: EventBatch[Any]) -> None:
    """Open, send, await that all has arrived, close."""
    async with sink:
        receipts = [await sink.send(batch) for batch in batches]
        for receipt in receipts:
            assert receipt is not None
            await receipt


async def read(broker: Cluster, topic: str) -> list[client.Record]:
    """All but probes."""
    records = await to_thread.run_sync(client.read_all, broker.servers, topic)
    return [record for record in records if record.key != PROBE]


def values(batches: Iterable[EventBatch[Any]]) -> list[bytes]:
    return b"".join(batch.to_json_lines() for batch in batches).splitlines()


def by_key(pairs: Iterable[tuple[bytes | None, bytes | None]]) -> dict[bytes | None, list[bytes | None]]:
    found: dict[bytes | None, list[bytes | None]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("key", ["host,pid", "host", "pid,cpu", "comm,pid"])
async def test_records_are_the_events(broker: Cluster, topic: str, key: str) -> None:
    """All of them, of each key in order, and with everything that a record has."""
    lost = (Lost(2, 3, 100, 102, datetime(2024, 2, 3, 4, 5, 6, 789_000, UTC)),)
    batches = [numbered(500, first) for first in range(0, 5000, 500)]
    batches[4] = batches[4].with_lost(lost)
    await deliver(KafkaSink(broker.servers, topic, key=key), *batches)
    records = await read(broker, topic)
    shape = Shape(Step, key)  # tests/test_kafka_records.py tells whether that is right
    expected = [record for batch in batches for record in shape.records(batch)]
    assert len(records) == len(expected) == 5001
    found = by_key((record.key, record.value) for record in records)
    assert found == by_key((record.key, record.value) for record in expected)
    assert len(found) == {"host,pid": 51, "host": 1, "pid,cpu": 51, "comm,pid": 51}[key]
    wanted = {record.value: record for record in expected}
    for record in records:
        assert record.value is not None
        assert record.headers == tuple(wanted[record.value].headers)
        assert record.timestamp == wanted[record.value].timestamp
    assert {record.partition for record in records} == (
        {0, 1, 2} if key != "host" else {records[0].partition}
    )


async def test_keys_are_where_other_clients_put_them(broker: Cluster, topic: str) -> None:
    theirs = f"{topic}-theirs"
    client.create_topic(broker.servers, theirs, partitions=3)
    # Of many lengths, some of which few have.
    events = [step(number, message="k" * (number % 30) + str(number)) for number in range(500)]
    await deliver(KafkaSink(broker.servers, topic, key="message"), batch(*events, step(500, message="")))
    ours = {record.key: record.partition for record in await read(broker, topic)}
    with Producer({"bootstrap.servers": broker.servers, "partitioner": "murmur2_random"}) as producer:
        for key in ours:
            producer.produce(theirs, b"", key=key)
        assert producer.flush(60) == 0
    assert {record.key: record.partition for record in await read(broker, theirs)} == ours
    assert len(ours) == 501


async def test_without_a_key_batches_are_spread(broker: Cluster, topic: str) -> None:
    batches = [numbered(10, first) for first in range(0, 800, 10)]
    await deliver(KafkaSink(broker.servers, topic, key=None), *batches)
    records = await read(broker, topic)
    assert Counter(record.value for record in records) == Counter(values(batches))
    assert {record.key for record in records} == {None}
    where = {record.value: record.partition for record in records}
    assert {len({where[value] for value in values([batch])}) for batch in batches} == {1}
    assert set(where.values()) == {0, 1, 2}


async def test_text_and_fields(broker: Cluster, topic_of_one: str) -> None:
    """As in JSON lines: what is not printable, or not UTF-8, is escaped."""
    messages = ['"', "\\\\", "é 🐝", "\\xff\\x00", "\u202e", "x" * 600_000]
    events = batch(*(step(number, message=message) for number, message in enumerate(messages)))
    chosen = events.select({"message": "m", "pid": "pid"})
    await deliver(KafkaSink(broker.servers, topic_of_one), events, chosen)
    found = [record.value for record in await read(broker, topic_of_one)]
    assert found == values([events, chosen])
    assert [json.loads(value or b"")["m"] for value in found[6:]] == [event.message for event in events]
    assert list(json.loads(found[-1] or b"")) == ["m", "pid"]


async def test_a_topic_for_each_type(broker: Cluster, topic: str) -> None:
    names = {Step: f"{topic}.step", Plain: f"{topic}.plain"}
    for name in names.values():
        client.create_topic(broker.servers, name)
    plain = batch(Plain(1, "a"), Plain(2, "b"))
    with anyio.fail_after(4):  # it does not wait for a topic that it cannot know
        await deliver(KafkaSink(broker.servers, f"{topic}.{{type}}"), numbered(3), plain, numbered(3, 3))
    assert Counter(record.value for record in await read(broker, names[Step])) == Counter(
        values([numbered(6)])
    )
    assert Counter(record.value for record in await read(broker, names[Plain])) == Counter(values([plain]))


@pytest.mark.parametrize(
    ("compression", "number"), [("none", 0), ("gzip", 1), ("snappy", 2), ("lz4", 3), ("zstd", 4)]
)
async def test_compression(broker: Cluster, topic_of_one: str, compression: Any, number: int) -> None:
    await deliver(KafkaSink(broker.servers, topic_of_one, compression=compression), numbered(1000))
    assert [record.value for record in await read(broker, topic_of_one)] == values([numbered(1000)])
    log = (broker.folder / f"1/data/{topic_of_one}-0/00000000000000000000.log").read_bytes()
    attributes = int.from_bytes(
        log[21:23], "big"
    )  # of the first batch: kafka.apache.org/documentation/#recordbatch
    assert attributes & 7 == number
    assert (len(log) < 50_000) == (compression != "none")


async def test_the_default_is_zstd(broker: Cluster, topic_of_one: str) -> None:
    await deliver(KafkaSink(broker.servers, topic_of_one), numbered(1))
    log = (broker.folder / f"1/data/{topic_of_one}-0/00000000000000000000.log").read_bytes()
    assert log[22] & 7 == 4


@pytest.mark.parametrize(
    "options", [{"acks": "1"}, {"batch_size": 1}, {"in_flight": 1}, {"batch_size": 1 << 20}]
)
async def test_other_settings(broker: Cluster, topic_of_one: str, options: dict[str, Any]) -> None:
    batches = [numbered(100, first) for first in range(0, 500, 100)]
    await deliver(KafkaSink(broker.servers, topic_of_one, **options), *batches)
    assert [record.value for record in await read(broker, topic_of_one)] == values(batches)


# --- what Kafka refuses


async def test_a_topic_that_is_not_there(broker: Cluster) -> None:
    sink = KafkaSink(broker.servers, "nowhere")
    with (
        anyio.fail_after(30),
        pytest.raises(SinkError, match=r"no topic 'nowhere' at 127.0.0.1:.*: create it"),
    ):
        await sink.open()
    async with KafkaSink(broker.servers, "nowhere.{type}") as sink:
        with anyio.fail_after(30), pytest.raises(SinkError, match=r"no topic 'nowhere.step' .*: create it"):
            await sink.send(numbered(1))


def login(broker: Cluster, topic: str, **options: Any) -> KafkaSink:
    given = {"sasl": "SCRAM-SHA-512", "username": USER, "password": PASSWORD, **options}
    return KafkaSink(broker.servers_at(Listener.SASL), topic, **given)


async def test_a_topic_that_is_not_for_us(broker: Cluster, topic: str) -> None:
    client.refuse(broker.servers, topic, USER)
    await to_thread.run_sync(wait_until_user_may, broker, topic, False)
    with (
        anyio.fail_after(30),
        pytest.raises(SinkError, match=rf"not let this user use the topic '{topic}': give it"),
    ):
        await login(broker, topic).open()


async def test_a_right_that_comes_later(
    broker: Cluster, topic_of_one: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may know of a topic, and not yet write, waits."""
    allow(broker.servers, topic_of_one, AclOperation.DESCRIBE)
    await to_thread.run_sync(wait_until_user_may, broker, topic_of_one, False)
    with anyio.fail_after(60):
        async with login(broker, topic_of_one, in_flight=1) as sink:
            receipt = await sink.send(numbered(10))
            with pytest.raises(
                SinkUnavailableError, match=rf"use the topic '{topic_of_one}': give it the right"
            ):
                await sink.send(numbered(1, 10))
            allow(broker.servers, topic_of_one, AclOperation.WRITE)
            await receipt
            await (await sink.send(numbered(1, 10)))
    assert [record.value for record in await read(broker, topic_of_one)] == values([numbered(11)])
    first, last = (record.getMessage() for record in caplog.records if record.name == "ebpfstream")
    assert f"use the topic '{topic_of_one}'" in first
    assert last.endswith("going on")


def wait_until_user_may(broker: Cluster, topic: str, may: bool) -> None:
    """Return when a rule counts for who may write."""
    settings = {
        "bootstrap.servers": broker.servers_at(Listener.SASL),
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "PLAIN",
        "sasl.username": USER,
        "sasl.password": PASSWORD,
        "log_level": 0,
    }
    while takes_probe(topic, settings) != may:
        pass


def allow(servers: str, topic: str, operation: AclOperation) -> None:
    """Let the user do this; once there is such a rule, what no rule allows is refused."""
    rule = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation)
    with AdminClient({"bootstrap.servers": servers}) as admin:
        (done,) = admin.create_acls([AclBinding(*rule, AclPermissionType.ALLOW)]).values()
        done.result(60)


def with_large_ones(*large: int) -> EventBatch[Any]:
    """40 events, some of them larger than the topic `narrow` takes; random, so that they stay so."""
    return batch(
        *(
            step(number, message=secrets.token_hex(40_000) if number in large else "small")
            for number in range(40)
        )
    )


@pytest.fixture
def narrow(broker: Cluster) -> str:
    """A topic that takes no large records."""
    name = f"narrow-{secrets.token_hex(4)}"
    client.create_topic(broker.servers, name, partitions=1, config={"max.message.bytes": "20000"})
    return name


@pytest.mark.parametrize("large", [[7], [0, 39], [20, 21, 22], list(range(40))])
async def test_records_that_are_too_large(broker: Cluster, narrow: str, large: list[int]) -> None:
    """They alone are refused; the others arrive, in order, and so does what follows."""
    events = with_large_ones(*large)
    async with KafkaSink(broker.servers, narrow) as sink:
        receipt = await sink.send(events.with_lost((Lost(0, 1, 0, 0),)))
        after = await sink.send(numbered(100, 40))
        with (
            anyio.fail_after(60),
            pytest.raises(SinkRejectedError, match=r"raise its max\.message\.bytes") as caught,
        ):
            await receipt
        await after
    assert caught.value.rejected is not None
    assert sorted(caught.value.rejected) == large
    found = [record.value for record in await read(broker, narrow)]
    kept = events.keep(number not in large for number in range(40)).with_lost((Lost(0, 1, 0, 0),))
    assert found == values([kept, numbered(100, 40)])


async def test_what_is_refused_goes_to_the_dead_letters(broker: Cluster, narrow: str, tmp_path: Path) -> None:
    events = with_large_ones(3, 30)
    hand = Hand()
    hand.submit()
    hand.ready[-1] = events.records
    hand.submitted += 40
    letters = tmp_path / "letters.jsonl"
    sink = KafkaSink(broker.servers, narrow, dead_letters=str(letters))
    statistics = await forward(EventStream(hand, Step, latency=0), sink, count=40)
    hand.give_back()
    assert (statistics.sinks[0].acknowledged, statistics.sinks[0].failed) == (38, 2)
    dead = [json.loads(line) for line in letters.read_text().splitlines()]
    assert [letter["event"]["sequence"] for letter in dead] == [3, 30]
    assert all("max.message.bytes" in letter["reason"] for letter in dead)
    arrived = [json.loads(record.value or b"")["sequence"] for record in await read(broker, narrow)]
    assert arrived == [number for number in range(40) if number not in (3, 30)]


async def test_records_that_are_too_old(broker: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    name = f"new-{secrets.token_hex(4)}"
    config = {"message.timestamp.before.max.ms": "3600000"}
    client.create_topic(broker.servers, name, partitions=1, config=config)
    async with KafkaSink(broker.servers, name) as sink:
        receipt = await sink.send(numbered(3))
        with (
            anyio.fail_after(60),
            pytest.raises(SinkRejectedError, match=r"no record as old .* message.timestamp"),
        ):
            await receipt
    assert await read(broker, name) == []


# --- who is there


async def test_it_begins_before_kafka_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened while nobody listens, and what is offered then arrives."""
    monkeypatch.setattr(kafka, "_PATIENCE", 0.5)
    monkeypatch.setattr(kafka_producer, "_LONGEST_DELAY", 1.0)
    monkeypatch.setattr(outlet, "_LONGEST_DELAY", 1.0)
    with Cluster(tmp_path, listeners=[Listener.PLAIN]) as cluster:
        client.create_topic(cluster.servers, "late", partitions=1)
        await to_thread.run_sync(cluster.kill)
        sink = KafkaSink(cluster.servers, "late")
        hand = Hand()
        forwarding = Forwarding(EventStream(hand, Step, latency=0), sink, count=40)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forwarding.run)
            hand.submit()
            hand.ready[-1] = numbered(40).records
            hand.submitted += 40
            with anyio.fail_after(60):
                while not forwarding.statistics().sinks[0].retries:
                    await anyio.sleep(0.02)
            await to_thread.run_sync(cluster.start)
        hand.give_back()
        assert forwarding.statistics().sinks[0].acknowledged == 40
        found = [json.loads(record.value or b"")["sequence"] for record in await read(cluster, "late")]
        assert found == list(range(40))


async def check_arrives(broker: Cluster, topic: str, sink: Sink) -> None:
    with anyio.fail_after(30):
        await deliver(sink, numbered(3))
    assert Counter(record.value for record in await read(broker, topic)) == Counter(values([numbered(3)]))


async def test_tls(broker: Cluster, topic: str) -> None:
    servers = broker.servers_at(Listener.TLS)
    await check_arrives(broker, topic, KafkaSink(servers, topic, tls=True, ca=str(broker.authority)))


async def test_tls_with_a_certificate(broker: Cluster, topic: str, tmp_path: Path) -> None:
    """In one file with its key, or in two."""
    servers = broker.servers_at(Listener.MUTUAL_TLS)
    options: dict[str, Any] = {"tls": True, "ca": str(broker.authority)}
    sink = KafkaSink(servers, topic, certificate=str(broker.certificate), **options)
    await check_arrives(broker, topic, sink)
    key, _, certificates = broker.certificate.read_text().partition("-----BEGIN CERT")
    (tmp_path / "key").write_text(key)
    (tmp_path / "certificate").write_text("-----BEGIN CERT" + certificates)
    own: dict[str, Any] = {"certificate": str(tmp_path / "certificate"), "private_key": str(tmp_path / "key")}
    await deliver(KafkaSink(servers, topic, **own, **options), numbered(3))


@pytest.mark.parametrize("sasl", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("tls", [False, True])
async def test_sasl(broker: Cluster, topic: str, tmp_path: Path, sasl: Any, tls: bool) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    servers = broker.servers_at(Listener.SASL_TLS if tls else Listener.SASL)
    address = f"kafka://{servers}/{topic}?sasl={sasl}&username={USER}&password_file={tmp_path}/password"
    await check_arrives(
        broker, topic, open_sink(address + (f"&tls=yes&ca={broker.authority}" if tls else ""))
    )


OTHERS: Final[list[tuple[Listener, dict[str, Any], str]]] = [
    (Listener.TLS, {"tls": True}, "is not trusted: give the authority's with ca="),
    (Listener.TLS, {"tls": True, "ca": "{}/other.pem"}, "is not trusted: give the authority's with ca="),
    (
        Listener.MUTUAL_TLS,
        {"tls": True, "ca": "{}/authority.pem", "certificate": "{}/other-client.pem"},
        "come to terms on TLS .* certificate=",
    ),
    (Listener.MUTUAL_TLS, {"tls": True, "ca": "{}/authority.pem"}, "come to terms on TLS .* certificate="),
    *(
        (Listener.SASL, {"sasl": sasl, "username": user, "password": password}, "refuses user or password")
        for sasl in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
        for user, password in ((USER, "wrong"), ("nobody", PASSWORD))
    ),
    (
        Listener.PLAIN,
        {"sasl": "PLAIN", "username": USER, "password": PASSWORD},
        "lets nobody log in: leave out sasl=",
    ),
]


@pytest.mark.parametrize(("listener", "options", "message"), OTHERS)
async def test_what_ends_it_at_once(
    broker: Cluster, topic: str, tmp_path: Path, listener: Listener, options: dict[str, Any], message: str
) -> None:
    certificates.make(
        tmp_path / "other.pem", tmp_path / "other-server.pem", tmp_path / "other-client.pem", USER
    )
    (tmp_path / "authority.pem").write_text(broker.authority.read_text())
    given: dict[str, Any] = {
        name: value.format(tmp_path) if isinstance(value, str) else value for name, value in options.items()
    }
    servers = broker.servers_at(listener)
    with anyio.fail_after(30), pytest.raises(SinkError, match=f"{servers}.*{message}") as caught:
        await KafkaSink(servers, topic, **given).open()
    assert not isinstance(caught.value, SinkUnavailableError)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("listener", "tls"), [(Listener.TLS, False), (Listener.PLAIN, True), (Listener.SASL, False)]
)
async def test_the_wrong_port(
    broker: Cluster, topic: str, listener: Listener, tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks as a Kafka that is just starting does, so it is waited for; and one is told what may be wrong."""
    monkeypatch.setattr(kafka, "_PATIENCE", 0.5)
    servers = broker.servers_at(listener)
    with anyio.fail_after(30):
        async with KafkaSink(servers, topic, tls=tls) as sink:
            with pytest.raises(
                SinkUnavailableError, match=rf"{servers} closes the connection: .* tls=.* sasl="
            ):
                await sink.send(numbered(1))


# --- closing


async def test_closing_waits_for_what_is_on_its_way(broker: Cluster, topic_of_one: str) -> None:
    batches = [numbered(500, first) for first in range(0, 10_000, 500)]
    sink = KafkaSink(broker.servers, topic_of_one, batch_size=16384)
    await sink.open()
    receipts = [await sink.send(events) for events in batches]
    await sink.aclose(60)
    with anyio.fail_after(1):
        for receipt in receipts:
            await receipt
    assert [record.value for record in await read(broker, topic_of_one)] == values(batches)


async def test_closing_says_what_has_not_arrived(broker: Cluster, topic_of_one: str, proxy: Proxy) -> None:
    sink = KafkaSink(broker.servers_at(Listener.PROXIED), topic_of_one)
    await sink.open()
    await (await sink.send(numbered(1)))
    proxy.hold()
    receipt = await sink.send(numbered(1, 1))
    with anyio.fail_after(10):
        await sink.aclose(0.5)
        with pytest.raises(SinkError, match=r"closed before this had arrived: give aclose\(\) more time"):
            await receipt


@pytest.mark.parametrize("method", ["open", "aclose"])
async def test_cancelled_it_is_closed(broker: Cluster, topic: str, method: str) -> None:
    """Not later, but when the call ends."""

    async def cancel(step: int, way: Way) -> Outcome:
        sink = KafkaSink(broker.servers, topic)
        if method == "aclose":
            await sink.open()
            await sink.send(numbered(1))
        outcome = await cancelled_at(step, getattr(sink, method)(), way)
        if method == "open" and outcome.completed:
            await sink.aclose()
        assert "ebpfstream kafka" not in {task.get_name() for task in asyncio.all_tasks()}
        return outcome

    await at_each_await(cancel)


# --- the command


LEDGER: Final = r"ebpfstream: kafka://\S+/{}: (\d+) of (\d+) events(.*)\n"


@pytest.mark.kernel
def test_the_command_ships_what_is_executed(broker: Cluster, topic: str) -> None:
    """SIGTERM delivers all that has happened; each event is there once, and says where it comes from."""
    with running("--to", f"kafka://{broker.servers}/{topic}") as command:
        pids = [true(topic, str(number)) for number in range(300)]
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=60)
    assert command.returncode == -signal.SIGTERM
    records = client.read_all(broker.servers, topic)
    ledger = re.search(LEDGER.format(topic), errors.decode())
    assert ledger is not None, errors.decode()
    assert int(ledger[1]) == int(ledger[2]) == len(records) >= 300
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    ours: dict[int, Any] = {}
    sequences: dict[str, list[int]] = {}
    for record in records:
        event, headers = json.loads(record.value or b""), dict(record.headers)
        assert record.key == f"{host}/{event['pid']}".encode()
        assert (headers["schema"], headers["host"], headers["boot"]) == (
            b"exec-event/1",
            host.encode(),
            boot.encode(),
        )
        where, _, number = headers["sequence"].decode().rpartition("/")
        assert (where, int(number)) == (f"{event['cpu']}/{event['program']}", event["sequence"])
        assert record.timestamp == milliseconds(event["time"])
        sequences.setdefault(where, []).append(int(number))
        if event["args"][1:2] == [topic]:
            ours[event["pid"]] = event["args"][2:]
    assert ours == {pid: [str(number)] for number, pid in enumerate(pids)}
    assert len({dict(record.headers)["stream"] for record in records}) == 1
    for numbers in sequences.values():
        assert sorted(numbers) == list(range(len(numbers)))


def milliseconds(time: str) -> int:
    return (datetime.fromisoformat(time) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


@pytest.mark.kernel
def test_the_command_ends_in_time_though_kafka_is_away(broker: Cluster, topic: str, proxy: Proxy) -> None:
    """It says what was not delivered; what it says was, is there."""
    address = f"kafka://{broker.servers_at(Listener.PROXIED)}/{topic}"
    with running("--to", address, command=[sys.executable, "-c", WITH_DEADLINE, "2"]) as command:
        true(topic, "first")
        wait_until(lambda: client.read_all(broker.servers, topic), command)
        proxy.hold()
        proxy.cut()
        for number in range(100):
            true(topic, str(number))
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=30)
    assert command.returncode == -signal.SIGTERM
    ledger = re.search(LEDGER.format(topic), errors.decode())
    assert ledger is not None, errors.decode()
    arrived, accepted = int(ledger[1]), int(ledger[2])
    assert accepted - arrived >= 100
    assert f"{accepted - arrived} dropped" in ledger[3]
    proxy.release()
    # Of what came before the proxy held, the acknowledgement may not have passed.
    assert arrived <= len(client.read_all(broker.servers, topic)) <= accepted - 100
