"""The perf buffer against the kernel: every CPU's ring, wakeups, loss, order, and CPUs that come and go."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import EventBatch, EventStream
from ebpfstream.errors import ArgumentError, UnsupportedError
from ebpfstream.kernel import buffers, perfbuf
from ebpfstream.kernel.buffers import Buffer
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.readymade import ReadyMade
from tests.kernel import flood
from tests.kernel.flood import FloodEvent

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


def open_flood(folder: Path, target: int, buffer_size: int) -> EventStream[FloodEvent]:
    return EventStream(flood.source(folder, "flood", target, buffer_size, "perf"), FloodEvent)


def test_sizes_are_for_all_cpus_together() -> None:
    assert perfbuf.ring_bytes(1 << 20, 2) == 1 << 19
    assert perfbuf.ring_bytes(1_000_000, 3) == 1 << 18
    with pytest.raises(
        ArgumentError, match=r"buffer_size=4096 is impossible: give 8192 to \d+ bytes for 2 CPUs"
    ):
        perfbuf.ring_bytes(4096, 2)
    buffer = PerfBuffer.create(1 << 20)
    assert buffer.size == len(os.sched_getaffinity(0)) * (1 << 19)
    assert buffer.drain(1 << 18) is None
    buffer.close()


@pytest.mark.timeout(300)
async def test_rings_that_wrap_and_overflow(tmp_path: Path) -> None:
    """The kernel's own count of what it lost is the program's (Linux ≥ 6.0)."""
    with flood.producing(cpu=1) as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 16, "perf")
        buffer = await source.open()
        assert isinstance(buffer, PerfBuffer)
        stream = EventStream(_Opened(source, buffer), FloodEvent)
        seen = 0
        async with stream:
            for _ in range(20):
                producer.start(20_000)
                producer.wait()  # far more than there is room for
                with anyio.move_on_after(0.05):
                    async for event in stream:
                        check(event)
                        seen += 1
            lost_by_kernel = buffer.lost
        statistics = stream.statistics()
    assert statistics.tried == 400_000
    assert statistics.submitted == statistics.received == statistics.delivered == seen
    assert statistics.lost == 400_000 - seen > 0
    assert lost_by_kernel == statistics.lost


class _Opened:
    """A source that has been opened already."""

    buffer: Buffer | None = None

    def __init__(self, source: ReadyMade, buffer: PerfBuffer) -> None:
        self._buffer = buffer
        self.detach = source.detach
        self.stop = source.stop
        self.pause = source.pause
        self.drained = source.drained
        self.losses = source.losses
        self.counters = source.counters
        self.set_filters = source.set_filters
        self.close = source.close

    async def open(self) -> PerfBuffer:
        return self._buffer


def check(event: FloodEvent) -> None:
    assert len(event.payload) == flood.payload_length(event.sequence)
    assert event.payload[-8:] == event.sequence.to_bytes(8, "little")


TWO_THREADS = """
import os, sys, threading
from itertools import repeat
def run(cpu):
    os.sched_setaffinity(0, {cpu})
    for _ in repeat(None, 30000):
        os.getppid()
print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=run, args=(cpu,)) for cpu in (0, 1)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


async def test_two_cpus_are_merged_by_time(tmp_path: Path) -> None:
    """What a thread on each CPU submits comes in the order of the kernel's time; what does not is counted."""
    times: list[int] = []
    following = {0: 0, 1: 0}
    mixed = 0
    with subprocess.Popen(
        [sys.executable, "-c", TWO_THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        source = flood.source(tmp_path, "flood", process.pid, 1 << 26, "perf")
        buffer = await source.open()
        assert isinstance(buffer, PerfBuffer)
        process.stdin.write(b"\n")
        process.stdin.flush()
        while process.poll() is None or buffer.pending():
            records = buffer.drain(1 << 18)
            if records is None:
                await anyio.sleep(0.001)
                continue
            batch = [
                int.from_bytes(records.data[start + 8 : start + 16], "little")
                for position, stride, _, count in records.runs
                for start in range(position, position + stride * count, stride)
            ]
            assert batch == sorted(batch)
            times += batch
            events = list(EventBatch(FloodEvent, records))
            mixed += len({event.cpu for event in events}) - 1
            for event in events:
                check(event)
                assert event.sequence == following[event.cpu]
                following[event.cpu] += 1
        assert source.counters()[:5] == (0, 60_000, 0, 60_000, 0)
        late = buffer.late
        source.close()
    assert following == {0: 30_000, 1: 30_000}
    assert mixed > 0, "both CPUs had records in one drain"
    youngest = list(itertools.accumulate(times, max))
    assert sum(time < before for before, time in zip(youngest, times[1:], strict=False)) == late


async def test_what_is_younger_than_max_delay_stays_in_its_ring(tmp_path: Path) -> None:
    with flood.producing() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 22, "perf", max_delay=0.3)
        async with EventStream(source, FloodEvent) as events:
            producer.start(10)
            producer.wait()
            ages = [-(await anext(events)).monotonic + time.monotonic_ns() for _ in range(10)]
            assert min(ages) > 0.29e9
            # Unless nothing older can come any more.
            producer.start(10)
            producer.wait()
            events.detach()
            ages = [time.monotonic_ns() - event.monotonic async for event in events]
            assert len(ages) == 10
        assert events.statistics().late == 0


async def test_late_ones_are_delivered_and_counted(tmp_path: Path) -> None:
    """A lateness that is made up: as if younger ones had been taken from another CPU before."""
    with flood.producing() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 22, "perf")
        buffer = await source.open()
        assert isinstance(buffer, PerfBuffer)
        buffer._latest = time.monotonic_ns() + 10**12
        async with EventStream(_Opened(source, buffer), FloodEvent) as events:
            producer.start(10)
            for _ in range(10):
                check(await anext(events))
        assert events.statistics().late == 10


