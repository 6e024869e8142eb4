"""KafkaSource with a real broker: what comes back, to whom, and what of it is noted as done."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import pickle
import re
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar, assert_type

import anyio
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it has them, and does not say so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from ebpfstream import (
    U32,
    U64,
    ArgumentError,
    Completeness,
    DecodeError,
    Event,
    ExecEvent,
    KafkaSink,
    KafkaSource,
    Lost,
    Sink,
    SourceError,
    StreamBusyError,
    StreamClosedError,
    SyscallEvent,
    forward,
    trace_execve,
)
from ebpfstream.batch import EventBatch
from ebpfstream.events import Array, Integer, Tail, layout
from ebpfstream.origin import Origin
from ebpfstream.testing import cancelled_at, make_batch, ways_to_cancel
from tests.kafka import client
from tests.kafka.broker import PASSWORD, USER, Cluster, Listener

if TYPE_CHECKING:
    from tests.kafka.proxy import Proxy

pytestmark = [pytest.mark.kafka, pytest.mark.anyio]

T = TypeVar("T")

HERE = Origin("here", "a boot", "1")
THERE = Origin("there", "a boot", "2")
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SESSION: Final = 6.0  # seconds; brokers allow no less
WAIT: Final = 60.0  # seconds for what takes less than one, or a session


@dataclass
class Mine(Event):
    cpu: U32
    program: U32
    sequence: U64
    pid: U32
    message: Annotated[str, Tail()]


@dataclass
class One(Event):
    pid: U32
    name: Annotated[str, Tail()]


@pytest.fixture(
    scope="module",
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """An object that is not closed says so when it is collected, and warnings are errors."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A broker that may be hurt, if it is well afterwards."""
    with Cluster(tmp_path_factory.mktemp("fragile"), listeners=[Listener.PLAIN]) as cluster:
        yield cluster


def mine(
    numbers: Iterable[int],
    *,
    cpu: int = 0,
    program: int = 0,
    origin: Origin | None = HERE,
    lost: Iterable[Lost] = (),
) -> EventBatch[Mine]:
    """Every process has ten of the numbers."""
    events = [Mine(cpu, program, number, number // 10, f"the {number}.") for number in numbers]
    batch = make_batch(events, lost=lost, type=Mine)
    batch.origin = origin
    return batch


def example(of: Any, **values: Any) -> Any:
    """An event as a record can hold it: of some fields the bytes."""
    plan = layout(of)
    for field in dataclasses.fields(of):
        match plan.kinds[field.name]:
            case Integer():
                values.setdefault(field.name, 3)
            case Array(count=count):
                values.setdefault(field.name, (5,) * count)
            case _:
                values.setdefault(field.name, b"")
    return of(**values)


async def send(servers: str, topic: str, *batches: EventBatch[Any]) -> None:
    async with KafkaSink(servers, topic) as sink:
        for arrived in [await sink.send(batch) for batch in batches]:
            assert arrived is not None
            await arrived


def produce(servers: str, topic: str, *values: bytes | None, **headers: str) -> None:
    """As another program would, to partition 0."""
    with Producer({"bootstrap.servers": servers}) as producer:
        for value in values:
            producer.produce(topic, value, partition=0, headers=dict(headers))
        assert producer.flush(WAIT) == 0


async def take(source: KafkaSource[T], count: int) -> list[T]:
    with anyio.fail_after(WAIT):
        return [await anext(source) for _ in range(count)]


async def until(done: Callable[[], bool]) -> None:
    with anyio.fail_after(WAIT):
        while not done():
            await anyio.sleep(0.02)


def committed(servers: str, topic: str, group: str, partitions: int = 3) -> int:
    """The sum over all partitions, as another client sees it."""
    settings = {"bootstrap.servers": servers, "group.id": group}
    with Consumer(settings) as consumer:
        found = consumer.committed([TopicPartition(topic, p) for p in range(partitions)], timeout=WAIT)
    return sum(max(partition.offset, 0) for partition in found)


def coordinator(source: KafkaSource[Any]) -> Any:
    """Aiokafka's, of the group."""
    assert source._member._consumer is not None
    return source._member._consumer._coordinator


def numbers(events: Iterable[Mine]) -> list[int]:
    return [event.sequence for event in events]


@asynccontextmanager
async def reading(source: KafkaSource[T], into: list[T]) -> AsyncIterator[None]:
    """While the block runs, a task of its own reads; the last event that it was given is not done with."""

    async def read() -> None:
        with suppress(StreamClosedError):
            async for event in source:
                into.append(event)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        yield
        tasks.cancel_scope.cancel()


# --- what goes in comes out


async def test_events_come_back(broker: Cluster, topic: str) -> None:
    batches: list[EventBatch[Any]] = [
        make_batch(
            [
                example(ExecEvent, sequence=n, comm="a ☃", args=("a", "b c\n"), cwd=b"b\0a\0")
                for n in range(50)
            ]
        ),
        make_batch([example(SyscallEvent, sequence=n, program=1) for n in range(50)]),
    ]
    for batch in batches:
        batch.origin = HERE
    await send(broker.servers, topic, *batches)
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}") as source:
        events = await take(source, 100)
    for batch, of in zip(batches, (ExecEvent, SyscallEvent), strict=True):
        assert sorted((e for e in events if type(e) is of), key=lambda e: e.sequence) == list(batch)
    assert events[0] != events[1]
    (received,) = source.completeness().values()
    assert (received.events, received.missing, received.doubles) == (100, 0, 0)


async def test_events_of_a_type_of_ones_own(broker: Cluster, topic: str) -> None:
    batch = mine(range(100))
    await send(broker.servers, topic, batch)
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}", types=[Mine]) as source:
        events = await take(source, 100)
    assert sorted(events, key=lambda event: event.sequence) == list(batch)
    assert [numbers(e for e in events if e.pid == pid) for pid in range(10)] == [
        list(range(10 * pid, 10 * pid + 10)) for pid in range(10)
    ]


