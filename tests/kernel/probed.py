"""A process that does what is being probed, as often as it is told."""

from __future__ import annotations

import subprocess
import sys
from typing import Self

_CHILD = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
memory = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
try:
    memory.madvise(mmap.MADV_NOHUGEPAGE)
except OSError:
    pass
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
touched = 0
for line in sys.stdin:
    what, times, cpu = line.split()
    if int(cpu) >= 0:
        os.sched_setaffinity(0, {int(cpu)})
    for _ in range(int(times)):
        if what == "touch":
            memory[touched * mmap.PAGESIZE] = 1
            touched += 1
        else:
            getattr(libc, what)()
    print("done", flush=True)
"""


class Probed:
    """The process; `memory` is where its 64 untouched pages begin."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self._process.pid
        self.memory = int(self._answer())

    def do(self, what: str, times: int, cpu: int = -1) -> None:
        """Call a function of libc without arguments, or `touch` new pages: so many times."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {times} {cpu}\n")
        assert self._answer() == "done\n"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
