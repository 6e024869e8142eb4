"""Event streams: wait for the kernel, drain, decode, account; iterated with `async for`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from operator import length_hint
from time import monotonic
from typing import Final, Generic, Literal, Protocol, Self, cast

from anyio.lowlevel import checkpoint
from anyio.to_thread import run_sync

from ebpfstream.batch import EventBatch, wall_clock_offset
from ebpfstream.errors import ArgumentError, DecodeError, LostError
from ebpfstream.events import E_co
from ebpfstream.filters import Filters
from ebpfstream.kernel.bpf import MapType, wait_for_running_programs
from ebpfstream.kernel.buffers import Buffer
from ebpfstream.lost import Lost
from ebpfstream.options import check_choice
from ebpfstream.origin import Origin
from ebpfstream.readymade import Counters
from ebpfstream.records import Records
from ebpfstream.statistics import Statistics
from ebpfstream.turns import Stream

LATENCY: Final = 0.002
"""Seconds that events may gather, unless told otherwise."""

OnLost = Literal["count", "yield", "raise"]

_NONE: Final = Records(b"", 0, [])
BATCH_BYTES: Final = 1 << 18
"""Bytes that a drain takes at most, but for the record that passes them."""
_MUCH_BYTES: Final = 1 << 16  # so many in the buffer need not gather any more
_GATHERED_MOST: Final = 0.25  # of the buffer, or of the part of it that one CPU has
# A record at the head that stays unfinished makes the descriptor readable for as long.
_UNFINISHED_PAUSE: Final = 0.0005


class Source(Protocol):
    """What a stream reads from: programs that submit to one buffer."""

    @property
    def buffer(self) -> Buffer | None:
        """The buffer, where it is there before `open`."""

    async def open(self) -> Buffer:
        """Attach; whatever is submitted after the return is in the buffer."""

    def detach(self) -> None:
        """Let no further run of the programs begin."""

    def stop(self) -> None:
        """Let nothing new come into the buffer, as far as that can be: nobody will read it."""

    def counters(self) -> Counters:
        """What the programs counted."""

    def set_filters(self, filters: Filters) -> None:
        """Let the programs leave out what does not meet these."""

    def pause(self, paused: bool) -> None:
        """Let the programs skip everything, or no longer."""

    def drained(self) -> None:
        """Something has been taken out of the buffer, or was to be."""

    def losses(self, records: Records | None, time: datetime) -> tuple[Lost, ...]:
        """What is missing before and among these records; of None, at the end of all."""

    def close(self) -> None:
        """Give everything back to the kernel."""


class EventStream(Stream, Generic[E_co]):
    """Events from the kernel, as an asynchronous iterator.

        async with trace_execve() as events:
            async for event in events:
                ...

    Entering the block attaches to the kernel.  Leaving it, or `aclose()`, detaches, counts what is left in the buffer
    as unread, reads the final counters, and frees everything; what has been counted stays in `statistics()`.  Without
    the block the first iteration attaches, and dropping the last reference detaches: at once, but without the final
    count.

    One task at a time may iterate.  A stream that is left by `break` goes on where it was when it is iterated again.
    Nothing is read ahead beyond one batch: while nobody asks, events wait in the kernel's buffer, and when that is full
    they are lost, and counted.

    `on_lost` says what else becomes of losses.  "count": nothing.  "yield": they are in the stream, as Lost, one for
    each batch and CPU, before the batch's events; all add up to `statistics().lost`.  "raise": LostError is raised, and
    the next call goes on.

    Works on asyncio (uvloop too) and trio.
    """

    def __init__(
        self,
        source: Source,
        event_type: type[E_co],
        *,
        latency: float = LATENCY,
        on_lost: OnLost = "count",
    ) -> None:
        if not latency >= 0:
            raise ArgumentError(f"latency={latency!r} is impossible: give seconds, 0 or more")
        check_choice("on_lost", on_lost, OnLost)
        super().__init__("event")
        self._source = source
        self._event_type = event_type
        self._latency = latency
        self._pause = latency  # or less, where so much would not fit
        self._on_lost = on_lost
        self._origin = Origin.new()
        self._buffer = source.buffer
        self._started = False
        self._behind = False  # the last drain left much, or stopped at its limit
        self._unfinished = False  # the last drain found nothing but a record that was not finished
        self._flowing = False  # the last wait was shorter than `latency`
        self._detached = False
        self._quiet = False  # and no program is running any more
        # Of the batch in hand: the events being iterated, and the lists that follow.
        self._batch: EventBatch[E_co] | None = None
        self._chunk: Iterator[E_co] = iter(())
        self._chunks: Iterator[list[E_co] | DecodeError] = iter(())
        self._lost: list[Lost] = []  # to be yielded before them
        self._received = 0
        self._handed = 0  # events of all lists that were begun
        self._undecodable = 0
        self._bytes = self._batches = self._wakeups = 0
        self._late = 0
        self._buffered_most = self._buffer_size = 0
        self._final: Counters | None = None

    async def __anext__(self) -> E_co:
        """The next event.

        Raises DecodeError for a record that the type does not fit, and LostError if that was asked for (the next call
        goes on after either), StreamClosedError, StreamBusyError, CorruptBufferError; at the first call all that
        opening may raise.
        """
        for event in self._chunk:
            return event
        return await self._first_of_next_chunk()

    async def _first_of_next_chunk(self) -> E_co:
        while True:
            if self._lost:
                return cast("E_co", self._lost.pop(0))  # the stream's type says that it may
            for chunk in self._chunks:
                if isinstance(chunk, DecodeError):
                    self._undecodable += 1
                    raise chunk
                self._handed += len(chunk)
                self._chunk = iter(chunk)
                return next(self._chunk)
            batch = await self._next_batch()
            if batch is None:
                raise StopAsyncIteration
            self._take_up(batch)

    def _take_up(self, batch: EventBatch[E_co]) -> None:
        self._batch = batch
        self._chunks = batch.decode()
        self._lost = list(batch.lost)

    def batches(self) -> Batches[E_co]:
        """The same stream a batch at a time: cheaper by far, above all with `to_json_lines()`.

        Goes on where the iteration of events stopped, and the other way round.  Iterating raises what `next_batch`
        raises.
        """
        return Batches(self)

    async def next_batch(self, most: int | None = None) -> EventBatch[E_co] | None:
        """What `batches()` yields, or None at the end; not more than `most` events.

        Raises what iterating events raises, but no DecodeError: nothing is decoded yet.
        """
        batch = await self._next_batch() if (rest := self._rest_in_hand()) is None else rest
        if batch is None:
            return None
        part = batch if most is None else batch[:most]
        self._handed += len(part)
        if part is not batch and len(part) < len(batch):
            self._take_up(batch[len(part) :])
        return part

    def _rest_in_hand(self) -> EventBatch[E_co] | None:
        rest = self._received - self._delivered - self._undecodable
        if self._batch is None or not (rest or self._lost):
            return None
        batch = self._batch[len(self._batch) - rest :]
        batch.lost = tuple(self._lost)
        self._put_down()
        return batch

    def _put_down(self) -> None:
        """Have nothing in hand any more."""
        self._handed -= length_hint(self._chunk)
        self._chunk, self._chunks, self._batch, self._lost = iter(()), iter(()), None, []

    @property
    def _delivered(self) -> int:
        return self._handed - length_hint(self._chunk)

    async def _next_batch(self) -> EventBatch[E_co] | None:
        """The next events from the kernel; None when there will be none."""
        with self._turn.taken():
            while True:
                if not (self._started or self._detached):
                    with self._turn.waiting():  # detach() and aclose() end it
                        await self._open()
                    self._turn.check_open()
                buffer = self._buffer
                if buffer is None:
                    return None
                more = await self._gathered(buffer)
                self._turn.check_open()
                if not more:
                    return self._told(self._made(_NONE, 0, self._losses(None)))
                batch = self._drained(buffer)
                if batch is not None:
                    return batch

    def _drained(self, buffer: Buffer) -> EventBatch[E_co] | None:
        pending = buffer.pending()
        if pending > self._buffered_most:
            self._buffered_most = pending
        records = buffer.drain(BATCH_BYTES)
        self._source.drained()
        if records is None:
            self._behind = self._flowing = False
            self._pause = self._latency
            self._unfinished = bool(buffer.pending())
            return None
        taken = len(records.data)
        self._behind = taken >= BATCH_BYTES or buffer.pending() >= _MUCH_BYTES
        if self._flowing:  # at this rate, no more than a part of the buffer is to gather
            pause = self._pause * buffer.fill()[1] * _GATHERED_MOST / taken
            self._pause = min(max(pause, self._latency / 64), self._latency)
        return self._told(self._made(records, wall_clock_offset(), self._losses(records)))

    def _made(self, records: Records, offset: int, lost: tuple[Lost, ...]) -> EventBatch[E_co]:
        return EventBatch(self._event_type, records, offset, lost, None, self._origin)

    def _losses(self, records: Records | None) -> tuple[Lost, ...]:
        return () if self._on_lost == "count" else self._source.losses(records, datetime.now(UTC))

    def _told(self, batch: EventBatch[E_co]) -> EventBatch[E_co] | None:
        """The batch, accounted for; None if there is nothing in it.  Raises LostError, the batch in hand."""
        self._account(batch)
        if batch.lost and self._on_lost == "raise":
            lost, batch.lost = batch.lost, ()
            self._take_up(batch)
            count = sum(one.count or 0 for one in lost)
            raise LostError(f"{count} events were lost; the stream goes on after them", lost)
        return batch if batch.records.runs or batch.lost else None

    async def _gathered(self, buffer: Buffer) -> bool:
        """Wait for events, and a little longer for more of them; False when none can come.

        While they come so often that some are there each time `latency` is over, their wakeups are not
        waited for: a wait costs the event loop more than a timer.
        """
        if self._unfinished:
            self._unfinished = False
            await self._turn.pause(_UNFINISHED_PAUSE)
            return True
        if self._behind or (self._detached and buffer.pending()):
            await checkpoint()
            return True
        if not (self._flowing or buffer.pending()):
            if self._quiet:
                return False
            woken = False
            with self._turn.waiting():
                woken = await self._woken(buffer)
            if not (woken and self._latency):
                return True
        await self._turn.pause(self._pause)
        return True

    async def _woken(self, buffer: Buffer) -> bool:
        """Wait until something is in the buffer; False when nothing new will be, and it holds what came meanwhile."""
        if self._detached:
            await run_sync(wait_for_running_programs)
            buffer.finish()
            self._quiet = True
            return False
        self._wakeups += 1
        asked = monotonic()
        await buffer.wait()
        self._flowing = monotonic() - asked < self._latency
        return True

    def _account(self, batch: EventBatch[E_co]) -> None:
        for _, stride, _, count in batch.records.runs:
            self._received += count
            self._bytes += stride * count
        self._batches += bool(batch.records.data)

    async def _open(self) -> None:
        if not self._started:
            self._buffer = await self._source.open()
            self._started = True
            if self._detached:  # meanwhile
                self._source.detach()

    @property
    def event_type(self) -> type[E_co]:
        """The class of its events."""
        return self._event_type

    @property
    def has_perf_buffer(self) -> bool:
        """Whether it is open, and reads a perf buffer: to open its part on a CPU that comes takes CAP_PERFMON."""
        return self._buffer is not None and self._buffer.map.type is MapType.PERF_EVENT_ARRAY

    def statistics(self) -> Statistics:
        """The ledger so far; after closing, the final one."""
        counters = self._final or self._source.counters()
        return Statistics(
            **counters._asdict(),
            received=self._received,
            delivered=self._delivered,
            undecodable=self._undecodable,
            unread=self._received - self._delivered - self._undecodable,
            bytes=self._bytes,
            batches=self._batches,
            wakeups=self._wakeups,
            late=self._late if self._buffer is None else self._buffer.late,
            buffer_size=self._buffer_size if self._buffer is None else self._buffer.size,
            buffered=0 if self._buffer is None else self._buffer.pending(),
            buffered_most=self._buffered_most,
        )

    def set_filters(self, filters: Filters) -> None:
        """Let the kernel leave out what does not meet these, from now on; they take the place of all before.

        Raises ArgumentError for a cgroup that there is not, StreamClosedError.
        """
        self._turn.check_open()
        self._source.set_filters(filters)

    def pause(self) -> None:
        """Let the programs skip what happens, in the kernel, and count it, until `resume`.

        What has been submitted still comes.  Raises StreamClosedError, UnsupportedError for a program of yours.
        """
        self._turn.check_open()
        self._source.pause(True)

    def resume(self) -> None:
        """Let the programs submit again.  Raises StreamClosedError, UnsupportedError."""
        self._turn.check_open()
        self._source.pause(False)

    def detach(self) -> None:
        """Take the programs off their hooks: nothing new happens to this stream from now on.

        What has been submitted still comes; then the iteration ends.  Takes up to some 100 ms where calls are traced.
        """
        if not self._detached:
            self._detached = True
            self._flowing = False
            self._source.detach()
            self._turn.interrupt()

    async def _free(self) -> None:
        self._detached = True
        try:
            if self._buffer is not None:
                await run_sync(self._source.stop)  # threads: the kernel waits for grace periods
                await run_sync(wait_for_running_programs)
                self._buffer.finish()
                while records := self._buffer.drain(BATCH_BYTES):
                    self._account(EventBatch(self._event_type, records))
                    await checkpoint()
        finally:
            self._put_down()
            self._release()

    def _release(self) -> None:
        try:
            self._final = self._source.counters()
            if self._buffer is not None:
                self._late, self._buffer_size = self._buffer.late, self._buffer.size
        finally:
            self._buffer = None
            self._source.close()

    def __del__(self) -> None:
        # There is none if a wrong argument was given.
        if getattr(self, "_buffer", None) is not None and not self._turn.closed:
            self._release()


class Batches(Generic[E_co]):
    """A stream's events a batch at a time, as an asynchronous iterator: see `EventStream.batches`."""

    def __init__(self, stream: EventStream[E_co]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventBatch[E_co]:
        """The next batch.  Raises what `EventStream.next_batch` raises."""
        batch = await self._stream.next_batch()
        if batch is None:
            raise StopAsyncIteration
        return batch
