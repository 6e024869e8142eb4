"""Snapshots of real maps as an asynchronous iterator."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ebpfstream import snapshots
from ebpfstream.errors import ArgumentError, MapError, StreamBusyError, StreamClosedError
from ebpfstream.kernel import compiler
from ebpfstream.kernel.bpf import MapType, online_cpus, possible_cpus
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.mapvalues import PerCpu, Snapshot
from ebpfstream.kernel.typedmap import TypedMap
from ebpfstream.snapshots import Snapshots, Ticks
from tests.kernel.counting import TEXT, attached, calling, event_type, simple, typed

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

SOON = 0.001


@pytest.fixture(scope="module")
def compiled() -> Module:
    return anyio.run(compiler.compile, TEXT)


async def test_one_after_the_other() -> None:
    found = simple(MapType.HASH)
    found[1] = 5
    async with Snapshots(found, SOON) as stream:
        found[2] = 6
        first = await anext(stream)
        assert first == {1: 5, 2: 6}
        assert first.complete
        del found[1]
        async for second in stream:
            assert second == {2: 6}
            break
        assert await anext(stream) == {2: 6}  # goes on after a break
    assert first == {1: 5, 2: 6}
    assert found.snapshot() == {2: 6}


async def test_without_a_block_it_begins_with_the_iteration() -> None:
    found = simple(MapType.HASH)
    started: list[int] = []
    stream = Snapshots(found, SOON, on_start=lambda: started.append(threading.get_ident()))
    assert not started
    found[1] = 5
    assert await anext(stream) == {1: 5}
    await anext(stream)
    assert len(started) == 1
    assert started != [threading.get_ident()]
    await stream.aclose()


async def test_what_starts_it_may_fail() -> None:
    failures = [MapError("not yet")]

    def start() -> None:
        if failures:
            raise failures.pop()

    stream = Snapshots(simple(MapType.HASH), SOON, on_start=start)
    with pytest.raises(MapError, match="not yet"):
        await anext(stream)
    assert await anext(stream) == {}


async def test_draining() -> None:
    found = simple(MapType.HASH)
    found.update({1: 2, 3: 4})
    async with Snapshots(found, SOON, drain=True) as stream:
        assert await anext(stream) == {1: 2, 3: 4}
        assert await anext(stream) == {}
        found[1] = 7
        assert await anext(stream) == {1: 7}
        queue = simple(MapType.QUEUE)
        async with Snapshots(queue, SOON, drain=True) as values:
            queue.push(5)
            queue.push(6)
            assert list((await anext(values)).values()) == [5, 6]


async def test_numbers_of_several_cpus_come_added_up(compiled: Module) -> None:
    for kind in (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY):
        found = simple(kind)
        found[1] = PerCpu(range(possible_cpus()))
        async with Snapshots(found, SOON) as added, Snapshots(found, SOON, per_cpu=True) as each:
            assert (await anext(added))[1] == sum(range(possible_cpus()))
            assert (await anext(each))[1] == PerCpu(range(possible_cpus()))
    structs = typed(compiled, "percpu_structs")
    structs[1] = (5, "text")
    async with Snapshots(structs, SOON) as stream:
        value = event_type(structs.value)(5, "text")
        assert (await anext(stream))[1] == PerCpu([value] * possible_cpus())


@pytest.mark.parametrize("every", [0, -1, math.nan, math.inf])
async def test_impossible_times(every: float) -> None:
    with pytest.raises(ArgumentError, match=r"every=.* is impossible: give seconds, more than 0"):
        Snapshots(simple(MapType.HASH), every)


async def test_maps_that_cannot_be_read_so() -> None:
    with pytest.raises(
        MapError, match=r"'made' is a queue, which cannot be read and keep its values.*drain=True"
    ):
        Snapshots(simple(MapType.QUEUE), 1)
    with pytest.raises(MapError, match=r"'made' is an array, which cannot be drained"):
        Snapshots(simple(MapType.ARRAY), 1, drain=True)


async def test_times_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    until: list[float] = []

    async def sleep_until(time: float) -> None:
        nonlocal now
        until.append(time)
        now = max(now, time) + 0.25  # it wakes late

    monkeypatch.setattr(
        snapshots, "anyio", SimpleNamespace(current_time=lambda: now, sleep_until=sleep_until)
    )
    ticks = Ticks(2)
    ticks.start()
    for work in (0.5, 1.5, 2.5, 0, 7.25, 0, 0):
        await ticks.wait()
        now += work
    # 2.5 s of work let one come late, 7.25 s let one come late and two be left out.
    assert until == [102, 104, 106, 108, 110, 112, 118]


async def test_one_task_at_a_time() -> None:
    async with Snapshots(simple(MapType.HASH), 30) as stream:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.__anext__)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(
                StreamBusyError, match="waiting for this stream's next snapshot: iterate it in one task"
            ):
                await anext(stream)
            tasks.cancel_scope.cancel()


async def test_closing() -> None:
    stream = Snapshots(simple(MapType.HASH), 30)
    raised: list[str] = []

    async def wait() -> None:
        try:
            await anext(stream)
        except StreamClosedError as error:
            raised.append(str(error))

    async with stream:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await stream.aclose()
            assert raised == ["this stream is closed: call the function that made it again for a new one"]
        with pytest.raises(StreamClosedError):
            await anext(stream)
        with pytest.raises(StreamClosedError):
            await stream.aclose()
    with pytest.raises(StreamClosedError):
        await stream.__aenter__()
    await Snapshots(simple(MapType.HASH), 30).aclose()


async def test_others_run_while_a_large_map_is_read() -> None:
    found = simple(MapType.HASH, entries=100_000)
    expected = {number: number for number in range(100_000)}
    found.update(expected)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with Snapshots(found, 30) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        stream._ticks._next = 0
        snapshot = await anext(stream)
        assert turns > 100
        assert snapshot == expected
        assert snapshot.complete
        tasks.cancel_scope.cancel()


def interrupted(found: TypedMap, interrupt: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something after the first step of reading a map, once."""
    fill = found.fill
    first = True

    def interrupting(snapshot: Snapshot, **how: bool) -> Iterator[None]:
        nonlocal first
        for step in fill(snapshot, **how):
            if first:
                first = False
                interrupt()
            yield step

    monkeypatch.setattr(found, "fill", interrupting)


