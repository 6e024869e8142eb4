"""How large buffers, queues and spools must be for a rate of events: worked out from what records really take."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, floor
from struct import Struct
from typing import Any, Final, Literal, get_args

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError
from ebpfstream.events import Event, Integer, Layout, layout
from ebpfstream.kernel.perfbuf import RING_MAX, ring_bytes
from ebpfstream.kernel.perfring import PREFIX, RECORD_MAX
from ebpfstream.kernel.ringbuf import HEADER_SIZE, SIZE_MAX, buffer_bytes, record_bytes
from ebpfstream.origin import Origin
from ebpfstream.packing import pack
from ebpfstream.records import Records, Run
from ebpfstream.segments import POSITIONS_SIZE, entry_size
from ebpfstream.sink import Sink
from ebpfstream.stream import BATCH_BYTES, LATENCY
from ebpfstream.tracers.execve import ExecEvent
from ebpfstream.tracers.syscalls import SyscallEvent

Kind = Literal["execve", "syscalls", "struct"]

WINDOW: Final = 0.1
"""Seconds over which the busiest time is looked for."""

# Both kinds keep what is in them below their size, and records are multiples of 8 bytes
# (__bpf_ringbuf_reserve(), kernel/bpf/ringbuf.c; ring_buffer_has_space(), kernel/events/ring_buffer.c).
_NEVER_USED: Final = 8
_PERF_SAMPLE_MOST: Final = RECORD_MAX - 8 - PREFIX
_SAMPLE_MOST: Final = (1 << 30) - 1  # the length in a ring buffer's header has two flags beside it

# Measured, see docs/guides/sizing.md: what follows the struct of an exec (path, arguments, working directory); the
# JSON of one without that, and what each of these bytes adds (the arguments are in `message`, too); a call with result.
_EXEC_TAIL: Final = 112
_EXEC_JSON, _EXEC_JSON_OF_BYTE = 530, 2.1
_SYSCALL_JSON: Final = 346

_BATCH: Final = BATCH_BYTES + (32 << 10)  # with the record that passes them
_BLOCK: Final = 4096
_MEBIBYTE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes that an event takes; means where lengths vary."""

    sample: float
    """What the program submits."""
    ring: float
    """In a ring buffer: behind a header of 8 bytes, and padded to a multiple of 8."""
    perf: float | None
    """In a perf buffer: behind a header, the time, a length; padded.  None if it never fits."""

    @property
    def larger(self) -> float:
        """In the kind of buffer that takes more."""
        return max(self.ring, self.perf or 0)


@dataclass(frozen=True, slots=True)
class Load:
    """What comes: rates, and what an event takes."""

    rate: float
    """Events a second."""
    record: Record
    busiest: float
    """Events a second while most comes; `rate` unless it was measured."""
    busiest_record: Record
    json: float | None
    """Bytes of an event as a JSON line; None if that is not known."""
    spool: float
    """Bytes of an event in a spool, with what its batch and its entry take."""
    seconds: float | None = None
    """How long it was measured; None if it was not."""
    events: int | None = None
    """How many came meanwhile."""
    lost: int | None = None
    """Of them, those for which there was no room while it was measured."""


@dataclass(frozen=True, slots=True)
class Part:
    """A kernel buffer for a load."""

    buffer_size: int
    """Bytes in all, as streams and commands take it."""
    per_cpu: int
    """Bytes that each CPU has; those of a ring buffer all have the same."""
    needed: int | None
    """Bytes of `per_cpu` that are needed; None where the size was given."""
    tolerates: float
    """Seconds that its consumer may stand still."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What must be kept while a sink takes nothing for so long."""

    seconds: float
    events: int
    queue_size: int
    """Bytes for all of it in memory."""
    spool_size: int
    """Bytes for all of it on disk."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer."""

    load: Load
    cpus: int
    latency: float
    stall: float | None
    events: int | None
    """That come within the stall and `latency`."""
    ring: Part | None
    perf: Part | None
    """With room for all of it on each CPU: what comes from one CPU has that CPU's part alone."""
    perf_spread: Part | None
    """The same if all CPUs always submit as much."""
    perf_impossible: str
    """Why there is none; empty if there is, or none was asked for."""
    queue_tolerates: float
    """Seconds for which a sink's queue has room, of the size that it has unless told otherwise."""
    outage: Outage | None
    json_per_day: float | None


def record(sample: int) -> Record:
    """What an event of so many bytes takes in either kind of buffer.  Raises ArgumentError."""
    if not 1 <= sample <= _SAMPLE_MOST:
        raise ArgumentError(f"an event of {sample} bytes is impossible: give 1 to {_SAMPLE_MOST} bytes")
    perf = _aligned(PREFIX + sample) if sample <= _PERF_SAMPLE_MOST else None
    return Record(sample, record_bytes(sample), perf)


def _aligned(size: int) -> int:
    return size + 7 & ~7


