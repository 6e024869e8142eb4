"""System calls by BCC, with the fields of trace_syscalls(): a callback for each event.

`bcc_syscalls.py ring|perf PID BYTES`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append("/usr/lib/python3/dist-packages")  # the distribution's, from any environment

from bcc import BPF  # type: ignore[import-not-found]

from benchmarks.peers import reporting
from benchmarks.peers.program import flags


def main() -> None:
    """Consume for ever."""
    kind, target, size = sys.argv[1:4]
    page = os.sysconf("SC_PAGESIZE")
    bpf = BPF(src_file=str(Path(__file__).parent / "syscalls.c"), cflags=flags(kind, target, int(size)))
    events = bpf["events"]
    count = lost = 0

    def read(_: Any, data: Any, size: int) -> None:
        nonlocal count
        event = events.event(data)
        event.monotonic, event.pid, event.number, event.comm, event.arguments  # noqa: B018
        count += 1

    def miss(number: int) -> None:
        nonlocal lost
        lost += number

    if kind == "ring":
        events.open_ring_buffer(read)
        poll = bpf.ring_buffer_poll
    else:
        pages = int(size) // page // (os.cpu_count() or 1)
        events.open_perf_buffer(read, page_cnt=pages, lost_cb=miss)
        poll = bpf.perf_buffer_poll
    reporting.ready(lambda: count, lambda: lost if kind == "perf" else None)
    while True:
        poll()


if __name__ == "__main__":
    main()
