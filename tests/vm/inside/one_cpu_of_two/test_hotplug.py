"""A CPU that may come, and was never there before."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import EventStream, trace_execve
from ebpfstream.kernel.bpf import online_cpus, possible_cpus
from ebpfstream.kernel.buffers import Kind
from tests.kernel import flood
from tests.kernel.flood import FloodEvent
from tests.vm.inside.threads import threads

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

SWITCH = Path("/sys/devices/system/cpu/cpu1/online")


@pytest.fixture(autouse=True)
def _one_cpu_of_two() -> Iterator[None]:
    assert (online_cpus(), possible_cpus()) == ([0], 2)
    yield
    SWITCH.write_text("0")


@pytest.mark.parametrize("kind", ["perf", "ring"])
async def test_a_cpu_that_comes(kind: Kind, tmp_path: Path) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}
    rounds = 0
    with threads() as producer:
        source = flood.source(tmp_path, "flood", producer.pid, 1 << 22, kind)
        async with EventStream(source, FloodEvent) as events, anyio.create_task_group() as tasks:

            async def produce() -> None:
                nonlocal rounds
                await run_sync(producer.call, 100, [0])
                await run_sync(SWITCH.write_text, "1")
                while not seen[1]:  # what comes before the stream has noticed is lost from a perf buffer
                    await run_sync(producer.call, 10, [1])
                    rounds += 1
                    assert rounds < 1000
                await run_sync(producer.call, 100, [0, 1])
                events.detach()

            tasks.start_soon(produce)
            async for event in events:
                seen[event.cpu].append(event.sequence)
    ledger = events.statistics()
    assert seen[0] == list(range(200))
    assert seen[1] == list(range(flood.known(ledger.lost), 10 * rounds + 100))
    assert ledger.tried == 300 + 10 * rounds == ledger.delivered + flood.known(ledger.lost)
    assert ledger.lost == 0 or kind == "perf"


@pytest.mark.parametrize("kind", ["perf", "ring"])
async def test_execs_on_the_one_cpu(kind: Kind) -> None:
    async with trace_execve(buffer=kind) as events:
        await run_sync(lambda: subprocess.run(["/bin/true", "one"], check=True))
        events.detach()
        found = [event async for event in events if event.args == ("/bin/true", "one")]
    assert [event.cpu for event in found] == [0]
    assert events.statistics().complete
