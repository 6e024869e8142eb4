"""A process that makes system calls on several CPUs at the very same time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

# lfind(3) calls a function for each element until that returns 0, which getppid(2) does not do here: so
# many calls, without Python between them and without its lock.
_THREADS: Final = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
def run(cpu, calls):
    os.sched_setaffinity(0, {cpu})
    libc.lfind(None, None, ctypes.byref(ctypes.c_size_t(calls)), ctypes.c_size_t(0), libc.getppid)
print("ready", flush=True)
for line in sys.stdin:
    calls, *cpus = map(int, line.split())
    threads = [threading.Thread(target=run, args=(cpu, calls)) for cpu in cpus]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print("done", flush=True)
"""


class Threads:
    """The process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self._read("ready")

    def call(self, calls: int, cpus: Sequence[int]) -> None:
        """Call getppid(2) so many times in a thread for each of these CPUs; returns when all have."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls} {' '.join(map(str, cpus))}\n")
        self._process.stdin.flush()
        self._read("done")

    def _read(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{word}\n"


@contextmanager
def threads() -> Iterator[Threads]:
    """Such a process, which is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-c", _THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Threads(process)
        finally:
            process.kill()
