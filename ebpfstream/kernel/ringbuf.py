"""The BPF ring buffer, read through its own memory.  Linux ≥ 5.8.

Layout (kernel/bpf/ringbuf.c, `struct bpf_ringbuf` and `struct bpf_ringbuf_hdr`): the map's
descriptor maps one page with the consumer's position, one with the producer's, then the data twice
in a row, so that no record wraps.  A record is a header of two u32 (length with two flag bits, page
offset), the sample, and padding to 8 bytes.
"""

from __future__ import annotations

import mmap
from typing import Final

from ebpfstream.errors import ArgumentError, CorruptBufferError
from ebpfstream.kernel.bpf import Map, MapType
from ebpfstream.kernel.ordering import barrier
from ebpfstream.kernel.runs import equal_headers
from ebpfstream.records import Records, Run
from ebpfstream.waiting import readable

HEADER_SIZE: Final = 8
_BUSY: Final = 1 << 31  # BPF_RINGBUF_BUSY_BIT: reserved, not yet submitted
_DISCARD: Final = 1 << 30  # BPF_RINGBUF_DISCARD_BIT: the program changed its mind
_FLAGS: Final = _BUSY | _DISCARD

SIZE_MAX: Final = 1 << 31
"""Bytes that a ring buffer may have: max_entries is a u32, and a power of two."""


def buffer_bytes(requested: int) -> int:
    """The size that the kernel can give for a request: a power of two of whole pages, not above it.

    Raises ArgumentError for what is below one page or above 2 GiB.
    """
    page = mmap.PAGESIZE
    if not page <= requested <= SIZE_MAX:
        raise ArgumentError(f"buffer_size={requested} is impossible: give {page} to {SIZE_MAX} bytes")
    return 1 << (requested.bit_length() - 1)


class RingBuffer:
    """Reads one ring buffer; nothing else in the process may read the same one.

    `drain()` never blocks.
    """

    late = 0  # its records are in the order of their reservation
    lost = None  # only a program knows that its reservation failed

    def __init__(self, ring: Map) -> None:
        self._map = ring
        self._size = size = ring.max_entries
        self._barrier = barrier()
        self._consumer_page = mmap.mmap(
            ring.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
        )
        self._producer_pages = mmap.mmap(
            ring.fd, mmap.PAGESIZE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE
        )
        self._consumer = memoryview(self._consumer_page)[:8].cast("Q")
        self._producer = memoryview(self._producer_pages)[:8].cast("Q")
        self._data = memoryview(self._producer_pages)[mmap.PAGESIZE :]
        self._headers = self._data.cast("I")
        self._end: int | None = None

    @classmethod
    def create(cls, size: int) -> RingBuffer:
        """A new ring buffer of `buffer_bytes(size)` bytes.

        Raises PrivilegeError, UnsupportedError (Linux < 5.8), LoadError (no memory).
        """
        return cls(Map.create("events", MapType.RINGBUF, max_entries=buffer_bytes(size)))

    @property
    def map(self) -> Map:
        """The map to which programs submit."""
        return self._map

    @property
    def size(self) -> int:
        """Bytes that the buffer holds, headers and padding included."""
        return self._size

    async def wait(self) -> None:
        """Return when there is something in the buffer, be it unfinished."""
        await readable(self._map.fd)

    def pending(self) -> int:
        """Bytes in the buffer now, unfinished records included."""
        end = self._producer[0] if self._end is None else self._end
        return end - self._consumer[0]

    def fill(self) -> tuple[int, int]:
        """Bytes in it, and how many have room."""
        return self.pending(), self._size

    def drain(self, limit: int) -> Records | None:
        """Take what is finished, oldest first, up to the record that passes `limit` bytes.

        None when the buffer is empty or its oldest record is unfinished.  Raises CorruptBufferError, and
        takes nothing then.
        """
        consumer = self._consumer[0]
        available = self.pending()
        if not available:
            return None
        if not 0 < available <= self._size or (consumer | available) & 7:
            raise _corrupt(f"its positions are {available} bytes apart, from {consumer} on")
        # Headers are looked at in place and the bytes copied afterwards: a copy of everything may
        # load a record's end before its header, and then take an unfinished record for a whole one.
        self._barrier()
        start = consumer & (self._size - 1)
        end, runs, discarded = self._scan(start, start + min(available, limit))
        self._barrier()
        taken = end - start
        # An unfinished record has its length already (__bpf_ringbuf_reserve()).
        reach = taken or record_bytes(self._headers[start >> 2] & ~_FLAGS)
        if reach > available:
            raise _corrupt(f"a record goes {reach - available} bytes beyond what has been reserved")
        if not taken:
            return None
        records = Records(bytes(self._data[start:end]), HEADER_SIZE, runs, discarded)
        self._barrier()
        self._consumer[0] = consumer + taken
        return records

    def _scan(self, start: int, end: int) -> tuple[int, list[Run], int]:
        """From `start`, the finished records that begin before `end`.

        Where they end, as runs of equal length (positions from `start`), and how many were discarded.
        """
        headers = self._headers
        runs: list[Run] = []
        discarded = 0
        position = start
        while position < end:
            header = headers[position >> 2]
            if header & _FLAGS:
                if header & _BUSY:
                    break
                discarded += 1
                position += record_bytes(header - _DISCARD)
                continue
            stride = HEADER_SIZE + header + 7 & ~7  # as record_bytes() has it
            # Streams of one type mostly have one length.
            count = equal_headers(headers, position >> 2, stride >> 2, end >> 2)
            runs.append((position - start, stride, header, count))
            position += count * stride
        return position, runs, discarded

    def unplug(self) -> None:
        """Cannot be: programs go on submitting until it is full."""

    def finish(self) -> None:
        """Hand out what is in it now, and nothing that comes after."""
        self._end = self._producer[0]

    def close(self) -> None:
        """Unmap and give up the map.  Closing again does nothing."""
        for view in (self._consumer, self._producer, self._headers, self._data):
            view.release()
        self._consumer_page.close()
        self._producer_pages.close()
        self._map.close()


def record_bytes(length: int) -> int:
    """Bytes from one record to the next, of a sample of so many."""
    return HEADER_SIZE + length + 7 & ~7


def _corrupt(what: str) -> CorruptBufferError:
    return CorruptBufferError(
        f"the ring buffer's memory is damaged: {what}. Close this stream, and open another one"
    )