async def test_what_has_been_taken_out_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though cancelled, or closed by another task, in the middle."""
    expected = {number: number for number in range(5000)}
    scope = anyio.CancelScope()
    found = simple(MapType.HASH, entries=5000)
    found.update(expected)
    interrupted(found, scope.cancel, monkeypatch)
    stream = Snapshots(found, SOON, drain=True)
    with scope:
        snapshot = await anext(stream)
        await checkpoint()
    assert scope.cancelled_caught
    assert snapshot == expected

    found = simple(MapType.HASH, entries=5000)
    found.update(expected)
    closed = anyio.Event()
    interrupted(found, closed.set, monkeypatch)
    async with Snapshots(found, SOON, drain=True) as stream, anyio.create_task_group() as tasks:

        async def close() -> None:
            await closed.wait()
            await stream.aclose()

        tasks.start_soon(close)
        assert await anext(stream) == expected


async def test_reading_alone_is_cancelled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = anyio.CancelScope()
    found = simple(MapType.HASH, entries=5000)
    found.update({number: number for number in range(5000)})
    interrupted(found, scope.cancel, monkeypatch)
    stream = Snapshots(found, SOON)
    with scope:
        await anext(stream)
    assert scope.cancelled_caught
    found.clear()
    assert await anext(stream) == {}  # begun anew


async def test_a_drain_that_asyncio_cancels_comes_with_the_next(
    monkeypatch: pytest.MonkeyPatch, anyio_backend_name: str
) -> None:
    if anyio_backend_name != "asyncio":
        return  # trio has no such thing
    found = simple(MapType.HASH, entries=5000)
    found.update({number: number for number in range(5000)})
    stream = Snapshots(found, SOON, drain=True)

    async def read() -> Snapshot:
        return await anext(stream)

    task = asyncio.create_task(read())
    interrupted(found, lambda: task.cancel(), monkeypatch)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 < len(found) < 5000
    snapshot = await anext(stream)
    assert snapshot == {number: number for number in range(5000)}
    assert snapshot.complete


@pytest.mark.parametrize("name", ["hash", "percpu_hash"])
async def test_every_call_is_counted_once(compiled: Module, name: str) -> None:
    """From processes on every CPU, by what came since the snapshot before."""
    counts, targets = typed(compiled, name), typed(compiled, "targets")
    counts.clear()
    calls = 50_000
    before, total, rounds = Snapshot(), 0, 0
    with attached(compiled, "counting"), calling(targets, calls) as going_on:
        async with Snapshots(counts, SOON) as stream:
            async for now in stream:
                total += sum(now.since(before).values())
                before = now
                rounds += 1
                if not going_on():
                    break
            now = await anext(stream)
            total += sum(now.since(before).values())
    assert total == calls * len(online_cpus())
    assert rounds > 0
