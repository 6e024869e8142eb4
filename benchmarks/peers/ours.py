"""ebpfstream, with the very program that BCC is given.

`ours.py ring|perf PID BYTES fields|latency|batches|numpy|FILE [LATENCY]`: `async for`, the fields of each event read,
or how late it is noted; `batches()`, iterated; as numpy columns; forwarded to a file.  LATENCY: seconds that events
may gather.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import anyio

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers import reporting
from benchmarks.peers.program import flags
from ebpfstream import BPF, Char, Comm, Event, EventStream, FileSink
from ebpfstream.events import U32, U64
from ebpfstream.forwarding import forward
from ebpfstream.stream import LATENCY


@dataclass
class Hello(Event):
    """What hello.c submits."""

    monotonic: U64
    pid: U32
    tid: U32
    uid: U32
    gid: U32
    comm: Comm
    message: Annotated[str, Char(24)]


async def consume(events: EventStream[Hello], how: str, latencies: list[int]) -> None:
    """For ever."""
    if how == "fields":
        async for event in events:
            event.monotonic, event.pid, event.tid, event.uid, event.gid, event.comm, event.message  # noqa: B018
    elif how == "latency":
        async for event in events:
            latencies.append(time.monotonic_ns() - event.monotonic)  # noqa: PERF401
    elif how == "batches":
        async for batch in events.batches():
            for event in batch:
                event.monotonic, event.pid, event.tid, event.uid, event.gid, event.comm, event.message  # noqa: B018
    elif how == "numpy":
        async for batch in events.batches():
            columns = batch.to_numpy()
            columns["monotonic"], columns["pid"], columns["comm"], columns["message"]
    else:
        await forward(events, FileSink(how))


async def run(kind: str, target: str, size: str, how: str, latency: float) -> None:
    """For ever."""
    latencies: list[int] = []
    async with BPF(Path(__file__).parent / "hello.c", cflags=flags(kind, target, int(size))) as bpf:
        events = bpf.events(
            "events", Hello, latency=latency, buffer_size=int(size) if kind == "perf" else None
        )
        async with events:
            reporting.ready(
                lambda: events.statistics().delivered, lambda: events.statistics().lost, latencies
            )
            await consume(events, how, latencies)


if __name__ == "__main__":
    kind, target, size, how, *latency = sys.argv[1:]
    anyio.run(run, kind, target, size, how, float(latency[0]) if latency else LATENCY)
