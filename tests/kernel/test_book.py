"""The programs of the book, their C text unchanged, against processes whose number is known.

They attach with `attach_syscall`: to a kprobe where the kernel has kprobes (tests/vm runs this there),
else to a tracepoint.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import BPF, Lost, TraceLine
from ebpfstream.kernel import kprobes
from ebpfstream.kernel.bpf import wait_for_running_programs
from ebpfstream.kernel.links import Kprobe, Tracepoint
from examples import hello, hello_buffer, hello_map, hello_ring_buffer, hello_tail

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

TRUE = "/bin/true"
COMM = Path("/proc/self/comm").read_text().rstrip("\n")


def execute(times: int) -> list[int]:
    """One execve each, by as many processes: their numbers."""
    pids = []
    for _ in range(times):
        pids.append(os.posix_spawn(TRUE, [TRUE], {}))
        os.waitpid(pids[-1], 0)
    return pids


async def lines_of(bpf: BPF, attach: Any, act: Any) -> tuple[Any, list[TraceLine]]:
    """What `act` returns, and all lines that were printed while it ran."""
    lines: list[TraceLine] = []
    result: Any = None
    stream = bpf.trace()
    async with stream, anyio.create_task_group() as tasks:
        attach()

        async def run() -> None:
            nonlocal result
            result = await run_sync(act)
            bpf.detach()
            await run_sync(wait_for_running_programs)
            await anyio.sleep(0.5)  # the pipe has no end to wait for
            tasks.cancel_scope.cancel()

        tasks.start_soon(run)
        async for line in stream:
            if not isinstance(line, Lost):
                lines.append(line)
    return result, lines


async def test_hello() -> None:
    async with BPF(text=hello.PROGRAM) as bpf:
        pids, lines = await lines_of(
            bpf, lambda: bpf.attach_syscall("execve", fn_name="hello"), lambda: execute(20)
        )
    ours = [line for line in lines if line.pid in pids]
    assert [line.pid for line in ours] == pids
    assert {line.message for line in ours} == {"Hello World!"}


async def test_hello_map() -> None:
    user, times = 54321, 15
    async with BPF(text=hello_map.PROGRAM) as bpf:
        bpf.attach_syscall("execve", fn_name="hello")
        for _ in range(times):
            subprocess.run([TRUE], user=user, check=True)
        assert bpf.maps["counter_table"][user] == times
        async for counts in bpf.snapshots("counter_table", every=0.1):
            assert counts[user] == times
            break


@pytest.mark.parametrize("program", [hello_buffer.PROGRAM, hello_ring_buffer.PROGRAM], ids=["perf", "ring"])
async def test_hello_buffer(program: str) -> None:
    async with BPF(text=program) as bpf:
        events = bpf.events("output")
        link = bpf.attach_syscall("execve", fn_name="hello")
        if kprobes.kprobes_available():
            assert link.hook == Kprobe(bpf.get_syscall_fnname("execve"))
        else:
            assert link.hook == Tracepoint("syscalls", "sys_enter_execve")
        pids = execute(50)
        bpf.detach()
        found = [event async for event in events if event.pid in pids]
        assert type(found[0]) is bpf.event_type("output")
    assert [vars(event) for event in found] == [
        {"pid": pid, "uid": os.getuid(), "command": COMM, "message": "Hello World"} for pid in pids
    ]
    statistics = events.statistics()
    assert statistics.received == statistics.delivered
    assert statistics.lost == (0 if "PERF" in program else None)
    assert (statistics.tried, statistics.submitted, statistics.rejected) == (None, None, None)


async def test_hello_ring_buffer_with_a_class() -> None:
    async with BPF(text=hello_ring_buffer.PROGRAM) as bpf:
        events = bpf.events("output", hello_ring_buffer.Hello)
        bpf.attach_syscall("execve", fn_name="hello")
        pids = execute(5)
        bpf.detach()
        found = [event async for event in events if event.pid in pids]
    assert found == [hello_ring_buffer.Hello(pid, os.getuid(), COMM, "Hello World") for pid in pids]


RESERVE = """
BPF_RINGBUF_OUTPUT(output, 8);
struct data_t { int pid; int uid; char command[16]; };
int hello(void *ctx) {
    int pid = bpf_get_current_pid_tgid() >> 32;
    struct data_t *data = output.ringbuf_reserve(sizeof(struct data_t));
    if (!data)
        return 0;
    data->pid = pid;
    data->uid = bpf_get_current_uid_gid();
    bpf_get_current_comm(&data->command, sizeof(data->command));
    if (pid % 2)
        output.ringbuf_discard(data, 0);
    else
        output.ringbuf_submit(data, 0);
    return 0;
}
"""


async def test_reserve_submit_discard() -> None:
    async with BPF(text=RESERVE) as bpf:
        events = bpf.events("output")
        bpf.attach_syscall("execve", fn_name="hello")
        pids = execute(40)
        bpf.detach()
        found = [(event.pid, event.uid, event.command) async for event in events if event.pid in pids]
    assert found == [(pid, os.getuid(), COMM) for pid in pids if pid % 2 == 0]


TIMERS = """
import ctypes, os
syscall = ctypes.CDLL(None).syscall
for number, times in ((222, 3), (223, 2), (224, 1), (226, 4), (110, 7)):
    for _ in range(times):
        syscall(number, -1, 0, 0, 0)
print(os.getpid())
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the book's numbers are those of x86-64")
@pytest.mark.parametrize("first", ["calls", "attach"])
async def test_hello_tail(first: str) -> None:
    """Of the calls that have an entry in the book's array; it knows 300."""
    others = dict.fromkeys(range(300), "ignore_opcode")
    del others[110]
    calls = others | {59: "hello_execve"} | dict.fromkeys(range(222, 227), "hello_timer")
    async with BPF(text=hello_tail.PROGRAM) as bpf:

        def attach() -> None:
            if first == "calls":
                bpf.tail_calls("syscall", calls)
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="hello")
            if first == "attach":
                bpf.tail_calls("syscall", calls)

        def act() -> int:
            return int(subprocess.run([sys.executable, "-c", TIMERS], capture_output=True, check=True).stdout)

        pid, lines = await lines_of(bpf, attach, act)
    beyond = re.compile(r"Another syscall: [3-9]\d\d")
    assert Counter(
        line.message for line in lines if line.pid == pid and not beyond.fullmatch(line.message)
    ) == {
        "Executing a program": 1,
        "Creating a timer": 3,
        "Some other timer operation": 3,
        "Deleting a timer": 4,
        "Another syscall: 110": 7,
    }


ROOT = Path(__file__).parents[2]
SHOWS = {
    "hello.py": "Hello World!",
    "hello_map.py": "ID 0: ",
    "hello_buffer.py": "Hello World",
    "hello_ring_buffer.py": "Hello World",
    "hello_tail.py": "Executing a program",
}


@pytest.mark.parametrize("name", SHOWS)
def test_example_prints_what_the_book_shows(name: str) -> None:
    example = subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "examples" / name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert example.stdout is not None
    with subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true; done"]) as producer:
        found = next((line for line in example.stdout if SHOWS[name] in line), None)
        producer.kill()
    example.send_signal(signal.SIGINT)
    _, errors = example.communicate(timeout=60)
    assert found, errors
    assert (errors, example.returncode) == ("", 0)


def test_there_is_a_test_for_each_example() -> None:
    files = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert files == {*SHOWS, "hello.c"}  # tests/kernel/test_program.py
