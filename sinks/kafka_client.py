"""The Kafka client: settings, what its errors mean, and closing it; alone in importing aiokafka."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypedDict

try:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
    from aiokafka.abc import ConsumerRebalanceListener
    from aiokafka.conn import create_conn
    from aiokafka.partitioner import murmur2
    from aiokafka.protocol.metadata import MetadataRequest
except ImportError as error:
    raise ImportError(f"Kafka needs aiokafka ({error}): pip install 'ebpfstream[kafka]'") from error

from ebpfstream.errors import ArgumentError, SinkError
from ebpfstream.options import check_choice
from ebpfstream.sinks import kafka_records
from ebpfstream.turns import to_the_end
from ebpfstream.waiting import is_asyncio

# Where nobody has set up logging, Python would print what aiokafka says of each attempt.
logging.getLogger("aiokafka").addHandler(logging.NullHandler())

Compression = Literal["zstd", "snappy", "gzip", "lz4", "none"]
Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

KafkaError = errors.KafkaError


class InvalidRecordError(errors.BrokerResponseError):  # type: ignore[misc]
    """A record is not as the topic wants it; aiokafka (0.14) takes the number for that of any error."""

    errno = 87
    message = "INVALID_RECORD"
    description = "The broker has found a record invalid"


errors.kafka_errors.setdefault(InvalidRecordError.errno, InvalidRecordError)

REJECTED: Final = (
    errors.MessageSizeTooLargeError,
    errors.RecordListTooLargeError,
    errors.InvalidTimestampError,
    InvalidRecordError,
)
"""A record of a batch will never be taken."""
_CONNECTING: Final = (
    "client_id",
    "ssl_context",
    "security_protocol",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
    "request_timeout_ms",
)
UNREACHABLE: Final = (errors.KafkaConnectionError, OSError)
"""No connection comes about."""
_FINAL: Final = (
    errors.AuthenticationFailedError,
    errors.AuthenticationMethodNotSupported,
    errors.ClusterAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.IllegalSaslStateError,
    errors.IncompatibleBrokerVersion,
    errors.InvalidTopicError,
    errors.SaslAuthenticationFailed,
    errors.TopicAuthorizationFailedError,
    errors.UnknownTopicOrPartitionError,
    errors.UnsupportedSaslMechanismError,
    errors.UnsupportedVersionError,
    ssl.SSLError,
)
_PORT: Final = "9092"  # Kafka's own
_MANY: Final = 4  # keys of one length that are quicker hashed together
# Seconds until a topic counts as missing: a new one is not known at once.
_TOPIC_PATIENCE: Final = 3.0


class Login(TypedDict, total=False):
    """How a broker is spoken to, and who is speaking; KafkaSink and KafkaSource take these as keyword arguments."""

    tls: bool
    """Whether to encrypt, and to look at the broker's certificate."""
    ca: str | None
    """A file of the authorities' certificates that are trusted, in place of the system's (PEM, as all of them)."""
    certificate: str | None
    """A file with a certificate of one's own, where the broker asks for one."""
    private_key: str | None
    """A file with its key, where that is not in the same."""
    sasl: Mechanism | None
    """How to log in: "PLAIN" sends the password as it is, so it needs `tls`; "SCRAM-SHA-256", "SCRAM-SHA-512"."""
    username: str | None
    """Who logs in."""
    password: str | None
    """The password."""
    password_file: str | None
    """A file with the password, which keeps it out of command lines."""


