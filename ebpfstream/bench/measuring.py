"""One measurement: events offered at some rate, and what became of them in a kernel buffer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

import anyio
from anyio.to_thread import run_sync

from ebpfstream.bench.latencies import Latencies
from ebpfstream.errors import EbpfStreamError
from ebpfstream.events import U64, Char, Event
from ebpfstream.kernel.bpf import online_cpus
from ebpfstream.kernel.buffers import Buffer
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.readymade import BPF_FOLDER, ReadyMade
from ebpfstream.statistics import Statistics
from ebpfstream.stream import LATENCY, EventStream

Kind = Literal["ring", "perf"]
Policy = Literal["each", "forced", "gathered", "watermark"]

POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)
SERIES: Final[tuple[tuple[Kind, Policy], ...]] = tuple(
    (kind, policy)
    for policy in POLICIES
    for kind in get_args(Kind)
    if (kind, policy) != ("perf", "forced")  # "each" is that already
)

WATERMARK: Final = 1 << 16
"""Bytes of events for which a fixed watermark wakes, unless that is more than a quarter of a CPU's part."""
_HEADER: Final = 8  # of a record, at least


class Case(NamedTuple):
    """What is measured: `rate` events each second are offered, 0: as many as the producers can."""

    kind: Kind
    policy: Policy
    size: int = 64
    rate: int = 0
    buffer_size: int = 4 << 20
    producers: int = 1

    @property
    def wake_every(self) -> int:
        """Events of a CPU for one wakeup; 0 where that is not fixed."""
        if self.policy == "gathered" or (self.kind, self.policy) == ("ring", "each"):
            return 0
        watermark = min(WATERMARK, self.buffer_size // len(online_cpus()) // 4)
        return 1 if self.policy != "watermark" else max(watermark // (self.size + _HEADER), 1)


class Figures(NamedTuple):
    """What came of it.  Rates are events per second, CPU time is seconds for a million events, latencies are µs."""

    offered: int
    delivered: int
    lost: int
    offered_rate: float
    delivered_rate: float
    lost_part: float
    producer_cpu: float
    consumer_cpu: float
    p50: float
    p99: float
    p999: float
    resident: float
    """MB of this process."""
    wakeups: float
    """Each second."""


class Producers:
    """Processes of producer.py, each on a CPU; this process has another one if there are enough."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self.pids = [process.pid for process in processes]

    def begin(self, number: int, rate: float, seconds: float) -> None:
        """Let so many of them share the rate; returns at once."""
        for process in self._processes[:number]:
            assert process.stdin is not None
            process.stdin.write(f"{rate / number} {seconds}\n")
            process.stdin.flush()

    def end(self, number: int) -> list[tuple[float, ...]]:
        """Wait for them; for each, calls, start and end in nanoseconds, seconds of CPU time."""
        answers = []
        for process in self._processes[:number]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise EbpfStreamError("a producer of events has been killed: measure again")
            answers.append(tuple(map(float, line.split())))
        return answers


@contextmanager
def producing(number: int) -> Iterator[Producers]:
    """Producers, and this process beside them: it has the first CPU, they have the ones that follow."""
    before = os.sched_getaffinity(0)
    cpus = sorted(before)
    with ExitStack() as stack:
        processes = []
        for index in range(1, number + 1):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-I", "-S", _PRODUCER, str(cpus[index % len(cpus)])],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    process_group=0,  # a terminal's Ctrl-C is for us alone
                )
            )
            stack.callback(process.kill)
            processes.append(process)
        os.sched_setaffinity(0, cpus[:1])
        stack.callback(os.sched_setaffinity, 0, before)
        yield Producers(processes)


_PRODUCER: Final = str(Path(__file__).with_name("producer.py"))


def event_type(size: int) -> type[Event]:
    """Events of `size` bytes, 8 or more."""
    filler: list[tuple[str, Any]] = [("filler", Annotated[bytes, Char(size - 8)])] if size > 8 else []
    return make_dataclass("FloodEvent", [("monotonic", U64), *filler], bases=(Event,))


class FloodSource(ReadyMade):
    """bpf/flood.c with the case's buffer and wakeups."""

    def __init__(self, case: Case, pids: Sequence[int]) -> None:
        self._wake_every = case.wake_every
        flags = [f"-DFIRST={pids[0]}", f"-DSECOND={pids[-1]}"]  # one that is not asked for calls waits
        if self._wake_every:
            flags.append(f"-DWAKE_EVERY={self._wake_every}")
        super().__init__(
            BPF_FOLDER / "flood.c",
            event_type(case.size),
            {"flood": RawTracepoint("sys_enter")},
            cflags=flags,
            buffer=case.kind,
            buffer_size=case.buffer_size,
        )

    async def open(self) -> Buffer:
        """Attach, and let the buffer wake as the case says."""
        buffer = await super().open()
        if self._wake_every and isinstance(buffer, PerfBuffer):
            buffer.wake_every(self._wake_every)
        return buffer


class _End(NamedTuple):
    """How things were when the producers had ended."""

    answers: list[tuple[float, ...]]
    time: int
    cpu: float
    received: int
    wakeups: int


async def measure(case: Case, seconds: float, producers: Producers) -> Figures:
    """Do it, and check that every event is accounted for.

    Raises EbpfStreamError, and whatever opening a stream may raise.
    """
    latencies = Latencies()
    ends: list[_End] = []
    source = FloodSource(case, producers.pids)
    latency = LATENCY if case.policy == "gathered" else 0
    async with EventStream(source, event_type(case.size), latency=latency) as events:

        async def end() -> None:
            answers = await run_sync(producers.end, case.producers)
            now, cpu, statistics = time.monotonic_ns(), time.process_time(), events.statistics()
            ends.append(_End(answers, now, cpu, statistics.received, statistics.wakeups))
            events.detach()

        cpu = time.process_time()
        producers.begin(case.producers, case.rate, seconds)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            async for batch in events.batches():
                latencies.add(time.monotonic_ns() - batch.to_numpy()["monotonic"])
        resident = _resident()
    return _figures(events.statistics(), ends.pop(), cpu, latencies, resident)


def _figures(
    statistics: Statistics, ended: _End, cpu: float, latencies: Latencies, resident: float
) -> Figures:
    """Raises EbpfStreamError if an event is not accounted for; `cpu` is this process's at the beginning, in seconds."""
    calls, starts, stops, produced = zip(*ended.answers, strict=True)
    offered, start = int(sum(calls)), min(starts)
    if offered != statistics.tried or offered != statistics.delivered + (statistics.lost or 0):
        raise EbpfStreamError(
            f"of {offered} events the ledger knows {statistics}: measure outside of containers, "
            "where processes have the numbers that BPF programs see"
        )
    elapsed = (ended.time - start) / 1e9
    return Figures(
        offered,
        statistics.delivered,
        offered - statistics.delivered,
        offered / (max(stops) - start) * 1e9,
        ended.received / elapsed,
        (offered - statistics.delivered) / offered,
        sum(produced) / offered * 1e6,
        (ended.cpu - cpu) / max(ended.received, 1) * 1e6,
        latencies.quantile(0.5),
        latencies.quantile(0.99),
        latencies.quantile(0.999),
        resident,
        ended.wakeups / elapsed,
    )


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
