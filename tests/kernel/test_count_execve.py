"""count_execve against execs of users that nobody else is."""

from __future__ import annotations

import gc
import math
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import (
    ArgumentError,
    EventBatch,
    ExecCount,
    StreamBusyError,
    StreamClosedError,
    count_execve,
    forward,
)
from ebpfstream.tracers import count_execve as module
from tests.kernel import objects

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

TRUE = "/bin/true"
ONE, OTHER = 54_321, 54_322
LONG = 3600.0


def execs(uid: int, times: int, cpu: int = 0, program: str = TRUE) -> subprocess.Popen[bytes]:
    """A process that makes two execs as this user, its own shell's and seq's, and so many of the program."""
    shell = f"read go; for _ in $(seq {times}); do {program}; done"
    return subprocess.Popen(
        ["taskset", "-c", str(cpu), "setpriv", f"--reuid={uid}", "--clear-groups", "sh", "-c", shell],
        stdin=subprocess.PIPE,
    )


def run(*children: subprocess.Popen[bytes]) -> None:
    """Let them begin at the same time, and wait for all."""
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.close()
    for child in children:
        assert child.wait() == 0


async def test_exactly_the_execs_of_each_user() -> None:
    """From two CPUs at the same time: the shells' own, seq's, and each program's."""
    async with count_execve(every=LONG) as counts:
        await run_sync(lambda: run(execs(ONE, 100), execs(ONE, 150, cpu=1), execs(OTHER, 70)))
        now = counts.read()
        counts.detach()
        final = [each async for each in counts]
    assert now[ONE] == 100 + 150 + 2 * 2
    assert now[OTHER] == 70 + 2
    assert len(final) == 1
    assert final[0] == counts.read()
    assert (final[0][ONE], final[0][OTHER]) == (now[ONE], now[OTHER])
    counters = counts.counters()
    assert counters.tried == counters.submitted == sum(final[0].values())
    assert (counters.rejected, counters.lost, counters.misses) == (0, 0, 0)


async def test_again_and_again() -> None:
    """Not before the time, all in all each time; what came between two is their difference."""
    start = time.monotonic()
    totals = []
    async with count_execve(every=0.2) as counts:
        for number in range(3):
            await run_sync(lambda number=number: run(execs(ONE, number)))  # type: ignore[misc]
            totals.append(await anext(counts))
            assert time.monotonic() - start >= 0.2 * (number + 1)
    assert [total[ONE] for total in totals] == [2, 5, 9]
    assert [new.since(old)[ONE] for old, new in pairwise(totals)] == [3, 4]


@pytest.mark.parametrize("most", [None, 1])
async def test_counts_are_forwarded(most: int | None) -> None:
    """An event for each user who has executed something since the last ones; at the end, at once, what came after."""
    told: list[ExecCount] = []

    async def keep(batch: EventBatch[Any]) -> None:
        told.extend(event for event in batch if event.uid in (ONE, OTHER))
        if sum(event.count for event in told) >= 100 + 70 + 2 * 2:
            counts.detach()

    counts = count_execve(every=0.2)
    async with counts:
        await run_sync(lambda: run(execs(ONE, 100), execs(OTHER, 70)))
        statistics = await forward(counts, keep, where=lambda event: event.uid in (ONE, OTHER), count=most)
    assert [(event.uid, event.count, event.total) for event in told] == [(ONE, 102, 102), (OTHER, 72, 72)][
        :most
    ]
    assert told[0].message == "102 execs, 102 in all"
    assert abs(datetime.now(UTC) - told[0].time).total_seconds() < 60
    assert statistics.stream.received == statistics.stream.delivered + statistics.stream.unread
    assert statistics.stream.delivered == statistics.filtered + len(told)
    assert statistics.complete


async def test_counts_between_two_are_told_once() -> None:
    async with count_execve(every=LONG, comm="true") as counts:
        batches = []
        for number in range(3):
            await run_sync(lambda number=number: run(execs(ONE, number)))  # type: ignore[misc]
            if number < 2:
                counts._ticks._next = 0  # it is time
                if number:
                    batches.append(await counts.next_batch())
        counts.detach()
        batches.append(await counts.next_batch())
        assert await counts.next_batch() is None
    assert [[(event.uid, event.count, event.total) for event in batch or ()] for batch in batches] == [
        [(ONE, 1, 1)],
        [(ONE, 2, 3)],
    ]


async def test_users_that_the_table_has_no_room_for_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_USERS", 1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program = Path(folder) / "nobody-elses"
        program.symlink_to(TRUE)
        async with count_execve(every=LONG, comm=program.name) as counts:
            for uid, times in ((ONE, 5), (OTHER, 3), (ONE, 2)):
                await run_sync(lambda uid=uid, times=times: run(execs(uid, times, program=str(program))))  # type: ignore[misc]
    assert counts.read() == {ONE: 7}
    counters = counts.counters()
    assert (counters.tried, counters.submitted, counters.lost) == (10, 7, 3)


async def test_filters_leave_out() -> None:
    async with count_execve(every=LONG, uid=ONE, comm="true") as counts:
        await run_sync(lambda: run(execs(ONE, 5), execs(OTHER, 3)))
    assert counts.read() == {ONE: 5}
    counters = counts.counters()
    assert (counters.tried, counters.submitted) == (5, 5)
    assert (counters.rejected or 0) >= 2 + 2 + 3  # shells and seqs of both


async def test_detaching_ends_a_waiting_iteration() -> None:
    counts = count_execve(every=LONG)
    found = []
    async with counts, anyio.create_task_group() as tasks:

        async def iterate() -> None:
            async for each in counts:
                found.append(each)

        tasks.start_soon(iterate)
        await run_sync(lambda: run(execs(ONE, 3)))
        counts.detach()
        counts.detach()
    assert [each[ONE] for each in found] == [5]


async def test_breaking_off_detaches() -> None:
    links = set()
    async for _ in count_execve(every=0.01):
        links = objects.held("link")
        break
    assert len(links) == 1
    gc.collect()
    assert objects.existing("link", links) == set()
    assert not objects.held("prog") | objects.held("map")


async def test_wrong_use() -> None:
    for every in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="every="):
            count_execve(every=every)
    async with count_execve(every=LONG) as counts:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(StreamClosedError):
                    await anext(counts)

            tasks.start_soon(wait)
            await anyio.sleep(0.05)
            with pytest.raises(StreamBusyError, match="iterate it in one task"):
                await anext(counts)
            await counts.aclose()
        with pytest.raises(StreamClosedError):
            await anext(counts)
        with pytest.raises(StreamClosedError):
            await counts.aclose()
    with pytest.raises(StreamClosedError):
        async with counts:
            pass


async def test_one_that_was_never_opened() -> None:
    counts = count_execve()
    assert counts.read() == {}
    assert counts.counters().tried == 0
    counts.detach()
    assert [each async for each in counts] == []
    await counts.aclose()
    assert counts.read() == {}


async def test_cancelled_while_it_opens_and_while_it_waits() -> None:
    for delay in (0.0, 0.001, 0.05, 0.2):
        counts = count_execve(every=LONG)
        with anyio.move_on_after(delay):
            async with counts:
                await anyio.sleep_forever()
    del counts
    async with count_execve(every=0.3) as counts:
        with anyio.move_on_after(0.05):
            await anext(counts)
        await run_sync(lambda: run(execs(ONE, 0)))
        assert (await anext(counts))[ONE] == 2
    assert not objects.held("link") | objects.held("prog") | objects.held("map")
