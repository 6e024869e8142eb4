"""Program executions counted by user, from `bpf/count_execve.c`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from time import monotonic_ns
from typing import Annotated, Any, Final, Self

from anyio.to_thread import run_sync

from ebpfstream.batch import EventBatch, wall_clock_offset
from ebpfstream.c_types import Number
from ebpfstream.events import U32, U64, Computed, Event, WallClock
from ebpfstream.filters import Filters
from ebpfstream.kernel import maps
from ebpfstream.kernel.bpf import MapType, wait_for_running_programs
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.kernel.mapvalues import Snapshot
from ebpfstream.kernel.typedmap import TypedMap
from ebpfstream.making import batch_of
from ebpfstream.readymade import BPF_FOLDER, Counters, MapSpec, Programs
from ebpfstream.snapshots import Ticks
from ebpfstream.statistics import Statistics
from ebpfstream.turns import Stream

_USERS: Final = 4096
_COUNTS: Final = "COUNTS"


def _said(count: int, total: int) -> str:
    return f"{count} exec{'s' * (count != 1)}, {total} in all"


@dataclass
class ExecCount(Event):
    """How many programs one user has executed since it was last told."""

    __schema_version__ = 1

    uid: U32
    """The real user (of the initial namespace)."""
    count: U64
    """Successful execs since the last such event about the user, or since the counting began."""
    total: U64
    """All of them since it began."""
    message: Annotated[str, Computed(_said, ("count", "total"))]
    """The same in words."""
    time: Annotated[datetime, WallClock("monotonic")]
    """When they were read, in UTC."""
    monotonic: U64
    """The same in nanoseconds of CLOCK_MONOTONIC."""

    @classmethod
    def of(cls, uid: int, count: int, total: int, monotonic: int) -> Self:
        """The event, to be packed: what is computed is made of the others."""
        computed: Any = None
        return cls(uid, count, total, computed, computed, monotonic)


class ExecCounts(Stream):
    """How many execs have succeeded by user, again and again, as an asynchronous iterator.

        async for counts in count_execve(every=2.0):
            print(counts)  # {0: 3, 1000: 17}

    Each is a dict of all that have been since the block was entered (or the iteration begun without
    one); `counts.since(earlier)` is what came between two.  The first comes `every` seconds after that.
    They keep their time: one that was asked for late does not move the next; those that were missed are
    left out.

    Nothing is ever taken out of the table in the kernel, and each CPU counts for itself, so no exec is
    missed or counted twice.  4,096 users have room in it; execs of others are `counters().lost`.

    `forward` takes it as it is: sinks are given an ExecCount for each user who has executed something
    since the last time.

    Leaving the block, `aclose()`, or dropping the last reference without either, detaches and frees
    everything; `read()` then has the final counts.  One task at a time may iterate.  Works on asyncio
    (uvloop too) and trio.
    """

    event_type = ExecCount

    def __init__(self, programs: Programs, every: float) -> None:
        super().__init__("count")
        self._ticks = Ticks(every)
        self._programs = programs
        self._table: TypedMap | None = None
        self._detached = False
        self._ended = False
        self._final: tuple[Snapshot, Counters] | None = None
        # As events: the counts that have been told, and what is still to be handed out.
        self._told: Mapping[int, int] = {}
        self._rest: EventBatch[ExecCount] | None = None
        self._made = self._delivered = 0

    async def __anext__(self) -> Snapshot:
        """The counts at the next point in time.

        Raises StreamClosedError, StreamBusyError; at the first call all that opening may raise.
        """
        counts = await self._next()
        if counts is None:
            raise StopAsyncIteration
        return counts

    async def next_batch(self, most: int | None = None) -> EventBatch[ExecCount] | None:
        """The next counts that have changed as events, not more than `most`; None at the end.

        Raises what iterating raises.
        """
        while self._rest is None or not len(self._rest):
            counts = await self._next()
            if counts is None:
                return None
            now = monotonic_ns()
            grown = counts.since(self._told)
            self._told = counts
            self._made += len(grown)
            events = [ExecCount.of(uid, count, counts[uid], now) for uid, count in sorted(grown.items())]
            self._rest = batch_of(ExecCount, events, wall_clock_offset=wall_clock_offset())
        part = self._rest[:most]
        self._rest = self._rest[len(part) :]
        self._delivered += len(part)
        return part

    def statistics(self) -> Statistics:
        """The ledger of what `next_batch` hands out; `lost`, `rejected` and `misses` are execs.

        What has happened since the last counts were told is still in the kernel, or comes with the last ones.
        """
        counters = self.counters()._replace(tried=None, submitted=None)
        return Statistics(
            **counters._asdict(),
            received=self._made,
            delivered=self._delivered,
            unread=self._made - self._delivered,
        )

    async def _next(self) -> Snapshot | None:
        with self._turn.taken():
            while True:
                # detach() and aclose() end the waiting, to be noticed at once.
                with self._turn.waiting():
                    if self._ended or (self._detached and self._table is None):
                        return None
                    await self._open()
                    if self._detached:
                        await run_sync(wait_for_running_programs)
                        self._ended = True
                    else:
                        await self._ticks.wait()
                    return self.read()
                self._turn.check_open()

    async def _open(self) -> None:
        if self._table is None:
            await self._programs.attach()
            made = self._programs.map(_COUNTS)
            assert made is not None
            self._table = maps.typed(made, "counts", Number("unsigned int"), Number("unsigned long long"))
            self._ticks.start()
            if self._detached:  # meanwhile
                self._programs.detach()

    def read(self) -> Snapshot:
        """The counts now; after closing, the final ones."""
        if self._final is not None:
            return Snapshot(self._final[0], complete=True)
        return Snapshot(complete=True) if self._table is None else self._table.sums()

    def counters(self) -> Counters:
        """What became of every exec: tried == submitted (which is counted) + lost, for want of room.

        Beside them, those that filters rejected and those that the kernel missed.  Final after closing.
        """
        return self._programs.counters() if self._final is None else self._final[1]

    def detach(self) -> None:
        """Count no further exec.  One more dict comes, at once and final; then the iteration ends."""
        if not self._detached:
            self._detached = True
            self._programs.detach()
            self._turn.interrupt()

    async def _free(self) -> None:
        self._detached = True
        try:
            if self._table is not None:
                await run_sync(self._programs.detach)
                await run_sync(wait_for_running_programs)
            self._final = self.read(), self.counters()
        finally:
            self._table = None
            self._programs.close()

    def __del__(self) -> None:
        programs = getattr(self, "_programs", None)
        if programs is not None:
            programs.close()


def count_execve(
    *,
    every: float = 2.0,
    pid: int | None = None,
    ppid: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    comm: str | None = None,
    cgroup: str | None = None,
    exclude_self: bool = False,
) -> ExecCounts:
    """Count the successful execs of this machine by real user, and tell the counts `every` seconds.

    Users are numbers of the initial namespace.  Filters are those of `trace_execve`; `comm` is the name
    of the new program.

    Nothing is attached until the iterator is entered or first iterated; then these may be raised:
    PrivilegeError (root, or CAP_BPF and CAP_PERFMON), UnsupportedError (Linux ≥ 5.7 with BTF or
    with its headers), BccNotFoundError.  ArgumentError at once.
    """
    programs = Programs(
        BPF_FOLDER / "count_execve.c",
        {"exec_counted": RawTracepoint("sched_process_exec")},
        maps={_COUNTS: MapSpec(MapType.PERCPU_HASH, 4, 8, _USERS)},
        filters=Filters(
            pid=pid, ppid=ppid, uid=uid, gid=gid, comm=comm, cgroup=cgroup, exclude_self=exclude_self
        ),
    )
    return ExecCounts(programs, every)
