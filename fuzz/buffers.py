"""Buffers with arbitrary bytes in them: what is drained is held against a reader that looks at one record at a time.

An input begins with what the target's `struct` says; the rest fills the buffer's memory, from the
reader's position on.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack
from functools import cache
from typing import Final, NamedTuple
from unittest import mock

from ebpfstream.errors import CorruptBufferError
from ebpfstream.kernel import perfbuf
from ebpfstream.kernel.perfring import PADDING_MAX, PREFIX, Part
from ebpfstream.records import Records
from fuzz.memory import PAGE, PerfMemory, RingMemory, perf_lost, perf_memory, perf_sample, ring_record

_BUSY, _DISCARD = 1 << 31, 1 << 30
_DRAINS: Final = 20  # of one input; with a limit of one byte there would be hundreds


def samples(records: Records) -> list[bytes]:
    """Each record's bytes; no slice may have been cut by the end of the data."""
    found = []
    for position, stride, size, count in records.runs:
        assert stride >= records.prefix + size, "a sample that reaches into the next record"
        assert count > 0
        assert 0 <= position <= position + stride * count <= len(records.data), "a run outside of the data"
        starts = range(position, position + stride * count, stride)
        found += [records.data[start + records.prefix : start + records.prefix + size] for start in starts]
    assert [len(sample) for sample in found] == [
        size for *_, size, count in records.runs for _ in range(count)
    ]
    return found


class Drained(NamedTuple):
    """What one drain takes."""

    samples: list[bytes]
    discarded: int
    taken: int


_RING: Final = struct.Struct("<BHHH")
_UNALIGNED, _BEHIND = 1, 2


@cache
def _ring() -> RingMemory:
    return RingMemory()


def ring(data: bytes) -> None:
    """Flags (positions that are no multiples of 8, or the wrong way round), limit, position, bytes in the buffer."""
    if len(data) < _RING.size:
        return
    flags, limit, start, available = _RING.unpack_from(data)
    if not flags & _UNALIGNED:
        start, available = start & ~7, available & ~7
    memory = data[_RING.size :][:PAGE].ljust(PAGE, b"\0")
    turn = start % PAGE
    memory = memory[PAGE - turn :] + memory[: PAGE - turn]
    consumer = start + (1 << 40)
    producer = consumer - available if flags & _BEHIND else consumer + available
    reader = _ring()
    reader.set(memory, consumer, producer)
    for _ in range(_DRAINS):
        expected = _ring_expected(memory, consumer, producer, limit + 1)
        try:
            records = reader.buffer.drain(limit + 1)
        except CorruptBufferError:
            assert expected is None, f"{expected} is there"
            assert reader.consumer == consumer, "something was taken"
            return
        assert expected is not None, "what goes beyond the end was taken"
        found = Drained([], 0, 0) if records is None else _ring_drained(records)
        assert found == expected
        consumer += expected.taken
        assert reader.consumer == consumer
        if not expected.taken:
            return


def _ring_drained(records: Records) -> Drained:
    assert (records.prefix, records.padding) == (8, 0)
    return Drained(samples(records), records.discarded, len(records.data))


def _ring_expected(memory: bytes, consumer: int, producer: int, limit: int) -> Drained | None:
    """None for what no kernel leaves."""
    if producer == consumer:
        return Drained([], 0, 0)
    if not 0 < producer - consumer <= len(memory) or consumer % 8 or producer % 8:
        return None
    found: list[bytes] = []
    discarded = 0
    position = consumer
    while position < min(producer, consumer + limit):
        start = position % len(memory)
        header = int.from_bytes(memory[start : start + 4], "little")
        size = header & ~(_BUSY | _DISCARD)
        end = position + (size + 15) // 8 * 8
        if header & _BUSY:
            if end > producer and position == consumer:
                return None
            break
        if end > producer:
            return None
        if header & _DISCARD:
            discarded += 1
        else:
            found.append((memory * 2)[start + 8 : start + 8 + size])
            assert len(found[-1]) == size
        position = end
    return Drained(found, discarded, position - consumer)


def ring_seeds() -> list[bytes]:
    """Valid buffers, one that ends in an unfinished record, and broken ones."""
    mixed = b"".join(ring_record(bytes(size), _DISCARD if size % 5 == 4 else 0) for size in range(40))
    equal = ring_record(b"equal...") * 100
    busy = equal + struct.pack("<II", 8 | _BUSY, 0) + bytes(8) + equal
    return [
        _RING.pack(0, 4095, 0, len(mixed)) + mixed,
        _RING.pack(0, 4095, 4000, len(equal)) + equal,
        _RING.pack(0, 100, 8, len(busy)) + busy,
        _RING.pack(0, 100, 8, len(equal) + 8) + equal + struct.pack("<II", 100, 0),
        _RING.pack(_UNALIGNED, 100, 9, 16) + equal,
        _RING.pack(_BEHIND, 100, 9, 16) + equal,
    ]


