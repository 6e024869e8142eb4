"""Events into Kafka, acknowledged: KafkaSink, librdkafka through confluent-kafka, and `await send()` of each event.

The same exec events; the same broker (one node, started here), topic (3 partitions), keys, headers, acks=all,
idempotent, zstd.  KafkaSink is given batches as they come out of the kernel and makes the records (JSON, keys,
headers) itself, which is in its time.  The others are given the records, made beforehand; and records that are made
of the batches by the same code, in their time.  In turn, several rounds; with the CPU time of this process, all its
threads, which says more where others use the machine as well.

Run with Java and Maven: `python benchmarks/kafka.py [--rounds N] [--events N]`.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import aiokafka
import confluent_kafka

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import ratio, save
from ebpfstream.batch import EventBatch
from ebpfstream.origin import Origin
from ebpfstream.sinks.kafka import KafkaSink
from ebpfstream.sinks.kafka_records import DEFAULT_KEY, Record, Shape
from ebpfstream.testing import make_batch
from ebpfstream.tracers.execve import ExecEvent
from tests.kafka import client
from tests.kafka.broker import Cluster, Listener

BATCH = 500
TOPIC = "exec"
NOW = datetime.now(UTC)


def event(number: int) -> ExecEvent:
    """One as any other."""
    args = ("/usr/bin/git", "-C", f"/srv/repository/{number % 97}", "status", "--porcelain=v2", "--branch")
    values: dict[str, object] = {
        **dict.fromkeys(ExecEvent.__dataclass_fields__, 1),
        **dict.fromkeys(("by_descriptor", "cwd_truncated", "args_truncated", "args_unreadable"), False),
        **dict.fromkeys(("message", "error"), ""),
        **dict.fromkeys(("retval", "program", "cgroup_id"), 0),
        **dict.fromkeys(("start_time", "time"), NOW),
        "pid": number % 30_000 + 2,
        "comm": "git",
        "filename": args[0],
        "args": args,
        "cwd": b"repository\0srv\0",
        "parent_comm": "bash",
        "tty": "pts3",
        "container_id": None,
        "sequence": number,
        "cpu": number % 2,
        "monotonic": 10**12 + number * 1000,
    }
    return ExecEvent(**values)  # type: ignore[arg-type]


def batches(count: int) -> list[EventBatch[ExecEvent]]:
    """So many events, as a stream hands them out."""
    origin = Origin.new()
    made = []
    for first in range(0, count, BATCH):
        batch = make_batch([event(number) for number in range(first, min(first + BATCH, count))])
        batch.origin, batch.wall_clock_offset = origin, time.time_ns() - 10**12
        made.append(batch)
    return made


async def by_sink(servers: str, given: list[EventBatch[ExecEvent]]) -> float:
    """Seconds until all are acknowledged."""
    async with KafkaSink(servers, TOPIC) as sink:
        start = time.perf_counter()
        for receipt in [await sink.send(batch) for batch in given]:
            await receipt
        return time.perf_counter() - start


async def by_each(servers: str, records: list[Record]) -> float:
    """The same with aiokafka as its users write it."""
    producer = aiokafka.AIOKafkaProducer(
        bootstrap_servers=servers, acks="all", enable_idempotence=True, compression_type="zstd"
    )
    await producer.start()
    try:
        start = time.perf_counter()
        for key, value, timestamp, headers, _ in records:
            await producer.send(TOPIC, value, key=key, timestamp_ms=timestamp, headers=headers)
        await producer.flush()
        return time.perf_counter() - start
    finally:
        await producer.stop()


def by_librdkafka(servers: str, records: list[Record]) -> float:
    """The same with confluent-kafka; a callback says of each record that it has arrived."""
    arrived = failed = 0

    def note(error: object, _: object) -> None:
        nonlocal arrived, failed
        arrived += 1
        failed += error is not None

    settings = {
        "bootstrap.servers": servers,
        "acks": "all",
        "enable.idempotence": True,
        "compression.type": "zstd",
    }
    producer = confluent_kafka.Producer({**settings, "linger.ms": 5, "queue.buffering.max.messages": 200_000})
    producer.list_topics(TOPIC)
    start = time.perf_counter()
    for number, (key, value, timestamp, headers, _) in enumerate(records):
        while True:
            try:
                producer.produce(
                    TOPIC, value, key=key, timestamp=timestamp or 0, headers=list(headers), on_delivery=note
                )
                break
            except BufferError:
                producer.poll(0.01)
        if not number % 1000:
            producer.poll(0)
    producer.flush()
    assert (arrived, failed) == (len(records), 0)
    return time.perf_counter() - start


def from_batches(
    send: Callable[[list[Record]], float], shape: Shape, given: list[EventBatch[ExecEvent]]
) -> float:
    """The same, with the making of the records."""
    start = time.perf_counter()
    made = [record for batch in given for record in shape.records(batch)]
    return time.perf_counter() - start + send(made)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, for machines")
    options = parser.parse_args()
    given = batches(options.events)
    shape = Shape(ExecEvent, DEFAULT_KEY)
    records = [record for batch in given for record in shape.records(batch)]
    size = sum(len(record.value) for record in records) / len(records)
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), listeners=[Listener.PLAIN]) as kafka:
        client.create_topic(kafka.servers, TOPIC)

        def confluent(records: list[Record]) -> float:
            return by_librdkafka(kafka.servers, records)

        def each(records: list[Record]) -> float:
            return asyncio.run(by_each(kafka.servers, records))

        forms: dict[str, Callable[[], float]] = {
            "KafkaSink, from batches": lambda: asyncio.run(by_sink(kafka.servers, given)),
            "confluent-kafka, from batches": lambda: from_batches(confluent, shape, given),
            "confluent-kafka, from records": lambda: confluent(records),
            "aiokafka's send(), from batches": lambda: from_batches(each, shape, given),
            "aiokafka's send(), from records": lambda: each(records),
        }
        figures: dict[str, list[float]] = {name: [] for name in forms}
        used: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(options.rounds + 1):
            for name, form in forms.items():
                before = time.process_time()
                seconds = form()
                if number:  # the first round warms the broker
                    figures[name].append(options.events / seconds)
                    used[name].append((time.process_time() - before) / options.events)
    print(
        f"{platform.platform()}, Python {platform.python_version()}, aiokafka {aiokafka.__version__}, ",
        end="",
    )
    print(
        f"confluent-kafka {confluent_kafka.__version__}; {options.events} exec events of {size:.0f} bytes of JSON"
    )
    first = statistics.median(next(iter(figures.values())))
    for name, rates in figures.items():
        low, middle, high = min(rates), statistics.median(rates), max(rates)
        print(
            f"{name:32} {middle / 1e3:8.1f} k/s  ({low / 1e3:.1f} to {high / 1e3:.1f})  1 : {first / middle:.2f}"
            f"  {statistics.median(used[name]) * 1e6:6.1f} µs of CPU per event"
        )
    ours, *others = figures
    limits = {"confluent-kafka, from records": 1.0, "aiokafka's send(), from records": 5.0}
    save(
        options.json,
        [
            ratio(f"{ours}: events/s, of {name}", figures[ours], figures[name], limits.get(name))
            for name in others
        ],
    )


if __name__ == "__main__":
    main()
