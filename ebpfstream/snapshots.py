"""A map's contents again and again, as an asynchronous iterator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from ebpfstream.errors import ArgumentError
from ebpfstream.kernel.mapvalues import Snapshot
from ebpfstream.kernel.typedmap import TypedMap
from ebpfstream.turns import Stream, in_thread


class Ticks:
    """Points in time `every` seconds apart, counted from `start()`; being late does not move them."""

    def __init__(self, every: float) -> None:
        if not 0 < every < math.inf:
            raise ArgumentError(f"every={every!r} is impossible: give seconds, more than 0")
        self._every = every
        self._next = math.inf

    def start(self) -> None:
        """Count from now."""
        self._next = anyio.current_time() + self._every

    async def wait(self) -> None:
        """Wait for the next point.  Those that have gone by are one together, and it has come."""
        await anyio.sleep_until(self._next)
        gone_by = (anyio.current_time() - self._next) // self._every
        self._next += self._every * (1 + max(gone_by, 0))


class Snapshots(Stream):
    """Snapshots of a map, one every so many seconds, as an asynchronous iterator.

        async for counts in bpf.snapshots("counter_table", every=2.0):
            ...

    The first comes `every` seconds after the block was entered, or the iteration begun without one.
    They keep their time: one that was read or asked for late does not move the next; those that were
    missed are left out.  A large map is read in steps between which other tasks run.

    With `drain` what is read is taken out of the map; `TypedMap.drain()` says for which programs that
    counts rightly.  Cancelling waits until a drain that has begun has been handed over; what asyncio
    itself cancels nevertheless, comes with the next one (or not at all, if none is asked for).

    The numbers of a per-CPU map come added up, or with `per_cpu` as they are.

    `on_start` is called, in a thread, before time begins to count.

    One task at a time may iterate.  Closing leaves the map as it is.  Works on asyncio (uvloop too) and trio.
    Linux ≥ 4.17.
    """

    def __init__(
        self,
        map: TypedMap,
        every: float,
        *,
        drain: bool = False,
        per_cpu: bool = False,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        super().__init__("snapshot")
        map.fill(Snapshot(), drain=drain)  # raises if that is not possible
        self._map = map
        self._drain = drain
        self._per_cpu = per_cpu
        self._on_start = on_start
        self._ticks = Ticks(every)
        self._started = False
        self._begun: tuple[Snapshot, Iterator[None]] | None = None  # a drain

    async def __anext__(self) -> Snapshot:
        """The next snapshot.  Raises StreamClosedError, StreamBusyError, MapError."""
        with self._turn.taken():
            while True:
                # aclose() ends the waiting, to be noticed at once.
                with self._turn.waiting():
                    await self._open()
                    if self._begun is None:
                        await self._ticks.wait()
                    with CancelScope(shield=self._drain):
                        return await self._read()
                self._turn.check_open()

    async def _read(self) -> Snapshot:
        found, steps = self._begun or self._begin()
        if self._drain:
            self._begun = found, steps  # asyncio's own cancellation knows no shield
        for _ in steps:
            await checkpoint()
        self._begun = None
        return found

    def _begin(self) -> tuple[Snapshot, Iterator[None]]:
        found = Snapshot()
        return found, self._map.fill(found, drain=self._drain, totals=not self._per_cpu)

    async def _open(self) -> None:
        if not self._started:
            if self._on_start is not None:
                await in_thread(self._on_start)
            self._started = True
            self._ticks.start()

    async def _free(self) -> None:
        self._begun = None
