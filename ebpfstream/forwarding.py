"""Streams → sinks."""

from __future__ import annotations

from contextlib import AsyncExitStack

from ebpfstream.errors import ArgumentError
from ebpfstream.events import E_co
from ebpfstream.sink import Sink
from ebpfstream.statistics import Statistics
from ebpfstream.stream import EventStream


async def forward(stream: EventStream[E_co], *sinks: Sink, count: int | None = None) -> Statistics:
    """Send a stream's events to every sink, a batch at a time, until the stream ends.

    Sinks are opened first, the stream last: nothing happens that could not be taken.  A batch is
    sent to one sink after the other, and the next one is read when all have it, so the slowest sets
    the pace; what does not fit into the kernel's buffer meanwhile is lost, and counted.  With
    `count`, ends after that many events.

    At the end sinks are flushed, the stream is closed (so are both after an error), and its final
    statistics are returned.  To end it from outside in good order, call `stream.detach()`.
    """
    if count is not None and count < 1:
        raise ArgumentError(f"count={count} is impossible: give a number of events, 1 or more")
    async with AsyncExitStack() as stack:
        for sink in sinks:
            await stack.enter_async_context(sink)
        await stack.enter_async_context(stream)
        while batch := await stream.next_batch(count):
            for sink in sinks:
                await sink.send(batch)
            if count is not None:
                count -= len(batch)
                if not count:
                    break
        for sink in sinks:
            await sink.flush()
    return stream.statistics()
