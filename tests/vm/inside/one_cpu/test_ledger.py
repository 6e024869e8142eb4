"""A machine that has one CPU and can have no other: reader and producer take turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from anyio.to_thread import run_sync

from ebpfstream import EventStream, trace_execve
from ebpfstream.kernel.bpf import online_cpus, possible_cpus
from ebpfstream.kernel.buffers import Kind
from tests.kernel import flood
from tests.kernel.flood import FloodEvent, known
from tests.kernel.test_book import execute

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


@pytest.mark.parametrize("kind", ["perf", "ring"])
async def test_the_ledger(kind: Kind, tmp_path: Path) -> None:
    assert (online_cpus(), possible_cpus()) == ([0], 1)
    with flood.producing() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 16, kind)
        async with EventStream(source, FloodEvent) as events:
            producer.start(5000)
            await run_sync(producer.wait)
            events.detach()
            numbers = [event.sequence async for event in events]
    ledger = events.statistics()
    assert ledger.tried == 5000 == len(numbers) + known(ledger.lost)
    assert ledger.submitted == ledger.received == ledger.delivered == len(numbers)
    assert numbers == sorted(set(numbers))
    assert known(ledger.lost) > 0


async def test_execs() -> None:
    async with trace_execve() as events:
        pids = execute(20)
        events.detach()
        assert [event.pid async for event in events if event.pid in pids] == pids