async def test_from_a_stream_through_forward(broker: Cluster, topic: str) -> None:
    """Without numbers nothing is known of completeness, and nothing is left out."""
    from ebpfstream.stream import EventStream
    from tests.test_stream import Hand, Number

    hand = Hand()
    try:
        stream = EventStream(hand, Number, latency=0)
        hand.submit(7, 8, 8, 9)
        hand.on["open"] = stream.detach
        with anyio.fail_after(WAIT):
            await forward(stream, KafkaSink(broker.servers, topic))
    finally:
        hand.give_back()
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}", types=[Number]) as source:
        assert await take(source, 4) == [Number(7), Number(8), Number(8), Number(9)]
    assert not source.completeness()


class Kept(Sink):
    """What was sent, as the program that sends it has it."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    async def send(self, batch: EventBatch[Any]) -> None:
        self.events += batch


@pytest.mark.kernel
async def test_from_the_kernel(broker: Cluster, topic: str) -> None:
    kept = Kept()
    async with trace_execve(exclude_self=False) as stream:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forward, stream, kept, KafkaSink(broker.servers, topic))
            for number in range(50):
                await anyio.run_process(["true", f"{number} ☃"])
            await until(lambda: sum(event.comm == "true" for event in kept.events) >= 50)
            stream.detach()
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}") as source:
        events: list[Any] = await take(source, len(kept.events))
    order = lambda event: (event.cpu, event.program, event.sequence)  # noqa: E731
    assert sorted(events, key=order) == sorted(kept.events, key=order)
    assert {f"{n} ☃" for n in range(50)} <= {event.args[-1] for event in events if event.comm == "true"}
    (received,) = source.completeness().values()
    assert (received.events, received.missing, received.doubles) == (len(kept.events), 0, 0)


async def test_losses(broker: Cluster, topic: str) -> None:
    losses = [Lost(0, 5, 10, 14, NOON), Lost(None, 2, time=NOON + timedelta(seconds=1))]
    batches = [mine(range(10)), mine(range(15, 20), lost=losses)]
    await send(broker.servers, topic, *batches, batches[1])
    async with KafkaSource(
        broker.servers, topic, group=f"yields-{topic}", types=[Mine], on_lost="yield"
    ) as source:
        events = await take(source, 17)
        assert sorted((e for e in events if isinstance(e, Lost)), key=losses.index) == losses
        assert await rest(source, broker.servers, topic, 24) == []
    async with KafkaSource(
        broker.servers, topic, group=f"both-{topic}", types=[Mine], on_lost="yield", doubles="yield"
    ) as source:
        assert Counter(type(event) for event in await take(source, 24)) == {Mine: 20, Lost: 4}
    async with KafkaSource(broker.servers, topic, group=f"counts-{topic}", types=[Mine]) as counts:
        assert sorted(numbers(await take(counts, 15))) == [*range(10), *range(15, 20)]
        assert await rest(counts, broker.servers, topic, 24) == []
    (received,) = counts.completeness().values()
    assert (received.missing, received.told, received.unexplained, received.doubles) == (5, 7, 0, 5)


async def rest(source: KafkaSource[T], servers: str, topic: str, end: int) -> list[T]:
    """What comes yet, until so many records are done with; what is left out is done with as well."""
    events: list[T] = []
    group = source._member._settings["group_id"]
    with anyio.fail_after(WAIT):
        async with reading(source, events):
            while not events and await anyio.to_thread.run_sync(committed, servers, topic, group) < end:
                await anyio.sleep(0.05)
    return events


async def test_json_of_others(broker: Cluster, topic: str) -> None:
    produce(broker.servers, topic, b'{"pid": 7, "name": "seven"}', b'{"pid":8,"name":"\\u2603","more":1}')
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}", types=[One]) as source:
        assert await take(source, 2) == [One(7, "seven"), One(8, "☃")]
    assert not source.completeness()


async def test_what_does_not_fit(broker: Cluster, topic: str) -> None:
    """Each is named by its place, and the next call goes on."""
    fits = b'{"pid":1,"name":"x"}'
    produce(broker.servers, topic, fits, schema="one")
    produce(broker.servers, topic, b"{}", schema="somebody/1")
    produce(broker.servers, topic, b"no JSON", b'{"pid":1}', b'{"pid":-1,"name":"x"}', None, schema="one")
    produce(broker.servers, topic, fits, schema="one/2")
    produce(broker.servers, topic, fits, schema="one", host="h", boot="b", stream="s", sequence="0/x")
    produce(broker.servers, topic, fits, schema="one", host="h", boot="b", stream="s", sequence="0/0/1")
    wrong = ["somebody/1", "no JSON", "One.name", "One.pid", "None is no JSON", "one/2", "0/x"]
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}", types=[One]) as source:
        assert await take(source, 1) == [One(1, "x")]
        for offset, what in enumerate(wrong, 1):
            with pytest.raises(DecodeError, match=what) as caught:
                await take(source, 1)
            assert f"partition 0, offset {offset} of {topic}" in str(caught.value)
        assert await take(source, 1) == [One(1, "x")]
    assert committed(broker.servers, topic, f"all-{topic}") == len(wrong) + 2
    async with KafkaSource(broker.servers, topic, group=f"others-{topic}") as exec_events:
        with pytest.raises(DecodeError, match="the schema is one, and exec-event/1, syscall-event/1 is what"):
            await take(exec_events, 1)


async def test_without_a_schema_and_two_types(broker: Cluster, topic: str) -> None:
    produce(broker.servers, topic, b'{"pid":1,"name":"x"}')
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}", types=(One, Mine)) as source:
        with pytest.raises(DecodeError, match="the schema is not told"):
            await take(source, 1)


# --- completeness


async def test_doubles_and_gaps(broker: Cluster, topic: str) -> None:
    """By host, boot, stream, CPU and program."""
    await send(
        broker.servers,
        topic,
        mine(range(20)),
        mine(range(30, 40)),
        mine(range(15, 35)),
        mine(range(5), cpu=1),
        mine(range(8, 12), cpu=1, program=1),
        mine(range(10), origin=THERE),
        mine(range(9, 3, -1), origin=THERE._replace(stream="3")),
        mine(range(5), origin=None),
    )
    async with KafkaSource(broker.servers, topic, group=f"drops-{topic}", types=[Mine]) as source:
        events = await take(source, 70)
        assert await rest(source, broker.servers, topic, 80) == []
    once_each = Counter([*range(40), *range(10), *range(4, 10), *range(5)])  # four times cpu 0
    assert Counter(event.sequence for event in events if event.cpu == 0) == once_each
    found = {
        origin: (received.events, received.missing, received.doubles)
        for origin, received in source.completeness().items()
    }
    assert found == {HERE: (49, 0, 10), THERE: (10, 0, 0), THERE._replace(stream="3"): (6, 0, 0)}
    async with KafkaSource(
        broker.servers, topic, group=f"yields-{topic}", types=[Mine], doubles="yield"
    ) as source:
        assert len(await take(source, 80)) == 80
    assert source.completeness()[HERE].doubles == 10


async def test_what_two_have_seen_is_what_one_has(broker: Cluster, topic: str) -> None:
    lost = [Lost(0, 100, 400, 499, NOON)]
    await send(
        broker.servers,
        topic,
        mine(range(400)),
        mine(range(600, 700), origin=THERE),
        mine(range(500, 900), lost=lost),
        mine(range(395, 400)),
        mine([*range(600, 610), *range(750, 800)], origin=THERE),
    )
    records = 400 + 100 + 401 + 5 + 60
    sources = [
        KafkaSource(broker.servers, topic, group=f"two-{topic}", types=[Mine], session_timeout=SESSION)
        for _ in range(2)
    ]
    events: list[Mine] = []
    async with sources[0], sources[1]:
        async with reading(sources[0], events), reading(sources[1], events):
            await until(lambda: sum(seen_by(source) for source in sources) == records)
    async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as alone:
        await take(alone, 950)
        assert await rest(alone, broker.servers, topic, records) == []
    whole = Completeness()
    whole.update(*(pickle.loads(pickle.dumps(source.completeness())) for source in sources))
    assert whole == alone.completeness()
    assert all(len(source.completeness()) == 2 for source in sources)
    here, there = whole[HERE], whole[THERE]
    assert (here.events, here.missing, here.told, here.doubles) == (800, 100, 100, 5)
    assert (there.events, there.missing, there.told, there.doubles) == (150, 50, 0, 10)
    assert len(events) == 950


def seen_by(source: KafkaSource[Any]) -> int:
    received = source.completeness().values()
    return sum(one.events + one.doubles + len(one.losses) for one in received)


# --- a group


async def test_a_group_shares(broker: Cluster, topic: str) -> None:
    left, right = [
        KafkaSource(broker.servers, topic, group=f"two-{topic}", types=[Mine], session_timeout=SESSION)
        for _ in range(2)
    ]
    by_left: list[Mine] = []
    by_right: list[Mine] = []
    async with left, right:
        await send(broker.servers, topic, mine(range(3000)))
        async with reading(left, by_left), reading(right, by_right):
            await until(lambda: len(by_left) + len(by_right) == 3000)
    assert sorted(numbers(by_left + by_right)) == list(range(3000))
    assert by_left
    assert by_right


async def test_another_joins_while_records_are_at_hand(broker: Cluster, topic: str) -> None:
    """Nothing is lost, and nothing comes twice: not even the event in hand."""
    await send(broker.servers, topic, mine(range(3000)))
    left, right = [
        KafkaSource(broker.servers, topic, group=f"two-{topic}", types=[Mine], commit_every=1000)
        for _ in range(2)
    ]
    async with left:
        events = await take(left, 10)
        async with reading(right, events):
            await until(lambda: not left._member._at_hand)  # it has been told
            async with reading(left, events):
                await until(lambda: len(events) >= 3000)
    await right.aclose()
    assert sorted(numbers(events)) == list(range(3000))
    assert (
        sum(received.doubles for source in (left, right) for received in source.completeness().values()) == 0
    )


async def test_an_event_is_in_hand_for_long_while_another_joins(broker: Cluster, topic: str) -> None:
    """It is not waited for for ever: it comes again, to the other or to the same, which then leaves it out."""
    await send(broker.servers, topic, mine(range(100)))
    options: Any = {"types": [Mine], "session_timeout": SESSION, "doubles": "yield"}
    left, right = [KafkaSource(broker.servers, topic, group=f"three-{topic}", **options) for _ in range(2)]
    async with left:
        events = await take(left, 1)
        async with right:
            async with reading(left, events), reading(right, events):
                await until(lambda: len(events) == 101)
    assert sorted(numbers(events)) == sorted([*range(100), events[0].sequence])


async def test_one_leaves(broker: Cluster, topic: str) -> None:
    left, right = [
        KafkaSource(broker.servers, topic, group=f"two-{topic}", types=[Mine], session_timeout=SESSION)
        for _ in range(2)
    ]
    events: list[Mine] = []
    async with right:
        async with left:
            await send(broker.servers, topic, mine(range(1000)))
            events += await take(left, 50)
        async with reading(right, events):
            await until(lambda: len(events) == 1000)
    assert sorted(numbers(events)) == list(range(1000))


WORKER = """
import anyio, sys
from ebpfstream import KafkaSource
from tests.kafka.test_source import Mine

