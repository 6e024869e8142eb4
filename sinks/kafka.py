"""A Kafka topic."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from math import inf
from typing import Any, Final, Literal, Self, Unpack

from ebpfstream import text
from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkError, SinkUnavailableError
from ebpfstream.options import Seconds, Size, check_choice
from ebpfstream.sink import CLOSING, Delivery, Sink
from ebpfstream.sink_url import SinkURL
from ebpfstream.sinks import kafka_client
from ebpfstream.sinks.kafka_client import Compression, Login, Security, bootstrap_servers
from ebpfstream.sinks.kafka_producer import Sending
from ebpfstream.sinks.kafka_records import DEFAULT_KEY, Shape, check_key
from ebpfstream.turns import to_the_end

Acks = Literal["all", "1"]

_PATIENCE: Final = 5.0  # seconds that opening waits for a broker, before it goes on without one
_MOMENT: Final = 1.0  # seconds that a batch waits, before the queue has to
_FOR_ARRIVING: Final = 0.7  # of the time for closing; the rest is for disconnecting


class KafkaOptions(Login, Delivery, total=False):
    """What KafkaSink takes as well: how a broker is spoken to, and what every sink takes."""


class KafkaSink(Sink):
    """Sends each event as a record to a Kafka topic; a batch has arrived when all its records are acknowledged.

        KafkaSink("127.0.0.1:9092", topic="exec")

    `servers` are some of the cluster's, `host:port` with commas between.  `{type}` in `topic` stands for the event
    type's name, such as exec-event.

    **A record** is the event's JSON, with the time of the event.  `key` decides on its partition, as Kafka's own
    clients do, and so on what stays in order: names of fields, and "host", with commas between; by default a process of
    a machine.  None spreads batches over all partitions.  The headers say the schema, and where the event comes from:
    schema, host, boot, stream, sequence.  All together name the event, so that it is known if it comes twice.  Losses
    are records of their own, `{"lost": …}` with the schema "lost", whose key is the host.

    Records go to a partition in batches of about `batch_size` bytes, each compressed then ("zstd", "snappy", "gzip",
    "lz4", "none").  About `in_flight` bytes of records may be on their way; the rest is in the queue.

    **At least once.**  While Kafka is away everything is kept (see `when_full` and `durable`), and sent in order when
    it is back.  What was not acknowledged then may arrive twice.  A request that is not answered in `request_timeout`
    seconds counts as failed.  With `acks="all"` all replicas that are in step have a record when it is acknowledged;
    with "1" the leader alone: what it did not pass on before it failed is lost.  Kafka itself writes to the disk later;
    a topic with replicas survives the loss of a machine.

    A record that is too large for the topic, or too old, is rejected, and the others of its batch arrive.

    **Opening** waits some seconds for a broker, and then goes on without one.  A login that is refused, a certificate
    that is not trusted, or a topic that is missing and that Kafka does not make by itself end it (SinkError), but only
    if there never was a connection: once there was one, everything is waited for.

    `sasl` ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512") logs in with `username` and `password`, which `password_file`
    keeps out of command lines; "PLAIN" sends them readable unless `tls` encrypts, with the authorities' certificates
    in `ca` (by default the system's) and a `certificate` of one's own.  Files are PEM.

    Needs the extra `kafka`, and asyncio: on trio it is refused (SinkError).  Kafka ≥ 2.1 (for zstd).
    """

    address_example = "kafka://127.0.0.1:9092/exec?acks=all"

    def __init__(
        self,
        servers: str,
        topic: str,
        *,
        key: str | None = DEFAULT_KEY,
        acks: Acks = "all",
        compression: Compression = "zstd",
        batch_size: Size = 1 << 18,
        in_flight: Size = 4 << 20,
        request_timeout: Seconds = 15.0,
        **options: Unpack[KafkaOptions],
    ) -> None:
        given: dict[str, Any] = {**options}
        login = {name: given.pop(name) for name in Security._fields if name in given}
        super().__init__(**given)
        self._servers = bootstrap_servers(servers)
        _check_topic(topic)
        check_key(key)
        check_choice("acks", acks, Acks)
        check_choice("compression", compression, Compression)
        for name, size in (("batch_size", batch_size), ("in_flight", in_flight)):
            if size < 1:
                raise ArgumentError(f"{name}={size} is impossible: give bytes, 1 or more")
        if not 0 < request_timeout < inf:
            raise ArgumentError(f"request_timeout={request_timeout} is impossible: give seconds, more than 0")
        self._security = Security(**login)
        self._security.check()
        self.name = f"kafka://{','.join(self._servers)}/{topic}"
        self._topic = topic
        self._key = key
        self._in_flight = in_flight
        self._request_timeout = request_timeout
        self._settings: dict[str, Any] = {
            "client_id": "ebpfstream",
            "acks": "all" if acks == "all" else 1,
            "enable_idempotence": acks == "all",
            "compression_type": None if compression == "none" else compression,
            "max_batch_size": batch_size,
            "request_timeout_ms": int(request_timeout * 1000),
            "retry_backoff_ms": 250,
        }
        self._sending: Sending | None = None
        self._shapes: dict[type[Any], tuple[str, Shape]] = {}

    @classmethod
    def from_url(cls, url: SinkURL) -> Self:
        """`kafka://host:9092,host2:9092/topic?acks=all`."""
        topic = url.path.strip("/")
        if "@" in url.host:
            raise ArgumentError(
                f"{url.scheme}://…@{url.host.rpartition('@')[2]}: an address holds no user: "
                "give the options username= and password_file="
            )
        if not url.host or not topic:
            raise ArgumentError(
                f"{url.text!r} lacks servers or a topic: write for example {cls.address_example}"
            )
        return cls(url.host, topic, **url.arguments(cls, without="servers topic"))

    async def open(self) -> None:
        """Connect, or go on without a connection after some seconds.  Raises SinkError."""
        kafka_client.check_loop(SinkError)
        settings = self._settings | await asyncio.to_thread(self._security.settings)
        try:
            self._sending = Sending(self._servers, settings, self._request_timeout)
            self._sending.start()
        except (RuntimeError, ValueError) as error:  # a compression whose library is not there
            raise SinkError(f"{self.name}: {error}: pip install 'ebpfstream[kafka]'") from error
        try:
            await self._connected(self._sending)
        except BaseException:
            await to_the_end(self._sending.close, _MOMENT)
            raise

    async def _connected(self, sending: Sending) -> None:
        ends_at = asyncio.get_running_loop().time() + _PATIENCE
        while not sending.connected and (left := ends_at - asyncio.get_running_loop().time()) > 0:
            _check(sending, self._topic)
            await sending.changed(left)
        if "{" not in self._topic:  # which topic that means, the first event says
            await self._partitions(sending, self._topic)

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None]:
        """Take a batch; what is returned awaits that it has arrived.

        Raises SinkUnavailableError when there is no room because nothing arrives, DecodeError, SinkError.
        """
        assert self._sending is not None
        topic, shape = self._shape(batch)
        await self._room(self._sending, topic)
        return self._sending.put(topic, shape.records(batch), len(batch.lost))

    async def _room(self, sending: Sending, topic: str) -> None:
        """Wait until there is a connection, or was one, and what is on its way leaves room."""
        ends_at = asyncio.get_running_loop().time() + _MOMENT
        while await self._partitions(sending, topic) is None or sending.held >= self._in_flight:
            _check(sending, topic)
            left = ends_at - asyncio.get_running_loop().time()
            if left <= 0 and sending.error is not None:
                raise SinkUnavailableError(sending.explain(sending.error, topic))
            await sending.changed(max(left, _MOMENT / 10))

    async def _partitions(self, sending: Sending, topic: str) -> int | None:
        try:
            return await sending.partitions(topic)
        except kafka_client.KafkaError as error:
            raise SinkError(sending.explain(error, topic)) from error

    def _shape(self, batch: EventBatch[Any]) -> tuple[str, Shape]:
        made = self._shapes.get(batch.event_type)
        if made is None:
            topic = self._topic.replace("{type}", text.hyphenated(batch.event_type.__name__))
            made = self._shapes[batch.event_type] = topic, Shape(batch.event_type, self._key)
        return made

    async def aclose(self, deadline: float = CLOSING) -> None:
        """Wait for what is on its way, as long as there is a connection and time; then disconnect."""
        if self._sending is not None:
            await to_the_end(self._close, self._sending, deadline)

    async def _close(self, sending: Sending, deadline: float) -> None:
        ends_at = asyncio.get_running_loop().time() + _FOR_ARRIVING * deadline
        while sending.held and (sending.connected or sending.error is None):
            left = ends_at - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await sending.changed(left)
        await sending.close((1 - _FOR_ARRIVING) * deadline)


def _check(sending: Sending, topic: str) -> None:
    """Raises SinkError if there will never be a connection."""
    if sending.failed:
        assert sending.error is not None
        raise SinkError(sending.explain(sending.error, topic)) from sending.error


def _check_topic(topic: str) -> None:
    plain = topic.replace("{type}", "type")
    allowed = plain.replace(".", "").replace("_", "").replace("-", "")
    if not (allowed.isascii() and allowed.isalnum() and len(plain) < 250):
        raise ArgumentError(
            f"topic={topic!r} is impossible: give letters, digits, dots, hyphens and underscores, at most 249"
        )
