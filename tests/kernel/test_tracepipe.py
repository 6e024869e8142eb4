"""trace_pipe of the running kernel: every line, exactly, and nobody else's.

Other programs of this machine may print meanwhile: lines carry the number of the process that they
are about, and what counts losses reads a trace instance that knows of one process alone.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream.batch import EventBatch
from ebpfstream.errors import PrivilegeError, StreamBusyError, StreamClosedError, UnsupportedError
from ebpfstream.forwarding import forward
from ebpfstream.kernel import compiler, tracefs
from ebpfstream.kernel.bpf import Program, ProgramType
from ebpfstream.kernel.links import Link, Tracepoint
from ebpfstream.kernel.tracepipe import TraceLine, TracePipe
from ebpfstream.lost import Lost
from ebpfstream.trace_lines import TraceEvent, TraceStream
from tests.kernel import flood

pytestmark = pytest.mark.kernel

CPU = max(os.sched_getaffinity(0))

# Prints at each getppid(2) of one process; `number` counts them.
PROGRAM = """
BPF_ARRAY(numbers, u64, 1);
int hello(void *ctx)
{
	int zero = 0;
	u64 *number = numbers.lookup(&zero);
	if (!number || bpf_get_current_pid_tgid() >> 32 != TARGET)
		return 0;
	PRINT;
	*number += 1;
	return 0;
}
"""
NUMBERED = 'bpf_trace_printk("of %d: %d", TARGET, *number)'


async def loaded(target: int, statement: str = NUMBERED) -> Program:
    module = await compiler.compile(PROGRAM.replace("PRINT", statement), [f"-DTARGET={target}"])
    return Program.load(
        "hello",
        ProgramType.TRACEPOINT,
        module.functions["hello"],
        module.numbered,
        license=module.license,
        kernel_version=module.kernel_version,
    )


def attached(program: Program) -> closing[Link]:
    return closing(Link.attach(program, Tracepoint("syscalls", "sys_enter_getppid")))


@asynccontextmanager
async def printing(target: int, statement: str = NUMBERED) -> AsyncIterator[None]:
    with closing(await loaded(target, statement)) as program, attached(program):
        yield


async def taken(stream: TraceStream, count: int) -> list[TraceLine | Lost]:
    """The next so many, and what else comes soon afterwards."""
    with anyio.fail_after(60):
        found = [await anext(stream) for _ in range(count)]
    with anyio.move_on_after(0.1):
        found.append(await anext(stream))
    return found


async def lines_of(stream: TraceStream, target: int, count: int) -> list[TraceLine]:
    """The next lines about a process, that many."""
    lines: list[TraceLine] = []
    with anyio.fail_after(60):
        while len(lines) < count:
            line = await anext(stream)
            if isinstance(line, TraceLine) and line.message.startswith(f"of {target}:"):
                lines.append(line)
    return lines


def messages(target: int, count: int) -> list[str]:
    return [f"of {target}: {number}" for number in range(count)]


def trace_clock(folder: Path | None = None) -> float:
    text = ((folder or tracefs.folder()) / f"per_cpu/cpu{CPU}/stats").read_text()
    (now,) = re.findall(r"^now ts: +(\d+\.\d+)", text, re.M)
    return float(now)


@contextmanager
def instance() -> Iterator[Path]:
    """A trace instance: files like those of the machine, and lines that are read there alone."""
    folder = tracefs.folder() / "instances" / f"ebpfstream-test-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


@contextmanager
def instance_for(target: int, kilobytes: int) -> Iterator[Path]:
    """An instance for what one process does, with a buffer of that size for each CPU."""
    with instance() as folder:
        (folder / "set_event_pid").write_text(str(target))
        (folder / "buffer_size_kb").write_text(str(kilobytes))
        yield folder


@contextmanager
def child(code: str) -> Iterator[tuple[int, Callable[[str], str]]]:
    """A process that answers each line with a line; its number, and how to ask it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(line: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        return process.stdout.readline()

    with process:
        try:
            yield process.pid, ask
        finally:
            process.kill()


# Names as /proc/self/comm takes them.  The kernel notes a thread's name when the thread is switched
# away from after it has been traced, hence the sleep.
NAMED = f"""
import os, sys, time
os.sched_setaffinity(0, [{CPU}])
for line in sys.stdin:
    with open("/proc/self/comm", "wb") as comm:
        comm.write(bytes.fromhex(line))
    for _ in range(3):
        os.getppid()
        time.sleep(0.01)
    print("done", flush=True)
"""


@pytest.mark.anyio
async def test_every_line_in_order() -> None:
    with flood.producing() as producer:
        async with printing(producer.pid), TraceStream() as stream:
            producer.start(1000)
            await run_sync(producer.wait)
            lines = await lines_of(stream, producer.pid, 1000)
            producer.start(1)
            lines += await lines_of(stream, producer.pid, 1)
    assert [line.message for line in lines] == messages(producer.pid, 1001)
    assert {line.pid for line in lines} == {producer.pid}


@pytest.mark.anyio
async def test_fields() -> None:
    names = {
        b"plain": "plain",
        b"a-12 [003] d..1": "a-12 [003] d..1",
        b"two  blanks  ": "two  blanks  ",
        b"(a) <...>-1": "(a) <...>-1",
        b": 1.0: x: ": ": 1.0: x: ",
        b"new\nline-1": "new\nline-1",
        b"\xff\xfe caf\xc3\xa9": "\\xff\\xfe café",
        b"\\xff\x1b[1m": "\\x5cxff\x1b[1m",
        b"longer than the kernel keeps": "longer than the",
    }
    with child(NAMED) as (pid, ask):
        async with printing(pid), TraceStream() as stream:
            for number, (name, task) in enumerate(names.items()):
                before = trace_clock()
                await run_sync(ask, name.hex())
                *_, line = await lines_of(stream, pid, 3)
                assert (line.task, line.pid, line.cpu) == (task, pid, CPU)
                assert line.message == f"of {pid}: {3 * number + 2}"
                assert before <= line.timestamp <= trace_clock()
                assert re.fullmatch(r"\S{4,8}", line.flags)


@pytest.mark.anyio
async def test_messages() -> None:
    """One line each, whatever is printed: newlines, another line's looks, bytes that are no text."""
    forged = r"x\n            bash-1234    [003] d..21   123.456789: bpf_trace_printk: forged"
    statement = f"""
        switch (*number) {{
        case 0: bpf_trace_printk("of %d: newline\\n", TARGET); break;
        case 1: bpf_trace_printk("of %d: one\\n\\ntwo\\n\\n", TARGET); break;
        case 2: bpf_trace_printk("of %d: {forged}", TARGET); break;
        case 3: bpf_trace_printk("of %d: \\nCPU:1 [LOST 5 EVENTS]\\n", TARGET); break;
        case 4: bpf_trace_printk("of %d: caf\\xc3\\xa9", TARGET); break;
        case 5: bpf_trace_printk("of %d: ", TARGET); break;
        default: bpf_trace_printk("");
        }}"""
    with flood.producing() as producer, instance_for(producer.pid, 1024) as folder:
        async with (
            printing(producer.pid, statement),
            TraceStream(path=folder / "trace_pipe") as stream,
        ):
            producer.start(7)
            found = await taken(stream, 7)
    prefix = f"of {producer.pid}: "
    assert [line.message.removeprefix(prefix) for line in found if isinstance(line, TraceLine)] == [
        "newline",
        "one\n\ntwo",
        forged.replace(r"\n", "\n"),
        "\nCPU:1 [LOST 5 EVENTS]",
        "café",
        "",
        "",
    ]
    assert len(found) == 7


@pytest.mark.anyio
async def test_several_programs_and_other_events() -> None:
    """Programs share the pipe; what other events write to it is left out."""
    with flood.producing(CPU) as producer, instance_for(producer.pid, 1024) as folder:
        async with (
            printing(producer.pid, 'bpf_trace_printk("first %d", *number)'),
            printing(producer.pid, 'bpf_trace_printk("second %d", *number)'),
            TraceStream(path=folder / "trace_pipe") as stream,
        ):
            for event in ("syscalls/sys_enter_getppid", "syscalls/sys_exit_getppid"):
                (folder / "events" / event / "enable").write_text("1")
            producer.start(500)
            lines = await taken(stream, 1000)
            statistics = (folder / f"per_cpu/cpu{CPU}/stats").read_text()
    assert len(lines) == 1000
    found = [line.message for line in lines if isinstance(line, TraceLine)]
    for name in ("first", "second"):
        assert [message for message in found if name in message] == [f"{name} {i}" for i in range(500)]
    assert "read events: 2000\n" in statistics


def add_up(stretch: list[TraceLine | Lost], target: int) -> tuple[int, int]:
    """How many came and how many were lost, if each gap in the numbers is what was said to be lost."""
    expected = lost = 0
    for found in stretch:
        if isinstance(found, Lost):
            assert found.cpu == CPU
            assert found.count is not None
            expected += found.count
            lost += found.count
        else:
            assert found.message == f"of {target}: {expected}"
            expected += 1
    return expected - lost, lost


@pytest.mark.anyio
@pytest.mark.parametrize("meanwhile", [False, True], ids=["read afterwards", "read meanwhile"])
async def test_what_is_lost_is_counted(meanwhile: bool) -> None:
    calls = 200_000
    with flood.producing(CPU) as producer, instance_for(producer.pid, 16) as folder:
        async with printing(producer.pid), TraceStream(path=folder / "trace_pipe") as stream:
            producer.start(calls)
            if not meanwhile:
                await run_sync(producer.wait)
            found = []
            with anyio.fail_after(60):
                async for line in stream:
                    found.append(line)
                    if isinstance(line, TraceLine) and line.message.endswith(f": {calls - 1}"):
                        break
    came, lost = add_up(found, producer.pid)
    assert came + lost == calls
    assert came > 0
    assert lost > 0


@pytest.mark.anyio
@pytest.mark.parametrize("most", [None, 7])
async def test_lines_are_forwarded_until_it_is_detached(most: int | None) -> None:
    """What was printed before that comes as well, whoever prints on."""
    events: list[TraceEvent] = []

    async def keep(batch: EventBatch[Any]) -> None:
        events.extend(batch)

    with flood.producing(CPU) as producer, instance_for(producer.pid, 1024) as folder:
        async with printing(producer.pid):
            stream = TraceStream(path=folder / "trace_pipe")
            async with stream:
                producer.start(1000)
                await run_sync(producer.wait)
                if most is None:
                    stream.detach()
                statistics = await forward(stream, keep, count=most)
    expected = messages(producer.pid, 1000)[:most]
    assert [event.message for event in events] == expected
    assert {(event.pid, event.cpu) for event in events} == {(producer.pid, CPU)}
    assert [event.timestamp for event in events] == sorted(event.timestamp for event in events)
    assert abs(datetime.now(UTC) - events[0].time).total_seconds() < 60
    ledger = statistics.stream
    assert (ledger.tried, ledger.lost, ledger.delivered) == (None, 0, len(expected))
    assert ledger.received == ledger.delivered + ledger.unread
    assert most is not None or ledger.received == 1000
    assert statistics.complete


@pytest.mark.anyio
async def test_losses_are_forwarded_and_make_it_incomplete() -> None:
    calls = 200_000
    events, lost = list[str](), list[Lost]()

    async def keep(batch: EventBatch[Any]) -> None:
        lost.extend(batch.lost)
        events.extend(event.message for event in batch.with_lost(()))

    with flood.producing(CPU) as producer, instance_for(producer.pid, 16) as folder:
        async with printing(producer.pid), TraceStream(path=folder / "trace_pipe") as stream:
            producer.start(calls)
            await run_sync(producer.wait)
            stream.detach()
            statistics = await forward(stream, keep)
    assert statistics.stream.lost == sum(one.count or 0 for one in lost) > 0
    assert statistics.stream.delivered == len(events) == calls - statistics.stream.lost
    assert statistics.complete is False


@pytest.mark.anyio
async def test_what_was_printed_before_is_dropped() -> None:
    """And what is printed from `on_start` on is not."""
    with flood.producing(CPU) as producer, instance_for(producer.pid, 1024) as folder:
        # Enabled as something that was printed before needs it.
        (folder / "events/bpf_trace/bpf_trace_printk/enable").write_text("1")
        async with printing(producer.pid):

            def call() -> None:
                producer.start(3)
                producer.wait()

            await run_sync(call)
            async with TraceStream(on_start=call, path=folder / "trace_pipe") as stream:
                found = await taken(stream, 3)
    assert [line.message for line in found if isinstance(line, TraceLine)] == messages(producer.pid, 6)[3:]


@pytest.mark.anyio
async def test_opening_under_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, though more is printed than it takes out."""
    reads = 0
    read = TracePipe.read

    def flooded(pipe: TracePipe, most: int) -> list[bytes]:
        nonlocal reads
        reads += 1
        assert reads < 20
        for _ in range(most + 1):
            os.getppid()
        return read(pipe, most)

    with instance() as folder:
        # Enabled as something that was printed before needs it.
        (folder / "events/bpf_trace/bpf_trace_printk/enable").write_text("1")
        async with printing(os.getpid()):
            for _ in range(500):
                os.getppid()
            monkeypatch.setattr(TracePipe, "read", flooded)
            async with TraceStream(path=folder / "trace_pipe") as stream:
                monkeypatch.undo()
                (line,) = await lines_of(stream, os.getpid(), 1)
    assert line.message == f"of {os.getpid()}: 500"


@pytest.mark.anyio
async def test_each_single_line_wakes() -> None:
    """Again and again: each line is there before the next is asked for."""
    with flood.producing() as producer:
        async with printing(producer.pid), TraceStream() as stream:
            for number in range(2000):
                producer.start(1)
                (line,) = await lines_of(stream, producer.pid, 1)
                assert line.message == f"of {producer.pid}: {number}"
                await run_sync(producer.wait)


@pytest.mark.anyio
async def test_other_tasks_run_under_a_flood() -> None:
    """And a deadline takes effect, though the pipe is never empty."""
    ticks = lines = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.sleep(0.001)
            ticks += 1

    with flood.producing(CPU) as producer:
        async with printing(producer.pid), TraceStream() as stream:
            producer.start(100_000_000)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(tick)
                with anyio.move_on_after(1):
                    async for _ in stream:
                        lines += 1
                tasks.cancel_scope.cancel()
            with anyio.fail_after(10):
                await stream.aclose()
        producer.end()
    assert ticks > 20
    assert lines > 1000


@pytest.mark.anyio
async def test_the_option_block_does_not_make_it_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, the kernel says that the pipe is readable when it is not (trace_poll())."""
    reads = 0
    read = TracePipe.read

    def counting(pipe: TracePipe, most: int) -> list[bytes]:
        nonlocal reads
        reads += 1
        return read(pipe, most)

    with instance_for(os.getpid(), 64) as folder:
        (folder / "trace_options").write_text("block")
        async with TraceStream(path=folder / "trace_pipe") as stream:
            monkeypatch.setattr(TracePipe, "read", counting)
            with anyio.move_on_after(0.3) as scope:
                await anext(stream)
    assert scope.cancelled_caught
    assert 2 <= reads <= 40


@pytest.mark.anyio
async def test_an_event_that_was_disabled_is_enabled() -> None:
    """As `trace-cmd reset` does to all events, and as each is in a new instance."""
    enable = tracefs.folder() / "events/bpf_trace/bpf_trace_printk/enable"
    with flood.producing() as producer:
        async with printing(producer.pid):
            enable.write_text("0")
            try:
                producer.start(1)
                await run_sync(producer.wait)
                async with TraceStream() as stream:
                    producer.start(1)
                    (line,) = await lines_of(stream, producer.pid, 1)
            finally:
                enable.write_text("1")
    assert line.message == f"of {producer.pid}: 1"


@contextmanager
def reading(command: list[str], path: Path) -> Iterator[int]:
    """A process that has the file open as its standard input."""
    with path.open("rb", buffering=0) as file:
        process = subprocess.Popen(command, stdin=file, stdout=subprocess.DEVNULL)
    with process:
        try:
            yield process.pid
        finally:
            process.kill()


REMEDY = "each line goes to one reader only: end that one first (one stream has the lines of all programs)"


@pytest.mark.anyio
@pytest.mark.parametrize("file", ["trace_pipe", f"per_cpu/cpu{CPU}/trace_pipe"])
async def test_another_reader(file: str) -> None:
    path = tracefs.folder() / "trace_pipe"
    stream = TraceStream()
    with reading(["cat"], tracefs.folder() / file) as pid:
        await comm_of(pid, "cat")
        with pytest.raises(StreamBusyError) as caught:
            await anext(stream)
        assert str(caught.value) == f"{path} is being read by cat ({pid}), and {REMEDY}"
    # It was not opened, so it can be now.
    async with stream:
        with pytest.raises(StreamBusyError, match=r"is being read by this process itself, and each line"):
            await anext(TraceStream())


async def comm_of(pid: int, name: str) -> None:
    """Return when the process has executed its program."""
    with anyio.fail_after(10):
        while Path(f"/proc/{pid}/comm").read_text() != f"{name}\n":
            await anyio.sleep(0.001)


@pytest.mark.anyio
async def test_another_reader_that_cannot_be_seen() -> None:
    code = "from ebpfstream.kernel.tracepipe import TracePipe; TracePipe()"
    with reading(["cat"], tracefs.folder() / "trace_pipe"):
        done = await run_sync(
            lambda: subprocess.run(
                ["unshare", "--pid", "--mount-proc", "--fork", sys.executable, "-c", code],
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    assert "trace_pipe is being read by a process that this one cannot see, and each line" in done.stderr


def test_where_the_kernel_lets_several_in(tmp_path: Path) -> None:
    """As before Linux 6.6: a file stands in for the pipe, as that can be opened twice."""
    path = tmp_path / "trace_pipe"
    path.touch()
    with reading(["sleep", "100"], path) as pid:
        with pytest.raises(StreamBusyError, match=rf"{path} is being read by \w+ \({pid}\), and each line"):
            TracePipe(path)
        assert not open_pipes(path)
    pipe = TracePipe(path)
    assert pipe.read(1) == []
    with pytest.raises(StreamBusyError, match="is being read by this process itself"):
        TracePipe(path)
    pipe.close()


@pytest.mark.parametrize(
    ("option", "undo"),
    [
        (None, "echo 1 > {}/tracing_on"),
        ("raw", "for option in noraw; do"),
        ("hex", "for option in nohex; do"),
        ("bin", "for option in nobin; do"),
        ("fields", "for option in nofields; do"),
        ("latency-format", "for option in nolatency-format; do"),
        ("nocontext-info", "for option in context-info; do"),
    ],
)
def test_settings_with_which_nothing_would_come(option: str | None, undo: str) -> None:
    """The remedy is one that works."""
    with instance() as folder:
        if option is None:
            (folder / "tracing_on").write_text("0")
        elif option == "fields" and "nofields" not in (folder / "trace_options").read_text().split():
            return  # before Linux 6.4
        else:
            (folder / "trace_options").write_text(option)
        with pytest.raises(UnsupportedError) as caught:
            TracePipe(folder / "trace_pipe")
        message = str(caught.value)
        assert undo.format(folder) in message
        subprocess.run(["sh", "-c", message.partition(": ")[2]], check=True)
        TracePipe(folder / "trace_pipe").close()


def test_privileges() -> None:
    code = (
        "from ebpfstream.kernel.tracepipe import TracePipe\n"
        "try:\n"
        "    TracePipe()\n"
        "except PermissionError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    tracefs.folder()  # mounted
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert re.fullmatch(
        rf"{PrivilegeError.__name__} \S+/trace_pipe cannot be opened by this user \(Permission denied\): "
        r"run as root, or remount tracefs for the user's group .*\n",
        done.stdout,
    )


async def closed() -> None:
    """The thread that opened a stream may hold it for another moment."""
    with anyio.fail_after(10):
        while open_pipes():
            await anyio.sleep(0.001)


def open_pipes(path: Path | None = None) -> list[str]:
    """Descriptors of this process that are trace_pipes."""
    name = str(path or tracefs.folder() / "trace_pipe")
    return [
        link.name
        for link in Path("/proc/self/fd").iterdir()
        if link.is_symlink() and os.readlink(link) == name
    ]


@pytest.mark.anyio
async def test_wrong_use() -> None:
    never = TraceStream()
    await never.aclose()
    with pytest.raises(StreamClosedError, match="this stream is closed: call the function"):
        await anext(never)
    assert not open_pipes()
    async with TraceStream() as stream:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                with pytest.raises(StreamClosedError):
                    async for _ in stream:
                        pass

            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(StreamBusyError, match="another task is waiting for this stream's next line"):
                await anext(stream)
            with anyio.fail_after(10):
                await stream.aclose()
        with pytest.raises(StreamClosedError):
            await stream.aclose()
    assert not open_pipes()


@pytest.mark.anyio
async def test_a_closed_stream_hands_out_nothing() -> None:
    with flood.producing() as producer:
        async with printing(producer.pid), TraceStream() as stream:
            producer.start(10)
            await run_sync(producer.wait)
            await lines_of(stream, producer.pid, 1)
            await stream.aclose()
            with pytest.raises(StreamClosedError):
                await anext(stream)


@pytest.mark.anyio
@pytest.mark.parametrize("leave", ["break", "raise", "cancel"])
async def test_leaving_a_temporary_closes_the_pipe_at_once(leave: str) -> None:
    seen = False

    async def iterate(on_start: Callable[[], None]) -> None:
        nonlocal seen
        async for _ in TraceStream(on_start):
            seen = len(open_pipes()) == 1
            if leave == "break":
                break
            if leave == "raise":
                raise ZeroDivisionError
            await anyio.sleep_forever()

    with flood.producing() as producer:
        async with printing(producer.pid), anyio.create_task_group() as tasks:

            async def run() -> None:
                try:
                    await iterate(lambda: producer.start(1))
                except ZeroDivisionError:
                    pass
                await closed()

            gc.disable()
            try:
                tasks.start_soon(run)
                with anyio.fail_after(10):
                    while not seen:
                        await anyio.sleep(0.01)
                if leave == "cancel":
                    tasks.cancel_scope.cancel()
            finally:
                gc.enable()
    assert seen
    gc.collect()
    assert not open_pipes()


@pytest.mark.anyio
async def test_dropping_the_last_reference_closes_the_pipe() -> None:
    """Whoever else may have the pipe itself, such as the thread that opened it."""
    stream = TraceStream()
    await stream.__aenter__()
    pipe = stream._pipe
    assert pipe is not None
    assert open_pipes() == [str(pipe.fd)]
    del stream
    await closed()
    assert pipe.fd < 0


@pytest.mark.anyio
async def test_cancelled_while_it_opens_and_while_it_waits() -> None:
    for delay in (0.0, 0.02, 0.1):
        stream = TraceStream(on_start=lambda: time.sleep(0.05))
        with anyio.move_on_after(delay):
            async with stream:
                await anyio.sleep_forever()
        del stream
        assert not open_pipes()
    with flood.producing() as producer:
        async with printing(producer.pid), TraceStream() as lines:
            with anyio.move_on_after(0.05):
                while True:
                    await anext(lines)
            # Nothing is broken by it.
            producer.start(1)
            await lines_of(lines, producer.pid, 1)


@pytest.mark.anyio
async def test_a_start_that_fails_leaves_nothing() -> None:
    attempts = 0

    def fail_once() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ZeroDivisionError

    stream = TraceStream(fail_once)
    with pytest.raises(ZeroDivisionError):
        await anext(stream)
    assert not open_pipes()
    async with stream:
        assert (attempts, len(open_pipes())) == (2, 1)
    assert attempts == 2


@pytest.mark.anyio
async def test_nothing_is_left_after_many_rounds() -> None:
    async def round_trip() -> None:
        async with TraceStream() as stream:
            with anyio.move_on_after(0.001):
                await anext(stream)

    await round_trip()
    before, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(100):
        await round_trip()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() <= threads


def test_the_pipe_is_not_inherited() -> None:
    with closing(TracePipe()) as pipe:
        assert not os.get_inheritable(pipe.fd)
