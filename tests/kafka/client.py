"""Topics as another client than ours sees them: librdkafka."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from confluent_kafka import Consumer, ElectionType, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it has them, and does not say so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from confluent_kafka import Message

SECONDS: Final = 60.0  # for anything here; less than one is usual
# Retries soon; says nothing of its own accord.
_SETTINGS: Final = {"reconnect.backoff.max.ms": 200, "socket.timeout.ms": 10_000, "log_level": 0}


class Record(NamedTuple):
    """One record of a topic; `timestamp` in milliseconds since 1970, as the broker keeps it."""

    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


def read_all(servers: str, topic: str) -> list[Record]:
    """Every record that is in a topic when its end is reached: partition by partition, each in its order.

    Raises:
        KafkaException: there is no such topic, or its end is not reached in time.
    """
    until = time.monotonic() + SECONDS
    group = {"group.id": "none", "enable.auto.commit": False}  # which librdkafka asks for, and does not use
    reading = {"enable.partition.eof": True, "check.crcs": True, "auto.offset.reset": "error"}
    reading["fetch.wait.max.ms"] = 10
    with Consumer({"bootstrap.servers": servers, **_SETTINGS, **group, **reading}) as consumer:
        found = consumer.list_topics(topic, timeout=SECONDS).topics[topic]
        if found.error:
            raise KafkaException(found.error)
        records: dict[int, list[Record]] = {partition: [] for partition in found.partitions}
        unfinished = set(records)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in records])
        while unfinished:
            if time.monotonic() > until:
                raise KafkaException(f"the end of {topic} {sorted(unfinished)} was not reached")
            for message in consumer.consume(10_000, timeout=0.1):
                partition = message.partition()
                if not (error := message.error()):
                    record = _record(message)
                    records[record.partition].append(record)
                elif error.code() == KafkaError._PARTITION_EOF and partition is not None:
                    unfinished.discard(partition)
                elif not error.retriable():
                    raise KafkaException(error)
    return [record for partition in sorted(records) for record in records[partition]]


def _record(message: Message) -> Record:
    partition, offset = message.partition(), message.offset()
    assert partition is not None
    assert offset is not None
    headers: Any = message.headers() or ()  # annotated as what may be given, not as what is
    return Record(partition, offset, message.timestamp()[1], message.key(), message.value(), tuple(headers))


def create_topic(
    servers: str,
    name: str,
    *,
    partitions: int = 3,
    replication: int = 1,
    config: Mapping[str, str] | None = None,
) -> None:
    """Create a topic; when this returns, each of `servers` knows a leader of each of its partitions.

    Raises:
        KafkaException: there is one already, or too few nodes are up.
    """
    topic = NewTopic(
        name, num_partitions=partitions, replication_factor=replication, config=dict(config or {})
    )
    with _admin(servers) as admin:
        _result(admin.create_topics([topic])[name])
    for server in servers.split(","):
        _wait(server, lambda leaders: len(leaders) == partitions and -1 not in leaders.values(), name)


def delete_topic(servers: str, name: str) -> None:
    """Delete a topic; when this returns, none of `servers` knows it any more."""
    with _admin(servers) as admin:
        _result(admin.delete_topics([name])[name])
    for server in servers.split(","):
        _wait(server, lambda leaders: not leaders, name)


def leader(servers: str, topic: str, partition: int = 0) -> int:
    """The node that leads a partition; -1 if none does."""
    with _admin(servers) as admin:
        return _leaders(admin, topic)[partition]


def elect_preferred_leaders(servers: str, topic: str) -> None:
    """Make the first replica of each partition its leader again, as it was before its node went and came."""
    until = time.monotonic() + SECONDS
    with _admin(servers) as admin:
        partitions = [TopicPartition(topic, partition) for partition in _leaders(admin, topic)]
        while partitions:
            outcome = _result(admin.elect_leaders(ElectionType.PREFERRED, partitions))
            partitions = [partition for partition in partitions if not _is_led(outcome[partition])]
            if time.monotonic() > until:
                raise TimeoutError(f"the first replicas of {partitions} are not in step")


def _is_led(error: KafkaError | None) -> bool:
    """Whether the first replica leads; false if it has not caught up yet."""
    if error and error.code() == KafkaError.PREFERRED_LEADER_NOT_AVAILABLE:
        time.sleep(0.1)
        return False
    if error and error.code() != KafkaError.ELECTION_NOT_NEEDED:
        raise KafkaException(error)
    return True


def refuse(servers: str, topic: str, user: str, operation: AclOperation = AclOperation.ALL) -> None:
    """Let a user of a SASL listener not do something with a topic; ALL: not even know of it."""
    acl = AclBinding(
        ResourceType.TOPIC,
        topic,
        ResourcePatternType.LITERAL,
        f"User:{user}",
        "*",
        operation,
        AclPermissionType.DENY,
    )
    with _admin(servers) as admin:
        _result(admin.create_acls([acl])[acl])


def nodes(servers: str, *, timeout: float = 2.0) -> set[int]:
    """The nodes that the first of `servers` to answer holds for alive; none if none answers in time."""
    with _admin(servers) as admin:
        try:
            return set(admin.list_topics(timeout=timeout).brokers)
        except KafkaException:
            return set()


def _admin(servers: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": servers, **_SETTINGS})


def _result(future: Future[Any]) -> Any:
    return future.result(SECONDS)


def _leaders(admin: AdminClient, topic: str) -> dict[int, int]:
    """Of all topics: a client that asks for one that is no more is told of it until it forgets it."""
    found = admin.list_topics(timeout=SECONDS).topics.get(topic)
    return {number: partition.leader for number, partition in found.partitions.items()} if found else {}


def _wait(server: str, wanted: Callable[[dict[int, int]], bool], topic: str) -> None:
    until = time.monotonic() + SECONDS
    with _admin(server) as admin:
        while not wanted(leaders := _leaders(admin, topic)):
            if time.monotonic() > until:
                raise TimeoutError(f"{server} knows these leaders of {topic}: {leaders}")
            time.sleep(0.05)
