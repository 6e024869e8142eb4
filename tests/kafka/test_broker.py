"""The broker in tests does what tests rely on, as two clients see it that are not ours."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import TopicAuthorizationFailedError, UnknownTopicOrPartitionError
from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from tests.kafka import client, jars
from tests.kafka.broker import PASSWORD, USER, BrokerError, Cluster, Listener
from tests.kafka.process import accepts, free_port
from tests.kafka.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kafka

MEGABYTES: Final = 700  # that a node may take
API_VERSIONS: Final = struct.pack(">ihhih", 10, 18, 0, 7, -1)  # size, what, version, number, no client's name


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A node that may be hurt, if it is well afterwards."""
    with Cluster(tmp_path_factory.mktemp("fragile")) as cluster:
        yield cluster


def produce(servers: str, topic: str, values: list[bytes]) -> None:
    """Each acknowledged; in order, to partition 0."""
    failed: list[object] = []
    with Producer({"bootstrap.servers": servers, "acks": "all", "enable.idempotence": True}) as producer:
        for value in values:
            producer.produce(
                topic,
                value,
                partition=0,
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
        assert producer.flush(60) == 0
    assert not failed


def values_in(servers: str, topic: str) -> list[bytes | None]:
    return [record.value for record in client.read_all(servers, topic)]


def memory(pid: int) -> int:
    """The most that a process ever had in memory, in megabytes."""
    status = Path(f"/proc/{pid}/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) >> 10


# --- what goes in comes out


def test_what_aiokafka_sends_librdkafka_reads(broker: Cluster, topic: str) -> None:
    async def send() -> None:
        settings = {"enable_idempotence": True, "acks": "all", "compression_type": "zstd"}
        async with AIOKafkaProducer(bootstrap_servers=broker.servers, **settings) as producer:
            for number in range(20_000):
                await producer.send(
                    topic,
                    b"%d" % number,
                    key=b"key %d" % (number % 10),
                    headers=[("host", b"here"), ("number", b"%d" % number)],
                    timestamp_ms=1_700_000_000_000 + number,
                )
            await producer.flush()

    asyncio.run(send())
    records = client.read_all(broker.servers, topic)
    assert len(records) == 20_000
    assert {record.value for record in records} == {b"%d" % number for number in range(20_000)}
    numbers: dict[bytes | None, list[int]] = {}
    for record in records:
        number = int(record.value or b"")
        numbers.setdefault(record.key, []).append(number)
        assert record.timestamp == 1_700_000_000_000 + number
        assert record.headers == (("host", b"here"), ("number", b"%d" % number))
    assert numbers == {b"key %d" % key: list(range(key, 20_000, 10)) for key in range(10)}
    assert {record.partition for record in records} <= {0, 1, 2}
    for partition, count in Counter(record.partition for record in records).items():
        assert [r.offset for r in records if r.partition == partition] == list(range(count))
    assert memory(broker.pid(1)) < MEGABYTES


def test_what_librdkafka_sends_aiokafka_reads(broker: Cluster, topic: str) -> None:
    values = [b"%d" % number for number in range(2_000)]
    produce(broker.servers, topic, values)

    async def read() -> list[bytes | None]:
        async with AIOKafkaConsumer(bootstrap_servers=broker.servers) as consumer:
            consumer.assign([partition := TopicPartition(topic, 0)])
            await consumer.seek_to_beginning()
            end = (await consumer.end_offsets([partition]))[partition]
            return [(await consumer.getone()).value for _ in range(end)]

    assert asyncio.run(read()) == values


def test_records_without_anything(broker: Cluster, topic: str) -> None:
    with Producer({"bootstrap.servers": broker.servers}) as producer:
        producer.produce(topic, None, partition=2)
        producer.produce(topic, b"", key=b"", partition=1)
    found = [(*record[:2], *record[3:]) for record in client.read_all(broker.servers, topic)]
    assert found == [(1, 0, b"", b"", ()), (2, 0, None, None, ())]


def test_topics_are_made_and_deleted_by_order_alone(broker: Cluster) -> None:
    name = "no-such-topic"
    with pytest.raises(KafkaException, match="UNKNOWN_TOPIC_OR_PART"):
        client.read_all(broker.servers, name)

    async def send() -> None:
        async with AIOKafkaProducer(bootstrap_servers=broker.servers, request_timeout_ms=1_000) as producer:
            await producer.send_and_wait(name, b"")

    with pytest.raises(UnknownTopicOrPartitionError):
        asyncio.run(send())
    client.create_topic(broker.servers, name, partitions=1, config={"max.message.bytes": "1000"})
    produce(broker.servers, name, [b"x" * 500])
    assert client.leader(broker.servers, name) == 1
    with pytest.raises(AssertionError, match="MSG_SIZE_TOO_LARGE"):
        produce(broker.servers, name, [b"x" * 2_000])
    with pytest.raises(KafkaException, match="TOPIC_ALREADY_EXISTS"):
        client.create_topic(broker.servers, name)
    client.delete_topic(broker.servers, name)
    client.create_topic(broker.servers, name)
    assert client.read_all(broker.servers, name) == []


# --- nodes that die, stop and fail over


def test_a_killed_node_has_what_it_acknowledged(fragile: Cluster) -> None:
    client.create_topic(fragile.servers, "killed")
    values = [b"%d" % number for number in range(10_000)]
    produce(fragile.servers, "killed", values)
    before = fragile.servers, fragile.pid(1)
    fragile.kill(1)
    assert client.nodes(fragile.servers) == set()
    fragile.start(1)
    assert fragile.servers == before[0]
    assert fragile.pid(1) != before[1]
    assert values_in(fragile.servers, "killed") == values
    produce(fragile.servers, "killed", [b"more"])
    assert values_in(fragile.servers, "killed") == [*values, b"more"]


def test_a_paused_node_is_silent_and_goes_on(fragile: Cluster) -> None:
    client.create_topic(fragile.servers, "paused")
    fragile.pause()
    assert client.nodes(fragile.servers) == set()
    assert all(accepts(int(address.rpartition(":")[2])) for address in fragile.servers.split(","))
    fragile.resume()
    produce(fragile.servers, "paused", [b"1", b"2"])
    assert values_in(fragile.servers, "paused") == [b"1", b"2"]


def test_others_take_over_from_a_leader(tmp_path: Path) -> None:
    with Cluster(tmp_path, 3) as cluster:
        assert client.nodes(cluster.servers) == {1, 2, 3}
        client.create_topic(cluster.servers, "led", partitions=1, replication=3)
        first = client.leader(cluster.servers, "led")
        produce(cluster.servers, "led", [b"1"])
        cluster.kill(first)
        produce(cluster.servers, "led", [b"2"])  # waits for the next leader
        assert (second := client.leader(cluster.servers, "led")) not in (first, -1)
        cluster.restart(first)
        assert client.leader(cluster.servers, "led") == second
        client.elect_preferred_leaders(cluster.servers, "led")
        produce(cluster.servers, "led", [b"3"])
        assert client.leader(cluster.servers, "led") == first
        cluster.stop(first)
        produce(cluster.servers, "led", [b"4"])
        assert values_in(cluster.servers, "led") == [b"1", b"2", b"3", b"4"]
        assert max(memory(cluster.pid(node)) for node in {1, 2, 3} - {first}) < MEGABYTES


def test_a_node_that_cannot_start_says_why(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, properties={"log.retention.hours": "forever"})
    with pytest.raises(BrokerError, match=r"node 1 was not formatted(.|\n)*log.retention.hours"):
        cluster.start()
    cluster.close()
    del cluster.properties["log.retention.hours"]
    taken = int(cluster.servers.rpartition(":")[2])
    with (
        socket.create_server(("127.0.0.1", taken)),
        pytest.raises(BrokerError, match="Address already in use"),
    ):
        cluster.start()
    cluster.close()


def test_nodes_do_not_outlive_who_started_them(tmp_path: Path) -> None:
    script = f"""
import pathlib, signal, threading
from tests.kafka.process import Process
def start():
    print(Process(["sleep", "1000"], pathlib.Path({str(tmp_path / "log")!r})).pid, flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=jars.ROOT) as process:
        assert process.stdout
        node = os.pidfd_open(int(process.stdout.readline()))
        try:
            with pytest.raises(TimeoutError):
                asyncio.run(_end_of(node, within=0.5))  # it does outlive the thread
            process.kill()
            asyncio.run(_end_of(node, within=30))
        finally:
            os.close(node)


async def _end_of(pidfd: int, *, within: float) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    await asyncio.wait_for(ended.wait(), within)


# --- the proxy


@pytest.fixture
def asking(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection through the proxy, over which the broker has answered once."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as connection:
        connection.sendall(API_VERSIONS)
        assert len(response(connection)) > 100
        assert proxy.connections == 1
        yield connection


def response(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        (size,) = struct.unpack(">i", file.read(4))
        return file.read(size)


def test_cutting_resets_and_lets_others_in(proxy: Proxy, asking: socket.socket) -> None:
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        asking.recv(1)
    assert proxy.connections == 0
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as another:
        another.sendall(API_VERSIONS)
        assert response(another)


@pytest.mark.parametrize("after", [0, 6])
def test_cutting_in_the_middle_of_a_response(proxy: Proxy, asking: socket.socket, after: int) -> None:
    done = proxy.cut_response(after)
    assert not done.is_set()
    asking.sendall(API_VERSIONS)
    assert done.wait(30)
    received = bytearray()
    with pytest.raises(ConnectionResetError):
        while True:
            received += asking.recv(100)
    # What was not read when the reset came is lost; it was the beginning, in any case.
    assert len(received) in {0, after}
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as another:
        another.sendall(API_VERSIONS)
        assert response(another)


def test_holding_and_releasing(proxy: Proxy, asking: socket.socket) -> None:
    proxy.hold()
    asking.sendall(API_VERSIONS)
    asking.settimeout(1)
    with pytest.raises(TimeoutError):
        asking.recv(1)
    proxy.release()
    asking.settimeout(30)
    assert len(response(asking)) > 100


def test_clients_stay_on_the_proxy_and_survive_its_cuts(broker: Cluster, proxy: Proxy, topic: str) -> None:
    async def send() -> None:
        servers = broker.servers_at(Listener.PROXIED)
        async with AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True) as producer:
            await producer.send_and_wait(topic, b"before", partition=0)
            assert proxy.connections > 0
            done = proxy.cut_response()
            await producer.send_and_wait(topic, b"twice, if it were not idempotent", partition=0)
            assert done.is_set()
            proxy.cut()
            await producer.send_and_wait(topic, b"after", partition=0)

    asyncio.run(send())
    assert values_in(broker.servers, topic) == [b"before", b"twice, if it were not idempotent", b"after"]


def test_a_connection_ends_with_its_other_side() -> None:
    with Proxy(free_port(), free_port()) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as connection:
            with pytest.raises(ConnectionResetError):
                connection.recv(1)  # nobody is there
        with socket.create_server(("127.0.0.1", proxy.target)) as server:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as connection:
                server.accept()[0].close()
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
    assert not accepts(proxy.port)


# --- who may come in

LOGINS: Final = [
    (listener, mechanism)
    for listener in (Listener.SASL, Listener.SASL_TLS)
    for mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
]


def aiokafka_settings(broker: Cluster, listener: Listener, mechanism: str, password: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "bootstrap_servers": broker.servers_at(listener),
        "security_protocol": "SASL_PLAINTEXT" if listener == Listener.SASL else "SASL_SSL",
        "sasl_mechanism": mechanism,
        "sasl_plain_username": USER,
        "sasl_plain_password": password,
    }
    if listener == Listener.SASL_TLS:
        settings["ssl_context"] = ssl.create_default_context(cafile=str(broker.authority))
    return settings


@pytest.mark.parametrize(("listener", "mechanism"), LOGINS)
def test_the_right_password_lets_in(broker: Cluster, topic: str, listener: Listener, mechanism: str) -> None:
    async def send() -> None:
        settings = aiokafka_settings(broker, listener, mechanism, PASSWORD)
        async with AIOKafkaProducer(enable_idempotence=True, **settings) as producer:
            await producer.send_and_wait(topic, b"in")

    asyncio.run(send())
    assert values_in(broker.servers, topic) == [b"in"]


def refusals(settings: dict[str, Any]) -> list[KafkaError]:
    """What keeps librdkafka out."""
    errors: list[KafkaError] = []
    silent: dict[str, Any] = {"log_level": 0, "error_cb": errors.append}
    with AdminClient(settings | silent) as admin:
        with pytest.raises(KafkaException):
            admin.list_topics(timeout=2)
        admin.poll(1)
    return errors


@pytest.mark.parametrize(("listener", "mechanism"), LOGINS)
def test_a_wrong_password_does_not(broker: Cluster, listener: Listener, mechanism: str) -> None:
    errors = refusals(
        {
            "bootstrap.servers": broker.servers_at(listener),
            "security.protocol": "SASL_PLAINTEXT" if listener == Listener.SASL else "SASL_SSL",
            "ssl.ca.location": str(broker.authority),
            "sasl.mechanism": mechanism,
            "sasl.username": USER,
            "sasl.password": "guessed",
        }
    )
    assert KafkaError._AUTHENTICATION in {error.code() for error in errors}


def tls_settings(broker: Cluster, listener: Listener) -> dict[str, Any]:
    return {"bootstrap.servers": broker.servers_at(listener), "security.protocol": "SSL"}


def test_tls(broker: Cluster) -> None:
    settings = tls_settings(broker, Listener.TLS)
    assert "certificate verify failed" in str(refusals(settings))
    with AdminClient(settings | {"ssl.ca.location": str(broker.authority)}) as admin:
        assert set(admin.list_topics(timeout=30).brokers) == {1}


def test_tls_with_a_certificate_of_the_client(broker: Cluster) -> None:
    settings = tls_settings(broker, Listener.MUTUAL_TLS) | {"ssl.ca.location": str(broker.authority)}
    assert re.search("alert (certificate required|bad certificate)", str(refusals(settings)))
    names = ("ssl.certificate.location", "ssl.key.location")
    with AdminClient(settings | dict.fromkeys(names, str(broker.certificate))) as admin:
        assert set(admin.list_topics(timeout=30).brokers) == {1}


def test_a_refused_topic(broker: Cluster, topic: str) -> None:
    client.refuse(broker.servers, topic, USER)

    async def send() -> None:
        settings = aiokafka_settings(broker, Listener.SASL, "PLAIN", PASSWORD)
        async with AIOKafkaProducer(**settings) as producer:
            await producer.send_and_wait(topic, b"in")

    with pytest.raises(TopicAuthorizationFailedError):
        asyncio.run(send())
    produce(broker.servers, topic, [b"by another"])
    assert values_in(broker.servers, topic) == [b"by another"]


# --- make kafka


class Command:
    """`python -m tests.kafka.broker`, until it is interrupted."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kafka.broker", "--port", str(self.port), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=jars.ROOT,
            env=os.environ | {"TMPDIR": str(folder)},
        )

    def __enter__(self) -> str:
        assert self._process.stdout
        assert f"127.0.0.1:{self.port}" in self._process.stdout.readline()
        return f"127.0.0.1:{self.port}"

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


def test_the_command_leaves_nothing(tmp_path: Path) -> None:
    async def send(servers: str) -> None:
        async with AIOKafkaProducer(bootstrap_servers=servers) as producer:
            await producer.send_and_wait("made-by-writing", b"1")

    with Command(folder=tmp_path) as servers:
        asyncio.run(send(servers))
        assert values_in(servers, "made-by-writing") == [b"1"]
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_the_command_keeps_its_data(tmp_path: Path) -> None:
    data = tmp_path / "made/by/it"
    with Command("--data", str(data), folder=tmp_path) as servers:
        produce(servers, "kept", [b"1"])
    with Command("--data", str(data), folder=tmp_path) as servers:
        produce(servers, "kept", [b"2"])
        assert values_in(servers, "kept") == [b"1", b"2"]


def test_the_command_when_its_port_is_taken(broker: Cluster) -> None:
    port = broker.servers.rpartition(":")[2]
    command = [sys.executable, "-m", "tests.kafka.broker", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, cwd=jars.ROOT)
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr
    assert "--port" in done.stderr


# --- the jars, with another Maven


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that PATH has, for a cache of jars that is empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}")
    monkeypatch.setattr(jars, "_CACHE", tmp_path / "cache")
    return folder