class Security(NamedTuple):
    """The same with what is so unless told otherwise."""

    tls: bool = False
    ca: str | None = None
    certificate: str | None = None
    private_key: str | None = None
    sasl: Mechanism | None = None
    username: str | None = None
    password: str | None = None
    password_file: str | None = None

    def __repr__(self) -> str:
        return f"<Security tls={self.tls} sasl={self.sasl} username={self.username}>"

    def check(self) -> None:
        """Raises ArgumentError for what does not go together."""
        if self.sasl is not None:
            check_choice("sasl", self.sasl, Mechanism)
        for name in ("ca", "certificate", "private_key"):
            if getattr(self, name) is not None and not self.tls:
                raise ArgumentError(f"{name}= is about TLS: give tls=True (tls=yes in an address) as well")
        if self.private_key is not None and self.certificate is None:
            raise ArgumentError("private_key= belongs to a certificate: give certificate= as well")
        if self.password is not None and self.password_file is not None:
            raise ArgumentError("password= and password_file= are both given: give one")
        has_password = self.password is not None or self.password_file is not None
        if self.sasl is None and (self.username is not None or has_password):
            raise ArgumentError(
                'a user is given, and not how to log in: give sasl="SCRAM-SHA-512" or the like'
            )
        if self.sasl is not None and (self.username is None or not has_password):
            raise ArgumentError(f"sasl={self.sasl!r} needs username= and password= or password_file=")

    def settings(self) -> dict[str, Any]:
        """As aiokafka takes them; reads the files.  Raises SinkError."""
        made: dict[str, Any] = {
            "security_protocol": ("SASL_" if self.sasl else "") + ("SSL" if self.tls else "PLAINTEXT")
        }
        if self.tls:
            made["ssl_context"] = self._tls_context()
        if self.sasl is not None:
            made |= {
                "sasl_mechanism": self.sasl,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self._password(),
            }
        return made

    def _tls_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.private_key)
        except OSError as error:  # ssl.SSLError is one
            given = ", ".join(filter(None, (self.ca, self.certificate, self.private_key)))
            raise SinkError(f"TLS cannot be set up with {given}: {error}: give PEM files") from error
        return context

    def _password(self) -> str:
        if self.password is not None:
            return self.password
        assert self.password_file is not None
        try:
            return Path(self.password_file).read_text().rstrip("\n")
        except (OSError, ValueError) as error:
            raise SinkError(f"the password cannot be read from {self.password_file}: {error}") from error


def bootstrap_servers(servers: str) -> list[str]:
    """`host:port,host,[::1]:port` as a list, with Kafka's port where none is given.  Raises ArgumentError."""
    listed = [server.strip() for server in servers.split(",") if server.strip()]
    if not listed:
        raise ArgumentError("there is no server: give host:port, or several with commas between")
    return [_with_port(server) for server in listed]


def _with_port(server: str) -> str:
    found = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\])(?::(\d{1,5}))?", server)
    if found is None or not 0 < int(port := found[2] or _PORT) < 65536:
        raise ArgumentError(f"{server!r} is no server: give host:port, such as 127.0.0.1:9092 or [::1]:9092")
    return f"{found[1]}:{port}"


def partitions_of(keys: Iterable[bytes], count: int) -> dict[bytes, int]:
    """Where Kafka's own clients put these keys."""
    by_length: dict[int, list[bytes]] = {}
    for key in keys:
        by_length.setdefault(len(key), []).append(key)
    found: dict[bytes, int] = {}
    for alike in by_length.values():
        hashes = kafka_records.murmur2(alike) if len(alike) >= _MANY else map(murmur2, alike)
        found.update(zip(alike, [(one & 0x7FFFFFFF) % count for one in hashes], strict=True))
    return found