async def main():
    servers, topic, session = sys.argv[1:]
    options = {"session_timeout": float(session), "commit_every": 0.05}
    async with KafkaSource(servers, topic, group=f"two-{topic}", types=[Mine], **options) as source:
        async for event in source:
            print(event.sequence, flush=True)
            await anyio.sleep(0.005)

anyio.run(main)
"""


async def test_one_is_killed(broker: Cluster, topic: str) -> None:
    """The other goes on from where the group stands."""
    await send(broker.servers, topic, mine(range(1000)))
    command = [sys.executable, "-c", WORKER, broker.servers, topic, str(SESSION)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as worker:
        assert worker.stdout is not None
        lines = [await anyio.to_thread.run_sync(worker.stdout.readline) for _ in range(100)]
        await until(lambda: committed(broker.servers, topic, f"two-{topic}") > 0)
        worker.send_signal(signal.SIGKILL)
        lines += worker.stdout.readlines()
    by_worker = [int(line) for line in lines]
    async with KafkaSource(
        broker.servers, topic, group=f"two-{topic}", types=[Mine], session_timeout=SESSION
    ) as source:
        done = committed(broker.servers, topic, f"two-{topic}")
        assert 0 < done < len(by_worker)
        events = await take(source, 1000 - done)
    assert set(by_worker) | set(numbers(events)) == set(range(1000))


# --- what is done with


async def test_done_is_what_another_was_asked_for_after(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(10)))
    servers = broker.servers
    options: Any = {"types": [Mine], "commit_every": 1000.0}
    source: KafkaSource[Mine] = KafkaSource(servers, topic, group=f"one-{topic}", **options)
    first = await take(source, 4)
    assert committed(servers, topic, f"one-{topic}") == 0
    await source.aclose()
    assert committed(servers, topic, f"one-{topic}") == 3
    async with KafkaSource(servers, topic, group=f"one-{topic}", **options) as source:
        again = await take(source, 2)
        assert first[3] in await take(source, 5) + again
    assert committed(servers, topic, f"one-{topic}") == 10
    assert not set(numbers(first[:3])) & set(numbers(again))


async def test_several_are_done_with_together(broker: Cluster, topic: str) -> None:
    """When the next ones are asked for, and not before; losses among them, and doubles left out."""
    await send(
        broker.servers, topic, mine(range(10)), mine([3, 4]), mine(range(10, 20), lost=[Lost(0, 1, 20, 20)])
    )
    group, servers = f"together-{topic}", broker.servers
    seen: list[tuple[Origin | None, Mine | Lost]] = []
    async with KafkaSource(
        servers, topic, group=group, types=[Mine], on_lost="yield", commit_every=1000
    ) as source:
        batches = source.batches(most=4)
        with anyio.fail_after(WAIT):
            while len(seen) < 21:
                batch = await anext(batches)
                assert 1 <= len(batch) <= 4
                seen += batch
        assert {origin for origin, _ in seen} == {HERE}
        assert sorted(event.sequence for _, event in seen if isinstance(event, Mine)) == list(range(20))
        assert [event.first_sequence for _, event in seen if isinstance(event, Lost)] == [20]
        assert committed(servers, topic, group) == 0
    assert committed(servers, topic, group) == 23
    with pytest.raises(ArgumentError, match="give 1 or more"):
        source.batches(0)


async def test_what_is_in_hand_comes_again_after_an_error(broker: Cluster, topic: str) -> None:
    produce(broker.servers, topic, *(b'{"pid":%d,"name":"x"}' % number for number in range(9)), schema="one")
    with pytest.raises(KeyError):
        async with KafkaSource(broker.servers, topic, group=f"error-{topic}", types=[One]) as source:
            batches, count = source.batches(3), 0
            with anyio.fail_after(WAIT):
                while count < 6:
                    last = await anext(batches)
                    count += len(last)
            raise KeyError
    assert committed(broker.servers, topic, f"error-{topic}") == count - len(last)


async def test_what_does_not_fit_among_several(broker: Cluster, topic: str) -> None:
    """Those before it come first, then it is told, then those after it."""
    fits = [b'{"pid":%d,"name":"x"}' % number for number in range(4)]
    produce(broker.servers, topic, fits[0], fits[1], b"no JSON", b"nor this", fits[2], fits[3], schema="one")
    async with KafkaSource(broker.servers, topic, group=f"all-{topic}", types=[One]) as source:
        batches = source.batches()
        found: list[int | str] = []
        with anyio.fail_after(WAIT):
            while len(found) < 6:
                try:
                    found += [event.pid for _, event in await anext(batches)]
                except DecodeError as error:
                    found.append(str(error).partition(" of ")[0])
        assert found == [0, 1, "partition 0, offset 2", "partition 0, offset 3", 2, 3]
    assert committed(broker.servers, topic, f"all-{topic}") == 6


async def test_leaving_the_block(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(10)))
    with pytest.raises(KeyError):
        async with KafkaSource(broker.servers, topic, group=f"error-{topic}", types=[Mine]) as source:
            await take(source, 4)
            raise KeyError
    assert committed(broker.servers, topic, f"error-{topic}") == 3
    async with KafkaSource(broker.servers, topic, group=f"well-{topic}", types=[Mine]) as source:
        async for event in source:
            if event.sequence >= 0:
                break
    assert committed(broker.servers, topic, f"well-{topic}") == 1


async def test_commit_every(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(500)))
    async with KafkaSource(
        broker.servers, topic, group=f"soon-{topic}", types=[Mine], commit_every=0.05
    ) as source:
        events: list[Mine] = []
        while not (done := committed(broker.servers, topic, f"soon-{topic}")):
            events += await take(source, 1)
        assert done <= len(events)


async def test_done_is_noted_while_nothing_comes(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(10)))
    events: list[Mine] = []
    async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
        async with reading(source, events):
            await until(lambda: len(events) == 10)
            with anyio.fail_after(WAIT):
                while await anyio.to_thread.run_sync(committed, broker.servers, topic, f"one-{topic}") < 10:
                    await anyio.sleep(0.05)


async def test_where_a_group_begins(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(50)))
    async with KafkaSource(
        broker.servers, topic, group=f"late-{topic}", types=[Mine], start="latest"
    ) as source:
        await send(broker.servers, topic, mine(range(50, 60)))
        assert sorted(numbers(await take(source, 10))) == list(range(50, 60))
    async with KafkaSource(broker.servers, topic, group=f"early-{topic}", types=[Mine]) as source:
        assert sorted(numbers(await take(source, 60))) == list(range(60))


async def test_a_group_that_begins_at_the_end_stands_there(broker: Cluster, topic: str) -> None:
    """Also if it was given nothing before its member left."""
    await send(broker.servers, topic, mine(range(50)))
    async with KafkaSource(broker.servers, topic, group=f"late-{topic}", types=[Mine], start="latest"):
        pass
    await send(broker.servers, topic, mine(range(50, 60)))
    async with KafkaSource(
        broker.servers, topic, group=f"late-{topic}", types=[Mine], start="latest"
    ) as source:
        assert sorted(numbers(await take(source, 10))) == list(range(50, 60))


# --- outages


async def test_broker_restarted(fragile: Cluster) -> None:
    """Killed, while events are read, and noted as done all the time."""
    topic = f"restarted-{secrets.token_hex(4)}"
    client.create_topic(fragile.servers, topic)
    await send(fragile.servers, topic, mine(range(2000)))
    events: list[Mine] = []
    async with KafkaSource(
        fragile.servers, topic, group=f"one-{topic}", types=[Mine], commit_every=0.01
    ) as source:
        async with reading(source, events):
            await until(lambda: len(events) >= 100)
            await anyio.to_thread.run_sync(fragile.kill)
            await anyio.sleep(1)
            await anyio.to_thread.run_sync(fragile.restart)
            await send(fragile.servers, topic, mine(range(2000, 2010)))
            await until(lambda: len(events) == 2010)
    assert sorted(numbers(events)) == list(range(2010))
    assert committed(fragile.servers, topic, f"one-{topic}") == 2010


async def test_broker_is_not_there_at_first(fragile: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    topic = f"first-{secrets.token_hex(4)}"
    client.create_topic(fragile.servers, topic)
    await send(fragile.servers, topic, mine(range(10)))
    await anyio.to_thread.run_sync(fragile.stop)
    events: list[Mine] = []
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            async with KafkaSource(fragile.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
                events.extend(await take(source, 10))

        tasks.start_soon(read)
        await until(lambda: any(record.name == "ebpfstream" for record in caplog.records))
        await anyio.to_thread.run_sync(fragile.restart)
    assert sorted(numbers(events)) == list(range(10))
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "ebpfstream"]
    assert re.match(
        f"Kafka at {fragile.servers} cannot be reached.*: look whether it runs.*; trying again$", warning
    )


async def test_topic_is_deleted_and_comes_back(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(100)))
    source = KafkaSource(
        broker.servers, topic, group=f"one-{topic}", types=[Mine], commit_every=0.05, session_timeout=SESSION
    )
    source._member._settings["metadata_max_age_ms"] = 500
    events: list[Mine] = []
    async with source, reading(source, events):
        await until(lambda: len(events) == 100)
        await anyio.to_thread.run_sync(client.delete_topic, broker.servers, topic)
        await until(lambda: not coordinator(source)._subscription.assigned_partitions())
        await anyio.to_thread.run_sync(client.create_topic, broker.servers, topic)
        await send(broker.servers, topic, mine(range(100, 150)))
        await until(lambda: len(events) == 150)
    assert sorted(numbers(events)) == list(range(150))


async def test_connections_are_cut(broker: Cluster, topic: str, proxy: Proxy) -> None:
    servers = broker.servers_at(Listener.PROXIED)
    await send(broker.servers, topic, mine(range(5000)))
    events: list[Mine] = []
    async with KafkaSource(servers, topic, group=f"one-{topic}", types=[Mine], commit_every=0.01) as source:
        async with reading(source, events):
            for count in (100, 1500, 2500):
                await until(lambda count=count: len(events) >= count)  # type: ignore[misc]
                await anyio.to_thread.run_sync(proxy.cut)
            await until(lambda: len(events) == 5000)
    assert sorted(numbers(events)) == list(range(5000))


async def test_an_error_that_may_pass(broker: Cluster, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    """As the client's own, of what it did not expect of a broker: another consumer begins where the group stands."""
    from aiokafka.errors import KafkaError

    await send(broker.servers, topic, mine(range(3000)))
    async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
        events = await take(source, 100)
        coordinator(source)._pending_exception = KafkaError("unexpected")
        events += await take(source, 2900)
        assert sorted(numbers(events)) == list(range(3000))
    assert committed(broker.servers, topic, f"one-{topic}") == 3000
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "ebpfstream"]
    assert "unexpected" in warning
    assert warning.endswith("; beginning anew")


