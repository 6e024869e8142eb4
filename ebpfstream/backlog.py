"""What waits for one sink: in memory, and beyond that on disk."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeVar, TypeVarTuple

import anyio

from ebpfstream.ages import Ages
from ebpfstream.batch import EventBatch
from ebpfstream.errors import (
    EventTypeError,
    QueueFullError,
    SinkError,
    SinkRejectedError,
    SinkUnavailableError,
)
from ebpfstream.lost import Lost
from ebpfstream.packing import pack, unpack
from ebpfstream.segments import Position
from ebpfstream.sink import Sink
from ebpfstream.spool import Spool
from ebpfstream.turns import in_thread

_FULL_DISK_DELAY: Final = 0.5  # seconds until a batch is offered again to a spool that has no room

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_log = logging.getLogger("ebpfstream")


class Signal:
    """Wakes the one task that waits for it, or the next one that will."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None
        self._is_set = False

    def set(self) -> None:
        """Wake it."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        """Return once it is set, and take that back."""
        if not self._is_set:
            self._event = anyio.Event()
            await self._event.wait()
        self._is_set = False


class _Gap:
    """What is missing between two batches, gathered to one for each CPU and one for the queue."""

    def __init__(self) -> None:
        self._lost: dict[int | None, Lost] = {}

    def add(self, lost: Iterable[Lost]) -> None:
        for one in lost:
            before = self._lost.get(one.cpu)
            if before is not None:
                known = before.count is not None and one.count is not None
                one = replace(
                    one,
                    count=(before.count or 0) + (one.count or 0) if known else None,
                    first_sequence=before.first_sequence,
                )
            self._lost[one.cpu] = one

    def add_dropped(self, count: int) -> None:
        if count:
            self.add([Lost(None, count, time=datetime.now(UTC))])

    def before(self, batch: EventBatch[Any]) -> EventBatch[Any]:
        """The batch with all of it before its own losses; nothing is missing here any more."""
        if not self._lost:
            return batch
        self.add(batch.lost)
        lost, self._lost = tuple(self._lost.values()), {}
        return batch.with_lost(lost)


async def _shielded(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """What a function returns that may wait for the disk, and whose effects must be known."""
    with anyio.CancelScope(shield=True):
        returned = await in_thread(function, *arguments)
    return returned  # noqa: RET504  # a scope might swallow, mypy thinks


class Waiting:
    """A batch that the sink is to get; what of it has arrived is no longer in it."""

    __slots__ = ("batch", "end", "is_finished", "nbytes", "since")

    def __init__(self, batch: EventBatch[Any], end: Position | None = None) -> None:
        self.batch = batch
        self.nbytes = 0 if end else batch.nbytes
        """What of the queue's size it takes."""
        self.end = end
        """Where it ends in the spool; None while it is in memory alone."""
        self.is_finished = False
        self.since = monotonic()
        """When its events were accepted."""


