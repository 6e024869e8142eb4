"""trace_execve against what the parent, /proc and the clock know."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import ExecEvent, trace_execve
from ebpfstream.kernel.buffers import Kind

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

TRUE = "/bin/true"


async def execs_of(
    act: Callable[[], Any], wanted: Callable[[ExecEvent], bool], **options: Any
) -> list[ExecEvent]:
    """The wanted ones of all execs that happened while `act` ran."""
    async with trace_execve(**options) as events:
        await run_sync(act)
        events.detach()
        found = [event async for event in events if wanted(event)]
    statistics = events.statistics()
    assert statistics.tried == statistics.submitted == statistics.received
    assert statistics.complete
    return found


async def exec_of(*argv: str | bytes, **options: Any) -> tuple[ExecEvent, subprocess.Popen[bytes]]:
    """The one exec of the process that this starts, with the process."""
    children: list[subprocess.Popen[bytes]] = []

    def act() -> None:
        child = subprocess.Popen(argv, **options)
        children.append(child)
        child.wait()

    found = await execs_of(act, lambda event: event.pid == children[0].pid)
    assert len(found) == 1
    return found[0], children[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("buffer", ["ring", "perf"])
async def test_ten_thousand_processes_from_several_threads(buffer: Kind) -> None:
    """Exactly 10,000 events, each with its own arguments, and the ledger says so."""
    threads, each = 4, 2500
    mark = f"ebpfstream-{os.getpid()}-{time.monotonic_ns()}"

    def start(thread: int) -> None:
        for number in range(each):
            pid = os.posix_spawn(TRUE, [TRUE, mark, str(thread), str(number)], {})
            os.waitpid(pid, 0)
            pids.append(pid)

    def act() -> None:
        workers = [threading.Thread(target=start, args=(thread,)) for thread in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    pids: list[int] = []
    seen: list[ExecEvent] = []
    async with trace_execve() as events, anyio.create_task_group() as tasks:

        async def produce() -> None:
            await run_sync(act)
            events.detach()

        tasks.start_soon(produce)
        others = 0
        async for event in events:
            if event.args[1:2] == (mark,):
                seen.append(event)
            else:
                others += 1
    assert len(seen) == threads * each
    assert {event.args for event in seen} == {
        (TRUE, mark, str(thread), str(number)) for thread in range(threads) for number in range(each)
    }
    assert sorted(event.pid for event in seen) == sorted(pids)
    assert all(event.message == f"{TRUE} {mark} {event.args[2]} {event.args[3]}" for event in seen)
    statistics = events.statistics()
    assert statistics.tried == statistics.submitted == statistics.received == statistics.delivered
    assert statistics.delivered == threads * each + others
    assert (statistics.lost, statistics.misses, statistics.undecodable, statistics.unread) == (0, 0, 0, 0)


async def test_what_the_parent_knows() -> None:
    before = datetime.now(UTC)
    monotonic = time.monotonic_ns()
    event, child = await exec_of(TRUE, "one", "two words", "it's", "")
    assert event == ExecEvent(
        pid=child.pid,
        uid=os.getuid(),
        comm="true",
        message=f"{TRUE} one 'two words' 'it'\"'\"'s' ''",
        ppid=os.getpid(),
        tid=child.pid,
        gid=os.getgid(),
        filename=TRUE,
        args=(TRUE, "one", "two words", "it's", ""),
        args_size=len(TRUE) + 1 + 4 + 10 + 5 + 1,
        args_truncated=False,
        args_unreadable=False,
        retval=0,
        error="",
        by_descriptor=False,
        cwd=str(Path.cwd()),
        cwd_truncated=False,
        parent_comm=Path(f"/proc/{os.getpid()}/comm").read_text().strip(),
        start_time=event.start_time,
        start_monotonic=event.start_monotonic,
        session=os.getsid(0),
        tty=event.tty,
        pid_namespace=Path("/proc/self/ns/pid").stat().st_ino,
        namespace_pid=child.pid,
        cgroup_id=event.cgroup_id,
        container_id=None,
        program=0,
        cpu=event.cpu,
        weight=1,
        sequence=event.sequence,
        time=event.time,
        monotonic=event.monotonic,
    )
    assert event.cpu in os.sched_getaffinity(0)
    assert monotonic < event.start_monotonic < event.monotonic < time.monotonic_ns()
    age = (event.time - event.start_time) / timedelta(microseconds=1)
    assert age == pytest.approx((event.monotonic - event.start_monotonic) / 1000, abs=1)
    slack = timedelta(milliseconds=1)  # between the reading of the two clocks
    assert before - slack < event.time < datetime.now(UTC) + slack


async def test_proc_agrees() -> None:
    """A process that stays long enough to be looked at, in a cgroup of its own if there is cgroup v2."""
    mount = next(
        line.split()[1]
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.split()[2] == "cgroup2"
    )
    group = Path(mount) / f"ebpfstream-test-{os.getpid()}"
    group.mkdir()
    try:
        shell = f"echo $$ > {group}/cgroup.procs; exec sleep 60 0.01"
        looked_at: dict[str, Any] = {}
        started: list[int] = []

        def act() -> None:
            child = subprocess.Popen(["sh", "-c", shell], stderr=subprocess.DEVNULL)
            proc = Path(f"/proc/{child.pid}")
            while not (proc / "cmdline").read_text().startswith("sleep\0"):
                time.sleep(0.01)
            looked_at.update(
                pid=child.pid,
                comm=(proc / "comm").read_text().strip(),
                args=tuple((proc / "cmdline").read_text().removesuffix("\0").split("\0")),
                cgroup_id=group.stat().st_ino,
                ppid=int((proc / "stat").read_text().split()[3]),
                cwd=str((proc / "cwd").readlink()),
                session=int((proc / "stat").read_text().split()[5]),
            )
            started.append(int((proc / "stat").read_text().split()[21]))
            child.kill()
            child.wait()

        found = await execs_of(act, lambda event: event.pid == looked_at["pid"])
    finally:
        group.rmdir()
    assert [event.comm for event in found] == ["sh", "sleep"]
    assert {name: getattr(found[1], name) for name in looked_at} == looked_at
    # /proc tells ticks of a clock that goes on while the machine sleeps.
    slept = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    ticks = (found[1].start_monotonic + slept) * os.sysconf("SC_CLK_TCK") // 10**9
    assert abs(ticks - started[0]) <= 1


async def test_another_user() -> None:
    event, _ = await exec_of("/bin/true", user=65534, group=65533, extra_groups=[])
    assert (event.uid, event.gid) == (65534, 65533)


async def test_a_script_has_its_interpreter_in_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/sh -e\ntrue\n")
    script.chmod(0o755)
    event, _ = await exec_of(str(script), "argument")
    assert event.filename == str(script)
    assert event.args == ("/bin/sh", "-e", str(script), "argument")
    assert event.comm == "script.sh"


async def test_bytes_of_every_kind() -> None:
    words = [b"new\nline", b"\xff\xfe", "é".encode(), b"\x1b[31m", b'"', rb"\x41", b"\\"]
    event, _ = await exec_of(TRUE, *words)
    assert event.args == (TRUE, "new\nline", "\\xff\\xfe", "é", "\x1b[31m", '"', "\\x5cx41", "\\")
    assert event.message == TRUE + r""" $'new\nline' $'\xff\xfe' 'é' $'\e[31m' '"' $'\x5cx41' '\'"""


