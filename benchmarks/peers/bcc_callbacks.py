"""BCC as its users write it: a callback for each event, and a poll that blocks.

`bcc_callbacks.py ring|perf PID BYTES fields|latency|FILE [WAKEUP]`: reads the fields of each event, notes how late it
is, or writes it to a file by `json.dumps`.  WAKEUP: the events of a perf buffer for which the reader is woken once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append("/usr/lib/python3/dist-packages")  # the distribution's, from any environment

from bcc import BPF  # type: ignore[import-not-found]

from benchmarks.peers import reporting
from benchmarks.peers.program import flags


def main() -> None:
    """Consume for ever."""
    kind, target, size, how = sys.argv[1:5]
    wakeup = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    page = os.sysconf("SC_PAGESIZE")
    bpf = BPF(src_file=str(Path(__file__).parent / "hello.c"), cflags=flags(kind, target, int(size)))
    events = bpf["events"]
    count = lost = 0
    latencies: list[int] = []
    file = Path(how).open("w") if how not in ("fields", "latency") else None  # noqa: SIM115

    def read(_: Any, data: Any, size: int) -> None:
        nonlocal count
        event = events.event(data)
        event.monotonic, event.pid, event.tid, event.uid, event.gid, event.comm, event.message  # noqa: B018
        count += 1

    def time_it(_: Any, data: Any, size: int) -> None:
        nonlocal count
        event = events.event(data)
        latencies.append(time.monotonic_ns() - event.monotonic)
        count += 1

    def write(_: Any, data: Any, size: int) -> None:
        nonlocal count
        event = events.event(data)
        line = {
            "monotonic": event.monotonic,
            "pid": event.pid,
            "tid": event.tid,
            "uid": event.uid,
            "gid": event.gid,
            "comm": event.comm.decode("utf-8", "replace"),
            "message": event.message.decode("utf-8", "replace"),
        }
        print(json.dumps(line), file=file)
        count += 1

    def miss(number: int) -> None:
        nonlocal lost
        lost += number

    callback = write if file else time_it if how == "latency" else read
    if kind == "ring":
        events.open_ring_buffer(callback)
        poll = bpf.ring_buffer_poll
    else:
        pages = int(size) // page // (os.cpu_count() or 1)
        events.open_perf_buffer(callback, page_cnt=pages, lost_cb=miss, wakeup_events=wakeup)
        poll = bpf.perf_buffer_poll
    reporting.ready(
        lambda: count,
        lambda: lost if kind == "perf" else None,
        latencies,
        file.flush if file else lambda: None,
    )
    while True:
        poll()


if __name__ == "__main__":
    main()