async def test_who_takes_long_stays_a_member(broker: Cluster, topic: str) -> None:
    """The client counts the time since it was asked last, and many events at a time come of it."""
    await send(broker.servers, topic, mine(range(100)))
    source = KafkaSource(
        broker.servers, topic, group=f"one-{topic}", types=[Mine], commit_every=0.1, session_timeout=SESSION
    )
    source._member._settings["max_poll_interval_ms"] = 1500
    async with source:
        for _ in range(10):
            await take(source, 1)
            await anyio.sleep(0.3)
        assert coordinator(source).generation == 1


async def test_leaving_a_broker_that_says_nothing(broker: Cluster, topic: str, proxy: Proxy) -> None:
    """It takes some seconds, and leaves nothing behind."""
    await send(broker.servers, topic, mine(range(10)))
    tasks, files = set(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    source = KafkaSource(broker.servers_at(Listener.PROXIED), topic, group=f"one-{topic}", types=[Mine])
    await take(source, 5)
    await anyio.to_thread.run_sync(proxy.hold)
    with anyio.fail_after(WAIT):
        await source.aclose()
    assert set(asyncio.all_tasks()) <= tasks
    await anyio.to_thread.run_sync(proxy.release)  # whose connections are of this process as well
    await until(lambda: len(os.listdir("/proc/self/fd")) <= files)


# --- what cannot be


async def refused(source: KafkaSource[Any], what: str) -> None:
    with anyio.fail_after(WAIT), pytest.raises(SourceError, match=what):
        await anext(source)
    with suppress(SourceError):
        await source.aclose()


async def test_no_such_topic(broker: Cluster) -> None:
    source: KafkaSource[Any] = KafkaSource(broker.servers, "nowhere", group="one")
    await refused(source, f"there is no topic 'nowhere' at {broker.servers}.*: create it, or give another")


async def test_wrong_password(broker: Cluster, topic: str) -> None:
    servers = broker.servers_at(Listener.SASL)
    login: Any = {"sasl": "SCRAM-SHA-512", "username": USER}
    await refused(
        KafkaSource(servers, topic, group=f"one-{topic}", password="wrong", **login),
        "refuses user or password",
    )
    await send(broker.servers, topic, mine(range(5)))
    async with KafkaSource(
        servers, topic, group=f"one-{topic}", types=[Mine], password=PASSWORD, **login
    ) as source:
        assert len(await take(source, 5)) == 5


@pytest.mark.parametrize("operation", [AclOperation.ALL, AclOperation.READ])
async def test_a_topic_that_is_not_for_this_user(
    broker: Cluster, topic: str, operation: AclOperation
) -> None:
    client.refuse(broker.servers, topic, USER, operation)
    await send(broker.servers, topic, mine(range(5)))
    login: Any = {"sasl": "SCRAM-SHA-512", "username": USER, "password": PASSWORD}
    source = KafkaSource(broker.servers_at(Listener.SASL), topic, group=f"one-{topic}", types=[Mine], **login)
    await refused(source, f"does not let this user use the topic '{topic}'")


async def test_a_group_that_is_not_for_this_user(broker: Cluster, topic: str) -> None:
    group = f"group-of-{topic}"
    acl = AclBinding(
        ResourceType.GROUP,
        group,
        ResourcePatternType.LITERAL,
        f"User:{USER}",
        "*",
        AclOperation.ALL,
        AclPermissionType.DENY,
    )
    with AdminClient({"bootstrap.servers": broker.servers}) as admin:
        admin.create_acls([acl])[acl].result(WAIT)
    login: Any = {"sasl": "SCRAM-SHA-512", "username": USER, "password": PASSWORD}
    source = KafkaSource(broker.servers_at(Listener.SASL), topic, group=group, types=[Mine], **login)
    await refused(source, "does not let this user use the consumer group")


async def test_session_timeout_that_is_not_allowed(broker: Cluster, topic: str) -> None:
    source = KafkaSource(broker.servers, topic, group=f"one-{topic}", session_timeout=0.5)
    await refused(source, "does not allow this session_timeout")


async def test_no_password_file(broker: Cluster, topic: str) -> None:
    login: Any = {"sasl": "PLAIN", "username": USER, "password_file": "/nowhere"}
    await refused(
        KafkaSource(broker.servers, topic, group=f"one-{topic}", **login), "cannot be read from /nowhere"
    )


def test_trio_is_refused() -> None:
    async def main() -> None:
        await refused(KafkaSource("127.0.0.1", "exec", group="one"), "this is trio")

    anyio.run(main, backend="trio")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"start": "middle"}, 'start=\'middle\' is unknown: give "earliest" or "latest"'),
        ({"on_lost": "raise"}, "on_lost='raise' is unknown"),
        ({"doubles": "count"}, "doubles='count' is unknown"),
        ({"group": ""}, "group and topic must have names"),
        ({"types": []}, "there is no type"),
        ({"commit_every": 0}, "commit_every=0 is impossible"),
        ({"session_timeout": float("nan")}, "session_timeout=nan is impossible"),
        ({"ca": "ca.pem"}, "give tls=True"),
        ({"servers": ""}, "there is no server"),
    ],
)
def test_arguments(options: dict[str, Any], what: str) -> None:
    arguments: dict[str, Any] = {"servers": "127.0.0.1", "topic": "exec", "group": "one", **options}
    with pytest.raises(ArgumentError, match=what):
        KafkaSource(**arguments)


