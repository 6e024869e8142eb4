"""Events as Kafka's records, without Kafka."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import pytest
from aiokafka.partitioner import DefaultPartitioner, murmur2
from hypothesis import example, given
from hypothesis import strategies as st

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, DecodeError
from ebpfstream.events import I32, U8, U32, U64, Char, Comm, Computed, Event, Flag, Tail, WallClock
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.sinks import kafka_records
from ebpfstream.sinks.kafka_client import partitions_of
from ebpfstream.sinks.kafka_records import DEFAULT_KEY, Shape, check_key
from ebpfstream.testing import make_batch

ORIGIN = Origin("höst", "boot-id", "stream-id")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
OFFSET = 1_700_000_000_000_000_000  # nanoseconds: CLOCK_MONOTONIC was 0 in November 2023


def _joined(message: str) -> str:
    return message + "!"


@dataclass
class Step(Event):
    """As the ready-made programs' events: numbered, and with a time of day."""

    __schema_version__ = 3

    sequence: U64
    comm: Comm
    pid: U32
    message: Annotated[str, Tail()]
    loud: Annotated[str, Computed(_joined, ("message",))]
    delta: I32
    failed: Flag
    cpu: U32
    program: U8
    time: Annotated[datetime, WallClock("monotonic")]
    monotonic: U64


def step(number: int, pid: int = 7, **others: Any) -> Step:
    values: dict[str, Any] = {
        "sequence": number,
        "comm": "cat",
        "pid": pid,
        "message": "hello",
        "loud": "",
        "delta": -number,
        "failed": False,
        "cpu": 2,
        "program": 1,
        "time": EPOCH,
        "monotonic": number * 1_000_000,
    }
    return Step(**(values | others))


@dataclass
class Plain(Event):
    """An event of a program that numbers nothing."""

    number: U32
    text: Annotated[str, Char(8)]


@dataclass
class Numbered(Event):
    """By CPU alone."""

    cpu: U32
    sequence: U64


def batch(*events: Any, lost: tuple[Lost, ...] = (), origin: Origin | None = ORIGIN) -> EventBatch[Any]:
    made = make_batch(events, type=type(events[0]) if events else Step)
    return EventBatch(made.event_type, made.records, OFFSET, lost, None, origin)


def keys(key: str | None, *events: Any, origin: Origin | None = ORIGIN) -> list[bytes | None]:
    return [record.key for record in Shape(type(events[0]), key).records(batch(*events, origin=origin))]


def test_a_record_is_the_event() -> None:
    events = [step(number, message='" \\ é \\xff \\x0a') for number in (5, 6)]
    first, second = Shape(Step, DEFAULT_KEY).records(batch(*events))
    assert first.value + b"\n" + second.value + b"\n" == batch(*events).to_json_lines()
    assert json.loads(first.value)["message"] == next(iter(batch(*events))).message
    assert b"\n" not in first.value
    assert first.headers == [
        ("schema", b"step/3"),
        ("host", "höst".encode()),
        ("boot", b"boot-id"),
        ("stream", b"stream-id"),
        ("sequence", b"2/1/5"),
    ]
    assert second.headers == [*first.headers[:-1], ("sequence", b"2/1/6")]
    assert (first.timestamp, second.timestamp) == (1_700_000_000_005, 1_700_000_000_006)


def test_fields_are_those_chosen() -> None:
    chosen = batch(step(5)).select({"pid": "process", "comm": "comm"})
    (record,) = Shape(Step, "message").records(chosen)
    assert record.value == b'{"process":7,"comm":"cat"}'
    assert record.key == b"hello"
    assert record.headers[-1] == ("sequence", b"2/1/5")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (DEFAULT_KEY, "höst/7"),
        ("host", "höst"),
        ("pid", "7"),
        ("pid,host", "7/höst"),
        (" cpu , pid ", "2/7"),
        ("sequence", "5"),
        ("delta,monotonic", "-5/5000000"),
        ("comm", "cat"),
        ("message,pid", "hello/7"),
        ("loud,host", "hello!/höst"),
        ("failed", "False"),
        ("time", "2023-11-14 22:13:20.005000+00:00"),
        (None, None),
    ],
)
def test_a_key_is_of_any_fields(key: str | None, expected: str | None) -> None:
    (made,) = keys(key, step(5))
    assert made == (None if expected is None else expected.encode())


def test_keys_are_those_of_their_events() -> None:
    """From batch to batch, and for another host."""
    shape = Shape(Step, DEFAULT_KEY)
    for _ in range(2):
        for host in ("a", "b"):
            events = [step(number, pid=number % 3) for number in range(7)]
            made = shape.records(batch(*events, origin=ORIGIN._replace(host=host)))
            assert [record.key for record in made] == [f"{host}/{n % 3}".encode() for n in range(7)]


