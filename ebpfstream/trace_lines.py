"""trace_pipe as a stream: lines of `bpf_trace_printk`, and the same as events for sinks."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path
from time import monotonic_ns
from typing import Annotated, Any, Final, Self

import anyio
from anyio.lowlevel import checkpoint

from ebpfstream.batch import EventBatch, wall_clock_offset
from ebpfstream.events import U32, U64, Char, Comm, Embedded, Event, Tail, WallClock
from ebpfstream.kernel.tracepipe import ENTRIES_AT_ONCE, TraceLine, TracePipe, parse
from ebpfstream.lost import Lost
from ebpfstream.making import batch_of
from ebpfstream.statistics import Statistics
from ebpfstream.turns import Stream, in_thread

_DOUBLE: Final = struct.Struct("<d")
_PAUSE: Final = 0.01  # seconds, after a wakeup for nothing


def _double(data: bytes) -> float:
    (value,) = _DOUBLE.unpack(data)
    return float(value)


@dataclass
class TraceEvent(Event):
    """A TraceLine as an event, for sinks."""

    __schema_version__ = 1

    pid: U32
    """The thread that was running (the kernel's pid, in the initial namespace)."""
    comm: Comm
    """The name that the kernel remembers for it: TraceLine's `task`."""
    message: Annotated[str, Tail()]
    """What was printed."""
    cpu: U32
    """The CPU it was running on."""
    flags: Annotated[str, Char(8)]
    """Its state, in letters."""
    timestamp: Annotated[float, Embedded(8, _double)]
    """The trace clock as printed: seconds, or ticks if the clock is one that counts."""
    time: Annotated[datetime, WallClock("monotonic")]
    """When the line was read, in UTC."""
    monotonic: U64
    """The same in nanoseconds of CLOCK_MONOTONIC."""

    @classmethod
    def of(cls, line: TraceLine, monotonic: int) -> Self:
        """The event, to be packed."""
        timestamp: Any = _DOUBLE.pack(line.timestamp)
        time: Any = None  # made of the other
        return cls(line.pid, line.task, line.message, line.cpu, line.flags, timestamp, time, monotonic)


class TraceStream(Stream):
    """Lines of `bpf_trace_printk`, as an asynchronous iterator of TraceLine and Lost.

        async with bpf.trace() as lines:
            async for line in lines:
                ...

    Entering the block, or the first iteration without one, opens the pipe; what was printed before
    that is dropped.  Leaving it closes the pipe, as does dropping the last reference; what has not
    been asked for by then is dropped, too.  Lines come in the order of the trace clock, from all
    programs of the machine.  One task at a time may iterate.

    `path` is another trace_pipe than the machine's, such as one of a trace instance.  `on_start` is
    called, in a thread, when the pipe is open: what is printed from then on is in the stream.

    `forward` takes it as it is: sinks are given TraceEvents.

    Works on asyncio (uvloop too) and trio.  Linux ≥ 4.17.
    """

    event_type = TraceEvent

    def __init__(self, on_start: Callable[[], None] | None = None, *, path: Path | None = None) -> None:
        super().__init__("line")
        self._on_start = on_start
        self._path = path
        self._pipe: TracePipe | None = None
        self._lines: Iterator[TraceLine | Lost] = iter(())
        self._detached = False
        self._left: float = inf
        """How many entries are still to come, once it is detached."""
        self._received = self._delivered = self._bytes = 0
        self._lost: int | None = 0  # unknown where the kernel does not say how many

    async def __anext__(self) -> TraceLine | Lost:
        """The next line, or what was lost before it.

        Raises StreamClosedError, StreamBusyError; at the first call all that opening may raise.
        """
        while True:
            for line in self._lines:
                self._delivered += isinstance(line, TraceLine)
                return line
            if not await self._more():
                raise StopAsyncIteration

    async def next_batch(self, most: int | None = None) -> EventBatch[TraceEvent] | None:
        """The next lines as events, not more than `most`; None at the end.  Raises what iterating raises."""
        lines: list[TraceLine] = []
        lost: list[Lost] = []
        while not (lines or lost):
            for line in self._lines:
                if isinstance(line, Lost):
                    lost.append(line)
                    continue
                lines.append(line)
                if len(lines) == most:
                    break
            if not (lines or lost or await self._more()):
                return None
        self._delivered += len(lines)
        now = monotonic_ns()
        events = [TraceEvent.of(line, now) for line in lines]
        return batch_of(TraceEvent, events, lost, wall_clock_offset())

    async def _more(self) -> bool:
        """Wait for lines; False if none will come."""
        lines = await self._next_lines()
        for line in lines:
            if isinstance(line, TraceLine):
                self._received += 1
            elif self._lost is not None:
                self._lost = None if line.count is None else self._lost + line.count
        self._lines = iter(lines)
        return bool(lines)

    async def _next_lines(self) -> list[TraceLine | Lost]:
        with self._turn.taken():
            woken = False
            while True:
                # detach() and aclose() cancel the scope, to be noticed at once.
                with self._turn.waiting():
                    if self._detached and self._pipe is None:
                        return []
                    await self._open()
                    assert self._pipe is not None
                    pipe = self._pipe
                    await checkpoint()
                    if self._detached and self._left == inf:
                        self._left = pipe.waiting()
                    entries = pipe.read(int(min(self._left, ENTRIES_AT_ONCE)))
                    self._left -= len(entries)
                    self._bytes += sum(map(len, entries))
                    if lines := [line for entry in entries for line in parse(entry)]:
                        return lines
                    if not entries:
                        if self._detached:
                            return []
                        if woken:  # for nothing, as always with the trace option "block"
                            await anyio.sleep(_PAUSE)
                        await anyio.wait_readable(pipe.fd)
                    woken = not entries
                self._turn.check_open()

    async def _open(self) -> None:
        if self._pipe is None:
            # In a thread: attaching what prints takes the kernel up to some 100 ms.
            try:
                await in_thread(self._start)
            except BaseException:
                self._give_up()
                raise

    def _start(self) -> None:
        self._pipe = TracePipe(self._path)
        self._pipe.drain()
        if self._on_start is not None:
            self._on_start()

    def _give_up(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def statistics(self) -> Statistics:
        """The ledger: lines received and delivered, and those that the kernel had no room for.

        `bytes` are those of all entries, other events' included.
        """
        return Statistics(
            tried=None,
            submitted=None,
            lost=self._lost,
            lost_full=self._lost,
            received=self._received,
            delivered=self._delivered,
            unread=self._received - self._delivered,
            bytes=self._bytes,
        )

    def detach(self) -> None:
        """What is in the pipe now still comes; then the iteration ends."""
        self._detached = True
        self._turn.interrupt()

    async def _free(self) -> None:
        self._lines = iter(())
        self._give_up()

    def __del__(self) -> None:
        # Not by its own last reference: the thread that opened it may hold another for a moment.
        if (pipe := getattr(self, "_pipe", None)) is not None:
            pipe.close()