# --- iterating and closing


async def test_breaking_off_and_iterating_again(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(10)))
    seen: list[int] = []
    async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
        while len(seen) < 10:
            async for event in source:
                seen.append(event.sequence)
                if len(seen) % 3 == 1:
                    break
    assert sorted(seen) == list(range(10))


async def test_closing_ends_what_waits(broker: Cluster, topic: str) -> None:
    source = KafkaSource(broker.servers, topic, group=f"one-{topic}")
    await source.__aenter__()
    raised: list[BaseException] = []

    async def wait() -> None:
        try:
            await anext(source)
        except StreamClosedError as error:
            raised.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.sleep(0.05)
        with pytest.raises(StreamBusyError):
            await anext(source)
        with anyio.fail_after(WAIT):
            await source.aclose()
    assert len(raised) == 1
    for call in (source.aclose, source.__anext__, source.__aenter__):
        with pytest.raises(StreamClosedError):
            await call()


async def test_closing_ends_what_waits_for_a_broker(unused: str) -> None:
    source = KafkaSource(unused, "exec", group="one")
    async with anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(StreamClosedError):
                await anext(source)

        tasks.start_soon(wait)
        await anyio.sleep(0.05)
        await source.aclose()


@pytest.fixture
def unused() -> str:
    from tests.kafka.process import free_port

    return f"127.0.0.1:{free_port()}"


