"""The work whose machine instructions `benchmarks/guard.py` counts: what is done again for each event, drain or batch.

Records are made here, without a kernel, always the same.  Each path warms up, then works between two calls of
`mark`; whoever counts looks at these moments.  `python benchmarks/hot_paths.py [PATH ...]` works, for a profiler say,
and prints as JSON how many units of work each path did, and what they are.
"""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple
from unittest import mock

import anyio

sys.path.insert(0, str(Path(__file__).parents[1]))

from ebpfstream import stream as stream_module
from ebpfstream.batch import EventBatch
from ebpfstream.events import U32, U64, Char, Comm, Event
from ebpfstream.filters import Filters
from ebpfstream.forwarding import forward
from ebpfstream.kernel.bpf import Map
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.readymade import Counters
from ebpfstream.records import Records
from ebpfstream.redaction import Redaction
from ebpfstream.sinks.blackhole import BlackholeSink
from ebpfstream.sinks.kafka_records import DEFAULT_KEY, Shape
from ebpfstream.spool import Spool
from ebpfstream.stream import EventStream
from ebpfstream.testing import make_batch
from ebpfstream.tracers.execve import ExecEvent
from fuzz.memory import RingMemory, perf_memory, perf_sample, ring_record

FIXED: Final = 1000  # events of a batch
EXECS: Final = 250
DRAINS: Final = 100
RING_DRAINS: Final = 10
PERF_DRAINS: Final = 7
PERF_RECORD: Final = 80  # bytes
ORIGIN: Final = Origin("host", "00000000-0000-4000-8000-000000000000", "0123456789abcdef")


def mark() -> None:
    """Let whoever counts note how far it has come: calls a function of libc that nothing else calls."""
    os.sched_get_priority_max(os.SCHED_OTHER)


# --- records


@dataclass
class Fixed(Event):
    """An event without tails."""

    monotonic: U64
    pid: U32
    tid: U32
    uid: U32
    gid: U32
    comm: Comm
    message: Annotated[str, Char(20)]


@cache
def fixed_batch() -> EventBatch[Fixed]:
    """Events as of a few programs that say a few things."""
    return make_batch(
        Fixed(10**12 + number, pid, pid, 1000, 1000, f"worker-{pid % 10}", f"message {number % 7}")
        for number in range(FIXED)
        for pid in [number * 7919 % 60_000]
    )


@cache
def exec_batch() -> EventBatch[ExecEvent]:
    """Command lines of several lengths."""
    chance = random.Random(1)
    values: dict[str, Any] = {
        **dict.fromkeys(ExecEvent.__dataclass_fields__, 1),
        **dict.fromkeys(("by_descriptor", "cwd_truncated", "args_truncated", "args_unreadable"), False),
        **dict.fromkeys(("message", "error"), ""),
        **dict.fromkeys(("retval", "program"), 0),
        **dict.fromkeys(("start_time", "time"), datetime(2026, 1, 1, tzinfo=UTC)),
        "comm": "git",
        "filename": "/usr/bin/git",
        "cwd": b"repository\0srv\0",
        "parent_comm": "bash",
        "tty": "pts3",
        "container_id": None,
    }
    events = []
    for number in range(EXECS):
        files = [f"source/file-{chance.randrange(1000)}.c" for _ in range(chance.randrange(1, 8))]
        values |= {
            "pid": number * 7919 % 30_000 + 2,
            "args": ("/usr/bin/git", "-C", "/srv/repository", "add", "--verbose", *files),
            "sequence": number,
            "cpu": number % 2,
            "monotonic": 10**12 + number * 1000,
            "start_monotonic": 10**12 + number * 1000 - 500,
        }
        events.append(ExecEvent(**values))
    batch = make_batch(events)
    batch.origin, batch.wall_clock_offset = ORIGIN, 1_700_000_000 * 10**9
    return batch


# --- a stream without a kernel


