"""Perf buffers: a ring for each CPU, read as one.  Linux ≥ 4.4."""

from __future__ import annotations

import errno
import logging
import mmap
import re
import select
import socket
import struct
import time
from itertools import groupby
from typing import Final

import anyio
from anyio.lowlevel import checkpoint
from anyio.to_thread import run_sync

from ebpfstream.errors import ArgumentError, LoadError, PrivilegeError
from ebpfstream.kernel import bpf
from ebpfstream.kernel.bpf import Map, MapType
from ebpfstream.kernel.ordering import barrier
from ebpfstream.kernel.perfring import PADDING_MAX, PREFIX, RECORD_MAX, Event, Part, Ring
from ebpfstream.records import Records, Run
from ebpfstream.waiting import readable

_log = logging.getLogger("ebpfstream")

_CAME: Final = re.compile(rb"online@/devices/system/cpu/cpu(\d+)\0")

RING_MAX: Final = 1 << 30
"""Bytes that one CPU's ring may have."""

# Records of one drain from which on gathering them costs less than being woken for each.
_BUSY: Final = 32
# Seconds that a program which has picked the event that wakes nobody may take to use it, mostly.
_SETTLING: Final = 0.02


def ring_bytes(requested: int, cpus: int) -> int:
    """Bytes of each CPU's ring for a buffer of `requested` bytes in all: a power of two of pages, or less in all.

    Raises ArgumentError for what gives no CPU a page, or one more than 1 GiB.
    """
    page = mmap.PAGESIZE
    if not page * cpus <= requested <= cpus * RING_MAX:
        raise ArgumentError(
            f"buffer_size={requested} is impossible: give {page * cpus} to {cpus * RING_MAX} bytes for {cpus} CPUs"
        )
    return 1 << ((requested // cpus).bit_length() - 1)


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
        self._rings: list[Ring] = []
        self._gathering: set[Ring] = set()
        self._adapting = True
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
        ring = Ring(cpu, self._ring_size)
        self._rings.append(ring)
        self._epoll.register(ring.waking.fd, select.EPOLLIN)
        self._use(ring, ring.waking)

    def _use(self, ring: Ring, event: Event) -> None:
        self._output.update(struct.pack("<I", ring.cpu), struct.pack("<I", event.fd))

    def wake_every(self, records: int) -> None:
        """Be woken once for so many records of a CPU, however many there are: to compare with.

        Before anything is submitted.  The last records wait until others come.
        """
        self._adapting = False
        for ring in self._rings:
            if records > 1:
                ring.gather(records)
                self._use(ring, ring.gathering)

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

    def fill(self) -> tuple[int, int]:
        """Bytes in the fullest ring, and how many have room there."""
        return max((ring.pending() for ring in self._rings), default=0), self._ring_size

    def lost_by_cpu(self) -> dict[int, int]:
        """What `lost` is made of, of the rings that there are now."""
        lost: dict[int, int] = {}
        for ring in self._rings:
            lost[ring.cpu] = lost.get(ring.cpu, 0) + ring.lost
        return lost

    def drain(self, limit: int) -> Records | None:
        """Take what there is, oldest first: about `limit` bytes, or 64 KiB of each CPU if that is more."""
        self._see_hotplug()
        horizon = time.monotonic_ns() - self._max_delay if self._holding_back else 1 << 64
        filled = [ring for ring in self._rings if ring.look()]
        self._barrier()
        limit = max(limit // len(filled) & ~7, RECORD_MAX) if filled else 0
        parts = [Part(ring, ring.copy(limit)) for ring in filled]
        for part in parts:
            if part.count and part.ring.seen > part.end:
                # What is left there may be older than what is younger than this elsewhere.
                horizon = min(horizon, part.last_time())
        for part in parts:
            part.keep_until(horizon)
        self._barrier()
        for part in parts:
            part.take()
        if self._adapting:
            self._adapt({part.ring: part.count for part in parts})
        for ring in [ring for ring in self._rings if ring.retired and not ring.pending()]:
            self._rings.remove(ring)
            self._lost_before += ring.lost
            ring.close()
        parts = [part for part in parts if part.count]
        return self._merged(parts) if parts else None

    def _merged(self, parts: list[Part]) -> Records:
        """The parts as one, by time."""
        times: list[int] = parts[0].times()
        # One CPU's are mostly in order: not where a program has interrupted another one.
        if len(parts) == 1 and times == sorted(times):
            if times[0] < self._latest:
                self._count_late(times)
            self._latest = max(self._latest, times[-1])
            return parts[0].records
        times = []
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
        return Records(b"".join([pieces[index][0] for index in order]), PREFIX, runs, padding=PADDING_MAX)

    def _count_late(self, times: list[int]) -> None:
        self.late += sum(time < self._latest for time in times)

    def _adapt(self, taken: dict[Ring, int]) -> None:
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
            await checkpoint()
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
        await readable(self._epoll.fileno(), self.pending)

    def _see_hotplug(self) -> None:
        """Give a CPU that has come online a ring; that of one that went is dead, but what is in it counts."""
        while True:
            try:
                came = _CAME.match(self._hotplug.recv(1 << 16, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Some announcements did not fit: whoever has no ring may have come.
                for cpu in set(bpf.online_cpus()) - {ring.cpu for ring in self._rings}:
                    self._came(cpu)
                continue
            if came:
                self._came(int(came[1]))

    def _came(self, cpu: int) -> None:
        try:
            self._add(cpu)
        except LoadError:
            return  # it went again
        except PrivilegeError as error:  # given up meanwhile
            _log.warning("CPU %d has come, and what happens on it is lost: %s", cpu, error)
            return
        for ring in self._rings[:-1]:
            if ring.cpu == cpu:
                ring.retired = True
                self._gathering.discard(ring)

    def unplug(self) -> None:
        """Let programs submit no more: they get ENOENT."""
        for ring in self._rings:
            if not ring.retired:
                self._output.delete(struct.pack("<I", ring.cpu))

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