def expected(kind: Kind, rate: float, event_size: int | None = None) -> Load:
    """The load of so many events a second, of a size that is known or was measured elsewhere.

    `event_size` is what a program submits for one.  Raises ArgumentError.
    """
    if not 0 < rate <= 1e9:
        raise ArgumentError(
            f"a rate of {rate:g} is impossible: give events a second, more than 0 and up to 1e9"
        )
    if kind not in get_args(Kind):
        raise ArgumentError(f"{kind!r} is unknown: give execve, syscalls or struct")
    json: float | None = None
    event_type: type[Event] = SyscallEvent
    if kind == "execve":
        event_type, least = ExecEvent, layout(ExecEvent).size
        event_size = least + _EXEC_TAIL if event_size is None else event_size
        if event_size < least:
            raise ArgumentError(f"an exec of {event_size} bytes is impossible: give {least} or more")
        json = _EXEC_JSON + _EXEC_JSON_OF_BYTE * (event_size - least)
    elif kind == "syscalls":
        if event_size is not None:
            raise ArgumentError("every system call's event has the same size: leave out the event's size")
        event_size, json = layout(SyscallEvent).size, _SYSCALL_JSON
    elif event_size is None:
        raise ArgumentError("of a struct only you know the size: give it in bytes, such as --event-size 64")
    of_one = record(event_size)
    spool = spooled(event_type, of_one, rate, varied=kind == "execve")
    return Load(rate, of_one, rate, of_one, json, spool)


