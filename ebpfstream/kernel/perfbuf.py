"""Perf buffers: a ring for each CPU, read through its memory.  Linux ≥ 4.4; sample times ≥ 4.1.

Layout (include/uapi/linux/perf_event.h, `struct perf_event_mmap_page`): one page with the positions
`data_head` (the kernel's) and `data_tail` (ours) at byte 1024, then the data, a power of two of
pages, once: a record may wrap.  A record is a header of u32 type, u16 misc, u16 size; a sample's is
followed by the time, a u32 length, and the sample with up to 7 bytes of padding whose number nobody tells.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import socket
import struct
import time
from bisect import bisect_right
from itertools import groupby
from typing import Final

import anyio
from anyio.lowlevel import checkpoint
from anyio.to_thread import run_sync

from ebpfstream.batch import Records, Run
from ebpfstream.errors import ArgumentError, LoadError, PrivilegeError
from ebpfstream.kernel import bpf
from ebpfstream.kernel.bpf import Descriptor, Map, MapType
from ebpfstream.kernel.ordering import barrier
from ebpfstream.kernel.runs import equal_headers

# Before a sample: the record's header, the time, the length.
_PREFIX: Final = 8 + 8 + 4
# The length is rounded up, so that the record's is a multiple of 8 (bpf_event_output(), kernel/trace/bpf_trace.c).
_PADDING_MAX: Final = 7
_RECORD_MAX: Final = 1 << 16  # the header's size is a u16

_PERF_RECORD_LOST, _PERF_RECORD_SAMPLE = 2, 9
_LOST: Final = struct.Struct("<8xQQ")  # id, lost

_IOC_ENABLE, _IOC_SET_OUTPUT = 0x2400, 0x2405
_NEVER: Final = 0x7FFFFFFF

_ATTR_SIZE: Final = 112  # PERF_ATTR_SIZE_VER5
_ATTRIBUTES: Final = struct.Struct("<IIQQQQQIIQQQQIi")

_CAME: Final = re.compile(rb"online@/devices/system/cpu/cpu(\d+)\0")

# Records of one drain from which on gathering them costs less than being woken for each.
_BUSY: Final = 32
# How long a program that has picked the event that wakes nobody may take to use it, mostly.
_SETTLING: Final = 0.02


def ring_bytes(requested: int, cpus: int) -> int:
    """Bytes of each CPU's ring for a buffer of `requested` bytes in all: a power of two of pages, or less in all.

    Raises ArgumentError for what gives no CPU a page, or one more than 1 GiB.
    """
    page = mmap.PAGESIZE
    if not page * cpus <= requested <= cpus << 30:
        raise ArgumentError(
            f"buffer_size={requested} is impossible: give {page * cpus} to {cpus << 30} bytes for {cpus} CPUs"
        )
    return 1 << ((requested // cpus).bit_length() - 1)


class _Event(Descriptor):
    """A perf event to which programs on one CPU may submit."""

    __slots__ = ()

    @classmethod
    def open(cls, cpu: int, wakeup_events: int) -> _Event:
        attributes = _ATTRIBUTES.pack(
            1,  # type: PERF_TYPE_SOFTWARE
            _ATTR_SIZE,
            10,  # config: PERF_COUNT_SW_BPF_OUTPUT
            1,  # sample_period
            1 << 10 | 1 << 2,  # sample_type: PERF_SAMPLE_RAW | PERF_SAMPLE_TIME
            0,  # read_format
            1 << 25,  # use_clockid
            wakeup_events,
            *[0] * 6,
            time.CLOCK_MONOTONIC,
        )
        fd = bpf.perf_event_open(attributes.ljust(_ATTR_SIZE, b"\0"), cpu)
        if fd < 0:
            code = ctypes.get_errno()
            if code in (errno.EPERM, errno.EACCES):
                raise bpf.privilege_error()
            raise LoadError(f"the kernel refused a perf event on CPU {cpu}: {os.strerror(code)}")
        return cls(fd)


class _Ring:
    """One CPU's ring, with two events that submit to it: one wakes for each record, one for none."""

    def __init__(self, cpu: int, size: int) -> None:
        self.cpu = cpu
        self.size = size
        self.lost = 0
        self.seen = 0
        self.retired = False  # its CPU went, and came back with another ring
        self.waking = _Event.open(cpu, 1)
        self.gathering = _Event.open(cpu, _NEVER)
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
        fcntl.ioctl(self.gathering.fd, _IOC_SET_OUTPUT, self.waking.fd)
        fcntl.ioctl(self.waking.fd, _IOC_ENABLE, 0)
        fcntl.ioctl(self.gathering.fd, _IOC_ENABLE, 0)
        memory = memoryview(self._memory)
        self._head = memory[1024:1032].cast("Q")
        self._tail = memory[1032:1040].cast("Q")
        self._data = memory[mmap.PAGESIZE :]

    def pending(self) -> int:
        return self._head[0] - self._tail[0]

    def look(self) -> int:
        """Bytes that may be copied once the caller has put a barrier behind this."""
        self.seen = self.pending()
        return self.seen

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

    def close(self) -> None:
        for view in (self._head, self._tail, self._data):
            view.release()
        self._memory.close()
        self.waking.close()
        self.gathering.close()


