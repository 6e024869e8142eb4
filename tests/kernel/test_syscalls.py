"""trace_syscalls against processes that make exactly the calls that they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import ArgumentError, EventStream, SyscallEvent, trace_syscalls
from ebpfstream.kernel.buffers import Kind
from ebpfstream.syscall_names import numbers
from ebpfstream.tracers import syscalls
from tests.kernel import objects
from tests.kernel.calling import MACHINE, Caller, bare_program

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


@pytest.fixture
def caller() -> Iterator[Caller]:
    with Caller() as caller:
        yield caller


async def rest(events: EventStream[SyscallEvent]) -> list[SyscallEvent]:
    """All that there is, after detaching."""
    events.detach()
    return [event async for event in events]


def balanced(events: EventStream[SyscallEvent]) -> bool:
    """Whether the closed stream's ledger says that all there was has been received."""
    statistics = events.statistics()
    assert statistics.tried == statistics.submitted == statistics.received == statistics.delivered
    return statistics.complete is True


@pytest.mark.parametrize("buffer", ["ring", "perf"])
@pytest.mark.parametrize("result", [False, True])
async def test_exactly_the_calls_that_were_made(caller: Caller, buffer: Kind, result: bool) -> None:
    """By name and by number, with all that the caller knows of them."""
    wanted: Any = ("getppid", numbers()["getuid"])
    before = time.monotonic_ns(), datetime.now(UTC)
    async with trace_syscalls(*wanted, result=result, pid=caller.pid, buffer=buffer) as events:
        await run_sync(lambda: caller.call("getppid", *range(101, 107), times=1000))
        await run_sync(lambda: caller.call("getgid", times=500))
        await run_sync(lambda: caller.call("getuid", times=700))
        found = await rest(events)
    after = time.monotonic_ns(), datetime.now(UTC)
    assert balanced(events)
    assert [event.name for event in found] == ["getppid"] * 1000 + ["getuid"] * 700
    first = found[0]
    assert first == SyscallEvent(
        pid=caller.pid,
        uid=os.getuid(),
        comm=caller.comm,
        message=f"getppid() = {os.getpid()}" if result else "getppid()",
        name="getppid",
        number=numbers()["getppid"],
        arguments=(101, 102, 103, 104, 105, 106),
        result=os.getpid() if result else None,
        error="",
        duration=first.duration,
        tid=caller.pid,
        gid=os.getgid(),
        ppid=os.getpid(),
        cpu=first.cpu,
        program=2 if result else 0,
        weight=1,
        sequence=0,
        time=first.time,
        monotonic=first.monotonic,
    )
    assert {event.result for event in found} == ({os.getpid(), os.getuid()} if result else {None})
    if result:
        assert all(event.duration is not None and event.duration > 0 for event in found)
    else:
        assert {event.duration for event in found} == {None}
    assert before[0] <= first.monotonic
    times = [event.monotonic for event in found]
    assert times == sorted(times)
    assert times[-1] <= after[0]
    margin = timedelta(milliseconds=1)
    assert before[1] - margin <= first.time <= after[1] + margin
    following: dict[int, int] = {}
    for event in found:
        assert event.sequence == following.get(event.cpu, 0)
        following[event.cpu] = event.sequence + 1


async def test_results_and_errors(caller: Caller) -> None:
    wanted = ("close", "nanosleep", "openat", "mmap")
    async with trace_syscalls(*wanted, result=True, pid=caller.pid) as events:
        caller.call("close", -1)
        caller.call("nanosleep", caller.space, 0)  # zero seconds
        caller.call("openat", -100, caller.space, 0x80000, 0)  # the empty path
        caller.call("mmap", 0, 4096, 0, 0x22, -1, 0)
        caller.call("nanosleep", 8)
        found = await rest(events)
    assert balanced(events)
    closed, slept, opened, mapped, failed = found
    assert (closed.result, closed.error, closed.arguments[0]) == (-9, "EBADF", 2**64 - 1)
    assert closed.message == "close(0xffffffffffffffff) = -9 EBADF"
    assert (slept.result, slept.error) == (0, "")
    assert slept.message == f"nanosleep({caller.space:#x}, 0x0) = 0"
    assert (opened.result, opened.error) == (-2, "ENOENT")
    assert opened.message == f"openat(0xffffffffffffff9c, {caller.space:#x}, 0x80000, 0x0) = -2 ENOENT"
    assert mapped.result is not None
    assert mapped.error == ""
    assert mapped.message == f"mmap(0x0, 0x1000, 0x0, 0x22, 0xffffffffffffffff, 0x0) = {mapped.result:#x}"
    assert (failed.result, failed.error) == (-14, "EFAULT")


async def test_a_duration_is_that_of_the_call() -> None:
    """A sleep cannot be shorter than it should be."""
    async with trace_syscalls("clock_nanosleep", result=True, ppid=os.getpid()) as events:
        await run_sync(lambda: subprocess.run(["sleep", "0.05"], check=True))
        (slept,) = await rest(events)
    assert slept.result == 0
    assert slept.duration is not None
    assert slept.duration >= 50_000_000
    assert slept.monotonic + slept.duration <= time.monotonic_ns()


