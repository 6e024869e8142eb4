"""Streams → sinks."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Generic, Protocol, TypeVarTuple, Unpack, runtime_checkable

import anyio
from anyio import CancelScope
from anyio.abc import TaskGroup

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError
from ebpfstream.events import E_co
from ebpfstream.outlet import Outlet
from ebpfstream.redaction import Redaction
from ebpfstream.shaping import Shaping
from ebpfstream.sink import Delivery, Sink
from ebpfstream.statistics import ForwardStatistics, Statistics

DEADLINE: Final = 5.0
"""Seconds that a forwarding may take to end, unless told otherwise."""

_FOR_CLOSING: Final = 0.2  # of them are for closing the sinks; the others, for delivering
_log = logging.getLogger("ebpfstream")

Ts = TypeVarTuple("Ts")

SinkFunction = Callable[[EventBatch[Any]], Awaitable[object]]
"""An asynchronous function that is given each batch: the simplest sink."""


@runtime_checkable
class BatchStream(AbstractAsyncContextManager[Any], Protocol[E_co]):
    """What can be forwarded: an EventStream, and what else hands out batches, such as `count_execve()`."""

    @property
    def event_type(self) -> type[E_co]:
        """The class of its events."""

    async def next_batch(self, most: int | None = None) -> EventBatch[E_co] | None:
        """Wait for events, not more than `most`; None at the end."""

    def detach(self) -> None:
        """Nothing new is to happen; what has happened still comes, then the end."""

    def statistics(self) -> Statistics:
        """The ledger."""


class FunctionSink(Sink):
    """Calls an asynchronous function with each batch; it has arrived when the function returns.

    What the function raises is raised as it is, and ends the forwarding, unless it is an error of the contract
    (`Sink`).
    """

    def __init__(self, function: SinkFunction, **delivery: Unpack[Delivery]) -> None:
        self.name = getattr(function, "__qualname__", type(function).__name__)
        super().__init__(**delivery)
        self._function = function

    async def send(self, batch: EventBatch[Any]) -> None:
        """Call it."""
        await self._function(batch)


class Forwarding(Generic[E_co]):
    """A stream's events on their way to sinks; `forward` is the short form of it.

    One task reads; each sink has a queue and a task of its own, so a slow sink slows the others only if its queue is
    full and its `when_full` is "block".  Parameters are those of `forward`.
    """

    def __init__(
        self,
        stream: BatchStream[E_co],
        *sinks: Sink | SinkFunction,
        count: int | None = None,
        where: Callable[[E_co], object] | None = None,
        fields: Mapping[str, str] | Sequence[str] | None = None,
        redact: Redaction | Sequence[str] | bool = False,
        deadline: float = DEADLINE,
    ) -> None:
        if count is not None and count < 1:
            raise ArgumentError(f"count={count} is impossible: give a number of events, 1 or more")
        if not deadline >= 0:
            raise ArgumentError(f"deadline={deadline} is impossible: give seconds, 0 or more")
        if not sinks:
            raise ArgumentError("there is no sink to forward to: give one or more")
        if len({id(sink) for sink in sinks}) < len(sinks):
            raise ArgumentError("a sink is given twice: each has a queue of its own, so make another one")
        self._stream = stream
        self.reshape(where=where, fields=fields, redact=redact)
        self._count = count
        self._deadline = deadline
        self._outlets = [
            Outlet(sink if isinstance(sink, Sink) else FunctionSink(sink), stream.event_type)
            for sink in sinks
        ]
        self._opened: list[Outlet] = []
        self._whole: CancelScope | None = None
        self._delivering: CancelScope | None = None
        self._error: Exception | None = None
        self._ends_at: float | None = None
        self._filtered = 0
        self.attached = anyio.Event()
        """Set when the stream is: what happens from then on is forwarded."""

    async def run(self) -> ForwardStatistics:
        """Open the sinks, then the stream; forward until it ends; deliver, flush, close; the final ledgers.

        Cancelled, it does all that as well: what has happened until then is delivered, as far as that can be
        within `deadline` seconds.  When a sink fails for good, the others get what was read until then, and its error
        is raised.  Raises what opening the stream and the sinks may raise, SinkError, QueueFullError.
        """
        done = anyio.Event()

        async def whole() -> None:
            # Where nobody who cancels this task, by whatever means, reaches it.
            with CancelScope(shield=True) as self._whole:
                await self._run()
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(whole)
            try:
                await done.wait()
            except BaseException:
                self.end()
                raise
        if self._error is not None:
            raise self._error
        return self.statistics()

    def end(self, deadline: float | None = None) -> None:
        """Let it end in good order: no more events, and what has happened is delivered until the deadline.

        `deadline` is another one than was given to the forwarding, in seconds from now; 0 ends it at once.
        """
        if self._delivering is None:  # nothing can have happened yet
            if self._whole is not None:
                self._whole.cancel()
            else:
                self._stream.detach()
            return
        seconds = self._deadline if deadline is None else deadline
        ends_at = anyio.current_time() + seconds
        if self._ends_at is None:
            self._stream.detach()
        elif ends_at >= self._ends_at:
            return
        self._ends_at = ends_at
        self._delivering.deadline = ends_at - seconds * _FOR_CLOSING

    def reopen(self) -> None:
        """Let the sinks open anew what may have been moved away, such as files by logrotate."""
        for outlet in self._outlets:
            outlet.reopen()

    def reshape(
        self,
        *,
        where: Callable[[E_co], object] | None = None,
        fields: Mapping[str, str] | Sequence[str] | None = None,
        redact: Redaction | Sequence[str] | bool = False,
    ) -> None:
        """Let these, as `forward` has them, take the place of all that were given, from the next batch on.

        Raises ArgumentError, and then nothing has changed.
        """
        self._shaping = Shaping(self._stream.event_type, where=where, fields=fields, redact=redact)

    @property
    def sinks(self) -> list[Sink]:
        """What it forwards to; functions as FunctionSink."""
        return [outlet.sink for outlet in self._outlets]

    def statistics(self) -> ForwardStatistics:
        """The ledgers so far; once `run` has returned or raised, the final ones."""
        return ForwardStatistics(
            self._stream.statistics(),
            tuple(outlet.statistics() for outlet in self._outlets),
            self._filtered,
        )

    async def _run(self) -> None:
        async with anyio.create_task_group() as collecting:
            try:
                await self._noting_errors(self._open_and_forward, collecting)
            finally:
                with CancelScope(shield=True):
                    async with anyio.create_task_group() as closing:
                        for outlet in self._opened:
                            closing.start_soon(self._noting_errors, outlet.close, self._rest())
                collecting.cancel_scope.cancel()
        for outlet in self._opened:
            await self._noting_errors(outlet.settle)

    async def _open_and_forward(self, collecting: TaskGroup) -> None:
        for outlet in self._outlets:
            await outlet.open()
            self._opened.append(outlet)
            collecting.start_soon(outlet.attend)  # until the sink is closed
        async with self._stream:
            self.attached.set()
            with CancelScope() as self._delivering:
                async with anyio.create_task_group() as sending:
                    for outlet in self._outlets:
                        sending.start_soon(self._noting_errors, outlet.send_all)
                    await self._noting_errors(self._read)
                    for outlet in self._outlets:
                        outlet.finish()

    async def _read(self) -> None:
        left = self._count
        while left != 0 and (batch := await self._stream.next_batch(left)) is not None:
            try:
                shaped = self._shaping.shape(batch)
            except BaseException:
                for outlet in self._outlets:
                    outlet.refuse(batch)
                raise
            self._filtered += len(batch) - len(shaped)
            if len(shaped) or shaped.lost:
                await self._hand_out(shaped)
            left = None if left is None else left - len(shaped)

    async def _hand_out(self, batch: EventBatch[E_co]) -> None:
        without = list(self._outlets)
        try:
            for outlet in self._outlets:  # those first that need not wait
                if outlet.offer(batch):
                    without.remove(outlet)
            while without:
                await without[0].take(batch)
                without.pop(0)
        finally:
            for outlet in without:
                outlet.refuse(batch)

    async def _noting_errors(self, function: Callable[[*Ts], Awaitable[None]], *arguments: *Ts) -> None:
        """Call it; the first error ends the forwarding, and is raised at its end."""
        try:
            await function(*arguments)
        except Exception as error:
            if self._error is None:
                self._error = error
            else:
                _log.error("%s", error)
            self.end()

    def _rest(self) -> float:
        """Seconds until it must have ended."""
        return self._deadline if self._ends_at is None else max(self._ends_at - anyio.current_time(), 0)


async def forward(
    stream: BatchStream[E_co],
    *sinks: Sink | SinkFunction,
    count: int | None = None,
    where: Callable[[E_co], object] | None = None,
    fields: Mapping[str, str] | Sequence[str] | None = None,
    redact: Redaction | Sequence[str] | bool = False,
    deadline: float = DEADLINE,
) -> ForwardStatistics:
    """Send a stream's events to every sink until the stream ends; the final ledgers.

    A sink is a Sink, or an asynchronous function that is given each EventBatch.  Sinks are opened first, the stream
    last: nothing happens that could not be taken.  What stands between:

    - `where`: events for which it returns something false are left out, and counted.
    - `fields`: those that JSON lines have, in that order; as a mapping, field → name in JSON.
    - `redact`: True for the usual forms of secrets in command lines, or regular expressions of yours; see Redaction.
    - `count`: ends after so many events.

    At the end, which may be cancellation, what has been read is delivered, sinks are flushed and closed, and so is the
    stream, within `deadline` seconds when it did not end by itself.  To end it from outside without cancelling, call
    `stream.detach()`.  `Forwarding` is the same as an object, whose ledgers can be looked at meanwhile.  Raises
    what `Forwarding.run` raises.
    """
    forwarding = Forwarding(
        stream, *sinks, count=count, where=where, fields=fields, redact=redact, deadline=deadline
    )
    return await forwarding.run()
