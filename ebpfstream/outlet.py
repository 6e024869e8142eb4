"""One sink of a forwarding: its queue, the task that sends, its ledger."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from math import inf
from typing import Any, Final

import anyio
from anyio import CancelScope

from ebpfstream.batch import EventBatch
from ebpfstream.dead_letters import DeadLetters
from ebpfstream.errors import (
    DecodeError,
    QueueFullError,
    SinkRejectedError,
    SinkUnavailableError,
)
from ebpfstream.lost import Lost
from ebpfstream.sink import Sink
from ebpfstream.statistics import SinkStatistics

_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 10.0
# Seconds between two offers of the same batch; doubled each time, less a random part, so that many
# hosts do not come back to one server in step.

_log = logging.getLogger("ebpfstream")


class _Signal:
    """Wakes the one task that waits for it, or the next one that will."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None
        self._is_set = False

    def set(self) -> None:
        self._is_set = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
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

    def add_dropped(self, batch: EventBatch[Any]) -> None:
        self.add(batch.lost)
        if len(batch):
            self.add([Lost(None, len(batch), time=datetime.now(UTC))])

    def before(self, batch: EventBatch[Any]) -> EventBatch[Any]:
        """The batch with all of it before its own losses; nothing is missing here any more."""
        if not self._lost:
            return batch
        self.add(batch.lost)
        lost, self._lost = tuple(self._lost.values()), {}
        return batch.with_lost(lost)


async def _back_off(delay: float) -> float:
    """Wait before the same is offered again; how long to wait next time."""
    await anyio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311  # no secret depends on it
    return min(2 * delay, _LONGEST_DELAY)