class Tape:
    """Source and buffer in one; each drain takes the next records, and there are always more."""

    buffer = None
    late = 0
    lost = None
    size = 0

    def __init__(self, records: Iterator[Records]) -> None:
        self._records = records
        self._ready = os.eventfd(1)

    async def open(self) -> Tape:
        return self

    @property
    def map(self) -> Map:
        raise NotImplementedError

    async def wait(self) -> None:
        await anyio.wait_readable(self._ready)

    def pending(self) -> int:
        """Nothing before the waiting, as in a stream of which little comes at a time."""
        return 0

    def fill(self) -> tuple[int, int]:
        return 0, 0

    def drain(self, limit: int) -> Records | None:
        return next(self._records, None)

    def losses(self, records: Records | None, time: datetime) -> tuple[Lost, ...]:
        return ()

    def counters(self) -> Counters:
        return Counters()

    def set_filters(self, filters: Filters) -> None:
        pass

    def pause(self, paused: bool) -> None:
        pass

    def _nothing(self) -> None:
        pass

    drained = detach = stop = unplug = finish = _nothing

    def close(self) -> None:
        os.close(self._ready)


def played(records: Records, times: int) -> Iterator[Records]:
    """The records twice as often, a mark before and after the second half; then once more."""
    return chain(repeat(records, times), _marked(), repeat(records, times), _marked(), [records])


def _marked() -> Iterator[Records]:
    mark()
    yield from ()


def _no_time() -> float:
    return 0


def on_a_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On asyncio's own event loop, with no programs to wait for at the end.

    A stream whose events come slowly waits otherwise than one whose events flow.  Under valgrind everything is slow,
    and how slow depends on the machine; so here no time passes for it, and they always flow.
    """
    with (
        mock.patch.object(stream_module, "wait_for_running_programs"),
        mock.patch.object(stream_module, "monotonic", _no_time),
    ):
        anyio.run(work)


# --- the paths; each returns how many units it did between its marks


def reference() -> int:
    """What Python itself costs here: unpacking, objects, dicts, text, in nothing of ours."""
    fields = struct.Struct("<8xQIIII16s20s4x")
    data = fields.pack(10**12, 1, 2, 3, 4, b"worker", b"message") * 50
    texts: dict[bytes, str] = {}

    class Made:
        pass

    def one_round() -> bytes:
        lines = []
        for monotonic, pid, _, uid, _, comm, message in fields.iter_unpack(data):
            made: Any = object.__new__(Made)
            made.time, made.pid, made.uid = monotonic + 5, pid, uid
            for key in (comm, message):
                if key not in texts:
                    texts[key] = key.partition(b"\0")[0].decode()
            made.comm, made.message = texts[comm], texts[message]
            lines.append(b'{"time":%d,"pid":%d,"comm":"%b"}' % (made.time, made.pid, made.comm.encode()))
        return b"\n".join(sorted(lines))

    return repeated(one_round, 100)


def repeated(work: Callable[[], object], times: int) -> int:
    """Do it as often before the first mark, and between the two."""
    for _ in range(times):
        work()
    mark()
    for _ in range(times):
        work()
    mark()
    return times


def iterated(batch: EventBatch[Any], times: int) -> int:
    """By `async for`."""

    async def work() -> None:
        left = (2 * times + 1) * len(batch)
        async with EventStream(Tape(played(batch.records, times)), batch.event_type) as events:
            async for _ in events:
                left -= 1
                if not left:
                    break

    on_a_loop(work)
    return times * len(batch)


def drained_by_a_stream() -> int:
    """One event at a time: what the event loop and the stream cost for each drain."""

    async def work() -> None:
        async with EventStream(Tape(played(fixed_batch()[:1].records, DRAINS)), Fixed) as events:
            for _ in range(2 * DRAINS + 1):
                await events.next_batch()

    on_a_loop(work)
    return DRAINS


def forwarded() -> int:
    """The same, and from there through a queue to a sink."""

    async def work() -> None:
        events = EventStream(Tape(played(fixed_batch()[:1].records, DRAINS)), Fixed)
        await forward(events, BlackholeSink(), count=2 * DRAINS + 1)

    on_a_loop(work)
    return DRAINS


def json_lines(batch: EventBatch[Any], times: int) -> int:
    """Of the same batch again and again."""
    return repeated(batch.to_json_lines, times) * len(batch)


def to_numpy() -> int:
    """Views of batches."""
    return repeated(fixed_batch().to_numpy, 200)


def ring_drained(batch: EventBatch[Any]) -> int:
    """A batch at a time, out of a ring that holds so many."""
    records = [ring_record(sample) for sample in batch.records.samples()]
    block = b"".join(records)
    memory = RingMemory(4 << 20)
    memory.set((block * 2 * RING_DRAINS).ljust(memory.size, b"\0"), 0, len(block) * 2 * RING_DRAINS)
    repeated(lambda: memory.buffer.drain(len(block)), RING_DRAINS)
    assert not memory.buffer.pending()
    memory.buffer.close()
    return RING_DRAINS * len(records)


def perf_drained() -> int:
    """Two CPUs' rings, merged by time; each drain takes 64 KiB of both."""
    size = 1 << 20
    with perf_memory(2, size) as (buffer, rings):
        for cpu, ring in enumerate(rings):
            samples = (perf_sample(2 * number + cpu, bytes(60)) for number in count())
            data = b"".join(islice(samples, size // PERF_RECORD))
            ring.set(data.ljust(size, b"\0"), 0, len(data))
        before = buffer.pending()
        repeated(lambda: buffer.drain(1), PERF_DRAINS)
        return (before - buffer.pending()) // PERF_RECORD // 2


def kafka_records() -> int:
    """Keys, values, headers, as KafkaSink makes them."""
    batch, shape = exec_batch(), Shape(ExecEvent, DEFAULT_KEY)
    return repeated(lambda: shape.records(batch), 5) * EXECS


def redacted() -> int:
    """Command lines without secrets, as nearly all are."""
    batch, redaction = exec_batch(), Redaction()
    return repeated(lambda: redaction.redact(batch), 20) * EXECS


def spooled() -> int:
    """Appended, read, acknowledged."""
    payload = random.Random(1).randbytes(1 << 10)
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder, "spool"), size=64 << 20)
        spool.open()

        def one() -> None:
            spool.append(payload, 1)
            entry = spool.read()
            assert entry is not None
            spool.acknowledge(entry.end)

        times = repeated(one, 200)
        spool.close()
    return times


