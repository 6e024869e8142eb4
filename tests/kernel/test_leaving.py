"""Leaving is clean: after many rounds, errors, cancellation at every await, SIGKILL; and nobody inherits anything."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ebpfstream import BPF, CorruptBufferError, EventStream, count_execve, trace_execve, trace_syscalls
from ebpfstream.kernel import compiler
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.compiler import Module
from ebpfstream.snapshots import Snapshots
from ebpfstream.syscall_names import numbers
from ebpfstream.testing import cancelled_at, ways_to_cancel
from ebpfstream.trace_lines import TraceStream
from tests.kernel import flood, objects
from tests.kernel.flood import FloodEvent

pytestmark = pytest.mark.kernel

WORKERS: Final = 4
"""Rounds that go on at the same time: each waits for the kernel mostly."""

# A call of getppid() in this process submits to all outputs, counts, and, once `say` is attached, prints.
TEXT: Final = (
    """
struct call { u64 number; };
BPF_HASH(counts, u32, u64);
"""
    + "".join(
        f"BPF_RINGBUF_OUTPUT(ring{number}, 1);\nBPF_PERF_OUTPUT(perf{number});\n" for number in range(WORKERS)
    )
    + """
static int of_interest(u64 number) {
    return bpf_get_current_pid_tgid() >> 32 == TARGET && number == GETPPID;
}
int submit(struct bpf_raw_tracepoint_args *ctx) {
    struct call call = {};
    if (!of_interest(ctx->args[1])) return 0;
    call.number = ctx->args[1];
"""
    + "".join(
        f"    ring{number}.ringbuf_output(&call, sizeof(call), 0);\n"
        f"    perf{number}.perf_submit(ctx, &call, sizeof(call));\n"
        for number in range(WORKERS)
    )
    + """
    counts.increment(1);
    return 0;
}
int say(struct bpf_raw_tracepoint_args *ctx) {
    if (of_interest(ctx->args[1])) bpf_trace_printk("said");
    return 0;
}
"""
)


def program() -> BPF:
    return BPF(text=TEXT, cflags=[f"-DTARGET={os.getpid()}", f"-DGETPPID={numbers()['getppid']}"])


class Held(NamedTuple):
    """What this process has of the kernel's."""

    descriptors: Counter[str]
    objects: dict[str, set[int]]
    mapped: Counter[str]
    children: set[int]
    tasks: int

    @classmethod
    def now(cls) -> Held:
        descriptors: Counter[str] = Counter()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # that by which the folder is read
                descriptors[re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{fd}"))] += 1
        mapped = re.findall(r"bpf-map|perf_event", Path("/proc/self/maps").read_text())
        kinds = {kind: objects.held(kind) for kind in ("prog", "map", "link")}
        try:
            tasks = len(asyncio.all_tasks())
        except RuntimeError:
            tasks = 0  # trio's
        return cls(descriptors, kinds, Counter(mapped), objects.children(), tasks)


def resident() -> int:
    """Bytes of memory that are this process's own."""
    gc.collect()
    _, total, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (total - shared) * os.sysconf("SC_PAGE_SIZE")


Seen = dict[str, set[int]]
Round = Callable[[BPF, int, Seen], Awaitable[None]]


def note(seen: Seen) -> None:
    for kind, ids in seen.items():
        ids |= objects.held(kind)


async def ring(bpf: BPF, worker: int, seen: Seen) -> None:
    async with bpf.events(f"ring{worker}") as events:
        os.getppid()
        assert (await anext(events)).number == numbers()["getppid"]


async def perf(bpf: BPF, worker: int, seen: Seen) -> None:
    async with bpf.events(f"perf{worker}", buffer_size=1 << 16) as events:
        os.getppid()
        assert (await anext(events)).number == numbers()["getppid"]


async def snapshots(bpf: BPF, worker: int, seen: Seen) -> None:
    async with bpf.snapshots("counts", every=0.001) as stream:
        os.getppid()
        async for counts in stream:
            assert counts[1] > 0
            break


async def trace(bpf: BPF, worker: int, seen: Seen) -> None:
    async with bpf.trace() as lines:
        os.getppid()
        async for line in lines:
            assert "said" in str(line)
            break


async def attach(bpf: BPF, worker: int, seen: Seen) -> None:
    link = bpf.attach_raw_tracepoint(tp="sched_switch", fn_name="say")
    note(seen)
    link.close()


async def execve(bpf: BPF, worker: int, seen: Seen) -> None:
    # One and the other by turns.
    async with trace_execve(buffer="ring" if len(seen["prog"]) % 2 else "perf") as events:
        await anyio.run_process(["true"])
        await anext(events)
        note(seen)


async def syscalls(bpf: BPF, worker: int, seen: Seen) -> None:
    async with trace_syscalls() as events:
        await anyio.run_process(["true"])
        await anext(events)
        note(seen)


async def counting(bpf: BPF, worker: int, seen: Seen) -> None:
    async with count_execve(every=0.001) as counts:
        await anext(counts)
        note(seen)


async def whole(bpf: BPF, worker: int, seen: Seen) -> None:
    async with program() as own:
        own.attach_raw_tracepoint(tp="sys_enter", fn_name="submit")
        async with (
            own.events("ring0") as events,
            own.events("perf0") as others,
            own.snapshots("counts", 0.001),
        ):
            os.getppid()
            await anext(events)
            await anext(others)
            note(seen)


MANY, SOME = 1000, 20
ROUNDS: Final[dict[Round, tuple[int, int]]] = {  # how many, how many at a time
    ring: (MANY, WORKERS),
    perf: (MANY, WORKERS),
    snapshots: (MANY, WORKERS),
    trace: (MANY, 1),
    attach: (MANY, 1),
    execve: (SOME, 1),
    syscalls: (SOME, 1),
    counting: (SOME, 1),
    whole: (SOME, 1),
}


@pytest.mark.parametrize("one", ROUNDS, ids=lambda one: one.__name__)
@pytest.mark.timeout(300)
def test_nothing_is_left_after_a_thousand_rounds(one: Round, request: pytest.FixtureRequest) -> None:
    if one is not whole:
        request.getfixturevalue("compiled_once")
    many, workers = ROUNDS[one]
    seen: Seen = {"prog": set(), "map": set(), "link": set()}
    growth = -1

    async def rounds(bpf: BPF, count: int) -> None:
        async def work(worker: int) -> None:
            for _ in range(count // workers):
                await one(bpf, worker, seen)

        async with anyio.create_task_group() as tasks:
            for worker in range(workers):
                tasks.start_soon(work, worker)

    async def main() -> None:
        nonlocal growth
        async with program() as bpf:
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="submit")
            if one is trace:
                bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="say")
            await rounds(bpf, many // 5)
            before, memory, threads = Held.now(), resident(), threading.active_count()
            await rounds(bpf, many)
            assert Held.now() == before
            assert threading.active_count() <= threads  # idle workers end by themselves
            growth = resident() - memory
            assert {kind: objects.left(kind, ids - before.objects[kind]) for kind, ids in seen.items()} == {
                kind: set() for kind in seen
            }

    async def compiled() -> None:
        async with program():
            pass

    anyio.run(compiled)  # its maps are kept
    outside, threads = Held.now(), threading.active_count()
    anyio.run(main)
    assert Held.now() == outside
    ended(threads)
    # 1 KiB in each round would be 1 MB.
    assert growth < (1 << 20 if many == MANY else 4 << 20), f"{growth} bytes in {many} rounds"
    if one is attach:
        assert len(seen["link"]) >= MANY
    elif many == SOME:
        assert len(seen["prog"]) > SOME


def ended(threads: int) -> None:
    """Workers have been told to end when the loop has."""
    for _ in range(200):
        if threading.active_count() <= threads:
            return
        time.sleep(0.01)
    raise AssertionError(threading.enumerate())


# --- each way to leave


class Context(Protocol):
    """A stream of any kind, or a BPF."""

    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *error: Any) -> None: ...