class PerfRecord(NamedTuple):
    """A sample, a count of lost ones, or something else."""

    start: int
    end: int
    time: int
    sample: bytes | None
    lost: int = 0


def _perf_expected(data: bytes, seen: int) -> list[PerfRecord] | None:
    """The records that lie whole in `data`, of `seen` bytes; None for what no kernel leaves."""
    found: list[PerfRecord] = []
    position = 0
    before = b""
    while position < len(data):
        kind, _, size = struct.unpack_from("<IHH", data, position)
        end = position + size
        if end > seen:
            return None
        if end > len(data):
            break
        if size % 8 or size < 8 or not 0 < kind < 64:
            return None
        if kind == 9:
            if size < 24:
                return None
            time, length = struct.unpack_from("<QI", data, position + 8)
            # Asked of the first of equal headers in a row: of each it would cost more than finding them.
            if length != size - 20 and data[position : position + 8] != before:
                return None
            found.append(PerfRecord(position, end, time, data[position + 20 : end]))
        elif kind == 2:
            if size < 24:
                return None
            (lost,) = struct.unpack_from("<Q", data, position + 16)
            found.append(PerfRecord(position, end, 0, None, lost))
        else:
            found.append(PerfRecord(position, end, 0, None))
        before = data[position : position + 8]
        position = end
    return found


_PERF: Final = struct.Struct("<BHHH")


@cache
def _part_ring() -> PerfMemory:
    return PerfMemory(0, PAGE)