class HotPath(NamedTuple):
    """Work that is counted."""

    unit: str
    """What it is counted for: an event, a drain."""
    work: Callable[[], int]


HOT_PATHS: Final = {
    "async for": HotPath("event", lambda: iterated(fixed_batch(), 10)),
    "async for, execs": HotPath("event", lambda: iterated(exec_batch(), 5)),
    "to_json_lines": HotPath("event", lambda: json_lines(fixed_batch(), 10)),
    "to_json_lines, execs": HotPath("event", lambda: json_lines(exec_batch(), 5)),
    "to_numpy": HotPath("batch", to_numpy),
    "ring buffer, equal lengths": HotPath("record", lambda: ring_drained(fixed_batch())),
    "ring buffer, mixed lengths": HotPath("record", lambda: ring_drained(exec_batch())),
    "perf buffer": HotPath("record", perf_drained),
    "stream": HotPath("drain", drained_by_a_stream),
    "forward": HotPath("drain", forwarded),
    "Kafka records": HotPath("event", kafka_records),
    "redaction": HotPath("event", redacted),
    "spool": HotPath("entry", spooled),
    "reference": HotPath("round", reference),
}


def main() -> None:
    """Work, and print how much it was."""
    worked = {}
    for name in sys.argv[1:] or HOT_PATHS:
        # Collections are part of the work, but not of what was made before: how much that is varies.
        gc.collect()
        gc.freeze()
        worked[name] = HOT_PATHS[name].work(), HOT_PATHS[name].unit
    print(json.dumps(worked))


if __name__ == "__main__":
    main()