class Outlet:
    """Takes batches into a queue, and sends them to a sink in a task of its own.

    Every event that it was offered is in its ledger once: acknowledged, dropped, failed, or in flight.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._dead_letters = DeadLetters(sink.dead_letters, sink.name) if sink.dead_letters else None
        self._queue: deque[EventBatch[Any]] = deque()
        self._queued = 0  # bytes, what is being sent included
        self._queued_most = 0
        self._at_head, self._at_tail = _Gap(), _Gap()
        self._last: EventBatch[Any] | None = None  # that was dropped at the tail
        self._something = _Signal()  # for the sending task
        self._room = _Signal()  # for who offers
        self._receipts: deque[tuple[Awaitable[None], EventBatch[Any]]] = deque()
        self._sent_ahead = _Signal()
        self._collected = _Signal()
        self._sending: CancelScope | None = None
        self._error: Exception | None = None
        self._finished = self._dead = self._to_reopen = self._away = False
        self._flush_at = inf
        self._accepted = self._acknowledged = self._dropped = self._failed = 0
        self._batches = self._retries = 0
        self._last_error = ""

    async def open(self) -> None:
        """Open the sink and the file for dead letters.  Raises SinkError."""
        if self._dead_letters is not None:
            await self._dead_letters.open()
        try:
            await self.sink.open()
        except BaseException:
            self._close_dead_letters()
            raise

    # --- the side of the reader

    def offer(self, batch: EventBatch[Any]) -> bool:
        """Take a batch, or drop what must be dropped; False if there is no room and it is to be waited for.

        Raises QueueFullError.
        """
        if self._dead:
            self.refuse(batch)
            return True
        if not self._fits(batch):
            match self.sink.when_full:
                case "block":
                    return False
                case "fail":
                    raise QueueFullError(
                        f"the queue of {self.sink.name} is full ({self._queued} of {self.sink.queue_size} bytes): "
                        "make queue_size larger, or choose another when_full"
                    )
                case "drop_newest":
                    self.refuse(batch)
                    self._at_tail.add_dropped(batch)
                    self._last = batch
                    return True
                case "drop_oldest":
                    self._drop_oldest(batch)
        self._accepted += len(batch)
        self._enqueue(self._at_tail.before(batch))
        self._last = None
        return True

    def refuse(self, batch: EventBatch[Any]) -> None:
        """Count a batch as dropped that has not been offered, or for which there was no room in time."""
        self._accepted += len(batch)
        self._dropped += len(batch)

    async def room(self) -> None:
        """Wait until something has been taken out of the queue."""
        await self._room.wait()

    def finish(self) -> None:
        """Nothing more will be offered."""
        if self._last is not None:  # what was dropped at the end is told as well
            self._enqueue(self._at_tail.before(self._last[:0].with_lost(())))
            self._last = None
        self._finished = True
        self._something.set()

    def reopen(self) -> None:
        """Let the sink open anew what it writes to, at once."""
        self._to_reopen = True
        self._something.set()

    def _fits(self, batch: EventBatch[Any]) -> bool:
        return not self._queued or self._queued + batch.nbytes <= self.sink.queue_size

    def _drop_oldest(self, batch: EventBatch[Any]) -> None:
        while self._queue and not self._fits(batch):
            oldest = self._queue.popleft()
            self._queued -= oldest.nbytes
            self._dropped += len(oldest)
            self._at_head.add_dropped(oldest)

    def _enqueue(self, batch: EventBatch[Any]) -> None:
        self._queue.append(batch)
        self._queued += batch.nbytes
        self._queued_most = max(self._queued_most, self._queued)
        self._something.set()

    # --- the sending task

    async def send_all(self) -> None:
        """Send what is offered until it is finished and acknowledged, then flush.

        Raises SinkError when the sink cannot go on.
        """
        try:
            with CancelScope() as self._sending:
                while await self._something_to_send():
                    batch = self._queue.popleft()
                    await self._send(self._at_head.before(batch))
                    self._queued -= batch.nbytes
                    self._room.set()
                while self._receipts:
                    await self._collected.wait()
                delay = _FIRST_DELAY
                while not await self._flushed():
                    delay = await _back_off(delay)
            if self._error is not None:
                raise self._error
        finally:
            self._dead = True
            self._room.set()

    async def _something_to_send(self) -> bool:
        """Wait for a batch, and meanwhile reopen and flush when it is time; False when none will come."""
        while True:
            if self._to_reopen:
                self._to_reopen = not await self._reopened()
            if self._flush_at <= anyio.current_time():
                await self._flushed()
            if self._queue:
                return True
            if self._finished:
                return False
            wait = self._flush_at - anyio.current_time()
            with anyio.move_on_after(_LONGEST_DELAY if self._to_reopen and wait == inf else wait):
                await self._something.wait()

    async def _send(self, batch: EventBatch[Any]) -> None:
        began, delay = anyio.current_time(), _FIRST_DELAY
        while True:
            try:
                receipt = await self.sink.send(batch)
            except SinkUnavailableError as error:
                self._acknowledge(batch[: error.taken])
                batch = batch[error.taken :]
                self._note_away(error)
                if anyio.current_time() - began >= self.sink.retry_for:
                    await self._fail(batch, str(error))
                    return
                delay = await _back_off(_FIRST_DELAY if error.taken else delay)
            except SinkRejectedError as error:
                self._acknowledge(batch[: error.taken])
                self._last_error = str(error)
                await self._fail(batch[error.taken :], str(error))
                return
            except DecodeError as error:
                batch, unfit = batch.without_undecodable()
                if not unfit:
                    await self._fail(batch, str(error))
                    return
                self._last_error = str(error)
                self._failed += len(unfit)
                if self._dead_letters is not None:
                    await self._dead_letters.add_records(unfit)
                if not len(batch) and not batch.lost:
                    return
            else:
                break
        self._note_back()
        if self.sink.flush_every is not None:
            self._flush_at = min(self._flush_at, anyio.current_time() + self.sink.flush_every)
        if receipt is None:
            self._acknowledge(batch)
        else:
            self._receipts.append((receipt, batch))
            self._sent_ahead.set()

    async def collect(self) -> None:
        """Await what the sink has yet to acknowledge; until cancelled, which is once the sink is closed."""
        while True:
            while not self._receipts:
                await self._sent_ahead.wait()
            receipt, batch = self._receipts[0]
            try:
                await receipt
            except SinkRejectedError as error:
                self._last_error = str(error)
                await self._fail(batch, str(error))
            except Exception as error:  # raised by `send_all`
                self._error = error
                if self._sending is not None:
                    self._sending.cancel()
                return
            else:
                self._acknowledge(batch)
            self._receipts.popleft()
            self._collected.set()

    async def _flushed(self) -> bool:
        self._flush_at = inf
        try:
            await self.sink.flush()
        except SinkUnavailableError as error:
            self._note_away(error)
            self._flush_at = anyio.current_time() + (self.sink.flush_every or _FIRST_DELAY)
            return False
        return True

    async def _reopened(self) -> bool:
        try:
            await self.sink.reopen()
        except SinkUnavailableError as error:
            self._note_away(error)
            return False
        return True

    def _note_away(self, error: SinkUnavailableError) -> None:
        self._retries += 1
        self._last_error = str(error)
        if not self._away:  # once for each time that it is away
            self._away = True
            _log.warning("%s: %s; trying again", self.sink.name, error)

    def _note_back(self) -> None:
        if self._away:
            self._away = False
            _log.warning("%s: going on", self.sink.name)

    def _acknowledge(self, batch: EventBatch[Any]) -> None:
        self._acknowledged += len(batch)
        self._batches += bool(len(batch))

    async def _fail(self, batch: EventBatch[Any], reason: str) -> None:
        self._failed += len(batch)
        self._at_head.add(batch.lost)  # to be told with the next one
        if self._dead_letters is None:
            _log.error("%s: %d events are given up: %s", self.sink.name, len(batch), reason)
            return
        batch, unfit = batch.without_undecodable()
        await self._dead_letters.add(batch, reason)
        await self._dead_letters.add_records(unfit)

    # --- the end

    async def close(self, deadline: float) -> None:
        """Close the sink; what has not arrived by then counts as dropped."""
        try:
            with anyio.move_on_after(deadline, shield=True):
                await self.sink.aclose(deadline)
        finally:
            self._close_dead_letters()

    def settle(self) -> None:
        """Nothing can arrive any more."""
        self._dropped += self._in_flight
        self._queue.clear()
        self._queued = 0

    def _close_dead_letters(self) -> None:
        if self._dead_letters is not None:
            self._dead_letters.close()

    @property
    def _in_flight(self) -> int:
        return self._accepted - self._acknowledged - self._dropped - self._failed

    def statistics(self) -> SinkStatistics:
        """The ledger so far."""
        return SinkStatistics(
            name=self.sink.name,
            accepted=self._accepted,
            acknowledged=self._acknowledged,
            dropped=self._dropped,
            failed=self._failed,
            in_flight=self._in_flight,
            batches=self._batches,
            retries=self._retries,
            queue_size=self.sink.queue_size,
            queued=self._queued,
            queued_most=self._queued_most,
            last_error=self._last_error,
        )