_compiled: dict[tuple[str, ...], Module] = {}
_texts: Path


@pytest.fixture(autouse=True, scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where programs for this process alone are; other modules find nothing of it held."""
    global _texts
    _texts = tmp_path_factory.mktemp("texts")
    yield
    for module in _compiled.values():
        for made in module.numbered.values():
            made.close()
    _compiled.clear()


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled once serves every round, each with descriptors of its own."""
    compile_really = compiler.compile

    async def compile_once(text: str, cflags: Any = ()) -> Module:
        key = text, *cflags
        if key not in _compiled:
            _compiled[key] = await compile_really(text, cflags)
        await checkpoint()
        module = _compiled[key]
        copies = {id(made): made.duplicate() for made in module.numbered.values()}
        return replace(
            module,
            maps={name: copies[id(made)] for name, made in module.maps.items()},
            numbered={number: copies[id(made)] for number, made in module.numbered.items()},
        )

    monkeypatch.setattr(compiler, "compile", compile_once)


class Whole:
    """A program of one's own with a stream of it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Any:
        async with AsyncExitStack() as stack:
            bpf = await stack.enter_async_context(program())
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="submit")
            stream: Any
            if self._kind == "snapshots":
                stream = bpf.snapshots("counts", every=0.01)
            elif self._kind == "trace":
                bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="say")
                stream = bpf.trace()
            else:
                stream = bpf.events(self._kind)
            await stack.enter_async_context(stream)
            self._stack = stack.pop_all()
        self._stream = stream  # so that it is closed by nothing but its closing
        return stream

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()


def flooded(kind: Kind) -> EventStream[FloodEvent]:
    """Of a program that loads faster than those of the library."""
    return EventStream(flood.source(_texts, "flood", os.getpid(), 1 << 16, kind), FloodEvent)


OPENED: Final[dict[str, Callable[[], Context]]] = {
    "ready-made ring": lambda: flooded("ring"),
    "ready-made perf": lambda: flooded("perf"),
    "count_execve": lambda: count_execve(every=0.01),
    "ring": lambda: Whole("ring0"),
    "perf": lambda: Whole("perf0"),
    "snapshots": lambda: Whole("snapshots"),
    "trace": lambda: Whole("trace"),
}


async def use(made: Context, leave: Literal["end", "raise"] = "end") -> None:
    """Open, iterate, first when something has come and then when it is yet to come, close."""
    async with made as stream:
        happen()
        await anext(stream)
        later = threading.Timer(0.02, happen)
        later.start()
        try:
            async for _ in stream:
                break
        finally:
            later.join()
        if leave == "raise":
            raise ZeroDivisionError


def happen() -> None:
    """Something for each kind of stream."""
    os.getppid()
    subprocess.run(["true"], check=True)


@pytest.mark.anyio
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("kind", OPENED)
async def test_cancelled_at_each_await(kind: str) -> None:
    """By a cancel scope, and by asyncio itself, which knows no shield; once, and whenever it waits again."""
    await use(OPENED[kind]())
    for how in ways_to_cancel():
        before = Held.now()
        for step in range(100):
            made = OPENED[kind]()
            came = (await cancelled_at(step, use(made), how)).reached
            # At once, while it is still there.
            assert Held.now() == before, (how, step)
            if not came:
                break
            del made
        assert 4 < step < 99


@pytest.mark.anyio
async def test_cancelled_while_it_compiles() -> None:
    async def compiling() -> None:
        module = await compiler.compile(TEXT, ["-DTARGET=1", "-DGETPPID=1"])
        for made in module.maps.values():
            made.close()

    await compiling()
    before = Held.now()
    for how in ways_to_cancel():
        for step in range(100):
            came = (await cancelled_at(step, compiling(), how)).reached
            assert Held.now() == before, (how, step)
            if not came:
                break
        assert 0 < step < 99


@pytest.mark.anyio
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("kind", OPENED)
async def test_when_the_body_raises(kind: str) -> None:
    await use(OPENED[kind]())
    before = Held.now()
    made = OPENED[kind]()
    with pytest.raises(ZeroDivisionError):
        await use(made, "raise")
    assert Held.now() == before


@pytest.mark.anyio
@pytest.mark.usefixtures("compiled_once")
async def test_a_closing_that_fails_frees_everything() -> None:
    """The other streams, too, and what they belong to."""

    def damaged(limit: int) -> None:
        raise CorruptBufferError("damaged")

    await use(OPENED["ring"]())
    before = Held.now()
    with pytest.raises(CorruptBufferError, match="damaged"):
        async with trace_execve(buffer="ring") as own:
            own._buffer.drain = damaged  # type: ignore[union-attr, method-assign]
    assert Held.now() == before
    bpf = program()
    with pytest.raises(CorruptBufferError, match="damaged"):
        async with bpf:
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="submit")
            streams = [bpf.events(name) for name in ("ring0", "perf0", "ring1")]
            for stream in streams:
                await stream.__aenter__()
            streams[1]._buffer.drain = damaged  # type: ignore[union-attr, method-assign]
            streams.append(bpf.trace())  # type: ignore[arg-type]
            await streams[3].__aenter__()
    assert Held.now() == before


# --- SIGKILL

_KILLED: Final = """
import anyio, subprocess, sys
from ebpfstream import trace_execve
from ebpfstream.kernel import child, compiler
from ebpfstream.kernel.bpf import Program
from ebpfstream.kernel.links import Link
where, kind = sys.argv[1:]
# A compiler that would never end.
if where == "compiling":
    code = child._code("bcc").replace(
        "bcc.main()",
        "import time; bcc._compile_with_headers = lambda *_: "
        "(open('/proc/self/comm', 'w').write('compiling'), time.sleep(600)); bcc.main()"
    )
    child._code = lambda module: code
def halt(here):
    if here == where:
        print(here, flush=True)
        sys.stdin.read()
def halting(here, function):
    def wrapped(*arguments, **named):
        if here == "compiling":
            halt(here)
        result = function(*arguments, **named)
        halt(here)
        return result
    return wrapped
compiler._receive = halting("compiling", compiler._receive)
Program.load = halting("loaded", Program.load)
Link.attach = halting("attached", Link.attach)
async def main():
    async with trace_execve(buffer=kind) as events:
        subprocess.run(["true"])
        async for _ in events:
            halt("iterating")
anyio.run(main)
"""


@pytest.mark.parametrize("buffer", ["ring", "perf"])
@pytest.mark.parametrize(
    ("where", "count"),
    [("compiling", (0, 4, 0)), ("loaded", (1, 5, 0)), ("attached", (1, 5, 1)), ("iterating", (1, 5, 1))],
)
def test_killed(where: str, count: tuple[int, ...], buffer: str) -> None:
    """Nothing of it stays in the kernel, and no child of it goes on."""
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, where, buffer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().decode() == f"{where}\n"
            offspring = objects.children(process.pid)
            assert len(offspring) == (where == "compiling")
            for child in offspring:
                while Path(f"/proc/{child}/comm").read_text() != "compiling\n":
                    time.sleep(0.001)
            kinds = {kind: objects.held(kind, process.pid) for kind in ("prog", "map", "link")}
            assert tuple(map(len, kinds.values())) == count
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert {kind: objects.left(kind, ids) for kind, ids in kinds.items()} == {kind: set() for kind in kinds}
    assert not [child for child in offspring if not gone(child)]


def gone(pid: int) -> bool:
    for _ in range(300):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


# --- children

_SHOW: Final = """
import os
for fd in range(3, 1000):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError:
        pass
"""


async def everything(
    stack: AsyncExitStack,
) -> tuple[EventStream[Any], EventStream[Any], Snapshots, TraceStream]:
    """A stream of each kind, open."""
    bpf = await stack.enter_async_context(program())
    bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="submit")
    await stack.enter_async_context(trace_execve(buffer="ring"))
    await stack.enter_async_context(trace_execve(buffer="perf"))
    await stack.enter_async_context(count_execve())
    return (
        await stack.enter_async_context(bpf.events("ring0")),
        await stack.enter_async_context(bpf.events("perf0")),
        await stack.enter_async_context(bpf.snapshots("counts", every=0.001)),
        await stack.enter_async_context(bpf.trace()),
    )


@pytest.mark.anyio
@pytest.mark.usefixtures("compiled_once")
async def test_children_inherit_nothing() -> None:
    def inherited() -> bytes:
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SHOW], close_fds=False, capture_output=True, check=True
        ).stdout

    without = inherited()
    async with AsyncExitStack() as stack:
        await everything(stack)
        assert sum(map(len, Held.now().objects.values())) > 20
        assert inherited() == without


@pytest.mark.anyio
async def test_a_fork_disturbs_nothing() -> None:
    """Though it drops all streams before it ends.

    The programs are compiled anew: buffers of `compiled_once` hold what earlier tests did not read.
    """
    async with AsyncExitStack() as stack:
        events, others, counts, _ = await everything(stack)
        for _ in range(2):
            for _ in range(10):
                os.getppid()
            assert forked(events.__del__, others.__del__) == 0
            for _ in range(10):
                os.getppid()
            for stream in (events, others):
                assert [(await anext(stream)).number for _ in range(20)] == [numbers()["getppid"]] * 20
                assert stream.statistics().buffered == 0
        before = (await anext(counts))[1]
        os.getppid()
        assert (await anext(counts))[1] == before + 1


def forked(*functions: Callable[[], None]) -> int:
    """The exit status of a child without exec that calls functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
        child = os.fork()
    if not child:
        status = 1
        try:
            for function in functions:
                function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]