class _Part:
    """What was copied from one ring: its samples, in runs, and what the kernel says it lost there."""

    def __init__(self, ring: _Ring, data: bytes) -> None:
        self.ring = ring
        self._words = memoryview(data).cast("Q")
        self.lost: list[tuple[int, int]] = []  # where, how many
        runs: list[Run] = []
        position, end = 0, len(data)
        while position < end:
            header = self._words[position >> 3]
            size = header >> 48
            if position + size > end:  # cut by the limit
                break
            kind = header & 0xFFFFFFFF
            if kind == _PERF_RECORD_SAMPLE:
                count = equal_headers(self._words, position >> 3, size >> 3, (end - size >> 3) + 1)
                runs.append((position, size, size - _PREFIX, count))
                position += size * count
                continue
            if kind == _PERF_RECORD_LOST:
                self.lost.append((position, _LOST.unpack_from(data, position)[1]))
            position += max(size, 8)
        self.records = Records(data, _PREFIX, runs, padding=_PADDING_MAX)
        self.end = position
        self.count = sum(run[3] for run in runs)

    def first_time(self) -> int:
        return self._words[(self.records.runs[0][0] >> 3) + 1]

    def last_time(self) -> int:
        position, stride, _, count = self.records.runs[-1]
        return self._words[(position + stride * (count - 1) >> 3) + 1]

    def times(self) -> list[int]:
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
        self.ring.lost += sum(lost for position, lost in self.lost if position < self.end)


