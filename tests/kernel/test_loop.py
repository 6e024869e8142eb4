"""The loop lives while a producer on another CPU never stops: timers, cancellation, Ctrl-C, closing; no spinning."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream import EventStream, StreamClosedError
from ebpfstream.kernel.buffers import Kind
from tests.kernel import flood, objects
from tests.kernel.flood import FloodEvent, known

pytestmark = pytest.mark.kernel

# Takes some ten times as long as a test.  It ends, so that a loop that is starved fails a test instead of stopping it.
ENDLESS = 15_000_000


@pytest.fixture(params=["ring", "perf"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """What is said of one kind of buffer holds for the other."""
    found: Kind = request.param
    return found


@pytest.fixture
def producer() -> Iterator[flood.Producer]:
    """On the last CPU, where there are several not the one that most else runs on."""
    with flood.producing(cpu=max(os.sched_getaffinity(0))) as found:
        yield found


def flood_stream(folder: Path, pid: int, kind: Kind, buffer_size: int = 1 << 20) -> EventStream[FloodEvent]:
    return EventStream(flood.source(folder, "flood", pid, buffer_size, kind), FloodEvent)


def floods(producer: flood.Producer) -> bool:
    """Whether the producer is still at it, and has not made all its calls."""
    process = producer._process
    assert process.stdout is not None
    return process.poll() is None and not select.select([process.stdout], [], [], 0)[0]


def spent(pid: int) -> int:
    """Nanoseconds on a CPU."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


async def read(events: EventStream[FloodEvent], form: str) -> None:
    """With some work for each event: the reader is never the faster one."""
    if form == "events":
        async for event in events:
            sum(event.payload)
    async for batch in events.batches():
        for event in batch:
            sum(event.payload)


async def wait_for_pressure(events: EventStream[FloodEvent]) -> None:
    """The producer has been faster than whoever reads."""
    while not events.statistics().lost:
        await anyio.sleep(0.01)


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["events", "batches"])
async def test_the_loop_lives(form: str, kind: Kind, producer: flood.Producer, tmp_path: Path) -> None:
    """A ticker goes on ticking, a deadline and a cancellation take effect, and so does closing; the flood goes on."""
    batches = [0]  # at each tick

    async def tick() -> None:
        while True:
            await anyio.sleep(0.001)
            batches.append(events.statistics().batches)

    async def cancel(scope: anyio.CancelScope) -> None:
        await anyio.sleep(0.2)
        scope.cancel()

    events = flood_stream(tmp_path, producer.pid, kind)
    async with events, anyio.create_task_group() as tasks:
        producer.start(ENDLESS)
        await wait_for_pressure(events)
        tasks.start_soon(tick)
        with pytest.raises(TimeoutError):
            with anyio.fail_after(1):
                await read(events, form)
        assert floods(producer)
        # A batch under pressure takes about as long as a tick: few of them come between two.
        batches.append(events.statistics().batches)
        assert max(after - before for before, after in pairwise(batches)) <= 10
        with anyio.CancelScope() as scope:
            tasks.start_soon(cancel, scope)
            await read(events, form)
        assert scope.cancelled_caught
        assert floods(producer)
        await events.aclose()
        tasks.cancel_scope.cancel()
    assert floods(producer)
    before = spent(producer.pid)
    while spent(producer.pid) == before:
        time.sleep(0.01)
    statistics = events.statistics()
    assert statistics.delivered > 1000
    assert known(statistics.lost) > 0
    assert statistics.submitted == statistics.received == statistics.delivered + statistics.unread


@pytest.mark.anyio
async def test_closing_under_a_reader(kind: Kind, producer: flood.Producer, tmp_path: Path) -> None:
    """By another task: the one that reads is told, though its buffer is never empty."""
    events = flood_stream(tmp_path, producer.pid, kind)

    async def close() -> None:
        await anyio.sleep(0.2)
        await events.aclose()

    async with events, anyio.create_task_group() as tasks:
        producer.start(ENDLESS)
        await wait_for_pressure(events)
        tasks.start_soon(close)
        with pytest.raises(StreamClosedError):
            await read(events, "events")
    assert floods(producer)
    statistics = events.statistics()
    assert statistics.submitted == statistics.received == statistics.delivered + statistics.unread


READER = """
import json, sys
from pathlib import Path
import anyio
from tests.kernel.test_loop import flood_stream, read

async def main(folder, pid, kind):
    async with flood_stream(Path(folder), pid, kind) as events:
        print("open", flush=True)
        await anext(events)
        print("reading", flush=True)
        await read(events, "events")

folder, pid, kind, backend, options = json.loads(sys.argv[1])
anyio.run(main, folder, pid, kind, backend=backend, backend_options=options)
"""


@pytest.mark.parametrize("load", ["flood", "nothing"])
def test_ctrl_c(
    load: str, kind: Kind, producer: flood.Producer, tmp_path: Path, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """It ends a program that reads, or waits, and leaves nothing attached."""
    arguments = json.dumps([str(tmp_path), producer.pid, kind, *anyio_backend])
    with subprocess.Popen(
        [sys.executable, "-c", READER, arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "open\n"
            producer.start(ENDLESS if load == "flood" else 1)
            assert reader.stdout.readline() == "reading\n"
            time.sleep(0.2)
            programs, links = objects.held("prog", reader.pid), objects.held("link", reader.pid)
            reader.send_signal(signal.SIGINT)
            _, errors = reader.communicate()
        finally:
            reader.kill()
    assert floods(producer) or load == "nothing"
    assert reader.returncode == -signal.SIGINT, errors
    assert errors.endswith("KeyboardInterrupt\n")
    assert programs
    assert links
    assert not objects.left("prog", programs)
    assert not objects.left("link", links)


@pytest.mark.anyio
@pytest.mark.parametrize("before", ["a wait", "events"])
async def test_a_stalled_consumer_costs_nothing(
    before: str, kind: Kind, producer: flood.Producer, tmp_path: Path
) -> None:
    """Its buffer is full, and the kernel says all the time that there is something to read."""
    async with flood_stream(tmp_path, producer.pid, kind, 1 << 16) as events:
        if before == "a wait":
            with anyio.move_on_after(0.1) as scope:
                await anext(events)
            assert scope.cancelled_caught
        producer.start(ENDLESS)
        if before == "events":
            for _ in range(100):
                await anext(events)
        await wait_for_pressure(events)
        delivered, lost = events.statistics().delivered, known(events.statistics().lost)
        start, cpu = time.monotonic(), time.process_time()
        await anyio.sleep(1)
        cpu, wall = time.process_time() - cpu, time.monotonic() - start
        assert floods(producer)
        assert events.statistics().delivered == delivered
        assert known(events.statistics().lost) > lost
    assert cpu < 0.2 * wall


@pytest.mark.anyio
async def test_an_idle_stream_sleeps(kind: Kind, producer: flood.Producer, tmp_path: Path) -> None:
    """The thread that waits for an event is not woken until there is one."""
    async with flood_stream(tmp_path, producer.pid, kind) as events:
        producer.start(1)
        await anext(events)
        with anyio.move_on_after(0.1):
            await anext(events)
        wakeups = events.statistics().wakeups
        switches = []
        for _ in range(5):  # the machine's other work may make the thread wait as well: not each time
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            with anyio.move_on_after(1) as scope:
                await anext(events)
            switches.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)
            assert scope.cancelled_caught
            if switches[-1] <= 3:
                break
        assert min(switches) <= 3
        assert events.statistics().wakeups - wakeups <= len(switches)
