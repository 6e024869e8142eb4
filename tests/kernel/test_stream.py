"""EventStream on the real kernel: the ledger, lifetime, and every way to leave."""

from __future__ import annotations

import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import (
    ArgumentError,
    BccNotFoundError,
    CompileError,
    EventBatch,
    EventStream,
    Statistics,
    StreamBusyError,
    StreamClosedError,
    UnsupportedError,
    trace_execve,
)
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.readymade import ReadyMade
from tests.kernel import flood, objects
from tests.kernel.flood import FloodEvent, known

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


@pytest.fixture(params=["ring", "perf"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """What is said of one kind of buffer holds for the other."""
    found: Kind = request.param
    return found


def flood_stream(folder: Path, target: int, buffer_size: int, kind: Kind) -> EventStream[FloodEvent]:
    return EventStream(flood.source(folder, "flood", target, buffer_size, kind), FloodEvent)


def check(event: FloodEvent) -> None:
    assert len(event.payload) == flood.payload_length(event.sequence)
    assert event.payload[-8:] == event.sequence.to_bytes(8, "little")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("buffer_size", [1 << 16, 1 << 22])
async def test_after_a_flood_the_ledger_is_exact(kind: Kind, tmp_path: Path, buffer_size: int) -> None:
    calls = 500_000
    gaps = received = 0
    following: dict[int, int] = {}
    with flood.producing() as producer:
        async with flood_stream(tmp_path, producer.pid, buffer_size, kind) as events:
            async with anyio.create_task_group() as tasks:

                async def produce() -> None:
                    producer.start(calls)
                    await run_sync(producer.wait)
                    events.detach()

                tasks.start_soon(produce)
                async for event in events:
                    check(event)
                    expected = following.get(event.cpu, 0)
                    assert event.sequence >= expected
                    gaps += event.sequence - expected
                    following[event.cpu] = event.sequence + 1
                    received += 1
    statistics = events.statistics()
    assert statistics.tried == calls
    assert known(statistics.submitted) + known(statistics.lost) == calls
    assert statistics.received == statistics.submitted == statistics.delivered == received
    assert (statistics.misses, statistics.undecodable, statistics.unread) == (0, 0, 0)
    # The gaps prove the loss from the outside, but for what was lost after the last event.
    assert gaps <= known(statistics.lost)
    assert sum(following.values()) == received + gaps


async def test_what_nobody_asked_for_is_counted_as_unread(kind: Kind, tmp_path: Path) -> None:
    with flood.producing() as producer:
        async with flood_stream(tmp_path, producer.pid, 1 << 16, kind) as events:
            producer.start(20_000)
            producer.wait()
            seen = 0
            async for event in events:
                check(event)
                seen += 1
                if seen == 7:
                    break
            running = events.statistics()
            assert running.delivered == 7
    statistics = events.statistics()
    assert statistics.delivered == 7
    assert statistics.tried == 20_000
    assert known(statistics.lost) > 0
    assert statistics.received == statistics.submitted == 20_000 - known(statistics.lost)
    assert statistics.unread == statistics.received - 7


async def test_events_and_batches_take_turns(kind: Kind, tmp_path: Path) -> None:
    with flood.producing(cpu=0) as producer:
        async with flood_stream(tmp_path, producer.pid, 1 << 22, kind) as events:
            producer.start(5000)
            producer.wait()
            events.detach()
            seen: list[FloodEvent] = []
            async for event in events:
                seen.append(event)
                if len(seen) == 10:
                    break
            async for batch in events.batches():
                assert isinstance(batch, EventBatch)
                seen.extend(batch)
                break
            assert events.statistics().delivered == len(seen)
            async for event in events:
                seen.append(event)
    assert [event.sequence for event in seen] == list(range(5000))
    assert events.statistics().delivered == 5000


async def test_other_tasks_run_under_a_flood(kind: Kind, tmp_path: Path) -> None:
    """And a deadline takes effect, though the buffer is never empty."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.sleep(0.001)
            ticks += 1

    with flood.producing() as producer:
        async with flood_stream(tmp_path, producer.pid, 1 << 20, kind) as events:
            producer.start(100_000_000)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(tick)
                with anyio.move_on_after(1):
                    async for event in events:
                        check(event)
                tasks.cancel_scope.cancel()
        statistics = events.statistics()
    assert ticks > 20
    assert statistics.submitted == statistics.received == statistics.delivered + statistics.unread
    assert statistics.delivered > 1000


async def test_latency_zero_and_an_idle_stream(kind: Kind) -> None:
    async with trace_execve(latency=0, buffer=kind) as events:
        with anyio.move_on_after(0.3):
            async for _ in events:
                pass
        before = time.process_time(), events.statistics().wakeups
        with anyio.move_on_after(1) as scope:
            async for event in events:
                if event.args == ("/bin/true", "wake"):
                    break
        spent = time.process_time() - before[0]
        assert scope.cancelled_caught
        # Others on this machine may exec something meanwhile; nothing else may wake it.
        statistics = events.statistics()
        assert statistics.wakeups - before[1] <= statistics.received + 1
        assert spent < 0.5


@pytest.mark.parametrize("leave", ["break", "raise", "cancel"])
async def test_leaving_a_temporary_detaches_at_once(leave: str) -> None:
    links: set[int] = set()

    async def iterate() -> None:
        async for _ in trace_execve():
            links.update(objects.held("link"))
            if leave == "break":
                break
            if leave == "raise":
                raise ZeroDivisionError
            await anyio.sleep_forever()

    async def run() -> None:
        try:
            await iterate()
        except ZeroDivisionError:
            pass
        assert objects.existing("link", links) == set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        while not (links or objects.held("link")):  # somebody else's exec may have ended it already
            await anyio.sleep(0.01)
        await run_sync(lambda: subprocess.run(["/bin/true"], check=True))
        if leave == "cancel":
            while not links:
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert len(links) == 1
    gc.collect()
    assert objects.existing("link", links) == set()


async def test_cancelled_while_it_waits_and_while_it_opens() -> None:
    for delay in (0.0, 0.001, 0.05, 0.2):
        stream = trace_execve()
        with anyio.move_on_after(delay):
            async with stream:
                await anyio.sleep_forever()
        assert objects.children() == set()
    del stream
    async with trace_execve() as events:
        with anyio.move_on_after(0.1):
            while True:
                await anext(events)
        # Nothing is broken by it.
        await run_sync(lambda: subprocess.run(["/bin/true", "after"], check=True))
        async for event in events:
            if event.args == ("/bin/true", "after"):
                break
    assert not objects.held("link") | objects.held("prog") | objects.held("map")


async def test_wrong_use() -> None:
    with pytest.raises(ArgumentError, match='buffer=\'foo\' is unknown: give "auto", "ring" or "perf"'):
        trace_execve(buffer="foo")  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match="buffer_size=-1 is impossible"):
        trace_execve(buffer_size=-1)
    with pytest.raises(ArgumentError, match="latency=-1 is impossible"):
        trace_execve(latency=-1)
    async with trace_execve() as events:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(StreamClosedError):
                    while True:
                        await anext(events)

            tasks.start_soon(wait)
            await anyio.sleep(0.05)
            with pytest.raises(StreamBusyError, match="iterate it in one task"):
                while True:
                    await anext(events)
            await events.aclose()
        with pytest.raises(StreamClosedError, match="this stream is closed"):
            await anext(events)
        with pytest.raises(StreamClosedError):
            await anext(events.batches())
        with pytest.raises(StreamClosedError):
            await events.aclose()
    with pytest.raises(StreamClosedError):
        async with events:
            pass
    assert events.statistics().tried == events.statistics().submitted


async def test_a_stream_that_was_never_opened() -> None:
    stream = trace_execve()
    assert stream.statistics().tried == 0
    await stream.aclose()
    stream = trace_execve()
    stream.detach()
    assert [event async for event in stream] == []


async def test_bcc_missing(tmp_path: Path) -> None:
    """In a mount namespace where the distribution's folder is empty."""
    shown = await run_sync(lambda: hidden("/usr/lib/python3/dist-packages", BccNotFoundError, tmp_path))
    assert BccNotFoundError.__name__ not in shown
    for line in (
        "apt-get install python3-bpfcc",
        "dnf install python3-bcc",
        "pacman -S python-bcc",
        "apk add py3-bcc",
    ):
        assert line in shown


async def test_btf_missing(tmp_path: Path) -> None:
    shown = await run_sync(lambda: hidden("/sys/kernel/btf", UnsupportedError, tmp_path))
    assert "CONFIG_DEBUG_INFO_BTF=y" in shown


def hidden(folder: str, error: type[Exception], cache: Path) -> str:
    """The message of the error that opening a stream raises where a folder is empty."""
    code = (
        "import anyio, ebpfstream\n"
        "async def main():\n"
        "    async with ebpfstream.trace_execve(): pass\n"
        "try:\n"
        "    anyio.run(main)\n"
        f"except ebpfstream.{error.__name__} as error:\n"
        "    print(error)\n"
    )
    script = f'mount -t tmpfs none {folder} && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"EBPFSTREAM_CACHE": str(cache)},
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("capabilities", ["", "+bpf", "+bpf,+perfmon"])
async def test_privileges(capabilities: str, tmp_path: Path) -> None:
    """Another user: refused by name, unless it has CAP_BPF and CAP_PERFMON."""
    code = (
        "import anyio, ebpfstream\n"
        "async def main():\n"
        "    async with ebpfstream.trace_execve() as events: print('attached')\n"
        "try:\n"
        "    anyio.run(main)\n"
        "except PermissionError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    # Whatever they may do with BPF, they must be able to read this environment, wherever it is.
    given = ",".join(filter(None, ["+dac_read_search", capabilities]))
    done = await run_sync(
        lambda: subprocess.run(
            [
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                f"--inh-caps={given}",
                f"--ambient-caps={given}",
                sys.executable,
                "-c",
                code,
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "EBPFSTREAM_CACHE": str(tmp_path),
            },
            check=True,
        )
    )
    if capabilities == "+bpf,+perfmon":
        assert done.stdout == "attached\n"
    else:
        assert done.stdout.startswith(
            "PrivilegeError the kernel refuses BPF to this process (uid 65534): run it as root"
        )


@pytest.mark.parametrize("end", ["exit", "kill"])
async def test_the_kernel_detaches_when_the_process_ends(end: str) -> None:
    code = (
        "import anyio, ebpfstream, os, signal, sys\n"
        "async def main():\n"
        "    events = ebpfstream.trace_execve()\n"
        "    await events.__aenter__()\n"
        "    print('attached', flush=True)\n"
        "    sys.stdin.readline()\n"
        f"    {'os.kill(os.getpid(), signal.SIGKILL)' if end == 'kill' else 'return'}\n"
        "anyio.run(main)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert await run_sync(child.stdout.readline) == b"attached\n"
        kinds = {kind: objects.held(kind, child.pid) for kind in ("link", "prog", "map")}
        assert [len(ids) for ids in kinds.values()] == [1, 1, 5]
        _, errors = await run_sync(child.communicate, b"\n")
    assert errors == b""
    assert child.returncode == (-signal.SIGKILL if end == "kill" else 0)
    await gone(kinds)


async def test_nothing_is_left_after_many_rounds(kind: Kind) -> None:
    kinds: dict[str, set[int]] = {"link": set(), "prog": set(), "map": set()}

    async def round_trip() -> None:
        async with trace_execve(buffer=kind) as events:
            await run_sync(lambda: subprocess.run(["/bin/true"], check=True))
            async for _ in events:
                for name, ids in kinds.items():
                    ids |= objects.held(name)
                break

    def own() -> tuple[list[str], int]:
        return sorted(os.listdir("/proc/self/fd")), mapped("bpf-map") + mapped("perf_event")

    await round_trip()
    before, threads = own(), threading.active_count()
    for _ in range(20):
        await round_trip()
    assert own() == before
    assert threading.active_count() <= threads  # idle workers end by themselves
    assert [len(ids) for ids in kinds.values()] == [21, 21, 105]
    await gone(kinds)
    assert objects.children() == set()


def broken(folder: Path, kind: Kind) -> EventStream[FloodEvent]:
    path = folder / "broken.c"
    path.write_text("nonsense")
    hooks = {"flood": RawTracepoint("sys_enter")}
    return EventStream(ReadyMade(path, FloodEvent, hooks, buffer=kind, buffer_size=1 << 16), FloodEvent)


async def test_a_failed_opening_leaves_nothing(kind: Kind, tmp_path: Path) -> None:
    """At once, while the stream itself is still there."""
    stream = broken(tmp_path, kind)
    with pytest.raises(CompileError):
        await stream.__aenter__()
    assert not objects.held("map") | objects.held("prog") | objects.held("link")
    del stream


async def test_statistics_after_a_failed_opening(kind: Kind, tmp_path: Path) -> None:
    stream = broken(tmp_path, kind)
    with pytest.raises(CompileError):
        await stream.__aenter__()
    assert stream.statistics() == Statistics()


@pytest.mark.parametrize(("misses", "total"), [([2, 3], 5), ([2, None], None), ([0], 0)])
def test_misses_of_all_programs(tmp_path: Path, misses: list[Any], total: int | None) -> None:
    """Unknown if the kernel does not tell of one; counters are those of all CPUs and programs."""

    class Program:
        def __init__(self, count: int | None) -> None:
            self._count = count

        def recursion_misses(self) -> int | None:
            return self._count

    class Counters:
        max_entries = 2

        def lookup(self, key: bytes) -> bytes:
            first = (1, 11, 1, 7, 1, 1, 1, 0, 10, 0), (2, 20, 0, 20, 0, 0, 0, 0, 20, 0)
            second = (4, 100, 0, 98, 1, 0, 0, 1, 100, 28), (0,) * 10
            layout = struct.Struct("<9QI12x")
            return b"".join(layout.pack(*cpu) for cpu in (first if key == bytes(4) else second))

    source: Any = flood.source(tmp_path, "flood", 1, 4096)
    source._programs = [Program(count) for count in misses]
    source._counters = Counters()
    assert source.counters() == (7, 131, 1, 125, 5, 2, 1, 1, 1, 28, total)
    assert source.numbers() == {(0, 0): 10, (1, 0): 20, (0, 1): 100, (1, 1): 0}


async def test_gaps_in_the_numbers_are_exactly_what_was_lost(kind: Kind, tmp_path: Path) -> None:
    """On one CPU, with room again at the end, so that the last loss has a gap as well."""
    with flood.producing(cpu=0) as producer:
        async with flood_stream(tmp_path, producer.pid, 1 << 16, kind) as events:
            producer.start(5000)
            producer.wait()
            full = events.statistics()
            assert known(full.lost) > 0
            numbers = [(await anext(events)).sequence for _ in range(known(full.submitted))]
            producer.start(10)
            producer.wait()
            events.detach()
            numbers += [event.sequence async for event in events]
    assert numbers[-10:] == list(range(5000, 5010))
    assert numbers == sorted(set(numbers))
    assert 5010 - len(numbers) == full.lost == events.statistics().lost


def mapped(what: str) -> int:
    """How many mappings of this process show the kernel's buffers."""
    return sum(what in line for line in Path("/proc/self/maps").read_text().splitlines())


async def gone(kinds: dict[str, set[int]]) -> None:
    """Objects go after a grace period of RCU."""
    with anyio.fail_after(10):
        while any(objects.existing(kind, ids) for kind, ids in kinds.items()):
            await anyio.sleep(0.01)