def is_final(error: BaseException) -> bool:
    """Whether trying again will not do, until somebody changes something."""
    return isinstance(error, _FINAL) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def explanation(error: BaseException, servers: list[str], topic: str) -> str:
    """What went wrong, and what to do about it; `topic` may be empty, if that is not known."""
    where = ",".join(servers)
    said = ", ".join(map(str, error.args)) or type(error).__name__
    match error:
        case errors.TopicAuthorizationFailedError():
            return (
                f"Kafka does not let this user use the topic {topic or said!r}: "
                "give it the right to describe it, and to write or read"
            )
        case errors.UnknownTopicOrPartitionError() | errors.InvalidTopicError():
            return f"there is no topic {topic!r} at {where}, and it is not made by itself: create it, or give another"
        case errors.GroupAuthorizationFailedError():
            return "Kafka does not let this user use the consumer group: give it the right to read it"
        case errors.InvalidSessionTimeoutError():
            return f"Kafka at {where} does not allow this session_timeout=: look at its group.min.session.timeout.ms"
        case errors.ClusterAuthorizationFailedError():
            return f"Kafka does not let this user write at {where}: give it the right to (IdempotentWrite)"
        case errors.AuthenticationFailedError() | errors.SaslAuthenticationFailed():
            return f"Kafka at {where} refuses user or password ({said}): look at username= and password="
        case errors.UnsupportedSaslMechanismError():
            return f"Kafka at {where} does not log in this way ({said}): give another sasl="
        case errors.IllegalSaslStateError():
            return f"Kafka at {where} lets nobody log in: leave out sasl=, or give the port that wants it"
        case errors.IncompatibleBrokerVersion() | errors.UnsupportedVersionError():
            return f"Kafka at {where} is of a version that we do not speak ({said}): use 2.1 or newer"
        case ssl.SSLCertVerificationError():
            return f"the certificate of {where} is not trusted: give the authority's with ca= ({error.verify_message})"
        case ssl.SSLError():
            return (
                f"Kafka at {where} and this client do not come to terms on TLS ({said}): look whether this port "
                "is the one for TLS, and whether it wants a certificate="
            )
        case errors.MessageSizeTooLargeError() | errors.RecordListTooLargeError():
            return f"the topic {topic!r} takes no record as large as this: raise its max.message.bytes"
        case errors.InvalidTimestampError():
            return (
                f"the topic {topic!r} takes no record as old as this: look at its message.timestamp settings"
            )
        case InvalidRecordError():
            return f"the topic {topic!r} takes no such record: if it is compacted, every record needs a key (key=)"
        case errors.LeaderNotAvailableError() | errors.NotLeaderForPartitionError():
            return f"nobody at {where} leads a partition that is written to: look whether all brokers run"
        case TimeoutError() | errors.KafkaTimeoutError() | errors.RequestTimedOutError():
            return f"Kafka at {where} does not answer in time: look whether it runs"
        case errors.KafkaConnectionError() | ConnectionResetError():
            return (
                f"Kafka at {where} closes the connection: look whether it runs, and whether this port wants tls=, "
                "a certificate= or sasl="
            )
        case OSError():
            return f"Kafka at {where} cannot be reached ({error}): look whether it runs, and at the address"
    return f"Kafka at {where} does not do its work ({error}): look at what it logs"


def check_loop(error: type[Exception]) -> None:
    """Raises the error where the loop is not asyncio's."""
    if not is_asyncio():
        raise error(
            "Kafka needs asyncio, and this is trio: aiokafka has no other loop; run this part of the program with "
            "anyio.run(main), whose default is asyncio"
        )


def is_passing(error: BaseException) -> bool:
    """Whether a new consumer may do better: this one, or the broker, was not up to it."""
    if is_final(error):
        return False
    passing = (*UNREACHABLE, errors.BrokerNotAvailableError)
    return isinstance(error, passing) or type(error) is KafkaError or getattr(error, "retriable", False)


def offsets(topic: str, done: dict[int, int]) -> dict[TopicPartition, int]:
    """Where a topic's partitions go on, as consumers take it."""
    return {TopicPartition(topic, partition): offset for partition, offset in done.items()}


def listener(
    revoked: Callable[[], Awaitable[None]], assigned: Callable[[set[TopicPartition]], Awaitable[None]]
) -> Any:
    """What calls functions when partitions may become another member's, and when it has been given some."""

    class Listener(ConsumerRebalanceListener):  # type: ignore[misc]
        async def on_partitions_revoked(self, _: set[TopicPartition]) -> None:
            await revoked()

        async def on_partitions_assigned(self, partitions: set[TopicPartition]) -> None:
            await assigned(partitions)

    return Listener()


async def partitions(producer: Producer, topic: str) -> int:
    """How many partitions a topic has.

    Raises UnknownTopicOrPartitionError when there is none after some seconds, TopicAuthorizationFailedError,
    KafkaConnectionError when nobody answers.
    """
    return len(await _partitions(producer.client, topic, _TOPIC_PATIENCE))


