"""System calls by ebpfstream: trace_syscalls("getppid"), read by `async for`.

`our_syscalls.py ring|perf PID BYTES`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers import reporting
from ebpfstream import trace_syscalls


async def run(kind: Any, target: str, size: str) -> None:
    """For ever."""
    async with trace_syscalls("getppid", pid=int(target), buffer=kind, buffer_size=int(size)) as events:
        reporting.ready(lambda: events.statistics().delivered, lambda: events.statistics().lost)
        async for event in events:
            event.monotonic, event.pid, event.number, event.comm, event.arguments  # noqa: B018


if __name__ == "__main__":
    anyio.run(run, sys.argv[1], sys.argv[2], sys.argv[3])