async def test_no_arguments_at_all() -> None:
    """Linux ≥ 5.18 gives such a program one empty argument (bprm_stack_limits(), fs/exec.c)."""
    pid = 0

    def act() -> None:
        nonlocal pid
        pid = os.fork()
        if not pid:
            ctypes.CDLL(None).execve(TRUE.encode(), None, None)
            os._exit(1)
        os.waitpid(pid, 0)

    (event,) = await execs_of(act, lambda event: event.pid == pid)
    assert event.args == ("",)
    assert event.filename == TRUE
    assert event.message == "''"


@pytest.mark.parametrize("size", [16384 - len(TRUE) - 2, 16384 - len(TRUE) - 1, 100_000])
async def test_long_arguments_say_when_they_are_cut(size: int) -> None:
    event, _ = await exec_of(TRUE, "y" * size)
    whole = len(TRUE) + 1 + size + 1
    assert event.args_size == whole
    assert event.args_truncated == (whole > 16384)
    kept = min(size, 16384 - len(TRUE) - 1)
    assert event.args == (TRUE, "y" * kept)


async def test_many_arguments() -> None:
    event, _ = await exec_of(TRUE, *[f"x{number}" for number in range(500)])
    assert event.args == (TRUE, *[f"x{number}" for number in range(500)])
    assert not event.args_truncated