async def test_every_call_of_a_program(tmp_path: Path) -> None:
    """One that makes four, from its exec to its end."""
    program = tmp_path / "bare"
    bare_program(program, ("getppid", 1), ("close", -1), ("getuid", 2), ("exit_group", 7))
    async with trace_syscalls(result=True, ppid=os.getpid()) as events:
        child = await run_sync(lambda: subprocess.Popen([program]))
        assert await run_sync(child.wait) == 7
        found = await rest(events)
    assert balanced(events)
    calls = [(event.name, event.result, event.program) for event in found if event.pid == child.pid]
    begin = next(index for index, call in enumerate(calls) if call[0] == "execve")
    assert calls[begin:] == [
        ("execve", 0, 2),
        ("getppid", os.getpid(), 2),
        ("close", -9, 2),
        ("getuid", os.getuid(), 2),
        ("exit_group", None, 0),
    ]
    last = found[-1]
    assert (last.message, last.duration, last.error) == ("exit_group(0x7)", None, "")


async def test_all_but_some(caller: Caller) -> None:
    """Nothing but what Python does between being told and saying that it is done."""
    ignored: list[str | int] = ["read", numbers()["write"], "brk", "mmap", "munmap", "getppid"]
    async with trace_syscalls(ignore=ignored, pid=caller.pid) as events:
        caller.call("getppid", times=100)
        caller.call("getuid", times=100)
        caller.call(999, times=3)  # there is none
        found = await rest(events)
    assert [event.name for event in found] == ["getuid"] * 100 + ["syscall_999"] * 3
    assert found[-1].number == 999
    async with trace_syscalls("getppid", "getuid", ignore="getppid", pid=caller.pid) as events:
        caller.call("getppid")
        caller.call("getuid")
        found = await rest(events)
    assert [event.name for event in found] == ["getuid"]


async def test_a_number_without_a_name_or_beyond_all(caller: Caller) -> None:
    async with trace_syscalls(999, result=True, pid=caller.pid) as events:
        caller.call(999, 1, 2, 3, 4, 5, 6)
        caller.call(1023)
        caller.call(1024)
        caller.call(1024 + 999)
        caller.call(2**31 + 999)
        caller.call(-1)
        found = await rest(events)
    assert [event.message for event in found] == ["syscall_999(0x1, 0x2, 0x3, 0x4, 0x5, 0x6) = -38 ENOSYS"]


async def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError, match=r"no system call 'opnat' on \w+; did you mean .*openat"):
        trace_syscalls("opnat")
    with pytest.raises(ArgumentError, match="there is no system call 'xyzzy'"):
        trace_syscalls(ignore=["xyzzy"])
    for number in (-1, 1024):
        with pytest.raises(ArgumentError, match=f"no system call {number}: .*0 to 1023"):
            trace_syscalls(number)
    with pytest.raises(ArgumentError, match="nothing is left to trace"):
        trace_syscalls("close", ignore=["close"])


