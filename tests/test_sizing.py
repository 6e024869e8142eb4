"""Sizes, against what buffers, queues and spools really take; and the command that tells them."""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner

from ebpfstream import ArgumentError, EventBatch, ExecEvent, SyscallEvent, sizing
from ebpfstream.backlog import Backlog
from ebpfstream.cli.size import size as command
from ebpfstream.events import Event, layout
from ebpfstream.kernel.perfbuf import RING_MAX, ring_bytes
from ebpfstream.kernel.ringbuf import SIZE_MAX, buffer_bytes
from ebpfstream.origin import Origin
from ebpfstream.packing import pack
from ebpfstream.records import Records, Run
from ebpfstream.segments import entry_size
from ebpfstream.sinks.blackhole import BlackholeSink
from ebpfstream.spool import Spool
from ebpfstream.stream import LATENCY

EXEC = layout(ExecEvent)
MILLISECOND = 1_000_000


def exec_batch(events: Iterable[tuple[int, bytes]]) -> EventBatch[ExecEvent]:
    """Execs as a ring buffer holds them: when, and the arguments of each."""
    data, runs = bytearray(), list[Run]()
    offsets = {member.name: member.offset for member in EXEC.members}
    for when, arguments in events:
        sample = bytearray(EXEC.size)
        struct.pack_into("<Q", sample, offsets["monotonic"], when)
        struct.pack_into("<I", sample, offsets["args_length"], len(arguments))
        sample += arguments
        stride = 8 + (len(sample) + 7) // 8 * 8
        runs.append((len(data), stride, len(sample), 1))
        data += (bytes(8) + sample).ljust(stride, b"\0")
    return EventBatch(ExecEvent, Records(bytes(data), 8, runs), 0, (), None, Origin.new())


@pytest.mark.parametrize(
    ("sample", "ring", "perf"),
    [
        (1, 16, 24),
        (4, 16, 24),
        (5, 16, 32),
        (8, 16, 32),
        (9, 24, 32),
        (64, 72, 88),
        (144, 152, 168),
        (280, 288, 304),
        (65_508, 65_520, 65_528),
        (65_509, 65_520, None),
    ],
)
def test_records(sample: int, ring: int, perf: int | None) -> None:
    """A header of 8; or of 8, the time, a length: and all of it a multiple of 8."""
    assert sizing.record(sample) == sizing.Record(sample, ring, perf)


def test_events_and_their_bytes() -> None:
    assert sizing.coming(20_000, 0.5) == 10_040  # LATENCY is 2 ms
    assert sizing.coming(0.1, 1) == 1
    assert sizing.needed(10_040, 288) == 10_040 * 288 + 8
    assert sizing.needed(3, 100.5) == 310
    assert [sizing.kernel_size(need) for need in (1, 4096, 4097, 2_891_528)] == [4096, 4096, 8192, 4 << 20]


def test_the_opposite_way() -> None:
    """As many as are needed for the stall that a buffer tolerates fit into it, and one more does not."""
    for size in (1 << 16, 1 << 20):
        for stride in (16, 288, 152.25):
            stall = sizing.tolerated(size, stride, 1000)
            events = sizing.coming(1000, stall)
            assert sizing.needed(events, stride) <= size < sizing.needed(events + 1, stride)
    assert sizing.tolerated(4096, 4096, 1) == 0
    assert sizing.tolerated(4096, 2048, 1e6) == 0  # less than what gathers


def test_a_stall() -> None:
    made = sizing.plan(sizing.expected("struct", 20_000, 280), cpus=4, stall=0.5)
    held = ((4 << 20) - 8) // 288
    assert made.events == 10_040
    assert made.ring == sizing.Part(4 << 20, 4 << 20, 10_040 * 288 + 8, held / 20_000 - LATENCY)
    held = ((4 << 20) - 8) // 304
    assert made.perf == sizing.Part(16 << 20, 4 << 20, 10_040 * 304 + 8, held / 20_000 - LATENCY)
    held = ((1 << 20) - 8) // 304
    assert made.perf_spread == sizing.Part(4 << 20, 1 << 20, 2510 * 304 + 8, held / 5000 - LATENCY)
    assert (made.perf_impossible, made.outage, made.json_per_day) == ("", None, None)