async def test_a_long_path_and_a_long_name(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 4000:
        folder = folder / ("d" * min(250, 4080 - len(str(folder))))
    name = "a-name-of-more-than-15-bytes"
    os.makedirs(folder)
    here = os.open(folder, os.O_PATH)
    path = str(folder / name)[:4095]
    try:
        os.link(TRUE, path) if os.stat(TRUE).st_dev == os.stat(folder).st_dev else Path(path).write_bytes(
            Path(TRUE).read_bytes()
        )
        os.chmod(path, 0o755)
        event, _ = await exec_of(path)
    finally:
        os.close(here)
    assert event.filename == path
    assert event.comm == os.path.basename(path)[:15]


async def test_exec_by_descriptor() -> None:
    """execveat(2) with AT_EMPTY_PATH, as fexecve(3) does."""
    pid = 0

    def act() -> None:
        nonlocal pid
        fd = os.open(TRUE, os.O_RDONLY)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", f"import os; os.execve({fd}, ['by-descriptor', 'x'], {{}})"],
            {},
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, fd)],
        )
        os.waitpid(pid, 0)
        os.close(fd)

    python, program = await execs_of(act, lambda event: event.pid == pid)
    assert python.filename == sys.executable
    assert program.args == ("by-descriptor", "x")
    assert program.filename.startswith("/dev/fd/")
    assert (python.by_descriptor, program.by_descriptor) == (False, True)


async def test_exec_by_another_thread_than_the_leader() -> None:
    code = (
        "import threading, os, sys\n"
        "def go():\n"
        "    print(threading.get_native_id(), flush=True)\n"
        f"    os.execv('{TRUE}', ['from-a-thread'])\n"
        "threading.Thread(target=go).start()\n"
        "threading.Event().wait()\n"
    )
    outputs: list[Any] = []

    def act() -> None:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        outputs.extend((child.pid, int(child.communicate()[0])))

    python, program = await execs_of(act, lambda event: event.pid == outputs[0])
    assert python.tid == python.pid
    assert program.args == ("from-a-thread",)
    assert program.pid == outputs[0]
    assert program.tid == outputs[1] != program.pid


async def test_a_failed_exec_is_no_event() -> None:
    def act() -> None:
        with pytest.raises(FileNotFoundError):
            subprocess.run(["/nonexistent/program"])

    assert await execs_of(act, lambda event: event.ppid == os.getpid()) == []


async def test_sequence_numbers_count_each_cpu() -> None:
    def act() -> None:
        for cpu in (0, 1):
            for _ in range(5):
                subprocess.run([TRUE], preexec_fn=lambda cpu=cpu: os.sched_setaffinity(0, {cpu}))  # type: ignore[misc]

    numbers: dict[int, list[int]] = {}
    for event in await execs_of(act, lambda event: True):
        numbers.setdefault(event.cpu, []).append(event.sequence)
    assert {0, 1} <= set(numbers)
    assert all(found == list(range(len(found))) for found in numbers.values())