def test_a_host_of_any_name() -> None:
    """What formats take for their own as well."""
    origin = ORIGIN._replace(host="50%d%%")
    assert keys(DEFAULT_KEY, step(5), origin=origin) == [b"50%d%%/7"]
    assert keys("pid,host,comm", step(5), origin=origin) == [b"7/50%d%%/cat"]


@given(
    st.integers(0, 41).flatmap(lambda n: st.lists(st.binary(min_size=n, max_size=n), min_size=1, max_size=9))
)
@example([b""])
@example([b"", b""])
@example([b"\xff" * 40, b"\0" * 40, b"\xff\0\0\0" * 10])
def test_hashes_are_those_of_other_clients(alike: list[bytes]) -> None:
    assert list(kafka_records.murmur2(alike)) == list(map(murmur2, alike))


@given(st.sets(st.binary(max_size=6), max_size=40), st.integers(1, 100))
def test_each_key_has_its_partition(several: set[bytes], count: int) -> None:
    where = DefaultPartitioner()
    expected = {key: where(key, list(range(count)), []) for key in several}
    assert partitions_of(several, count) == expected


def test_without_a_stream_the_host_is_this_one() -> None:
    (record,) = Shape(Step, DEFAULT_KEY).records(batch(step(5), origin=None))
    assert record.key == f"{socket.gethostname()}/7".encode()
    assert record.headers == [("schema", b"step/3"), ("sequence", b"2/1/5")]


def test_without_numbers_and_times() -> None:
    (record,) = Shape(Plain, DEFAULT_KEY).records(batch(Plain(1, "x")))
    assert record.key == "höst".encode()  # it has no pid
    assert [name for name, _ in record.headers] == ["schema", "host", "boot", "stream"]
    assert record.headers[0] == ("schema", b"plain")
    assert record.timestamp is None


def test_without_a_program() -> None:
    (record,) = Shape(Numbered, None).records(batch(Numbered(3, 9)))
    assert record.headers[-1] == ("sequence", b"3/9")


def test_losses_are_records_before_the_events() -> None:
    when = datetime(2024, 2, 3, 4, 5, 6, 789_000, UTC)
    lost = (Lost(1, 3, 10, 12, when), Lost(None, 4))
    made = Shape(Step, DEFAULT_KEY).records(batch(step(5), lost=lost))
    first, second, event = made
    assert [json.loads(record.value).keys() for record in (first, second)] == [{"lost"}, {"lost"}]
    assert json.loads(first.value)["lost"]["last_sequence"] == 12
    assert (first.key, second.key) == (host := "höst".encode(), host)
    assert first.headers[0] == second.headers[0] == ("schema", b"lost")
    assert first.headers[1:4] == second.headers[1:] == event.headers[1:4]
    assert first.headers[4] == ("sequence", b"1/10-12")
    assert first.timestamp == int(when.timestamp() * 1000)
    assert second.timestamp is None
    assert event.headers[-1] == ("sequence", b"2/1/5")


def test_losses_alone() -> None:
    (record,) = Shape(Step, "pid").records(batch(lost=(Lost(0, 1, 0, 0),)))
    assert record.key is None  # no process lost them
    assert record.headers[-1] == ("sequence", b"0/0-0")
    assert Shape(Step, "pid").records(batch()) == []


def test_what_does_not_fit() -> None:
    whole = batch(step(1))
    torn = EventBatch(Step, whole.records._replace(runs=[*whole.records.runs, (0, 16, 3, 1)]))
    for key in (DEFAULT_KEY, "comm", None):
        with pytest.raises(DecodeError):
            Shape(Step, key).records(torn)


@pytest.mark.parametrize("key", ["", "pid,", "a b", "pid;comm", "{pid}"])
def test_what_can_be_no_key(key: str) -> None:
    with pytest.raises(ArgumentError, match="give names of fields"):
        check_key(key)


def test_a_key_that_the_type_does_not_have() -> None:
    with pytest.raises(ArgumentError, match=r"Step has no field 'ppid'; there are host, sequence, comm, pid"):
        Shape(Step, "host,ppid")


def test_its_size_is_at_least_that_in_a_batch() -> None:
    from aiokafka.record.default_records import DefaultRecordBatchBuilder

    for event in (
        step(1),
        step(2, message="x" * 10_000),
        step(2**63, delta=0, monotonic=0, pid=2**32 - 1, cpu=2**32 - 1),
    ):
        (record,) = Shape(Step, DEFAULT_KEY).records(batch(event))
        builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
        empty = builder.size()
        builder.append(0, record.timestamp, record.key, record.value, record.headers)
        assert 0 <= record.size - (builder.size() - empty) <= 48