class PerfBuffer:
    """Reads the rings of all CPUs as one buffer, ordered by the time at which the kernel took each sample.

    A record whose CPU had not finished it when its neighbours were taken comes after them, and is
    counted in `late`; with `max_delay` (seconds) records are left in their rings until they are as
    old as that, to wait for such ones.

    Being woken for each record costs a producer more than anything else.  So each CPU's slot in the map
    holds the event that wakes for every record while little happens, and the one that wakes nobody
    while much does: then the reader comes back by itself.
    """

    def __init__(self, output: Map, size: int, *, max_delay: float = 0) -> None:
        self._output = output
        self._max_delay = round(max_delay * 1e9)
        cpus = bpf.online_cpus()
        self._ring_size = ring_bytes(size, len(cpus))
        self._rings: list[_Ring] = []
        self._gathering: set[_Ring] = set()
        self._unsettled = False
        self._holding_back = True
        self._latest = 0
        self._lost_before = 0  # in rings that are gone
        self.late = 0
        self._barrier = barrier()
        self._epoll = select.epoll()
        self._hotplug = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)  # NETLINK_KOBJECT_UEVENT
        try:
            self._hotplug.bind((0, 1))  # the kernel's own group
            self._epoll.register(self._hotplug, select.EPOLLIN)
            for cpu in cpus:
                self._add(cpu)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, size: int, *, max_delay: float = 0) -> PerfBuffer:
        """A new perf buffer of `size` bytes in all, rounded down to powers of two of pages for each CPU.

        Raises ArgumentError (a size below a page for each CPU), PrivilegeError, LoadError.
        """
        output = Map.create(
            "events", MapType.PERF_EVENT_ARRAY, key_size=4, value_size=4, max_entries=bpf.possible_cpus()
        )
        try:
            return cls(output, size, max_delay=max_delay)
        except BaseException:
            output.close()
            raise

    def _add(self, cpu: int) -> None:
        ring = _Ring(cpu, self._ring_size)
        self._rings.append(ring)
        self._epoll.register(ring.waking.fd, select.EPOLLIN)
        self._use(ring, ring.waking)

    def _use(self, ring: _Ring, event: _Event) -> None:
        self._output.update(struct.pack("<I", ring.cpu), struct.pack("<I", event.fd))

    @property
    def map(self) -> Map:
        """The map to which programs submit."""
        return self._output

    @property
    def size(self) -> int:
        """Bytes that all rings hold."""
        return sum(ring.size for ring in self._rings)

    @property
    def lost(self) -> int:
        """Records for which a ring had no room, as far as the kernel has said so yet."""
        return self._lost_before + sum(ring.lost for ring in self._rings)

    def pending(self) -> int:
        """Bytes in the rings now."""
        return sum(ring.pending() for ring in self._rings)

    def drain(self, limit: int) -> Records | None:
        """Take what there is, oldest first: about `limit` bytes, or 64 KiB of each CPU if that is more."""
        self._see_hotplug()
        horizon = time.monotonic_ns() - self._max_delay if self._holding_back else 1 << 64
        filled = [ring for ring in self._rings if ring.look()]
        self._barrier()
        limit = max(limit // len(filled) & ~7, _RECORD_MAX) if filled else 0
        parts = [_Part(ring, ring.copy(limit)) for ring in filled]
        for part in parts:
            if part.count and part.ring.seen > part.end:
                # What is left there may be older than what is younger than this elsewhere.
                horizon = min(horizon, part.last_time())
        for part in parts:
            part.keep_until(horizon)
        self._barrier()
        for part in parts:
            part.take()
        self._adapt({part.ring: part.count for part in parts})
        for ring in [ring for ring in self._rings if ring.retired and not ring.pending()]:
            self._rings.remove(ring)
            self._lost_before += ring.lost
            ring.close()
        parts = [part for part in parts if part.count]
        return self._merged(parts) if parts else None

    def _merged(self, parts: list[_Part]) -> Records:
        """The parts as one, by time."""
        if len(parts) == 1:
            records = parts[0].records
            if parts[0].first_time() < self._latest:
                self._count_late(parts[0].times())
            self._latest = max(self._latest, parts[0].last_time())
            return records
        times: list[int] = []
        pieces: list[tuple[memoryview, int, int]] = []  # bytes, stride, size
        for part in parts:
            times += part.times()
            data = memoryview(part.records.data)
            for position, stride, size, count in part.records.runs:
                pieces += [
                    (data[start : start + stride], stride, size)
                    for start in range(position, position + stride * count, stride)
                ]
        order = sorted(range(len(times)), key=times.__getitem__)
        if times[order[0]] < self._latest:
            self._count_late(times)
        self._latest = max(self._latest, times[order[-1]])
        runs: list[Run] = []
        position = 0
        for (stride, size), group in groupby(order, key=lambda index: pieces[index][1:]):
            count = sum(1 for _ in group)
            runs.append((position, stride, size, count))
            position += stride * count
        return Records(b"".join([pieces[index][0] for index in order]), _PREFIX, runs, padding=_PADDING_MAX)

    def _count_late(self, times: list[int]) -> None:
        self.late += sum(time < self._latest for time in times)

    def _adapt(self, taken: dict[_Ring, int]) -> None:
        """Gather where much happens, wake where nothing does any more."""
        for ring in self._rings:
            count = taken.get(ring, 0)
            if ring.retired:
                continue
            if count >= _BUSY and ring not in self._gathering:
                self._use(ring, ring.gathering)
                self._gathering.add(ring)
            elif not count and ring in self._gathering and not ring.pending():
                self._use(ring, ring.waking)
                self._gathering.remove(ring)
                self._unsettled = True

    async def wait(self) -> None:
        """Return when there may be something to drain; at once while much happens."""
        if self._gathering:
            return
        if self._unsettled:
            # A program may have picked the event that wakes nobody just before it was replaced, and not
            # have submitted yet.  That is over within microseconds, but certain after a grace period only.
            with anyio.move_on_after(_SETTLING):
                await self._readable()
                return
            await run_sync(bpf.wait_for_running_programs)
            self._unsettled = False
            if self.pending():
                return
        await self._readable()

    async def _readable(self) -> None:
        # Polling a perf event takes its readiness away (perf_poll(), kernel/events/core.c), and registering
        # a descriptor polls it: a record that comes before is not reported after.  So look, once registered.
        async with anyio.create_task_group() as tasks:

            async def look() -> None:
                for pause in (0, 0, 0, _SETTLING):
                    await (anyio.sleep(pause) if pause else checkpoint())
                    if self.pending():
                        tasks.cancel_scope.cancel()

            tasks.start_soon(look)
            await anyio.wait_readable(self._epoll.fileno())
            tasks.cancel_scope.cancel()

    def _see_hotplug(self) -> None:
        """Give a CPU that has come online a ring; that of one that went is dead, but what is in it counts."""
        while True:
            try:
                came = _CAME.match(self._hotplug.recv(1 << 16, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return
            if came and (cpu := int(came[1])) in bpf.online_cpus():
                for ring in self._rings:
                    if ring.cpu == cpu:
                        ring.retired = True
                        self._gathering.discard(ring)
                self._add(cpu)

    def finish(self) -> None:
        """Hold nothing back any more: no program runs that could still submit."""
        self._holding_back = False

    def close(self) -> None:
        """Unmap and give up everything.  Closing again does nothing."""
        self._epoll.close()
        self._hotplug.close()
        for ring in self._rings:
            ring.close()
        self._rings.clear()
        self._output.close()
