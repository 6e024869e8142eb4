"""KafkaSink without Kafka: what can be said of it, and what it says of what cannot be."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from aiokafka import AIOKafkaProducer

from ebpfstream.errors import ArgumentError, SinkError, SinkUnavailableError
from ebpfstream.sink import open_sink
from ebpfstream.sinks import kafka
from ebpfstream.sinks.kafka import KafkaSink
from ebpfstream.sinks.kafka_client import Producer, Security, bootstrap_servers
from ebpfstream.testing import ExampleEvent, make_batch
from tests.kafka.process import free_port

LOGIN = {"sasl": "PLAIN", "username": "alice", "password": "secret"}
BACKENDS = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})]


def sink(address: str) -> KafkaSink:
    made = open_sink(address)
    assert isinstance(made, KafkaSink)
    return made


def test_the_address_names_servers_and_topic() -> None:
    assert sink("kafka://127.0.0.1:9092/exec").name == "kafka://127.0.0.1:9092/exec"
    assert (
        sink("kafka://a,b:19092,[::1]/x.y_z-{type}").name == "kafka://a:9092,b:19092,[::1]:9092/x.y_z-{type}"
    )
    assert sink("kafka://%61%2Cb/%65xec/").name == "kafka://a:9092,b:9092/exec"


def test_options_in_an_address() -> None:
    made = sink(
        "kafka://a/t?acks=1&compression=none&batch_size=64KiB&in_flight=1MiB&request_timeout=500ms&key=none"
        "&tls=yes&sasl=SCRAM-SHA-256&username=%61lice&password=a%26b%3Dc&when_full=drop_oldest&queue_size=1MB"
    )
    assert made._settings["acks"] == 1
    assert made._settings["enable_idempotence"] is False
    assert made._settings["compression_type"] is None
    assert made._settings["max_batch_size"] == 65536
    assert made._settings["request_timeout_ms"] == 500
    assert made._in_flight == 1 << 20
    assert made._key is None
    assert made._security.settings()["security_protocol"] == "SASL_SSL"
    assert made._security[5:7] == ("alice", "a&b=c")
    assert (made.when_full, made.queue_size) == ("drop_oldest", 1_000_000)


def test_the_defaults_are_safe() -> None:
    made = KafkaSink("a", "t")
    assert made._settings["acks"] == "all"
    assert made._settings["enable_idempotence"] is True
    assert made._settings["compression_type"] == "zstd"
    assert made._key == "host,pid"


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    made = KafkaSink("a", "t", **LOGIN)  # type: ignore[arg-type]
    assert "secret" not in f"{made!r} {made.name} {made._security!r}"
    (tmp_path / "password").write_text("from a file\n")
    security = Security(sasl="PLAIN", username="alice", password_file=str(tmp_path / "password"))
    assert security.settings()["sasl_plain_password"] == "from a file"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("kafka:", "write for example kafka://"),
        ("kafka://127.0.0.1:9092", "lacks servers or a topic"),
        ("kafka:///exec", "lacks servers or a topic"),
        ("kafka://[::1/exec", "'kafka://[::1/exec' is no address: Invalid IPv6 URL"),
        ("kafka://alice:secret@a/exec", "give the options username= and password_file="),
        ("kafka://a/exec?acks=2", "acks='2' is not all or 1"),
        ("kafka://a/exec?batch_size=big", "a number of bytes such as 64KiB"),
        ("kafka://a/exec?topic=x", "no option 'topic'"),
    ],
)
def test_addresses_that_are_none(address: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        open_sink(address)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"servers": ""}, "give host:port"),
        ({"servers": " , "}, "give host:port"),
        ({"servers": "a:b"}, "'a:b' is no server: give host:port"),
        ({"servers": "a:0"}, "give host:port"),
        ({"servers": "a:65536"}, "give host:port"),
        ({"servers": ":9092"}, "give host:port"),
        ({"servers": "::1"}, r"or \[::1\]:9092"),
        ({"servers": "a b"}, "give host:port"),
        ({"servers": "kafka://a"}, "give host:port"),
        ({"topic": ""}, "give letters, digits"),
        ({"topic": "a/b"}, "give letters, digits"),
        ({"topic": "{host}"}, "give letters, digits"),
        ({"topic": "é"}, "give letters, digits"),
        ({"topic": "x" * 250}, "at most 249"),
        ({"key": "a b"}, "give names of fields"),
        ({"acks": 1}, 'give "all" or "1"'),
        ({"compression": "brotli"}, 'give "zstd", "snappy", "gzip", "lz4" or "none"'),
        ({"batch_size": 0}, "batch_size=0 .* 1 or more"),
        ({"in_flight": 0}, "in_flight=0 .* 1 or more"),
        ({"request_timeout": 0}, "more than 0"),
        ({"request_timeout": float("inf")}, "more than 0"),
        ({"ca": "x"}, "give tls=True"),
        ({"certificate": "x"}, "give tls=True"),
        ({"tls": True, "private_key": "x"}, "give certificate="),
        ({**LOGIN, "sasl": "GSSAPI"}, 'give "PLAIN", "SCRAM-SHA-256" or "SCRAM-SHA-512"'),
        ({**LOGIN, "password_file": "x"}, "give one"),
        ({**LOGIN, "sasl": None}, "give sasl="),
        ({**LOGIN, "password": None}, "needs username= and password="),
        ({**LOGIN, "username": None}, "needs username= and password="),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        KafkaSink(**{"servers": "a", "topic": "t", **options})
    assert "secret" not in str(caught.value)


def test_servers() -> None:
    assert bootstrap_servers("a , b-1.example.com:1,127.0.0.1,[::1]:2,[fe80::1]") == [
        "a:9092",
        "b-1.example.com:1",
        "127.0.0.1:9092",
        "[::1]:2",
        "[fe80::1]:9092",
    ]


def test_without_its_library_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["aiokafka"] = None
from ebpfstream import open_sink
try:
    open_sink("kafka://a/t")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'ebpfstream[kafka]'" in done.stdout


def test_trio_is_refused() -> None:
    with pytest.raises(SinkError, match=r"Kafka needs asyncio, and this is trio: .* anyio.run"):
        anyio.run(KafkaSink("127.0.0.1", "t").open, backend="trio")


@pytest.mark.anyio
class TestOpening:
    """What needs no answer."""

    @pytest.fixture(params=BACKENDS)
    def anyio_backend(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(autouse=True)
    def _impatience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kafka, "_PATIENCE", 0.3)

    @pytest.mark.parametrize("compression", ["zstd", "snappy", "lz4", "gzip"])
    async def test_without_compression_it_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, compression: Any
    ) -> None:
        attributes = AIOKafkaProducer._COMPRESSORS[compression][1]
        monkeypatch.setitem(AIOKafkaProducer._COMPRESSORS, compression, (lambda: False, attributes))
        with pytest.raises(SinkError, match=rf"{compression} .*pip install 'ebpfstream\[kafka\]'"):
            await KafkaSink("127.0.0.1", "t", compression=compression).open()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tls": True, "ca": "{}/missing"}, "TLS cannot be set up with .*/missing: .* give PEM files"),
            ({"tls": True, "ca": "{}/empty"}, "TLS cannot be set up with .*/empty: .* give PEM files"),
            ({"tls": True, "certificate": "{}/empty"}, "TLS cannot be set up with .*/empty"),
            (LOGIN | {"password": None, "password_file": "{}/missing"}, "password .* read from .*/missing"),
            (LOGIN | {"password": None, "password_file": "{}"}, "the password cannot be read from"),
        ],
    )
    async def test_files_that_cannot_be_read(
        self, tmp_path: Path, options: dict[str, Any], message: str
    ) -> None:
        (tmp_path / "empty").touch()
        given: dict[str, Any] = {
            name: value.format(tmp_path) if isinstance(value, str) else value
            for name, value in options.items()
        }
        with pytest.raises(SinkError, match=message):
            await KafkaSink("127.0.0.1", "t", **given).open()

    @pytest.mark.parametrize("topic", ["t", "{type}"])
    async def test_nobody_is_there(self, caplog: pytest.LogCaptureFixture, topic: str) -> None:
        """It goes on, says so once, and takes nothing."""
        address = f"127.0.0.1:{free_port()}"
        with caplog.at_level(logging.WARNING, "ebpfstream"), anyio.fail_after(30):
            made = KafkaSink(address, topic)
            await made.open()
            for _ in range(3):
                with pytest.raises(SinkUnavailableError, match=rf"Kafka at {address} cannot be reached"):
                    await made.send(make_batch([ExampleEvent(1, "a", "b")]))
            await made.aclose()
        (record,) = [record for record in caplog.records if record.name == "ebpfstream"]
        assert record.getMessage().startswith(f"Kafka at {address} cannot be reached ([Errno 111]")
        assert record.getMessage().endswith("look whether it runs, and at the address; trying again")

    async def test_a_name_that_is_none(self) -> None:
        with anyio.fail_after(60):
            async with KafkaSink("no-such-host.invalid", "t") as made:
                with pytest.raises(
                    SinkUnavailableError, match=r"no-such-host.invalid:9092 cannot be reached"
                ):
                    await made.send(make_batch([ExampleEvent(1, "a", "b")]))

    async def test_who_is_there_is_not_kafka(self) -> None:
        """Somebody who ends every connection."""

        async def end(stream: anyio.abc.SocketStream) -> None:
            await stream.aclose()

        async with (
            await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(listener.serve, end)
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            with anyio.fail_after(30):
                async with KafkaSink(f"127.0.0.1:{port}", "t") as made:
                    with pytest.raises(
                        SinkUnavailableError, match=r"closes the connection: .* tls=, .* sasl="
                    ):
                        await made.send(make_batch([ExampleEvent(1, "a", "b")]))
            tasks.cancel_scope.cancel()

    async def test_it_is_closed_at_once_while_nobody_answers(self) -> None:
        """Somebody who says nothing; what is held by then is let go."""

        async def keep(stream: anyio.abc.SocketStream) -> None:
            async with stream:
                await anyio.sleep_forever()

        async with (
            await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(listener.serve, keep)
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            made = KafkaSink(f"127.0.0.1:{port}", "t")
            with anyio.fail_after(10):
                await made.open()
                with anyio.move_on_after(0.1) as sending:
                    await made.send(make_batch([ExampleEvent(1, "a", "b")]))
                assert sending.cancelled_caught
                await made.aclose(0)
            tasks.cancel_scope.cancel()

    async def test_a_sender_that_fails_is_no_error_of_the_event_loop(self) -> None:
        """Aiokafka tells transactions of it, of which there are none, in a callback of its task."""

        async def failing() -> None:
            raise RuntimeError("the transport is closed")

        told: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        producer = Producer(["127.0.0.1:1"], {"enable_idempotence": True, "acks": "all"})
        task = asyncio.create_task(failing())
        task.add_done_callback(producer._sender._fail_all)
        await asyncio.wait([task])
        await anyio.sleep(0)
        assert told == []
        await producer.end(1)
