"""Programs that make as many records as one likes, from a process that one starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from ebpfstream.events import U32, U64, Event, Tail
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.readymade import Overload, ReadyMade

_FOLDER: Final = Path(__file__).parent

# In C as in Python: lengths of many kinds, long ones rarely.
LENGTH: Final = "(({0}) % 64 == 0 ? 8000 : ({0}) * 37 % 251 + 8)"


@dataclass
class FloodEvent(Event):
    """What flood.c submits."""

    sequence: U64
    monotonic: U64
    cpu: U32
    weight: U32
    program: U32
    payload: Annotated[bytes, Tail()]


def payload_length(sequence: int) -> int:
    """How long the payload of the event of this number is."""
    return 8000 if sequence % 64 == 0 else sequence * 37 % 251 + 8


def known(count: int | None) -> int:
    """A count of the ledger that our own programs keep, and so is known."""
    assert count is not None
    return count


class Producer:
    """A process that calls getppid(2) as often as it is told, on one CPU if that is given."""

    def __init__(self, cpu: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PRODUCER, "" if cpu is None else str(cpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.pid = self._process.pid

    def start(self, calls: int) -> None:
        """Begin; returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        """Return when all calls that were asked for have been made."""
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> None:
        """Stop at once, in the middle of whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


_PRODUCER: Final = """
import os, sys
from itertools import repeat
if sys.argv[1]:
    os.sched_setaffinity(0, {int(sys.argv[1])})
print("ready", flush=True)
for line in sys.stdin:
    getppid = os.getppid
    for _ in repeat(None, int(line)):
        getppid()
    print("done", flush=True)
"""


@contextmanager
def producing(cpu: int | None = None) -> Iterator[Producer]:
    """A producer that is gone afterwards."""
    producer = Producer(cpu)
    try:
        yield producer
    finally:
        producer.end()


def source(
    folder: Path,
    name: str,
    target: int,
    buffer_size: int,
    buffer: Kind = "ring",
    max_delay: float = 0,
    overload: Overload = "lose",
) -> ReadyMade:
    """The program `<name>.c` for one producer's calls."""
    text = (_FOLDER / f"{name}.c").read_text()
    path = folder / f"{name}-{target}.c"
    path.write_text(f"#define TARGET {target}\n#define LENGTH(n) {LENGTH.format('n')}\n{text}")
    return ReadyMade(
        path,
        FloodEvent,
        {name: RawTracepoint("sys_enter")},
        buffer=buffer,
        buffer_size=buffer_size,
        max_delay=max_delay,
        overload=overload,
    )