async def test_nothing_is_left_open(broker: Cluster, topic: str) -> None:
    await send(broker.servers, topic, mine(range(10)))

    async def life() -> None:
        async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
            await take(source, 1)

    await life()  # threads of the loop's
    tasks, files = set(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await life()
    assert set(asyncio.all_tasks()) <= tasks
    await until(lambda: len(os.listdir("/proc/self/fd")) <= files)


async def test_nobody_holds_it_any_more(broker: Cluster, topic: str) -> None:
    """Then it leaves the group by itself; the event that was in hand comes again."""
    await send(broker.servers, topic, mine(range(10)))
    tasks = set(asyncio.all_tasks())
    async for event in KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]):
        assert event.sequence >= 0
        break
    gc.collect()
    await until(lambda: set(asyncio.all_tasks()) <= tasks)
    async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
        assert sorted(numbers(await take(source, 10))) == list(range(10))


@pytest.mark.parametrize("goes_on", [False, True])
async def test_cancelled_at_each_await(broker: Cluster, topic: str, goes_on: bool) -> None:
    """Nothing is left open; or the same object goes on as if nothing had been."""
    await send(broker.servers, topic, mine(range(10)))
    await KafkaSource(broker.servers, topic, group=f"none-{topic}").aclose()
    tasks, files = set(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    for way in ways_to_cancel():
        step, is_reached = 0, True
        while is_reached:
            source = KafkaSource(broker.servers, topic, group=f"{way} {step} {topic}", types=[Mine])

            async def first(source: KafkaSource[Mine] = source) -> None:
                await anext(source)

            with anyio.fail_after(WAIT):
                is_reached = (await cancelled_at(step, first(), way)).reached
            if goes_on and step % 4 == 0:
                assert len(await take(source, 9)) == 9
            await source.aclose()
            assert set(asyncio.all_tasks()) <= tasks
            await until(lambda: len(os.listdir("/proc/self/fd")) <= files)
            step += 4 if goes_on else 1
        assert step > 8


async def test_the_loop_lives(broker: Cluster, topic: str) -> None:
    """However much there is to read, others have their turn."""
    await send(broker.servers, topic, mine(range(20_000)))
    async with KafkaSource(broker.servers, topic, group=f"one-{topic}", types=[Mine]) as source:
        await take(source, 1)
        await anyio.sleep(0.5)  # the client reads ahead
        turns: list[int] = []
        seen = 1

        async def other() -> None:
            while True:
                await anyio.lowlevel.checkpoint()
                turns.append(seen)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            async for _ in source:
                seen += 1
                if seen == 20_000:
                    break
            tasks.cancel_scope.cancel()
    assert max(b - a for a, b in zip([0, *turns], [*turns, seen], strict=True)) <= 1000


# --- as type checkers see it


def types_are_known(servers: str) -> None:
    assert_type(KafkaSource(servers, "exec", group="one"), KafkaSource[ExecEvent | SyscallEvent])
    assert_type(
        KafkaSource(servers, "exec", group="one", on_lost="yield"),
        KafkaSource[ExecEvent | SyscallEvent | Lost],
    )
    assert_type(KafkaSource(servers, "exec", group="one", types=[Mine]), KafkaSource[Mine])
    assert_type(
        KafkaSource(servers, "exec", group="one", types=[Mine], on_lost="yield"), KafkaSource[Mine | Lost]
    )


async def types_of_events_are_known(servers: str) -> None:
    async for event in KafkaSource(servers, "exec", group="one", start="latest"):
        assert_type(event, ExecEvent | SyscallEvent)
    async with KafkaSource(servers, "exec", group="one", types=[Mine], tls=True) as source:
        async for one in source:
            assert_type(one, Mine)
