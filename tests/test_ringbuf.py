"""RingBuffer on memory that a test writes: what the kernel does at the worst moment, at exactly that moment.

tests/kernel/test_ringbuf.py has the real kernel; this needs no privileges.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfstream.errors import CorruptBufferError
from ebpfstream.kernel import ringbuf
from ebpfstream.kernel.bpf import Map, MapType
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.kernel.runs import equal_headers
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
        at = position % SIZE
        first, rest = data[: SIZE - at], data[SIZE - at :]
        for area in (2 * PAGE, 2 * PAGE + SIZE):
            os.pwrite(self.fd, first, area + at)
            os.pwrite(self.fd, rest, area)

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
    found = [
        records.data[start + records.prefix : start + records.prefix + size]
        for position, stride, size, count in records.runs
        for start in range(position, position + stride * count, stride)
    ]
    assert [len(sample) for sample in found] == [
        size for *_, size, count in records.runs for _ in range(count)
    ]
    return found


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


SIZES = [*range(130), *range(131, SIZE - 24, 97), SIZE - 24, SIZE - 17, SIZE - 16]


@pytest.mark.parametrize("flags", [0, DISCARD])
def test_samples_of_every_size_wherever_they_wrap(kernel: Kernel, flags: int) -> None:
    """The buffer goes round some fifty times; of nothing is more or less taken."""
    for number, size in enumerate(SIZES):
        sample = bytes([number % 256]) * size
        count = min(1 + number % 3, SIZE // (size + 16))
        for _ in range(count):
            kernel.put(sample, flags)
        records = kernel.buffer.drain(1 << 20)
        assert samples(records) == ([] if flags else [sample] * count)
        assert records is not None
        assert records.discarded == (count if flags else 0)
        assert kernel.consumer == kernel.position
    assert kernel.position > 20 * SIZE


class Programs:
    """Programs that reserve and finish as it comes, and what has to come out of it."""

    def __init__(self, start: int, garbage: int) -> None:
        self.kernel = Kernel(start)
        self.kernel.write(0, random.Random(garbage).randbytes(SIZE))  # what earlier rounds have left
        self.lengths: dict[int, int] = {}  # of those not taken yet, by where they are, in their order
        self.unfinished: list[int] = []
        self.contents: dict[int, bytes | None] = {}  # None: withdrawn
        self.end = start
        self.reserved = self.lost = self.taken = 0

    def reserve(self, size: int) -> None:
        if self.end + (size + 15 & ~7) - self.kernel.consumer >= SIZE:  # as in __bpf_ringbuf_reserve()
            self.lost += 1
            return
        position = self.kernel.reserve(size)
        self.reserved += 1
        self.lengths[position] = size
        self.unfinished.append(position)
        self.end = self.kernel.position

    def finish(self, number: int, withdrawn: bool) -> None:
        if not self.unfinished:
            return
        position = self.unfinished.pop(number % len(self.unfinished))
        sample = bytes([position // 8 % 256]) * self.lengths[position]
        self.contents[position] = None if withdrawn else sample
        self.kernel.submit(position, sample, DISCARD if withdrawn else 0)

    def drain(self, limit: int) -> None:
        before = self.kernel.consumer
        wanted: list[bytes] = []
        withdrawn = 0
        for position in list(self.lengths):
            if position in self.unfinished or position >= before + limit:
                break
            content = self.contents[position]
            if content is None:
                withdrawn += 1
            else:
                wanted.append(content)
            del self.lengths[position]
        records = self.kernel.buffer.drain(limit)
        assert samples(records) == wanted
        assert (records.discarded if records else 0) == withdrawn
        assert self.kernel.consumer == next(iter(self.lengths), self.end)
        self.taken += len(wanted) + withdrawn


Step = tuple[str, int, bool]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("reserve"), st.sampled_from([0, 1, 7, 8, 8, 8, 8, 9, 24, 100, 2000]), st.booleans()
        ),
        st.tuples(st.just("finish"), st.integers(0, 5), st.booleans()),
        st.tuples(st.just("drain"), st.sampled_from([1, 17, 100, 1 << 18]), st.just(False)),
    ),
    max_size=120,
)


@given(
    start=st.sampled_from([0, 8, SIZE - 8, SIZE - 16, (1 << 50) + SIZE - 24]),
    garbage=st.integers(0, 1 << 32),
    steps=STEPS,
)
@settings(max_examples=300, deadline=None)
def test_records_that_are_finished_in_any_order(start: int, garbage: int, steps: list[Step]) -> None:
    """Whole, once, in the order of their reservation; withdrawn and lost ones counted, an unfinished one ends it."""
    programs = Programs(start, garbage)
    kernel = programs.kernel
    try:
        for verb, number, flag in steps:
            if verb == "reserve":
                programs.reserve(number)
                if flag:  # as most programs do
                    programs.finish(-1, withdrawn=False)
            elif verb == "finish":
                programs.finish(number, withdrawn=flag)
            else:
                programs.drain(number)
        while programs.unfinished:
            programs.finish(0, withdrawn=False)
        kernel.buffer.finish()
        if kernel.position + 24 - kernel.consumer < SIZE:
            kernel.put(b"after the end")
        while programs.lengths:
            programs.drain(1 << 10)
        assert kernel.buffer.drain(1 << 10) is None
        assert kernel.buffer.pending() == 0
        assert programs.taken == programs.reserved
        assert programs.taken + programs.lost == sum(verb == "reserve" for verb, _, _ in steps)
    finally:
        kernel.buffer.close()
        os.close(kernel.fd)


@pytest.mark.parametrize("flags", [0, DISCARD, BUSY, BUSY | DISCARD])
@pytest.mark.parametrize("size", [17, 1 << 20, (1 << 30) - 1])
@pytest.mark.parametrize("equal", [False, True])
def test_a_record_that_goes_beyond_the_end(kernel: Kernel, flags: int, size: int, equal: bool) -> None:
    """Nothing is taken then, however often one asks; an unfinished one is looked at when it is the oldest."""
    length = size if equal and size < 100 else 8
    if not flags & BUSY:
        kernel.put(b"x" * length)
        kernel.put(b"y" * length)
    position = kernel.reserve(16)
    kernel.write(position, struct.pack("<I", size | flags))
    before = kernel.consumer
    for _ in range(2):
        with pytest.raises(CorruptBufferError, match=r"a record goes \d+ bytes beyond .* Close this stream"):
            kernel.buffer.drain(1 << 20)
        assert kernel.consumer == before


def test_an_unfinished_record_keeps_its_length_in_mind(kernel: Kernel) -> None:
    """What came before it is taken first."""
    kernel.put(b"whole...")
    position = kernel.reserve(8)
    kernel.write(position, struct.pack("<I", 9 | BUSY))
    assert samples(kernel.buffer.drain(1 << 20)) == [b"whole..."]
    with pytest.raises(CorruptBufferError, match="a record goes 8 bytes beyond"):
        kernel.buffer.drain(1 << 20)


@pytest.mark.parametrize(
    ("consumer", "producer"), [(8, 0), (0, SIZE + 8), (0, 1 << 40), (4, 20), (0, 12), (1 << 40, 8)]
)
def test_positions_that_cannot_be(kernel: Kernel, consumer: int, producer: int) -> None:
    kernel._set(0, consumer)
    kernel._set(PAGE, producer)
    message = f"its positions are {producer - consumer} bytes apart, from {consumer} on"
    with pytest.raises(CorruptBufferError, match=message):
        kernel.buffer.drain(1 << 20)
    assert kernel.consumer == consumer


@given(
    headers=st.lists(st.integers(0, 2), min_size=1, max_size=2000)
    | st.integers(1, 3000).map(lambda n: [1] * n),
    other=st.integers(0, 3000),
    first=st.integers(0, 50),
    step=st.integers(1, 9),
    end=st.integers(1, 3000),
)
def test_equal_headers(headers: list[int], other: int, first: int, step: int, end: int) -> None:
    """As many as one finds by looking at each."""
    first, end = min(first, len(headers) - 1), min(end, len(headers))
    if other < len(headers):
        headers[other] = 2
    expected = 1
    while first + expected * step < end and headers[first + expected * step] == headers[first]:
        expected += 1
    memory = memoryview(struct.pack(f"<{len(headers)}I", *headers)).cast("I")
    assert equal_headers(memory, first, step, end) == expected
