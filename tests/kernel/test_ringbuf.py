"""The ring buffer against the kernel, faster than we can read."""

from __future__ import annotations

import mmap
import os
import struct
from collections import defaultdict
from pathlib import Path

import anyio
import pytest

from ebpfstream.errors import ArgumentError
from ebpfstream.kernel import ordering, ringbuf
from ebpfstream.kernel.bpf import wait_for_running_programs
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.records import Records
from tests.kernel import flood

pytestmark = pytest.mark.kernel


class Checker:
    """Holds every record against what records.c put into it."""

    def __init__(self) -> None:
        self.records = self.discarded = self.bytes = 0
        self.gaps = 0
        self._next: dict[int, int] = defaultdict(int)

    def check(self, records: Records) -> None:
        data = records.data
        self.discarded += records.discarded
        self.bytes += len(data)
        for position, stride, size, count in records.runs:
            assert stride == (size + 8 + 7) & ~7
            for start in range(position + records.prefix, position + stride * count, stride):
                first = data[start : start + 8]
                assert data[start + size - 8 : start + size] == first, "a record was torn"
                (tag,) = struct.unpack("<Q", first)
                cpu, sequence = tag >> 48, tag & (1 << 48) - 1
                assert sequence >= self._next[cpu], "a record came twice or out of order"
                self.gaps += sequence - self._next[cpu]
                self._next[cpu] = sequence + 1
            self.records += count


@pytest.mark.timeout(300)
@pytest.mark.parametrize("machine", ["x86_64", "fenced"])
def test_millions_of_mixed_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Nothing torn, doubled, missing or out of order; with the fences of other architectures as well."""
    if machine == "fenced":
        fence = ordering.barrier("aarch64")
        monkeypatch.setattr(ringbuf, "barrier", lambda: fence)
    calls = 0
    checker = Checker()
    with flood.producing() as producer:
        source = flood.source(tmp_path, "records", producer.pid, 1 << 20)
        buffer = anyio.run(source.open)
        assert isinstance(buffer, RingBuffer)
        try:
            limits = [1 << 18, 4096, 16, 1 << 30]
            # What is lost depends on who else uses this machine; how much is checked must not.
            while checker.records < 1_500_000:
                producer.start(100_000)
                calls += 100_000
                while flood.known(source.counters().tried) < calls or buffer.pending():
                    limits.append(limits.pop(0))
                    if records := buffer.drain(limits[0]):
                        checker.check(records)
                producer.wait()
            source.detach()
            wait_for_running_programs()
            assert buffer.drain(1 << 30) is None
            counters = source.counters()
        finally:
            source.close()
    assert counters.tried == calls
    assert flood.known(counters.submitted) + flood.known(counters.lost) == calls
    assert checker.records + checker.discarded == counters.submitted
    # What has a gap before it was lost or withdrawn; what comes after the last record has no gap to show.
    assert checker.gaps <= flood.known(counters.lost) + checker.discarded
    assert checker.bytes > 100 * (1 << 20), "the buffer went round a hundred times"


def test_an_empty_buffer_gives_nothing() -> None:
    buffer = RingBuffer.create(1 << 16)
    assert buffer.drain(1 << 20) is None
    assert buffer.pending() == 0
    buffer.close()


def test_size_is_the_power_of_two_below() -> None:
    assert ringbuf.buffer_bytes(mmap.PAGESIZE) == mmap.PAGESIZE
    assert ringbuf.buffer_bytes(10_000_000) == 8 << 20
    with pytest.raises(ArgumentError, match=r"buffer_size=0 is impossible: give 4096 to 2147483648 bytes"):
        ringbuf.buffer_bytes(0)
    with pytest.raises(ArgumentError):
        ringbuf.buffer_bytes(1 << 40)


def test_closing_gives_everything_back() -> None:
    before = os.listdir("/proc/self/fd"), len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(100):
        RingBuffer.create(1 << 16).close()
    assert (os.listdir("/proc/self/fd"), len(Path("/proc/self/maps").read_text().splitlines())) == before