def test_what_is_told_is_what_the_buffers_make_of_it() -> None:
    for stall in (0.001, 0.1, 3):
        made = sizing.plan(sizing.expected("execve", 3000), cpus=3, stall=stall)
        assert made.ring is not None
        assert made.perf is not None
        assert made.perf_spread is not None
        assert buffer_bytes(made.ring.buffer_size) == made.ring.buffer_size
        for part in (made.perf, made.perf_spread):
            assert ring_bytes(part.buffer_size, 3) == part.per_cpu
        # Given that size, it tolerates as much.
        again = sizing.plan(made.load, cpus=3, buffer_size=made.perf.buffer_size)
        assert again.perf is not None
        assert again.perf.tolerates == made.perf.tolerates >= stall


def test_a_buffer_of_a_size() -> None:
    """Which is rounded as the kernel's are."""
    made = sizing.plan(sizing.expected("syscalls", 100_000), cpus=2, buffer_size=(8 << 20) + 5)
    assert made.ring == sizing.Part(8 << 20, 8 << 20, None, ((8 << 20) - 8) // 152 / 100_000 - LATENCY)
    each = ((4 << 20) - 8) // 168
    assert made.perf == sizing.Part(8 << 20, 4 << 20, None, each / 100_000 - LATENCY)
    assert made.perf_spread == sizing.Part(8 << 20, 4 << 20, None, each / 50_000 - LATENCY)
    small = sizing.plan(made.load, cpus=2, buffer_size=4096)
    assert (small.perf, small.perf_impossible[:17]) == (None, "buffer_size=4096 ")


def test_limits_are_the_kernels() -> None:
    assert buffer_bytes(SIZE_MAX) == SIZE_MAX
    assert ring_bytes(RING_MAX, 1) == RING_MAX
    for refuse, most in (
        (buffer_bytes, SIZE_MAX),
        (lambda size: ring_bytes(size, 1), RING_MAX),
    ):
        with pytest.raises(ArgumentError):
            refuse(2 * most)
    load = sizing.expected("struct", 1_000_000, 8)  # 16 bytes, and 32
    most = ((2 << 30) - 8) // 16
    made = sizing.plan(load, cpus=2, stall=(most - 2000) / 1_000_000)
    assert (made.events, made.ring and made.ring.buffer_size) == (most, 2 << 30)
    assert made.perf is None
    assert "1 GiB at most" in made.perf_impossible
    with pytest.raises(ArgumentError, match=r"2 GiB at most: that is a stall of 134 s .* filters"):
        sizing.plan(load, cpus=2, stall=(most - 1999) / 1_000_000)
    assert "65508 bytes" in sizing.plan(sizing.expected("struct", 1, 65_509), cpus=1, stall=1).perf_impossible


@pytest.mark.parametrize(
    ("rate", "kind", "varied"), [(1, "execve", True), (20_000, "execve", True), (1e6, "syscalls", False)]
)
def test_a_spool_holds_the_outage(rate: float, kind: sizing.Kind, varied: bool, tmp_path: Path) -> None:
    """On the real one, in the entries that such a stream makes; a mebibyte less holds not all."""
    load = sizing.expected(kind, rate)
    events = 20_000
    outage = sizing.plan(load, cpus=1, outage=events / rate).outage
    assert outage is not None
    assert outage.events == events
    stride, number = (
        int(load.record.larger),
        max(1, min(int(rate * LATENCY), (256 << 10) // int(load.record.larger))),
    )
    runs: list[Run] = [(0, stride, stride - 8, number)]
    if varied:
        runs = [(index * stride, stride, stride - 8, 1) for index in range(number)]
    event_type: type[Event] = ExecEvent if kind == "execve" else SyscallEvent
    records = Records(bytes(stride * number), 8, runs)
    payload = pack(EventBatch(event_type, records, 1 << 60, (), None, Origin.new()))
    assert load.spool == entry_size(payload) / number

    def dropped(size: int) -> int:
        spool = Spool(tmp_path / str(size), size=size)
        spool.open()
        lost = sum(spool.append(payload, number) for _ in range(events // number))
        spool.close()
        return lost

    assert dropped(outage.spool_size) == 0
    assert dropped(int(load.spool * events * 0.9)) > 0


def test_a_queue_holds_the_outage() -> None:
    load = sizing.expected("execve", 1000)
    outage = sizing.plan(load, cpus=1, outage=20).outage
    assert outage is not None
    batch = exec_batch([(0, bytes(128))] * 100)
    assert batch.nbytes == 100 * 304 == 100 * load.record.larger  # as a perf buffer has them

    def taken(size: int) -> int:
        backlog = Backlog(BlackholeSink(queue_size=size), ExecEvent)
        return sum(backlog.put_nowait(batch) for _ in range(200)) * 100

    assert taken(outage.queue_size) == outage.events == 20_000
    assert taken(outage.queue_size - (2 << 20)) < 20_000


def test_json_of_execs() -> None:
    """What was measured fits what is written today: the arguments are in it twice."""
    for length in (40, 112, 300):
        batch = exec_batch([(1_700_000_000 * 10**9, b"word\0" * (length // 5))] * 10)
        estimated = sizing.expected("execve", 1, EXEC.size + length).json
        assert estimated == pytest.approx(len(batch.to_json_lines()) / 10, rel=0.15)


def test_what_is_measured() -> None:
    """Rates of all of it, and of the 100 ms that take most bytes; means of what records take."""
    meter = sizing.Meter()
    quiet = exec_batch([(number * 200 * MILLISECOND, b"a" * 24) for number in range(10)])
    meter.add(quiet)
    # More events at one time, more bytes at another one: 5 in 100 ms, then a sixth.
    many = [(3000 * MILLISECOND + number * MILLISECOND, b"") for number in range(7)]
    large = [(4000 * MILLISECOND + number * 20 * MILLISECOND, b"b" * 401) for number in range(6)]
    busy = exec_batch([*large, *many])  # CPUs do not keep to one order
    meter.add(busy)
    load = meter.load(5.0, lost=2)
    size = EXEC.size
    assert (load.rate, load.events, load.lost, load.seconds) == (25 / 5, 25, 2, 5.0)
    assert load.record.sample == size + (10 * 24 + 6 * 401) / 23
    assert load.busiest == 5 / 0.1
    assert load.busiest_record == sizing.record(size + 401)
    assert load.json == (len(quiet.to_json_lines()) + len(busy.to_json_lines())) / 23
    assert load.spool == (entry_size(pack(quiet)) + entry_size(pack(busy))) / 23
    made = sizing.plan(load, cpus=1, stall=1, outage=10)
    assert made.events == sizing.coming(50, 1)
    assert made.outage is not None
    assert made.outage.events == 50  # by the mean


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "give --rate .* or --measure 10s"),
        ("--stall 1s", "give --rate"),
        ("--rate 5", "nothing to work out: give a stall"),
        ("--rate 0 --stall 1s", "a rate of 0 is impossible: give events a second"),
        ("--rate=-3 --stall 1s", "a rate of -3 is impossible"),
        ("--rate nan --stall 1s", "a rate of nan is impossible"),
        ("--rate 5 --stall 0s", "stall 0 is impossible: give a time of more than 0"),
        ("--rate 5 --outage 0s", "outage 0 is impossible"),
        ("--rate 5 --stall 1s --buffer-size 1MiB", "give one of them"),
        ("--rate 5 --buffer-size 100", f"give {mmap.PAGESIZE} to 2147483648 bytes"),
        ("--rate 1e6 --stall 1h", "do not fit into a ring buffer.* a stall of 7.45 s at this rate"),
        ("--rate 5 --stall 1s --cpus 0", "0 CPUs are impossible"),
        (
            "--rate 5 --stall 1s --event-size 100",
            f"an exec of 100 bytes is impossible: give {EXEC.size} or more",
        ),
        ("struct --rate 5 --stall 1s", "give it in bytes, such as --event-size 64"),
        ("struct --rate 5 --stall 1s --event-size 0", "an event of 0 bytes is impossible"),
        ("syscalls --rate 5 --stall 1s --event-size 64", "leave out the event's size"),
        ("--measure 1s --rate 5 --stall 1s", "--measure is for execs"),
        ("syscalls --measure 1s --stall 1s", "--measure is for execs"),
        ("--measure 1ms --stall 1s", "0.001s is too short: give a second"),
        ("--measure 1h", "nothing to work out"),
        ("--measure 1h --stall 0s", "stall 0 is impossible"),
    ],
)
def test_what_cannot_be_meant(given: str, message: str) -> None:
    """Is said at once, with what to do."""
    with pytest.raises(ArgumentError, match=message):
        CliRunner().invoke(command, given, catch_exceptions=False)


def test_nothing_was_measured() -> None:
    with pytest.raises(ArgumentError, match="nothing was executed within 2 s: measure for longer"):
        sizing.Meter().load(2)


def shown(arguments: str) -> str:
    done = CliRunner().invoke(command, arguments, catch_exceptions=False, env={"COLUMNS": "300"})
    assert done.exit_code == 0
    return done.output


def test_for_people() -> None:
    made = sizing.plan(sizing.expected("execve", 20_000), cpus=2, outage=6 * 3600)
    assert made.outage is not None
    spool, queue = made.outage.spool_size >> 20, made.outage.queue_size >> 20
    assert (
        shown("--rate 20000 --stall 500ms --outage 6h --cpus 2")
        == f"""\
rate          20,000 events a second, as given
event         280 bytes of an exec (a mean, measured elsewhere: see --event-size): {HELD}
stall         500 ms, and 2 ms that events may gather: 10,040 events
ring buffer   --buffer-size 4MiB: 2,891,528 bytes are needed; tolerates 726 ms
perf buffer   --buffer-size 8MiB --buffer perf: 4 MiB for each of 2 CPUs, as if all came from one; {NEEDED[0]}
              --buffer-size 4MiB --buffer perf: 2 MiB each, if they are spread evenly; {NEEDED[1]}
queue         queue_size=8MiB, unless told otherwise: full after 1.32 s in which the sink takes nothing
outage        6 h: 432,000,000 events; spool_size={spool}MiB keeps them on disk \
({made.load.spool:.0f} bytes an event), queue_size={queue}MiB in memory
JSON          1.32 TB a day, in Kafka or a file: 765 bytes an event, uncompressed
"""
    )


HELD = "288 in a ring buffer, 304 in a perf buffer"
NEEDED = [f"{need} bytes are needed; tolerates 687 ms" for need in ("3,052,168", "1,526,088")]


def test_for_people_who_know_the_size() -> None:
    lines = shown("struct --event-size 64 --rate 50 --buffer-size 64KiB --cpus 1").splitlines()
    assert lines[1] == "event         64 bytes, as given: 72 in a ring buffer, 88 in a perf buffer"
    assert lines[2] == "ring buffer   --buffer-size 64KiB: tolerates 18.1 s"
    assert lines[3].endswith(
        "--buffer perf: 64 KiB for each of 1 CPUs, as if all came from one; tolerates 14.8 s"
    )
    assert "JSON" not in lines[-1]  # who knows its fields?


def test_for_people_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = sizing.Meter()
    meter.add(exec_batch([(number * MILLISECOND, b"c" * (100 + number)) for number in range(8)]))

    async def measure(seconds: float) -> sizing.Load:
        return meter.load(seconds, lost=2)

    # The package has the command by the module's name.
    monkeypatch.setattr(sys.modules["ebpfstream.cli.size"], "_measure", measure)
    lines = shown("--measure 2s --stall 1s").splitlines()
    assert lines[:5] == [
        "ebpfstream: counting execs for 2 s",
        "rate          5 events a second: 10 in 2.0 s, 2 of them lost meanwhile",
        "busiest       80 events a second, within 100 ms: kernel buffers are for this",
        "event         272 bytes in the mean, within that time: 283 in a ring buffer, 295 in a perf buffer",
        "stall         1 s, and 2 ms that events may gather: 81 events",
    ]
    assert lines[5].startswith(
        f"ring buffer   --buffer-size 32KiB: {81 * 283 + 8:,} bytes are needed; tolerates "
    )


def test_for_machines() -> None:
    told: dict[str, Any] = orjson.loads(
        shown("syscalls --rate 100000 --stall 20ms --outage 1m --cpus 2 --json")
    )
    made = sizing.plan(sizing.expected("syscalls", 100_000), cpus=2, stall=0.02, outage=60)
    assert (told["kind"], told["queue_size"], told["latency"]) == ("syscalls", 8 << 20, LATENCY)
    assert told["load"]["record"] == {"sample": 144, "ring": 152, "perf": 168}
    assert made.ring is not None
    assert made.outage is not None
    assert told["ring"] == {
        "buffer_size": 512 << 10,
        "per_cpu": 512 << 10,
        "needed": 2200 * 152 + 8,
        "tolerates": made.ring.tolerates,
    }
    assert told["perf"]["buffer_size"] == 2 * (512 << 10)
    assert told["perf_spread"]["buffer_size"] == 2 * (256 << 10)
    assert told["outage"] == {
        "seconds": 60.0,
        "events": 6_000_000,
        "queue_size": made.outage.queue_size,
        "spool_size": made.outage.spool_size,
    }
    assert told["json_per_day"] == 100_000 * 346 * 86400
