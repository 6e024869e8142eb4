"""One CPU's ring of a perf buffer, read through its memory.

Layout (include/uapi/linux/perf_event.h, `struct perf_event_mmap_page`): one page with the positions
`data_head` (the kernel's) and `data_tail` (ours) at byte 1024, then the data, a power of two of
pages, once: a record may wrap.  A record is a header of u32 type, u16 misc, u16 size; a sample's is
followed by the time, a u32 length, and the sample with up to 7 bytes of padding whose number nobody tells.

A sample of more than 65,508 bytes has a record whose size does not fit into its u16.  The kernel writes
it all the same, over whatever lies behind the few bytes that it has reserved.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import time
from bisect import bisect_right
from typing import Final

from ebpfstream.errors import CorruptBufferError, LoadError, PrivilegeError
from ebpfstream.kernel import bpf
from ebpfstream.kernel.bpf import Descriptor
from ebpfstream.kernel.runs import equal_headers
from ebpfstream.records import Records, Run

# Before a sample: the record's header, the time, the length.
PREFIX: Final = 8 + 8 + 4
# The length is rounded up, so that the record's is a multiple of 8 (bpf_event_output(), kernel/trace/bpf_trace.c).
PADDING_MAX: Final = 7
RECORD_MAX: Final = 1 << 16  # the header's size is a u16
_SAMPLE_MAX: Final = RECORD_MAX - 8 - PREFIX

_PERF_RECORD_LOST, _PERF_RECORD_SAMPLE = 2, 9
_LEAST: Final = 24  # bytes of either
_KIND_AND_ODD_BYTES: Final = 7 << 48 | 0xFFFFFFFF  # of a header as one number; sizes are multiples of 8
_KINDS: Final = range(1, 64)  # perf's own begin at 64 (tools/lib/perf/include/perf/event.h)
_LOST: Final = struct.Struct("<8xQQ")  # id, lost

_IOC_ENABLE, _IOC_SET_OUTPUT = 0x2400, 0x2405
_NEVER: Final = 0x7FFFFFFF
_FORMAT_LOST: Final = 1 << 4

_ATTR_SIZE: Final = 112  # PERF_ATTR_SIZE_VER5
_ATTRIBUTES: Final = struct.Struct("<IIQQQQQIIQQQQIi")


class Event(Descriptor):
    """A perf event to which programs on one CPU may submit."""

    __slots__ = ()

    @classmethod
    def open(cls, cpu: int, wakeup_events: int) -> Event:
        """An event that wakes whoever polls it after so many records.  Raises PrivilegeError, LoadError."""
        for read_format in (_FORMAT_LOST, 0):
            attributes = _ATTRIBUTES.pack(
                1,  # type: PERF_TYPE_SOFTWARE
                _ATTR_SIZE,
                10,  # config: PERF_COUNT_SW_BPF_OUTPUT
                1,  # sample_period
                1 << 10 | 1 << 2,  # sample_type: PERF_SAMPLE_RAW | PERF_SAMPLE_TIME
                read_format,
                1 << 25,  # use_clockid
                wakeup_events,
                *[0] * 6,
                time.CLOCK_MONOTONIC,
            )
            fd = bpf.perf_event_open(attributes.ljust(_ATTR_SIZE, b"\0"), cpu)
            if fd >= 0 or ctypes.get_errno() != errno.EINVAL:
                break  # else PERF_FORMAT_LOST is unknown: it came with Linux 6.0
        if fd < 0:
            code = ctypes.get_errno()
            if code in (errno.EPERM, errno.EACCES):
                raise bpf.privilege_error(perf_event=True)
            raise LoadError(f"the kernel refused a perf event on CPU {cpu}: {os.strerror(code)}")
        return cls(fd)

    def lost(self) -> int | None:
        """Records of this event for which there was no room; None before Linux 6.0."""
        try:
            counts = os.read(self.fd, 16)  # value, lost
        except OSError:
            return None  # its CPU went
        return int.from_bytes(counts[8:], "little") if len(counts) == 16 else None


class Ring:
    """One CPU's ring, with two events that submit to it: one wakes for each record, one for none."""

    def __init__(self, cpu: int, size: int) -> None:
        self.cpu = cpu
        self.size = size
        self.lost_told = 0
        self.seen = 0
        self.retired = False  # its CPU went, and came back with another ring
        self.waking = Event.open(cpu, 1)
        self.gathering = Event.open(cpu, _NEVER)
        try:
            self._memory = mmap.mmap(
                self.waking.fd, mmap.PAGESIZE + size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            raise PrivilegeError(
                f"the kernel does not let this process lock {size} bytes for a perf buffer on each CPU: give it "
                "CAP_IPC_LOCK, raise RLIMIT_MEMLOCK or kernel.perf_event_mlock_kb, or ask for a smaller buffer_size"
            ) from error
        fcntl.ioctl(self.waking.fd, _IOC_ENABLE, 0)
        self._share(self.gathering)
        memory = memoryview(self._memory)
        self._head = memory[1024:1032].cast("Q")
        self._tail = memory[1032:1040].cast("Q")
        self._data = memory[mmap.PAGESIZE :]

    def _share(self, event: Event) -> None:
        """Let an event submit to this ring, too."""
        fcntl.ioctl(event.fd, _IOC_SET_OUTPUT, self.waking.fd)
        fcntl.ioctl(event.fd, _IOC_ENABLE, 0)

    def gather(self, records: int) -> None:
        """Let `gathering` be an event that wakes for so many records; no program submits to the one before."""
        self.gathering.close()
        self.gathering = Event.open(self.cpu, records)
        self._share(self.gathering)

    @property
    def lost(self) -> int:
        """Records for which there was no room; before Linux 6.0 those that a later record told of."""
        counts = [self.waking.lost(), self.gathering.lost()]
        known = [count for count in counts if count is not None]
        return max(sum(known), self.lost_told)

    def pending(self) -> int:
        """Bytes in the ring now."""
        return self._head[0] - self._tail[0]

    def look(self) -> int:
        """Bytes that may be copied once the caller has put a barrier behind this.  Raises CorruptBufferError."""
        self.seen = seen = self.pending()
        if not 0 <= seen <= self.size or (seen | self._tail[0]) & 7:
            raise self.corrupt(f"its positions are {seen} bytes apart, from {self._tail[0]} on")
        return seen

    def copy(self, limit: int) -> bytes:
        """The oldest bytes of those seen, `limit` at most."""
        start = self._tail[0] & (self.size - 1)
        length = min(self.seen, limit)
        data = self._data
        if start + length <= self.size:
            return bytes(data[start : start + length])
        return b"".join((data[start:], data[: start + length - self.size]))

    def release(self, length: int) -> None:
        """Give space back; the caller has put a barrier behind the copying."""
        self._tail[0] += length

    def corrupt(self, what: str) -> CorruptBufferError:
        """The error for what the kernel never leaves there."""
        return CorruptBufferError(
            f"the memory of CPU {self.cpu}'s perf buffer is damaged: {what}. A program that submits more than "
            f"{_SAMPLE_MAX} bytes at a time does that: let it submit less, or to a ring buffer. Close this stream, "
            "and open another one"
        )

    def close(self) -> None:
        """Unmap, and close both events."""
        for view in (self._head, self._tail, self._data):
            view.release()
        self._memory.close()
        self.waking.close()
        self.gathering.close()


class Part:
    """What was copied from one ring: its samples, in runs, and what the kernel says it lost there.

    Raises CorruptBufferError.
    """

    def __init__(self, ring: Ring, data: bytes) -> None:
        self.ring = ring
        self._words = words = memoryview(data).cast("Q")
        self.lost: list[tuple[int, int]] = []  # where, how many
        runs: list[Run] = []
        position, end = 0, len(data)
        while position < end:
            index = position >> 3
            header = words[index]
            size = header >> 48
            if position + size > end:  # cut by the limit
                if position + size > ring.seen:
                    raise ring.corrupt(f"a record goes {position + size - ring.seen} bytes beyond its end")
                break
            if header & _KIND_AND_ODD_BYTES == _PERF_RECORD_SAMPLE:
                # The first of a run is asked for its own length; asking each would cost as much as finding them.
                if size < _LEAST or words[index + 2] & 0xFFFFFFFF != size - PREFIX:
                    raise ring.corrupt(_misfit(header))
                count = 1
                if position + 2 * size <= end and words[index + (size >> 3)] == header:
                    count = equal_headers(words, index, size >> 3, (end - size >> 3) + 1)
                runs.append((position, size, size - PREFIX, count))
                position += size * count
                continue
            kind = header & _KIND_AND_ODD_BYTES
            if kind not in _KINDS or size < (_LEAST if kind == _PERF_RECORD_LOST else 8):
                raise ring.corrupt(_misfit(header))
            if kind == _PERF_RECORD_LOST:
                self.lost.append((position, _LOST.unpack_from(data, position)[1]))
            position += size
        self.records = Records(data, PREFIX, runs, padding=PADDING_MAX)
        self.end = position
        self.count = sum(run[3] for run in runs)

    def last_time(self) -> int:
        """When the kernel took the last sample, in nanoseconds of CLOCK_MONOTONIC."""
        position, stride, _, count = self.records.runs[-1]
        return self._words[(position + stride * (count - 1) >> 3) + 1]

    def times(self) -> list[int]:
        """The same of each."""
        times: list[int] = []
        for position, stride, _, count in self.records.runs:
            first, step = (position >> 3) + 1, stride >> 3
            times += self._words[first : first + step * (count - 1) + 1 : step].tolist()
        return times

    def keep_until(self, horizon: int) -> None:
        """Leave what is younger than the horizon in the ring."""
        if not self.count or self.last_time() <= horizon:
            return
        self.count = bisect_right(self.times(), horizon)
        self.records = self.records.cut(0, self.count)
        if self.count:
            position, stride, _, count = self.records.runs[-1]
            self.end = position + stride * count
        else:
            self.end = 0

    def take(self) -> None:
        """Give the space back, and count what the kernel lost before its end."""
        self.ring.release(self.end)
        self.ring.lost_told += sum(lost for position, lost in self.lost if position < self.end)


def _misfit(header: int) -> str:
    return f"a record of kind {header & 0xFFFFFFFF} says that it has {header >> 48} bytes"