def write(tool: Path, script: str) -> None:
    tool.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    tool.chmod(0o755)


def test_what_is_missing(tools: Path) -> None:
    assert "without Java" in jars.missing()
    write(tools / "java", """echo 'openjdk version "1.8.0_292"' >&2""")
    assert "needs Java 17 or later, and `java` here is 8" in jars.missing()
    write(tools / "java", """echo 'openjdk version "21" 2023-09-19' >&2""")
    assert "without Maven" in jars.missing()
    with pytest.raises(jars.JarsError, match="apt-get install maven"):
        jars.get()
    write(tools / "mvn", "echo no network; exit 1")
    assert jars.missing() == ""
    with pytest.raises(jars.JarsError, match="no network"):
        jars.get()
    assert [path.name for path in (tools.parent / "cache").iterdir()] == ["lock"]


def test_jars_are_fetched_once(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jars, "_POM", tmp_path / "pom.xml")
    (tmp_path / "pom.xml").write_text("one")
    write(tools / "java", """echo 'openjdk version "17.0.1"' >&2""")
    fetch = f"""for last; do :; done
echo >> {tmp_path}/fetched; sleep 0.5; mkdir -p "${{last#*=}}"; echo > "${{last#*=}}/kafka.jar" """
    write(tools / "mvn", fetch)
    together = threading.Barrier(4)

    def get(_: int) -> Path:
        together.wait()
        return jars.get()

    with ThreadPoolExecutor(4) as threads:
        (folder,) = set(threads.map(get, range(4)))
    assert [path.name for path in folder.iterdir()] == ["kafka.jar"]
    assert (tmp_path / "fetched").read_text() == "\n"
    (tmp_path / "pom.xml").write_text("another")
    another = jars.get()
    assert another != folder
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {another.name, "lock"}
    assert (tmp_path / "fetched").read_text() == "\n\n"