async def test_a_thread_that_is_not_the_leader_executes_a_program() -> None:
    """Its number changes within the call."""
    code = (
        "import threading, os\n"
        "def go():\n"
        "    print(threading.get_native_id(), flush=True)\n"
        "    os.execv('/bin/true', ['true'])\n"
        "threading.Thread(target=go).start()\n"
        "threading.Event().wait()\n"
    )
    async with trace_syscalls("execve", result=True) as events:
        child = await run_sync(lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        output, _ = await run_sync(child.communicate)
        found = [event for event in await rest(events) if event.pid == child.pid and event.result == 0]
    assert balanced(events)
    assert [event.tid for event in found] == [child.pid, int(output)]
    assert found[1].tid != child.pid


async def test_neither_the_caller_nor_its_parent_is_a_leader() -> None:
    """Both are told by the numbers of their processes."""
    code = (
        "import os, threading\n"
        "def go():\n"
        "    print(threading.get_native_id(), os.getppid(), flush=True)\n"
        "thread = threading.Thread(target=go)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    async with trace_syscalls("getppid") as events:
        child = await run_sync(lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        output, _ = await run_sync(child.communicate)
        found = [event for event in await rest(events) if event.pid == child.pid]
    thread, parent = map(int, output.split())
    assert parent == os.getpid()
    assert [(event.tid, event.ppid) for event in found] == [(thread, parent)]
    assert thread != child.pid


async def test_calls_that_had_begun_before_are_no_events(caller: Caller) -> None:
    """The child waits in read(2) when tracing begins, and when it ends."""
    async with trace_syscalls("read", "getppid", result=True, pid=caller.pid) as events:
        caller.call("getppid")
        caller.call("getuid")
        found = await rest(events)
    names = [event.name for event in found]
    assert names[0] == "getppid"
    assert names.count("getppid") == 1
    assert len(names) == 2  # the read that "getuid" ended
    assert balanced(events)


async def test_a_call_that_a_signal_interrupts(caller: Caller) -> None:
    """Stopped and continued, a sleep goes on by another call."""
    name = "clock_nanosleep"
    async with trace_syscalls(name, "restart_syscall", result=True, ppid=os.getpid()) as events:
        child = await run_sync(lambda: subprocess.Popen(["sleep", "0.5"]))
        for number in (signal.SIGSTOP, signal.SIGCONT):
            await anyio.sleep(0.1)
            child.send_signal(number)
        assert await run_sync(child.wait) == 0
        found = await rest(events)
    assert [(event.name, event.result, event.error) for event in found] == [
        (name, -516, "ERESTART_RESTARTBLOCK"),
        ("restart_syscall", 0, ""),
    ]


async def test_a_thread_that_ends_within_a_call() -> None:
    """reboot(2) of a pid namespace of its own is one that nobody returns from (reboot_pid_ns())."""
    code = (
        "import ctypes, os, sys\n"
        "assert os.getpid() == 1 and os.stat('/proc/self/ns/pid').st_ino != int(sys.argv[1])\n"
        "ctypes.CDLL(None).reboot(0x4321fedc)\n"
    )
    ours = str(os.stat("/proc/self/ns/pid").st_ino)
    argv = ["unshare", "--pid", "--fork", sys.executable, "-I", "-S", "-c", code, ours]
    async with trace_syscalls("reboot", result=True) as events:
        await run_sync(lambda: subprocess.run(argv))
        (event,) = await rest(events)
    assert balanced(events)
    assert (event.name, event.result, event.duration, event.program) == ("reboot", None, None, 3)
    assert event.arguments[:3] == (0xFEE1DEAD, 0x28121969, 0x4321FEDC)


if MACHINE == "x86_64":

    async def test_calls_of_32_bit_programs_are_left_out(caller: Caller) -> None:
        """64 is semget for 64-bit programs, and getppid for others."""
        async with trace_syscalls("semget", "getppid", result=True, pid=caller.pid) as events:
            caller.call("semget", 0, 0, 0)
            result = caller.call_32_bit(64)
            found = await rest(events)
        assert [event.message for event in found] == ["semget(0x0, 0x0, 0x0) = -22 EINVAL"]
        if result is not None:
            assert result == os.getpid()
            assert (events.statistics().rejected or 0) >= 1


async def test_own_calls_can_be_left_out() -> None:
    def ask() -> None:
        for _ in range(10):
            os.getppid()
        # The caller's parent is a shell: that is nobody whom this process has started.
        subprocess.run(["sh", "-c", f"{sys.executable} -I -S -c 'import os; os.getppid()'; true"], check=True)

    async with trace_syscalls("getppid", exclude_self=True) as events:
        await run_sync(ask)
        found = await rest(events)
    assert os.getpid() not in {event.pid for event in found} | {event.ppid for event in found}
    assert "python" in {event.comm[:6] for event in found}
    assert (events.statistics().rejected or 0) >= 10


async def test_what_has_no_room_is_counted(caller: Caller) -> None:
    """On one CPU, so that the gaps in the numbers are all of it."""
    os.sched_setaffinity(caller.pid, {0})
    async with trace_syscalls("getppid", result=True, pid=caller.pid, buffer_size=4096) as events:
        await run_sync(lambda: caller.call("getppid", times=5000))
        numbers_seen = [event.sequence for event in await rest(events)]
    statistics = events.statistics()
    assert statistics.tried == 5000
    assert numbers_seen == list(range(len(numbers_seen)))
    assert statistics.lost == 5000 - len(numbers_seen) > 0


async def test_too_many_calls_that_wait_are_counted(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_IN_FLIGHT", 1)
    with Caller() as other:
        async with trace_syscalls("getppid", "pause", "ppoll", result=True, ppid=os.getpid()) as events:
            other.start("ppoll", 0, 0, 0, 0)
            while not Path(f"/proc/{other.pid}/syscall").read_text().startswith(f"{numbers()['ppoll']} "):
                await anyio.sleep(0.01)
            caller.call("getppid", times=5)
            os.kill(other.pid, signal.SIGKILL)
            await anyio.sleep(0)
            other.close()
            caller.call("getppid", times=3)
            found = await rest(events)
    assert [event.name for event in found] == ["ppoll"] + ["getppid"] * 3
    assert found[0].error == "ERESTARTNOHAND"
    statistics = events.statistics()
    assert (statistics.tried, statistics.lost, statistics.submitted) == (9, 5, 4)


async def test_nothing_is_left(caller: Caller) -> None:
    held = {}
    async with trace_syscalls("getppid", result=True, pid=caller.pid) as events:
        for kind in ("link", "prog", "map"):
            held[kind] = objects.held(kind)
    assert {kind: len(ids) for kind, ids in held.items()} == {"link": 3, "prog": 5, "map": 6}
    assert events.statistics().complete
    for kind, ids in held.items():
        assert await run_sync(objects.left, kind, ids) == set()