async def _partitions(client: Any, topic: str, within: float) -> set[int]:
    found: set[int] | None
    try:
        async with asyncio.timeout(within):
            found = await client._wait_on_metadata(topic)  # noqa: SLF001
    except (TimeoutError, errors.UnknownTopicOrPartitionError):  # it says that also if nobody could be asked
        is_answered = await client.force_metadata_update()
        found = client.cluster.partitions_for_topic(topic)
        if found is None:
            raise (
                errors.UnknownTopicOrPartitionError if is_answered else errors.KafkaConnectionError
            ) from None
    return found


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Producer(AIOKafkaProducer):  # type: ignore[misc]
    """Aiokafka's (0.14), but it says why it cannot connect, and ends whatever it is doing.

    There `stop` never returns while a batch of an idempotent producer cannot be delivered, and what is cancelled
    leaves tasks and connections behind; what ends those has no public name.
    """

    def __init__(self, servers: list[str], settings: dict[str, Any]) -> None:
        super().__init__(bootstrap_servers=servers, **settings)
        self._connecting = settings
        if self._txn_manager is not None:
            # Of a sender that fails it tells whoever waits for a transaction, and fails where nobody can.
            self._txn_manager.fatal_error = _nobody_waits

    async def start(self) -> None:
        """Connect.  Raises KafkaError, OSError."""
        await _bootstrap(self.client, self._connecting)
        await self._sender.start()

    async def end(self, patience: float) -> None:
        """Stop if that takes no more than so many seconds, or else end; cancelled, it ends at once."""
        transports = _transports(self.client)
        stopping = asyncio.create_task(self.stop())
        try:
            await asyncio.wait([stopping], timeout=patience)
        finally:
            if not stopping.done():
                await to_the_end(self._end, stopping, transports)
        with suppress(Exception, asyncio.CancelledError):
            stopping.result()

    async def _end(self, stopping: asyncio.Task[None], transports: set[asyncio.WriteTransport]) -> None:
        await _ended(stopping, *_tasks_of(self._sender, self.client, self._message_accumulator))
        await _closed(self.client, transports)


def _nobody_waits(error: BaseException) -> None:
    pass


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]
    """The same of aiokafka's consumer."""

    def __init__(self, servers: list[str], settings: dict[str, Any]) -> None:
        super().__init__(bootstrap_servers=servers, **settings)
        self._client.bootstrap = partial(_bootstrap, self._client, settings)

    async def look_for(self, topic: str) -> None:
        """Return when it knows the topic, once it has been started; by itself it would wait for half a minute.

        Raises as `partitions` does.
        """
        await _partitions(self._client, topic, _TOPIC_PATIENCE)

    async def end(self, patience: float) -> None:
        """Leave the group if that takes no more than so many seconds, or else without a word; end everything."""
        transports = _transports(self._client)
        stopping = asyncio.create_task(self.stop())
        await asyncio.wait([stopping], timeout=patience)
        await _ended(stopping, *_tasks_of(self._client, self._coordinator, self._fetcher))
        await _closed(self._client, transports)


async def _bootstrap(client: Any, settings: dict[str, Any]) -> None:
    """Learn of the brokers from one of the servers.  Raises KafkaError, OSError."""
    connecting: dict[str, Any] = {name: settings[name] for name in _CONNECTING if name in settings}
    failures: list[Exception] = []
    for host, port, _ in client.hosts:
        try:
            metadata = await _metadata_from(host, port, connecting)
        except (KafkaError, OSError) as error:
            cause = error.__cause__
            failures.append(cause if isinstance(cause, ssl.SSLError) else error)
            continue
        client.cluster.update_metadata(metadata)
        client._sync_task = asyncio.create_task(client._md_synchronizer())  # noqa: SLF001
        return
    raise next(filter(is_final, failures), failures[0])


async def _metadata_from(host: str, port: int, connecting: dict[str, Any]) -> Any:
    connection = await create_conn(host, port, **connecting)
    try:
        metadata = await connection.send(MetadataRequest([]))
    finally:
        connection.close()
    if not metadata.brokers:
        raise errors.BrokerNotAvailableError("it has no brokers yet")
    return metadata


def _transports(client: Any) -> set[asyncio.WriteTransport]:
    writers = [connection._writer for connection in client._conns.values()]  # noqa: SLF001
    return {writer.transport for writer in writers if writer is not None}


async def _closed(client: Any, transports: set[asyncio.WriteTransport]) -> None:
    transports |= _transports(client)
    connections = [connection.close() for connection in client._conns.values()]  # noqa: SLF001
    for transport in transports:
        transport.abort()  # or what the other end does not read would keep it open
    await asyncio.gather(*connections, return_exceptions=True)


def _tasks_of(*owners: object) -> list[asyncio.Task[Any]]:
    """Those that run methods of these objects."""
    found = []
    for task in asyncio.all_tasks():
        frame = getattr(task.get_coro(), "cr_frame", None)
        owner = frame and frame.f_locals.get("self")
        if owner is not None and any(owner is one for one in owners):
            found.append(task)
    return found
