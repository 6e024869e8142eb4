"""RingBuffer on memory that a test writes: what the kernel does at the worst moment, at exactly that moment.

tests/kernel/test_ringbuf.py has the real kernel; this needs no privileges.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream.kernel import ringbuf
from ebpfstream.kernel.bpf import Map, MapType
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.records import Records

SIZE = mmap.PAGESIZE
BUSY, DISCARD = 1 << 31, 1 << 30
PAGE = mmap.PAGESIZE


class Kernel:
    """The producer's side: a file in memory in place of the map, its data written twice."""

    def __init__(self, position: int = 0) -> None:
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 2 * PAGE + 2 * SIZE)
        self.position = position
        self._set(0, position)
        self._set(PAGE, position)
        self.buffer = RingBuffer(Map(os.dup(self.fd), MapType.RINGBUF, 0, 0, SIZE))

    def _set(self, offset: int, value: int) -> None:
        os.pwrite(self.fd, struct.pack("<Q", value), offset)

    @property
    def consumer(self) -> int:
        return int(struct.unpack("<Q", os.pread(self.fd, 8, 0))[0])

    def write(self, position: int, data: bytes) -> None:
        for index, byte in enumerate(data):
            at = (position + index) % SIZE
            os.pwrite(self.fd, bytes([byte]), 2 * PAGE + at)
            os.pwrite(self.fd, bytes([byte]), 2 * PAGE + SIZE + at)

    def reserve(self, size: int, flags: int = BUSY) -> int:
        """A record without its sample; its position."""
        position = self.position
        self.write(position, struct.pack("<II", size | flags, 0))
        self.position += (8 + size + 7) & ~7
        self._set(PAGE, self.position)
        return position

    def submit(self, position: int, sample: bytes, flags: int = 0) -> None:
        self.write(position + 8, sample)
        self.write(position, struct.pack("<I", len(sample) | flags))

    def put(self, sample: bytes, flags: int = 0) -> None:
        self.submit(self.reserve(len(sample)), sample, flags)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.buffer.close()
    os.close(made.fd)


def samples(records: Records | None) -> list[bytes]:
    if records is None:
        return []
    return [
        records.data[start + records.prefix : start + records.prefix + size]
        for position, stride, size, count in records.runs
        for start in range(position, position + stride * count, stride)
    ]


class Hooked:
    """A view that runs something before each look into it."""

    def __init__(self, view: Any, before: Callable[[], object]) -> None:
        self._view = view
        self._before = before

    def __getitem__(self, part: Any) -> Any:
        self._before()
        return self._view[part]

    def release(self) -> None:
        self._view.release()


def test_a_record_that_is_finished_at_the_last_moment_is_whole(kernel: Kernel) -> None:
    """Between the look at the positions and that at its header: what is copied must be from afterwards."""
    kernel.put(b"first...")
    position = kernel.reserve(16)
    buffer: Any = kernel.buffer
    buffer._headers = Hooked(buffer._headers, lambda: kernel.submit(position, b"whole" * 3 + b"."))
    assert samples(kernel.buffer.drain(1 << 20)) == [b"first...", b"whole" * 3 + b"."]


def test_space_is_given_back_after_the_copy(kernel: Kernel) -> None:
    kernel.put(b"first...")
    buffer: Any = kernel.buffer
    positions: list[int] = []
    buffer._data = Hooked(buffer._data, lambda: positions.append(kernel.consumer))
    assert samples(kernel.buffer.drain(1 << 20)) == [b"first..."]
    assert set(positions) == {0}
    assert kernel.consumer == 16


@pytest.mark.parametrize("before", [0, 1, 2, 70])
def test_an_unfinished_record_ends_it(kernel: Kernel, before: int) -> None:
    """Also where it interrupts records of its own length, and what is finished after it waits for it."""
    for number in range(before):
        kernel.put(b"%08d" % number)
    position = kernel.reserve(8)
    kernel.put(b"after...")
    records = kernel.buffer.drain(1 << 20)
    assert samples(records) == [b"%08d" % number for number in range(before)]
    assert (records is None) == (before == 0)
    assert kernel.consumer == position
    assert kernel.buffer.pending() == 32
    assert kernel.buffer.drain(1 << 20) is None
    assert kernel.consumer == position
    kernel.submit(position, b"finished")
    assert samples(kernel.buffer.drain(1 << 20)) == [b"finished", b"after..."]
    assert kernel.buffer.pending() == 0


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17])
def test_withdrawn_records_are_passed_and_counted(kernel: Kernel, size: int) -> None:
    for number in range(3):
        kernel.put(bytes([number]) * size)
        kernel.put(b"x" * size, DISCARD)
    records = kernel.buffer.drain(1 << 20)
    assert samples(records) == [bytes([number]) * size for number in range(3)]
    assert records is not None
    assert records.discarded == 3
    assert kernel.buffer.pending() == 0


