"""One sink of a forwarding: its queue, the task that sends, its ledger."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from math import inf
from time import monotonic
from typing import Any, Final

import anyio
from anyio import CancelScope

from ebpfstream.backlog import Backlog, Signal, Waiting
from ebpfstream.batch import EventBatch
from ebpfstream.dead_letters import DeadLetters
from ebpfstream.errors import DecodeError, SinkRejectedError, SinkUnavailableError
from ebpfstream.sink import Sink
from ebpfstream.statistics import SinkStatistics
from ebpfstream.waiting import BackOff

# Seconds between two offers of the same batch: see BackOff.
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 10.0

_log = logging.getLogger("ebpfstream")


class Outlet:
    """Takes batches into a backlog, and sends them to a sink in a task of its own.

    Every event that it was offered, or found on disk, is in its ledger once: acknowledged, dropped, failed, spooled, or
    in flight.
    """

    def __init__(self, sink: Sink, event_type: type[Any]) -> None:
        self.sink = sink
        self._dead_letters = DeadLetters(sink.dead_letters, sink.name) if sink.dead_letters else None
        self._backlog = Backlog(sink, event_type)
        self._receipts: deque[tuple[Awaitable[None], Waiting]] = deque()
        self._sent_ahead = Signal()
        self._collected = Signal()
        self._sending: CancelScope | None = None
        self._back_off = BackOff(_FIRST_DELAY, _LONGEST_DELAY)  # of the task that sends
        self._error: Exception | None = None
        self._dead = self._to_reopen = self._away = False
        self._flush_at = inf
        self._acknowledged = self._failed = 0
        self._batches = self._retries = 0
        self._last_error = ""

    async def open(self) -> None:
        """Open the sink, its spool, and the file for dead letters.  Raises SinkError."""
        async with AsyncExitStack() as opened:
            if self._dead_letters is not None:
                await self._dead_letters.open()
                opened.callback(self._dead_letters.close)
            await self._backlog.open()
            opened.push_async_callback(self._backlog.close)
            await self.sink.open()
            opened.pop_all()

    # --- the side of the reader

    def offer(self, batch: EventBatch[Any]) -> bool:
        """Take a batch, or drop what must be dropped; False if that takes time: see `take`.  Raises QueueFullError."""
        if self._dead:
            self.refuse(batch)
            return True
        return self._backlog.put_nowait(batch)

    async def take(self, batch: EventBatch[Any]) -> None:
        """Take a batch, or drop it, as soon as that can be.  Cancelled, it has done neither."""
        await self._backlog.put(batch, unless=lambda: self._dead)

    def refuse(self, batch: EventBatch[Any]) -> None:
        """Count a batch as dropped that has not been offered, or for which there was no room in time."""
        self._backlog.refuse(batch)

    def finish(self) -> None:
        """Nothing more will be offered."""
        self._backlog.finish()

    def reopen(self) -> None:
        """Let the sink open anew what it writes to, at once."""
        self._to_reopen = True
        self._backlog.something.set()

    # --- the sending task

    async def send_all(self) -> None:
        """Send what is offered until it is finished and acknowledged, then flush.

        Raises SinkError when the sink cannot go on.
        """
        try:
            with CancelScope() as self._sending:
                while (waiting := await self._next()) is not None:
                    await self._send(waiting)
                while self._receipts:
                    await self._collected.wait()
                self._back_off.reset()
                while not await self._flushed():
                    await self._back_off.pause()
            if self._error is not None:
                raise self._error
        finally:
            self._dead = True
            self._backlog.wake()

    async def _next(self) -> Waiting | None:
        """Wait for a batch, and meanwhile reopen and flush when it is time; None when none will come."""
        self._back_off.reset()
        while True:
            if self._to_reopen:
                self._to_reopen = not await self._reopened()
            if self._flush_at <= anyio.current_time():
                await self._flushed()
            try:
                waiting = await self._backlog.get()
            except SinkUnavailableError as error:
                self._note_away(error)
                await self._back_off.pause()
                continue
            if waiting is not None or self._backlog.is_exhausted:
                return waiting
            wait = self._flush_at - anyio.current_time()
            with anyio.move_on_after(_LONGEST_DELAY if self._to_reopen and wait == inf else wait):
                await self._backlog.something.wait()

    async def _send(self, waiting: Waiting) -> None:
        """Offer a batch to the sink until it is taken or given up."""
        receipt = await self._offered(waiting)
        self._backlog.sent(waiting)
        if receipt is None:
            self._backlog.finished(waiting)
        else:
            self._receipts.append((receipt, waiting))
            self._sent_ahead.set()

    async def _offered(self, waiting: Waiting) -> Awaitable[None] | None:
        """What to await until it has arrived; None if it has, or never will."""
        began = anyio.current_time()
        self._back_off.reset()
        while True:
            try:
                receipt = await self.sink.send(waiting.batch)
            except SinkUnavailableError as error:
                self._acknowledge(waiting.batch[: error.taken])
                waiting.batch = waiting.batch[error.taken :]
                self._note_away(error)
                if anyio.current_time() - began >= self.sink.retry_for:
                    await self._fail(waiting, waiting.batch, str(error))
                    return None
                if error.taken:
                    self._back_off.reset()
                await self._back_off.pause()
            except SinkRejectedError as error:
                await self._rejected(waiting, error)
                return None
            except DecodeError as error:
                waiting.batch, unfit = waiting.batch.without_undecodable()
                if not unfit:
                    await self._fail(waiting, waiting.batch, str(error))
                    return None
                self._last_error = str(error)
                self._failed += len(unfit)
                if self._dead_letters is not None:
                    await self._dead_letters.add_records(unfit)
                if not len(waiting.batch) and not waiting.batch.lost:
                    return None
            else:
                break
        self._note_back()
        if self.sink.flush_every is not None:
            self._flush_at = min(self._flush_at, anyio.current_time() + self.sink.flush_every)
        if receipt is None:
            self._acknowledge(waiting.batch)
        return receipt

    async def attend(self) -> None:
        """Await what the sink has yet to acknowledge, and sync the spool; until cancelled, once the sink is closed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._backlog.keep_synced)
            await self._collect()

    async def _collect(self) -> None:
        while True:
            while not self._receipts:
                await self._sent_ahead.wait()
            receipt, waiting = self._receipts[0]
            try:
                await receipt
            except SinkRejectedError as error:
                await self._rejected(waiting, error)
            except Exception as error:  # raised by `send_all`
                self._error = error
                if self._sending is not None:
                    self._sending.cancel()
                return
            else:
                self._acknowledge(waiting.batch)
            self._backlog.finished(waiting)
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
        if not self._to_reopen:
            self._note_back()
        return True

    async def _reopened(self) -> bool:
        try:
            await self.sink.reopen()
        except SinkUnavailableError as error:
            self._note_away(error)
            return False
        self._note_back()
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

    async def _rejected(self, waiting: Waiting, error: SinkRejectedError) -> None:
        self._last_error = str(error)
        batch = waiting.batch
        if error.rejected is None:
            self._acknowledge(batch[: error.taken])
            await self._fail(waiting, batch[error.taken :], str(error))
        else:
            chosen = set(error.rejected)
            self._acknowledge(batch.keep(number not in chosen for number in range(len(batch))))
            failed = batch.keep(number in chosen for number in range(len(batch)))
            await self._fail(waiting, failed.with_lost(()), str(error))

    async def _fail(self, waiting: Waiting, batch: EventBatch[Any], reason: str) -> None:
        """Give up what is left of a batch."""
        waiting.batch = batch[:0]
        self._failed += len(batch)
        self._backlog.tell(batch.lost)  # with the next one
        if self._dead_letters is None:
            _log.error("%s: %d events are given up: %s", self.sink.name, len(batch), reason)
            return
        batch, unfit = batch.without_undecodable()
        await self._dead_letters.add(batch, reason)
        await self._dead_letters.add_records(unfit)

    # --- the end

    async def close(self, deadline: float) -> None:
        """Close the sink."""
        with anyio.move_on_after(deadline, shield=True):
            await self.sink.aclose(deadline)

    async def settle(self) -> None:
        """Nothing can arrive any more: what has not is kept in the spool, or counts as dropped."""
        await self._backlog.close()
        if self._dead_letters is not None:
            self._dead_letters.close()

    def statistics(self) -> SinkStatistics:
        """The ledger so far."""
        backlog = self._backlog
        gone = self._acknowledged + backlog.dropped + self._failed + backlog.on_disk
        since = backlog.waits_since
        return SinkStatistics(
            name=self.sink.name,
            accepted=backlog.accepted,
            recovered=backlog.recovered,
            acknowledged=self._acknowledged,
            dropped=backlog.dropped,
            failed=self._failed,
            spooled=backlog.on_disk,
            in_flight=backlog.accepted + backlog.recovered - gone,
            batches=self._batches,
            retries=self._retries,
            queue_size=self.sink.queue_size,
            queued=backlog.queued,
            queued_most=backlog.queued_most,
            lag=0.0 if since is None else monotonic() - since,
            spool_size=self.sink.spool_size if self.sink.spool is not None else None,
            spool_bytes=backlog.spool_bytes,
            away=self._away,
            last_error=self._last_error,
        )
