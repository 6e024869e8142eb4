"""What is executed, by BCC: its execsnoop's way at tracepoints, a line of JSON for each.

`bcc_execsnoop.py FILE`
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.append("/usr/lib/python3/dist-packages")  # the distribution's, from any environment

from bcc import BPF  # type: ignore[import-not-found]

from benchmarks.peers import reporting

ARGUMENT = 0  # in execsnoop.c


def main() -> None:
    """Write for ever."""
    bpf = BPF(src_file=str(Path(__file__).parent / "execsnoop.c"))
    events = bpf["events"]
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    count = lost = 0

    def seen(_: Any, data: Any, size: int) -> None:
        nonlocal count
        event = events.event(data)
        if event.kind == ARGUMENT:
            arguments[event.pid].append(event.argument.decode("utf-8", "replace"))
            return
        filename, *args = arguments.pop(event.pid, [""])
        if event.retval:
            return
        line = {
            "pid": event.pid,
            "uid": event.uid,
            "comm": event.comm.decode("utf-8", "replace"),
            "ppid": event.ppid,
            "tid": event.tid,
            "gid": event.gid,
            "filename": filename,
            "args": args,
            "retval": event.retval,
            "cgroup_id": event.cgroup_id,
            "monotonic": event.monotonic,
        }
        print(json.dumps(line), file=file)
        count += 1

    def miss(number: int) -> None:
        nonlocal lost
        lost += number

    with Path(sys.argv[1]).open("w") as file:
        pages = (4 << 20) // os.sysconf("SC_PAGESIZE") // (os.cpu_count() or 1)
        events.open_perf_buffer(seen, page_cnt=pages, lost_cb=miss)
        reporting.ready(lambda: count, lambda: lost, (), file.flush)
        while True:
            bpf.perf_buffer_poll()


if __name__ == "__main__":
    main()
