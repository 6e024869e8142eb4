"""What is executed, by ebpfstream: a line of JSON for each, forwarded to a file.

`our_execsnoop.py ring|perf FILE`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers import reporting
from ebpfstream import FileSink, forward, trace_execve


async def run(kind: Any, file: str) -> None:
    """Write for ever."""
    async with trace_execve(buffer=kind) as events:
        reporting.ready(lambda: events.statistics().delivered, lambda: events.statistics().lost)
        await forward(events, FileSink(file))


if __name__ == "__main__":
    anyio.run(run, sys.argv[1], sys.argv[2])