def spooled(event_type: type[Event], of_one: Record, rate: float, *, varied: bool) -> float:
    """Bytes of an event in a spool: a part of an entry that holds as many as come within `LATENCY`.

    Where lengths are `varied` an entry says that of each event.
    """
    stride = _aligned(ceil(of_one.larger))
    number = max(1, min(floor(rate * LATENCY), BATCH_BYTES // stride))
    size = stride - HEADER_SIZE
    runs: list[Run] = [(0, stride, size, number)]
    if varied:
        runs = [(index * stride, stride, size, 1) for index in range(number)]
    batch = EventBatch(
        event_type, Records(bytes(number * stride), HEADER_SIZE, runs), 1 << 60, (), None, Origin.new()
    )
    return entry_size(pack(batch)) / number


class Meter:
    """Adds up what comes out of a stream of execs through a ring buffer."""

    def __init__(self) -> None:
        self._events: list[tuple[int, int, int]] = []  # when, bytes of the sample, in a ring buffer
        self._json = self._spool = 0
        self._time = _time_of(layout(ExecEvent))

    def add(self, batch: EventBatch[Any]) -> None:
        """Take a batch into account."""
        data, prefix = batch.records.data, batch.records.prefix
        for position, stride, size, count in batch.records.runs:
            for start in range(position, position + stride * count, stride):
                (when,) = self._time.unpack_from(data, start + prefix)
                self._events.append((when, size, stride))
        self._json += len(batch.to_json_lines())
        self._spool += entry_size(pack(batch))

    def load(self, seconds: float, lost: int = 0) -> Load:
        """What came within so many seconds.  Raises ArgumentError if nothing did."""
        events = sorted(self._events)
        if not events:
            raise ArgumentError(
                f"nothing was executed within {seconds:g} s: measure for longer, while the machine does what it "
                "is for, or give a rate"
            )
        window = _busiest(events)
        of_one, in_window = _mean(events), _mean(window)
        number = len(events)
        return Load(
            (number + lost) / seconds,
            of_one,
            len(window) / WINDOW,
            in_window,
            self._json / number,
            self._spool / number,
            seconds,
            number + lost,
            lost,
        )


def _time_of(plan: Layout) -> Struct:
    """Takes when it happened out of an event."""
    (member,) = (member for member in plan.members if member.name == "monotonic")
    assert member.kind == Integer(8)
    return Struct(f"<{member.offset}xQ")


def _busiest(events: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those within `WINDOW` that take most bytes, of events by time."""
    first = size = most = 0
    best = (0, 0)
    for last, (when, _, stride) in enumerate(events):
        size += stride
        while events[first][0] <= when - WINDOW * 1e9:
            size -= events[first][2]
            first += 1
        if size > most:
            most, best = size, (first, last + 1)
    return events[slice(*best)]


def _mean(events: Iterable[tuple[int, int, int]]) -> Record:
    of_each = [record(size) for _, size, _ in events]
    count = len(of_each)
    return Record(
        sum(one.sample for one in of_each) / count,
        sum(one.ring for one in of_each) / count,
        sum(one.perf or 0 for one in of_each) / count,  # an exec always fits
    )


def coming(rate: float, stall: float) -> int:
    """Events of a stall, and of the time that a stream lets events gather before it takes them."""
    return ceil(round(rate * (stall + LATENCY), 6))


def needed(events: int, size: float) -> int:
    """Bytes that a buffer must have to hold so many records of that size."""
    return ceil(round(events * size, 6)) + _NEVER_USED


def kernel_size(need: int) -> int:
    """The least power of two in pages that is not below it."""
    return max(1 << (need - 1).bit_length(), mmap.PAGESIZE)


def tolerated(buffer: int, size: float, rate: float) -> float:
    """Seconds for which a consumer may stand still: the opposite of `coming` and `needed`."""
    return max((buffer - _NEVER_USED) // size / rate - LATENCY, 0)


def plan(
    load: Load,
    *,
    cpus: int,
    stall: float | None = None,
    buffer_size: int | None = None,
    outage: float | None = None,
) -> Plan:
    """The sizes for a stall and an outage, or how long a stall a buffer tolerates.

    Kernel buffers are worked out for the busiest time, as if it lasted for all of the stall; what is kept for longer,
    for the mean.  Raises ArgumentError.
    """
    if stall is None and buffer_size is None and outage is None:
        raise ArgumentError(
            "there is nothing to work out: give a stall that must lose nothing (--stall 500ms), a buffer of which "
            "to know the stall (--buffer-size 4MiB), or an outage of a sink (--outage 6h)"
        )
    if stall is not None and buffer_size is not None:
        raise ArgumentError("a stall gives a buffer's size, and a size the stall: give one of them")
    for name, seconds in (("stall", stall), ("outage", outage)):
        if seconds is not None and not 0 < seconds < 1e9:
            raise ArgumentError(
                f"{name} {seconds:g} is impossible: give a time of more than 0, such as 500ms"
            )
    if cpus < 1:
        raise ArgumentError(f"{cpus} CPUs are impossible: give 1 or more")
    made = Plan(
        load,
        cpus,
        LATENCY,
        stall,
        None,
        None,
        None,
        None,
        "",
        tolerated(Sink.queue_size - _BATCH, load.record.larger, load.rate),
        None if outage is None else _outage(load, outage),
        None if load.json is None else load.rate * load.json * 86400,
    )
    if stall is not None:
        return _for_stall(made, stall)
    return made if buffer_size is None else _of_size(made, buffer_size)


def _for_stall(made: Plan, stall: float) -> Plan:
    load, cpus = made.load, made.cpus
    rate, ring, perf = load.busiest, load.busiest_record.ring, load.busiest_record.perf
    events = coming(rate, stall)
    need = needed(events, ring)
    if need > SIZE_MAX:
        most = tolerated(SIZE_MAX, ring, rate)
        raise ArgumentError(
            f"{events} events of {ring:.0f} bytes do not fit into a ring buffer, of which the kernel gives 2 GiB at "
            f"most: that is a stall of {most:.3g} s at this rate.  Ask for less, leave events out with filters, or "
            'thin them out with overload="sample"'
        )
    size = kernel_size(need)
    made = replace(made, events=events, ring=Part(size, size, need, tolerated(size, ring, rate)))
    if perf is None:
        return replace(made, perf_impossible=_too_large())
    parts = []
    for share in (1, cpus):
        need = needed(ceil(events / share), perf)
        size = kernel_size(need)
        parts.append(Part(size * cpus, size, need, tolerated(size, perf, rate / share)))
    if parts[0].per_cpu > RING_MAX:
        why = f"a CPU's part would need {parts[0].needed} bytes, and the kernel gives 1 GiB at most"
        return replace(made, perf_impossible=why)
    return replace(made, perf=parts[0], perf_spread=parts[1])


def _of_size(made: Plan, buffer_size: int) -> Plan:
    load, cpus = made.load, made.cpus
    rate, ring, perf = load.busiest, load.busiest_record.ring, load.busiest_record.perf
    size = buffer_bytes(buffer_size)
    made = replace(made, ring=Part(size, size, None, tolerated(size, ring, rate)))
    if perf is None:
        return replace(made, perf_impossible=_too_large())
    try:
        each = ring_bytes(buffer_size, cpus)
    except ArgumentError as error:
        return replace(made, perf_impossible=str(error))
    one, spread = (Part(each * cpus, each, None, tolerated(each, perf, rate / share)) for share in (1, cpus))
    return replace(made, perf=one, perf_spread=spread)


def _too_large() -> str:
    return f"a perf record has room for {_PERF_SAMPLE_MOST} bytes: submit less at a time, or to a ring buffer"


def _outage(load: Load, seconds: float) -> Outage:
    events = ceil(round(load.rate * seconds, 6))
    queue = ceil(events * load.record.larger) + _BATCH
    stored = ceil(events * load.spool)
    # Two segments in a row hold more than one may have: a sixteenth of all, up to 64 MiB.  Each ends with its block.
    segments = max(33, 2 * (stored >> 26) + 3)
    return Outage(seconds, events, _whole(queue), _whole(stored + POSITIONS_SIZE + segments * _BLOCK))


def _whole(size: int) -> int:
    """In whole MiB, not below it."""
    return -(-size // _MEBIBYTE) * _MEBIBYTE
