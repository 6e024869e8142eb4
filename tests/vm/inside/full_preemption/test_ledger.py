"""Where the kernel takes the CPU away in the middle of a system call, counts are as exact as elsewhere."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import EventStream
from ebpfstream.kernel.bpf import online_cpus
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import Link, RawTracepoint
from tests.kernel import flood
from tests.kernel.flood import FloodEvent
from tests.vm.inside.threads import threads

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


def test_it_is_this_machine() -> None:
    assert "(full)" in Path("/sys/kernel/debug/sched/preempt").read_text()
    assert online_cpus() == [0, 1]


@pytest.mark.parametrize("kind", ["ring", "perf"])
@pytest.mark.parametrize("buffer_size", [1 << 16, 1 << 26])
async def test_a_flood_from_every_cpu(kind: Kind, buffer_size: int, tmp_path: Path) -> None:
    """Two threads on each, so that they get into each other's way."""
    calls, cpus = 20_000, [0, 1, 0, 1]
    received = gaps = 0
    following = dict.fromkeys(cpus, 0)
    with threads() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, buffer_size, kind)
        async with EventStream(source, FloodEvent) as events, anyio.create_task_group() as tasks:

            async def produce() -> None:
                await run_sync(producer.call, calls, cpus)
                events.detach()

            tasks.start_soon(produce)
            async for event in events:
                assert len(event.payload) == flood.payload_length(event.sequence)
                assert event.payload[-8:] == event.sequence.to_bytes(8, "little")
                gaps += event.sequence - following[event.cpu]
                assert event.sequence >= following[event.cpu]
                following[event.cpu] = event.sequence + 1
                received += 1
    ledger = events.statistics()
    assert (ledger.tried, ledger.misses) == (calls * len(cpus), 0)
    assert ledger.tried == received + flood.known(ledger.lost)
    assert received == ledger.submitted == ledger.received == ledger.delivered
    assert (ledger.undecodable, ledger.unread) == (0, 0)
    if buffer_size > 1 << 16:
        assert following == {0: 2 * calls, 1: 2 * calls}
        assert ledger.lost == 0
    else:
        # What was lost after the last event shows in the counters alone.
        assert 0 < gaps <= flood.known(ledger.lost)


@pytest.mark.parametrize("kind", ["ring", "perf"])
async def test_runs_within_runs_are_counted(kind: Kind, tmp_path: Path) -> None:
    """The program sends a signal, is attached to signals as well, and the kernel does not run it within itself."""
    calls, cpus = 500, [0, 1, 0, 1]
    with threads() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 22, kind)
        (path,) = tmp_path.iterdir()
        before, stamp, after = path.read_text().partition("\tstamp(")
        path.write_text(f"{before}\tbpf_send_signal(17 /* SIGCHLD */);\n{stamp}{after}")
        async with EventStream(source, FloodEvent) as events:
            link = Link.attach(source._programs[0], RawTracepoint("signal_generate"))
            await run_sync(producer.call, calls, cpus)
            link.close()
            events.detach()
            received = [event.cpu async for event in events]
    ledger = events.statistics()
    assert ledger.tried == ledger.submitted == len(received) == calls * len(cpus)
    assert received.count(0) == received.count(1)
    assert (ledger.lost, ledger.misses, ledger.complete) == (0, calls * len(cpus), False)