def perf_part(data: bytes) -> None:
    """Flags, limit, position, bytes in the ring of one CPU."""
    if len(data) < _PERF.size:
        return
    flags, limit, start, available = _PERF.unpack_from(data)
    if not flags & _UNALIGNED:
        start, available = start & ~7, available & ~7
    memory = data[_PERF.size :][:PAGE].ljust(PAGE, b"\0")
    turn = start % PAGE
    tail = start + (1 << 40)
    head = tail - available if flags & _BEHIND else tail + available
    one = _part_ring()
    one.lost_told = 0
    one.set(memory[PAGE - turn :] + memory[: PAGE - turn], tail, head)
    expected = None
    if 0 <= head - tail <= PAGE and not tail % 8 and not head % 8:
        content = memory[: min(available, (limit & ~7) + 8)]
        expected = _perf_expected(content, available)
    try:
        one.look()
        part = Part(one, one.copy((limit & ~7) + 8))
    except CorruptBufferError:
        assert expected is None, f"{expected} is there"
        assert one.tail == tail
        return
    assert expected is not None, "what no kernel leaves was taken"
    assert (part.records.prefix, part.records.padding) == (PREFIX, PADDING_MAX)
    wanted = [record for record in expected if record.sample is not None]
    assert samples(part.records) == [record.sample for record in wanted]
    assert part.times() == [record.time for record in wanted]
    assert part.count == len(wanted)
    if wanted:
        assert part.last_time() == wanted[-1].time
        part.keep_until(sorted(part.times())[part.count // 2])
        kept = samples(part.records)
        assert kept == [record.sample for record in wanted[: part.count]]
        if part.count < len(wanted):
            assert part.end == (wanted[part.count - 1].end if part.count else 0)
    part.take()
    assert one.tail == tail + part.end
    assert one.lost_told == sum(record.lost for record in expected if record.start < part.end)


def _perf_content() -> bytes:
    mixed = [perf_sample(1000 + size, bytes(size)) for size in range(40)]
    return b"".join([*mixed[:20], perf_lost(3), *mixed[20:]])


def perf_part_seeds() -> list[bytes]:
    """Valid rings, and broken ones."""
    content = _perf_content()
    equal = perf_sample(5, b"equal...") * 80
    return [
        _PERF.pack(0, 4095, 0, len(content)) + content,
        _PERF.pack(0, 500, 4000, len(equal)) + equal,
        _PERF.pack(0, 4095, 0, len(equal) + 16) + equal + struct.pack("<IHHQ", 9, 0, 16, 0),
        _PERF.pack(0, 4095, 0, len(equal) + 24) + equal + struct.pack("<IHHQQ", 9, 0, 24, 0, 70000),
        _PERF.pack(0, 4095, 0, len(equal) + 8) + equal + struct.pack("<IHH", 5, 0, 8),
        _PERF.pack(0, 4095, 0, 56) + struct.pack("<IHHQI", 9, 0, 33, 0, 13) + bytes(36),
        _PERF.pack(0, 4095, 0, 40) + struct.pack("<IHHQ", 2, 0, 16, 0) + perf_sample(0, b"x"),
        _PERF.pack(_BEHIND, 500, 0, 8) + equal,
    ]


_MERGED: Final = struct.Struct("<QHHHH")
_RINGS: Final = 3
_LIMIT_LEAST: Final = 512  # in place of what is read of each ring at least, so that less than all is read


class _Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0

    def monotonic_ns(self) -> int:
        return self.now


class _PerfCpus:
    """The rings of some CPUs as one buffer, and what it is held against."""

    def __init__(self) -> None:
        self._stack = ExitStack()  # for as long as this process runs
        self.buffer, self.rings = self._stack.enter_context(perf_memory(_RINGS, PAGE))
        self.clock = _Clock()
        self._stack.enter_context(mock.patch.object(perfbuf, "time", self.clock))
        self._stack.enter_context(mock.patch.object(perfbuf, "RECORD_MAX", _LIMIT_LEAST))

    def begin(self) -> None:
        """Forget all earlier inputs."""
        self.buffer.late = 0
        self.buffer._latest = 0
        self.buffer._holding_back = True
        self.latest = self.late = 0
        for ring in self.rings:
            ring.lost_told = 0

    def drain(self, contents: list[bytes], limit: int) -> bool:
        """One drain; False if nothing more can come of these rings' contents, each from the reader's position on."""
        before = [ring.tail for ring in self.rings]
        lost = [ring.lost_told for ring in self.rings]
        filled = sum(map(bool, contents))
        each = max(limit // filled & ~7, _LIMIT_LEAST) if filled else 0
        expected = [_perf_expected(content[:each], len(content)) for content in contents]
        try:
            records = self.buffer.drain(limit)
        except CorruptBufferError:
            assert None in expected, "nothing is wrong with it"
            assert [ring.tail for ring in self.rings] == before, "something was taken"
            return False
        found = [] if records is None else list(zip(_times(records), samples(records), strict=True))
        wanted: list[list[tuple[int, bytes]]] = []
        for number, (ring, there) in enumerate(zip(self.rings, expected, strict=True)):
            assert there is not None, "what no kernel leaves was taken"
            moved = ring.tail - before[number]
            assert moved in {0, *(record.end for record in there)}, "a part of a record was taken"
            taken = [record for record in there if record.end <= moved]
            assert ring.lost_told - lost[number] == sum(record.lost for record in taken)
            wanted.append([(record.time, record.sample) for record in taken if record.sample is not None])
            times = [time for time, _ in wanted[-1]]
            if times == sorted(times):
                assert not times or times[-1] <= self.clock.now or not self.buffer._holding_back
            contents[number] = contents[number][moved:]
        assert found == sorted((one for part in wanted for one in part), key=lambda one: one[0])
        self.late += sum(time < self.latest for time, _ in found)
        self.latest = max([self.latest, *(time for time, _ in found)])
        assert self.buffer.late == self.late
        return [ring.tail for ring in self.rings] != before


def _times(records: Records) -> list[int]:
    return [
        int.from_bytes(records.data[start + 8 : start + 16], "little")
        for position, stride, _, count in records.runs
        for start in range(position, position + stride * count, stride)
    ]


@cache
def _perf_cpus() -> _PerfCpus:
    return _PerfCpus()


def perf(data: bytes) -> None:
    """The clock, a limit, and how many bytes are in each CPU's ring; then these."""
    if len(data) < _MERGED.size:
        return
    now, limit, *lengths = _MERGED.unpack_from(data)
    cpus = _perf_cpus()
    cpus.begin()
    cpus.clock.now = now
    contents = []
    position = _MERGED.size
    for ring, length in zip(cpus.rings, lengths, strict=True):
        size = length % PAGE & ~7
        content = data[position : position + size].ljust(size, b"\0")
        position += size
        ring.set(bytes(PAGE), now & 0xFFF8, now & 0xFFF8)
        assert not content or ring.put(content)
        contents.append(content)
    for number in range(_DRAINS):
        if not cpus.drain(contents, limit):
            if not cpus.buffer._holding_back:
                break
            cpus.buffer.finish()
        elif number == _DRAINS // 2:
            cpus.buffer.finish()


def perf_seeds() -> list[bytes]:
    """Three rings with interleaved times, and a broken one."""
    first = b"".join(perf_sample(time, b"first %d" % time) for time in range(0, 300, 7))
    second = b"".join(perf_sample(time, b"2nd" * (time % 11)) for time in range(0, 200, 13))
    third = _perf_content()[:-104]
    rings = ((first, second, third), (first, second, b""), (b"", third, b""), (first, second[:-8], third))
    return [_MERGED.pack(1020, 600, *map(len, parts)) + b"".join(parts) for parts in rings]