@pytest.mark.parametrize("latency", [0, 0.001])
async def test_no_wakeup_is_missed(tmp_path: Path, latency: float) -> None:
    """Single events and bursts, in every phase of waiting: each arrives by itself."""
    pauses = [0, 0.0001, 0.0005, 0.001, 0.002, 0.005, 0.015, 0.02, 0.025, 0.03, 0.05, 0.1]
    with flood.producing() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 22, "perf")
        async with (
            EventStream(source, FloodEvent, latency=latency) as events,
            anyio.create_task_group() as tasks,
        ):
            received = anyio.Semaphore(0)

            async def receive() -> None:
                async for event in events:
                    check(event)
                    received.release()

            tasks.start_soon(receive)
            for round_number in range(150):
                calls = 1 if round_number % 3 else 500
                await anyio.sleep(pauses[round_number % len(pauses)])
                producer.start(calls)
                with anyio.fail_after(5):
                    for _ in range(calls):
                        await received.acquire()
                producer.wait()
            events.detach()
        statistics = events.statistics()
    assert statistics.tried == statistics.delivered == 100 * 1 + 50 * 500


def interrupts() -> int:
    """Of the kind by which a perf event wakes its reader (irq_work), on all CPUs so far."""
    line = next(line for line in Path("/proc/interrupts").read_text().splitlines() if "IRQ work" in line)
    return sum(int(word) for word in line.split() if word.isdigit())


async def test_a_busy_producer_is_not_interrupted_for_each_record(tmp_path: Path) -> None:
    with flood.producing() as producer:
        async with open_flood(tmp_path, producer.pid, 1 << 24) as events:
            before = interrupts()
            producer.start(200_000)
            seen = 0
            async for _ in events:
                seen += 1
                if seen + flood.known(events.statistics().lost) == 200_000:
                    break
            assert interrupts() - before < 20_000
            # And asleep again afterwards.
            wakeups = events.statistics().wakeups
            with anyio.move_on_after(0.5):
                await anext(events)
            assert events.statistics().wakeups - wakeups <= 3


async def test_a_cpu_that_goes_and_comes_back(tmp_path: Path) -> None:
    switch = Path("/sys/devices/system/cpu/cpu1/online")
    if not switch.exists():
        pytest.skip("CPU 1 cannot be switched off here: run this test in a virtual machine with two CPUs")
    with flood.producing() as producer:
        async with open_flood(tmp_path, producer.pid, 1 << 22) as events:

            async def receive(cpu: int, calls: int) -> None:
                os.sched_setaffinity(producer.pid, {cpu})
                producer.start(calls)
                with anyio.fail_after(10):
                    cpus = {(await anext(events)).cpu for _ in range(calls)}
                producer.wait()
                assert cpus == {cpu}

            await receive(1, 100)
            try:
                os.sched_setaffinity(producer.pid, {0, 1})
                await run_sync(switch.write_text, "0")
                await receive(0, 100)
            finally:
                await run_sync(switch.write_text, "1")
            with anyio.move_on_after(0.2):  # whoever waits for events notices
                await anext(events)
            await receive(1, 100)
            await receive(0, 10)
        statistics = events.statistics()
    assert statistics.tried == statistics.delivered == 310
    assert statistics.lost == 0


async def test_more_announcements_than_fit() -> None:
    """Of other things: they are all made through the same socket."""
    with closing(PerfBuffer.create(1 << 20)) as buffer:
        announce = Path("/sys/devices/system/cpu/cpu0/uevent")
        for _ in range(3000):
            announce.write_text("change")
        assert buffer.drain(1 << 18) is None
        with pytest.raises(BlockingIOError):
            buffer._hotplug.recv(1, socket.MSG_DONTWAIT)


async def test_auto_is_perf_where_there_is_no_ring_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux before 5.8, which is not at hand."""

    def refuse(size: int) -> RingBuffer:
        raise UnsupportedError("no BPF ring buffer")

    with closing(buffers.create("auto", 1 << 20, 0)) as ring:
        assert isinstance(ring, RingBuffer)
    monkeypatch.setattr(RingBuffer, "create", refuse)
    with closing(buffers.create("auto", 1 << 20, 0)) as perf:
        assert isinstance(perf, PerfBuffer)
    with pytest.raises(UnsupportedError):
        buffers.create("ring", 1 << 20, 0)


def test_closing_gives_everything_back() -> None:
    before = sorted(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(50):
        PerfBuffer.create(1 << 18).close()
    assert (
        sorted(os.listdir("/proc/self/fd")),
        len(Path("/proc/self/maps").read_text().splitlines()),
    ) == before


def test_locked_memory_is_named() -> None:
    code = (
        "import resource\n"
        "from ebpfstream.kernel.perfbuf import PerfBuffer\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\n"
        "try:\n"
        "    PerfBuffer.create(1 << 28)\n"
        "except PermissionError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-ipc_lock,-sys_resource", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.startswith("PrivilegeError the kernel does not let this process lock 134217728 bytes")
    assert "CAP_IPC_LOCK" in done.stdout
