"""Calls getppid(2), as fast as it can or so often each second: `ebpfstream bench` runs this file as a process.

The argument is its CPU.  For each line "<calls per second, or 0 for as many as go> <seconds>" it answers
with a line "<calls> <start> <end> <seconds of CPU time>"; start and end by the monotonic clock, in ns.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from itertools import repeat, starmap
from typing import Final

_STEP: Final = 1_000_000  # ns
_MOST: Final = 1000  # calls between two looks at the clock


def produce(rate: float, seconds: float) -> tuple[int, int, int, float]:
    """Do what a line asks for; a call that is late is made up for."""
    clock, call = time.monotonic_ns, os.getppid
    used = time.process_time()
    start = now = clock()
    end = start + round(seconds * 1e9)
    calls, step = 0, start
    while now < end:
        due = _MOST if not rate else min(int((now - start) * rate / 1e9) + 1 - calls, _MOST)
        if due > 0:
            deque(starmap(call, repeat((), due)), maxlen=0)  # no bytecode for each call
            calls += due
        if rate and due < _MOST:
            step += _STEP
            time.sleep(max(step - clock(), 0) / 1e9)
        now = clock()
    return calls, start, now, time.process_time() - used


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    for line in sys.stdin:
        rate, seconds = map(float, line.split())
        sys.stdout.write(" ".join(map(str, produce(rate, seconds))) + "\n")
        sys.stdout.flush()