def test_only_withdrawn_records(kernel: Kernel) -> None:
    kernel.put(b"x" * 20, DISCARD)
    records = kernel.buffer.drain(1 << 20)
    assert records is not None
    assert (records.runs, records.discarded) == ([], 1)
    assert kernel.buffer.pending() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 66, 128, 192, 193, 194])
def test_what_an_earlier_round_left_is_not_read_again(count: int) -> None:
    """Behind the last record lie old ones of the same length, their headers finished."""
    kernel = Kernel()
    for number in range(SIZE // 16):
        kernel.put(b"old%05d" % number)
    assert len(samples(kernel.buffer.drain(1 << 20))) == SIZE // 16
    for number in range(count):
        kernel.put(b"new%05d" % number)
    records = kernel.buffer.drain(1 << 20)
    assert samples(records) == [b"new%05d" % number for number in range(count)]
    assert records is not None
    assert records.runs == [(0, 16, 8, count)]
    assert kernel.consumer == SIZE + 16 * count
    kernel.buffer.close()
    os.close(kernel.fd)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 66, 67, 192, 193, 194])
def test_records_of_one_length_are_one_run(kernel: Kernel, count: int) -> None:
    """However many there are, and whatever follows them."""
    for number in range(count):
        kernel.put(b"%08d" % number)
    kernel.put(b"another length..")
    kernel.put(b"%08d" % count)
    records = kernel.buffer.drain(1 << 20)
    assert records is not None
    assert records.runs == [(0, 16, 8, count), (16 * count, 24, 16, 1), (16 * count + 24, 16, 8, 1)]


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3), (160, 10), (1 << 20, 10)]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_limit(kernel: Kernel, limit: int, expected: int, mixed: bool) -> None:
    """Records that begin before it; of equal length or not makes no difference."""
    for number in range(10):
        kernel.put(b"x" * (8 - (number % 2 if mixed else 0)))
    assert len(samples(kernel.buffer.drain(limit))) == expected
    assert kernel.consumer == 16 * expected


@given(
    start=st.integers(0, 3 * SIZE // 8).map(lambda words: words * 8),
    puts=st.lists(st.tuples(st.sampled_from([1, 8, 8, 8, 8, 24, 100]), st.booleans()), max_size=40),
    limit=st.integers(1, 2000),
)
def test_any_records_anywhere_by_any_limit(start: int, puts: list[tuple[int, bool]], limit: int) -> None:
    kernel = Kernel(start)
    try:
        wanted = []
        for number, (size, withdrawn) in enumerate(puts):
            if kernel.position + size + 16 - start > SIZE:
                break
            sample = bytes([number]) * size
            kernel.put(sample, DISCARD if withdrawn else 0)
            if not withdrawn:
                wanted.append(sample)
        found = []
        while records := kernel.buffer.drain(limit):
            found += samples(records)
        assert found == wanted
        assert kernel.consumer == kernel.position
    finally:
        kernel.buffer.close()
        os.close(kernel.fd)


def test_fences_stand_where_order_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the producer's position, after the headers, and before the space is given back."""
    log: list[str] = []
    monkeypatch.setattr(ringbuf, "barrier", lambda: lambda: log.append("fence"))
    kernel = Kernel()
    kernel.put(b"first...")
    buffer: Any = kernel.buffer
    buffer._producer = Hooked(buffer._producer, lambda: log.append("position"))
    buffer._headers = Hooked(buffer._headers, lambda: log.append("header"))
    buffer._data = Hooked(buffer._data, lambda: log.append("copy"))
    assert samples(kernel.buffer.drain(1 << 20)) == [b"first..."]
    # The header is looked at twice: for its flags, and as the first of a run.
    assert log == ["position", "fence", "header", "header", "fence", "copy", "fence"]
    kernel.buffer.close()
    os.close(kernel.fd)
