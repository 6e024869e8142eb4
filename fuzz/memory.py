"""Kernel buffers whose other side is the caller, not the kernel: the readers are the real ones."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from unittest import mock

from ebpfstream.kernel import bpf, perfbuf
from ebpfstream.kernel.bpf import Map, MapType
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.perfring import Event, Ring
from ebpfstream.kernel.ringbuf import RingBuffer

PAGE: Final = mmap.PAGESIZE


class RingMemory:
    """The memory of a ring buffer, and the `buffer` that reads it."""

    def __init__(self, size: int = PAGE) -> None:
        self.size = size
        fd = os.memfd_create("ring")
        os.ftruncate(fd, 2 * PAGE + 2 * size)
        self._memory = mmap.mmap(fd, 0)
        self.buffer = RingBuffer(Map(fd, MapType.RINGBUF, 0, 0, size))

    def set(self, data: bytes, consumer: int, producer: int) -> None:
        """`data` is the whole data area; the kernel maps it twice, this writes it twice."""
        self._memory[2 * PAGE :] = data * 2
        self._memory[:8] = consumer.to_bytes(8, "little")
        self._memory[PAGE : PAGE + 8] = producer.to_bytes(8, "little")

    @property
    def consumer(self) -> int:
        """The reader's position."""
        return int.from_bytes(self._memory[:8], "little")


class PerfMemory(Ring):
    """One CPU's ring, without a CPU."""

    def __init__(self, cpu: int, size: int) -> None:
        self.cpu = cpu
        self.size = size
        self.lost_told = 0
        self.seen = 0
        self.retired = False
        self.waking, self.gathering = (Event(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2))
        self._memory = mmap.mmap(-1, PAGE + size)
        memory = memoryview(self._memory)
        self._head = memory[1024:1032].cast("Q")
        self._tail = memory[1032:1040].cast("Q")
        self._data = memory[PAGE:]

    @property
    def head(self) -> int:
        """The kernel's position."""
        return self._head[0]

    @property
    def tail(self) -> int:
        """The reader's."""
        return self._tail[0]

    def set(self, data: bytes, tail: int, head: int) -> None:
        """`data` is the whole data area."""
        self._memory[PAGE:] = data
        self._tail[0] = tail
        self._head[0] = head

    def put(self, record: bytes) -> bool:
        """What the kernel does with a record; False if there is no room."""
        head = self._head[0]
        if head + len(record) - self._tail[0] >= self.size:  # CIRC_SPACE() leaves one byte
            return False
        start = head & (self.size - 1)
        first = record[: self.size - start]
        self._data[start : start + len(first)] = first
        self._data[: len(record) - len(first)] = record[len(first) :]
        self._head[0] = head + len(record)
        return True


def perf_sample(time: int, sample: bytes) -> bytes:
    """The record of a sample."""
    size = len(sample) + 4 + 7 & ~7
    return struct.pack("<IHHQI", 9, 1, 16 + size, time, size - 4) + sample.ljust(size - 4, b"\xaa")


def perf_lost(count: int) -> bytes:
    """The record that tells of lost ones."""
    return struct.pack("<IHHQQ", 2, 0, 24, 7, count)


def ring_record(sample: bytes, flags: int = 0) -> bytes:
    """A record of a ring buffer; `flags` are those of its header."""
    return struct.pack("<II", len(sample) | flags, 0) + sample + b"\xaa" * (-len(sample) % 8)


class _NoMap(Map):
    """Takes what is put into it."""

    def __init__(self) -> None:
        super().__init__(-1, MapType.PERF_EVENT_ARRAY, 4, 4, 64)

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        pass

    def delete(self, key: bytes) -> bool:
        return True


@contextmanager
def perf_memory(cpus: int, size: int, max_delay: float = 0) -> Iterator[tuple[PerfBuffer, list[PerfMemory]]]:
    """A perf buffer of so many rings of `size` bytes, and these."""
    rings: list[PerfMemory] = []

    def ring(cpu: int, size: int) -> PerfMemory:
        rings.append(PerfMemory(cpu, size))
        return rings[-1]

    with (
        mock.patch.object(perfbuf, "Ring", ring),
        mock.patch.object(bpf, "online_cpus", return_value=[*range(cpus)]),
    ):
        buffer = PerfBuffer(_NoMap(), cpus * size, max_delay=max_delay)
    buffer._hotplug.close()  # this machine's CPUs are no concern of it
    buffer._hotplug = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        yield buffer, rings
    finally:
        buffer.close()