class Backlog:
    """Takes batches for a sink, bounded in bytes, and gives them in order to the task that sends.

    With a spool: `durable`, every batch is on disk before it counts as accepted.  With `when_full="spill"`, once the
    memory is full, all that has not arrived is put on disk, and what comes then as well, until all of that has been
    read back.
    """

    def __init__(self, sink: Sink, event_type: type[Any]) -> None:
        self._sink = sink
        self._event_type = event_type
        self._memory: deque[Waiting] = deque()
        self._given: deque[Waiting] = deque()  # to the sending task, in order, and not finished
        self._at_head, self._at_tail = _Gap(), _Gap()
        self._last: EventBatch[Any] | None = None  # that was dropped at the tail
        self._finished_to: Position | None = None
        self._spool: Spool | None = None
        if sink.spool is not None:
            self._spool = Spool(Path(sink.spool), size=sink.spool_size, fsync=sink.spool_fsync)
        self._disk = anyio.Lock()  # until what was done there is counted
        self._spilling = False
        self._disk_is_full = False
        self._damaged = 0
        self.something = Signal()
        """There may be something to do for the task that sends."""
        self._room = Signal()
        self.is_finished = False
        """Nothing more will be put here."""
        self.queued = self.queued_most = 0  # bytes in memory, what is being sent included
        self.accepted = self.recovered = self.dropped = 0
        self._on_disk = Ages()

    async def open(self) -> None:
        """Find what an earlier life left.  Raises SinkError."""
        if self._spool is not None:
            await in_thread(self._spool.open)
            self.recovered = self._spool.recovered
            self._on_disk.add(self.recovered, monotonic())
            self._damaged = self._spool.damaged  # what is missing altogether is in neither
            self._spilling = self._spool.unread

    # --- the side of the reader

    def put_nowait(self, batch: EventBatch[Any]) -> bool:
        """Take a batch, or drop what must be dropped; False if that takes time: see `put`.

        Raises QueueFullError.
        """
        if self._sink.durable or self._spilling:
            return False
        if not self._fits(batch):
            match self._sink.when_full:
                case "block" | "spill":
                    return False
                case "fail":
                    raise QueueFullError(
                        f"the queue of {self._sink.name} is full ({self.queued} of {self._sink.queue_size} bytes): "
                        "make queue_size larger, or choose another when_full"
                    )
                case "drop_newest":
                    self.refuse(batch)
                    self._at_tail.add(batch.lost)
                    self._at_tail.add_dropped(len(batch))
                    self._last = batch
                    return True
                case "drop_oldest":
                    self._drop_oldest(batch)
        self.accepted += len(batch)
        self._add(self._at_tail.before(batch))
        self._last = None
        return True

    async def put(self, batch: EventBatch[Any], unless: Callable[[], bool]) -> None:
        """Take a batch, as soon as there is room in memory or it is on disk; `unless` that is so: then refuse it.

        Cancelled, it has done neither.
        """
        while not unless():
            if self.put_nowait(batch):
                return
            if self._spool is None:
                await self._room.wait()
            elif await self._put_on_disk(batch):
                return
        self.refuse(batch)

    def refuse(self, batch: EventBatch[Any]) -> None:
        """Count a batch as dropped that was not taken."""
        self.accepted += len(batch)
        self.dropped += len(batch)

    def finish(self) -> None:
        """Nothing more will be put here."""
        if self._last is not None:  # what was dropped at the end is told as well
            self._add(self._at_tail.before(self._last[:0].with_lost(())))
            self._last = None
        self.is_finished = True
        self.something.set()

    @property
    def is_exhausted(self) -> bool:
        """Whether there is nothing here, and nothing will be."""
        on_disk = self._spool is not None and (self._spool.unread or self._finished_to is not None)
        return self.is_finished and not self._memory and not on_disk

    @property
    def on_disk(self) -> int:
        """Events in the spool that are not in memory as well."""
        return self._on_disk.count

    @property
    def spool_bytes(self) -> int | None:
        """Bytes of the spool on disk; None if there is none."""
        return None if self._spool is None else self._spool.nbytes

    @property
    def waits_since(self) -> float | None:
        """When, by `monotonic`, the oldest event was accepted that has not arrived; None if all have.

        Those of an earlier life count from when they were found.
        """
        for waiting in chain(self._given, self._memory):
            if len(waiting.batch) and not waiting.is_finished:
                return waiting.since
        return self._on_disk.since

    def wake(self) -> None:
        """Let whoever waits for room look again."""
        self._room.set()

    def _fits(self, batch: EventBatch[Any]) -> bool:
        return not self.queued or self.queued + batch.nbytes <= self._sink.queue_size

    def _drop_oldest(self, batch: EventBatch[Any]) -> None:
        while self._memory and not self._fits(batch):
            oldest = self._memory.popleft()
            self.queued -= oldest.nbytes
            self.dropped += len(oldest.batch)
            self._at_head.add(oldest.batch.lost)
            self._at_head.add_dropped(len(oldest.batch))

    def _add(self, batch: EventBatch[Any]) -> None:
        waiting = Waiting(batch)
        self._memory.append(waiting)
        self.queued += waiting.nbytes
        self.queued_most = max(self.queued_most, self.queued)
        self.something.set()

    # --- the spool

    async def _put_on_disk(self, batch: EventBatch[Any]) -> bool:
        """Whether that could be; if not, some time has passed."""
        assert self._spool is not None
        try:
            async with self._disk:
                if not self._sink.durable and not self._spilling:
                    await self._spill()
                dropped = await _shielded(self._append, self._spool, batch)
                self.accepted += len(batch)
                self._on_disk.add(len(batch), monotonic())
                self._note_dropped(dropped)
        except SinkRejectedError as error:  # it would never fit
            _log.error("%s: %d events are given up: %s", self._sink.name, len(batch), error)
            self.refuse(batch)
            self._at_head.add(batch.lost)
            self._at_head.add_dropped(len(batch))
        except (OSError, SinkUnavailableError) as error:
            if not self._disk_is_full:
                self._disk_is_full = True
                _log.warning("%s: cannot write to the spool: %s; trying again", self._sink.name, error)
            with anyio.move_on_after(_FULL_DISK_DELAY):
                await self._room.wait()
            return False
        self._disk_is_full = False
        self.something.set()
        return True

    async def _spill(self) -> None:
        """Put on disk what has been taken and has not arrived, so that what follows may go there.

        It stays in memory as well, and on its way.
        """
        assert self._spool is not None
        unfinished = [waiting for waiting in (*self._given, *self._memory) if not waiting.is_finished]
        await _shielded(self._append_all, self._spool, unfinished)
        self._spilling = True

    def _append_all(self, spool: Spool, unfinished: list[Waiting]) -> None:
        for waiting in unfinished:
            if waiting.end is None:
                spool.append(pack(waiting.batch), len(waiting.batch))
                # It is in memory: there is no need to read it again.
                while (entry := spool.read()) is not None:
                    waiting.end = entry.end

    @staticmethod
    def _append(spool: Spool, batch: EventBatch[Any]) -> int:
        return spool.append(pack(batch), len(batch))

    def _read(self, spool: Spool) -> tuple[Waiting | None, int]:
        """The next one, and how many events there were in it when it was written."""
        self._acknowledge(spool)
        entry = spool.read()
        if entry is None:
            return None, 0
        return Waiting(unpack(entry.payload, self._event_type), entry.end), entry.count

    def _acknowledge(self, spool: Spool) -> None:
        if self._finished_to is not None:
            position, self._finished_to = self._finished_to, None
            spool.acknowledge(position)

    def _note_dropped(self, count: int) -> None:
        # The spool drops the oldest segment of which nothing is on its way.  What is left of the one before it then
        # counts as younger than it is, until it is read.
        self._on_disk.take(count)
        self.dropped += count
        self._at_head.add_dropped(count)

    async def keep_synced(self) -> None:
        """Let the disk have it as often as the sink's `spool_fsync` says, until cancelled."""
        interval = self._sink.spool_fsync
        while self._spool is not None and not isinstance(interval, str):
            await anyio.sleep(interval)
            try:
                await in_thread(self._spool.sync)
            except OSError as error:
                _log.error("%s: the disk may not have all of the spool: %s", self._sink.name, error)

    # --- the side of the task that sends

    async def get(self) -> Waiting | None:
        """The next batch; None if there is none now.  Raises SinkError."""
        waiting: Waiting | None = None
        if self._memory:
            waiting = self._memory.popleft()
        elif self._spool is not None and (self._spilling or self._spool.unread or self._finished_to):
            async with self._disk:
                waiting = await self._get_from_disk(self._spool)
        if waiting is not None:
            waiting.batch = self._at_head.before(waiting.batch)
            self._given.append(waiting)
        return waiting

    async def _get_from_disk(self, spool: Spool) -> Waiting | None:
        try:
            waiting, count = await _shielded(self._read, spool)
        except EventTypeError as error:
            raise SinkError(
                f"the spool {self._sink.spool} is of another program: {error}; let that one go on with it, "
                "or give another folder"
            ) from error
        except OSError as error:
            raise SinkUnavailableError(
                f"cannot read the spool {self._sink.spool}: {error.strerror}"
            ) from error
        since = self._on_disk.take(count)
        damaged = spool.damaged - self._damaged
        self._damaged += damaged
        self._note_dropped(min(damaged, self.on_disk))
        if waiting is not None and since is not None:
            waiting.since = since
        if waiting is None:
            self._spilling = False
            self._room.set()
        return waiting

    def sent(self, waiting: Waiting) -> None:
        """The sink has taken it: there is room."""
        if waiting.nbytes:
            self.queued -= waiting.nbytes
            waiting.nbytes = 0
            self._room.set()

    def finished(self, waiting: Waiting) -> None:
        """It has arrived, or is given up."""
        waiting.is_finished = True
        while self._given and self._given[0].is_finished:
            end = self._given.popleft().end
            if end is not None:
                self._finished_to = end
                self.something.set()

    def tell(self, lost: Iterable[Lost]) -> None:
        """Let these losses be told with the next batch."""
        self._at_head.add(lost)

    # --- the end

    async def close(self) -> None:
        """Keep on disk, if there is a spool, what has not arrived; the rest is dropped."""
        unfinished = [waiting for waiting in (*self._given, *self._memory) if not waiting.is_finished]
        if self._spool is not None:
            await _shielded(self._leave, self._spool, unfinished)
        self.dropped += sum(len(waiting.batch) for waiting in unfinished if waiting.end is None)
        self._memory.clear()
        self._given.clear()
        self.queued = 0

    def _leave(self, spool: Spool, unfinished: list[Waiting]) -> None:
        try:
            self._acknowledge(spool)
            self._append_all(spool, unfinished)
        except (OSError, SinkError) as error:
            _log.error("%s: cannot write to the spool what has not arrived: %s", self._sink.name, error)
        finally:
            kept = [waiting for waiting in unfinished if waiting.end is not None]
            if kept:
                self._on_disk.add_oldest(sum(len(waiting.batch) for waiting in kept), kept[0].since)
            spool.close()
