"""How late a 1 ms ticker is in an event loop that reads from a producer that never stops.

One process calls getppid(2) on CPU 1 without end; the loop on CPU 0 iterates a stream of these calls, through
a ring and a perf buffer, by `async for` and by batch, and decodes every event.  In the same loop a task
sleeps for 1 ms again and again, and notes how much longer each sleep took; "own" is without the time in which the
loop wanted to run and the kernel ran other processes on its CPU (run_delay in /proc/PID/schedstat), which matters on
a machine that is not idle.  "nothing read": the same ticker and producer without a stream.

Next to it BCC's own `ring_buffer_poll(0)` and `perf_buffer_poll(0)` in a task of an asyncio loop, with an await
after each poll, samples of the same size and a callback that makes the same objects of them: each poll goes
on for as long as there is something to read.  By default a perf buffer wakes the reader at each event, which
costs the producer so much that it may be the slower one; so this is done with a wakeup for each 512
events as well.  A thread watches, and ends the process after `--peer-seconds`: what is told is how many
polls had returned and how often the ticker had ticked by then.

Run as root: `python benchmarks/loop.py [--rounds N] [--seconds S] [--peer-seconds S] [--backend asyncio|uvloop|trio]`;
by `chrt -r 1` in front of it, on a machine that does other things too (for as short as that may be).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import anyio

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import claim, save
from ebpfstream import EventStream
from ebpfstream.kernel import bcc, headers
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.readymade import ReadyMade
from tests.kernel import flood
from tests.kernel.flood import FloodEvent

KINDS: Final[tuple[Kind, ...]] = ("ring", "perf")
FORMS: Final = ("async for", "batches")
BACKENDS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
BUFFER_SIZE: Final = 16 << 20
CALLS: Final = 1 << 40
TICK: Final = 0.001

_PEER: Final = """
struct event { u64 sequence, monotonic; u32 cpu, weight, program, length; char payload[44]; };
OUTPUT
RAW_TRACEPOINT_PROBE(sys_enter)
{
    if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
        return 0;
    struct event event = {.monotonic = bpf_ktime_get_ns(), .cpu = bpf_get_smp_processor_id()};
    SUBMIT;
    return 0;
}
"""
PEERS: Final[tuple[tuple[Kind, int], ...]] = (("ring", 1), ("perf", 1), ("perf", 512))
_PEER_OUTPUT: Final[dict[Kind, tuple[str, str]]] = {
    "ring": (
        f"BPF_RINGBUF_OUTPUT(output, {BUFFER_SIZE >> 12});",
        "output.ringbuf_output(&event, sizeof(event), 0)",
    ),
    "perf": ("BPF_PERF_OUTPUT(output);", "output.perf_submit(ctx, &event, sizeof(event))"),
}


Lags = list[tuple[float, float]]


async def tick(lags: Lags) -> None:
    """Note how late each sleep ends, and how late without others' share."""
    schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def delay() -> float:
        return int(os.pread(schedstat, 100, 0).split()[1]) / 1e9

    while True:
        start, delayed = time.perf_counter(), delay()
        await anyio.sleep(TICK)
        lag = time.perf_counter() - start - TICK
        lags.append((lag, max(lag - (delay() - delayed), 0)))


async def read(events: EventStream[FloodEvent], form: str) -> None:
    """For good."""
    if form == "async for":
        async for event in events:
            event.sequence, event.cpu  # noqa: B018
    async for batch in events.batches():
        for event in batch:
            event.sequence, event.cpu  # noqa: B018


async def measure(kind: Kind | None, form: str, seconds: float) -> tuple[Lags, str]:
    """The lags, and what was read in that time."""
    lags: Lags = []
    told = ""
    with flood.producing(cpu=1) as producer, tempfile.TemporaryDirectory() as folder:
        text = (Path(flood.__file__).parent / "flood.c").read_text()
        path = Path(folder) / "flood.c"
        path.write_text(f"#define TARGET {producer.pid}\n#define LENGTH(n) 44\n{text}")
        hooks = {"flood": RawTracepoint("sys_enter")}
        if kind is None:
            producer.start(CALLS)
            with anyio.move_on_after(seconds):
                await tick(lags)
            return lags, told
        source = ReadyMade(path, FloodEvent, hooks, buffer=kind, buffer_size=BUFFER_SIZE)
        async with EventStream(source, FloodEvent) as events, anyio.create_task_group() as tasks:
            producer.start(CALLS)
            await anyio.sleep(0.1)
            tasks.start_soon(tick, lags)
            start = time.perf_counter()
            with anyio.move_on_after(seconds):
                await read(events, form)
            late = time.perf_counter() - start - seconds
            ledger = events.statistics()
            start = time.perf_counter()
            await events.aclose()
            closing = time.perf_counter() - start
            tasks.cancel_scope.cancel()
    assert ledger.tried
    assert ledger.lost is not None
    rate = ledger.delivered / seconds / 1e3
    told = f"{rate:.0f} k/s | {ledger.lost / ledger.tried:.0%} | {late * 1e3:.1f} | {closing * 1e3:.0f}"
    return lags, told


def quantiles(lags: Lags) -> list[float]:
    """Milliseconds: p50, p99 and the worst, and the same of what is the loop's own."""
    found = []
    for which in zip(*lags, strict=True):
        ordered = sorted(which)
        found += [ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]]
    return [lag * 1e3 for lag in found]


def row(name: str, lags: Lags, told: str) -> str:
    """For the table."""
    cells = [f"{lag:.1f}" for lag in quantiles(lags)]
    return f"| {name} | {len(lags)} | {' | '.join(cells)} | {told or ' | | | '} |"


class PeerRun:
    """BCC in a task, as its users have it, for some seconds; it ends the process."""

    def __init__(self, kind: Kind, wakeup: int, seconds: float, producer: flood.Producer) -> None:
        self._kind, self._wakeup, self._seconds = kind, wakeup, seconds
        self._producer = producer
        self._polls = self._returned = self._events = 0
        self._lags: Lags = []
        output, submit = _PEER_OUTPUT[kind]
        number = 110 if platform.machine() == "x86_64" else 173
        text = _PEER.replace("OUTPUT", output).replace("SUBMIT", submit)
        text = text.replace("TARGET", str(producer.pid)).replace("GETPPID", str(number))
        tree = next(headers.trees(text))
        if tree is not None:
            os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        library = bcc.load(bcc.find())
        assert library is not None
        self._bpf: Any = sys.modules["_ebpfstream_bcc"].BPF(text=text)
        self._output: Any = self._bpf["output"]
        if kind == "ring":
            self._output.open_ring_buffer(self._seen)
        else:
            self._output.open_perf_buffer(
                self._seen, page_cnt=BUFFER_SIZE >> 13, lost_cb=self._missed, wakeup_events=wakeup
            )

    async def run(self) -> None:
        """Poll, and tick, until `_watch` ends it all."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(tick(self._lags))
            await asyncio.sleep(0.1)
            before = len(self._lags)
            self._producer.start(CALLS)
            threading.Thread(target=self._watch, args=[before], daemon=True).start()
            tasks.create_task(self._poll())

    def _seen(self, _: object, data: object, size: int) -> None:
        one = self._output.event(data)
        FloodEvent(one.sequence, one.monotonic, one.cpu, one.weight, one.program, one.payload)
        self._events += 1

    def _missed(self, count: int) -> None:
        """BCC prints a line for each loss where nobody takes them."""

    async def _poll(self) -> None:
        once = self._bpf.ring_buffer_poll if self._kind == "ring" else self._bpf.perf_buffer_poll
        while True:
            self._polls += 1
            once(0)
            self._returned += 1
            await asyncio.sleep(0)

    def _watch(self, before: int) -> None:
        try:
            time.sleep(self._seconds)
            name = f"{self._kind}, a wakeup for {self._wakeup}" if self._wakeup > 1 else self._kind
            print(
                f"| BCC, {name} | {self._seconds:.0f} s: "
                f"{self._polls} polls begun, {self._returned} returned, "
                f"{self._polls - self._returned} still at it; {len(self._lags) - before} ticks; "
                f"{self._events / self._seconds / 1e3:.0f} k events/s read |",
                flush=True,
            )
            headers.clean_up()
        finally:
            self._producer.end()
            os._exit(0)


def peer(kind: Kind, wakeup: int, seconds: float) -> None:
    """One run of BCC; ends the process."""
    with flood.producing(cpu=1) as producer:
        asyncio.run(PeerRun(kind, wakeup, seconds, producer).run())


def say_what(options: argparse.Namespace) -> None:
    """What is measured, and where."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ebpfstream", "anyio", "trio", "uvloop"))
    load = os.getloadavg()[0]
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions};")
    print(f"{options.backend}; load of the machine before: {load:.1f};")
    print(
        f"88-byte samples, {BUFFER_SIZE >> 20} MiB, producer on CPU 1, loop on CPU 0, {options.seconds:.0f} s each;"
    )
    print(
        "how late a sleep of 1 ms ends, how late the deadline came that ended the reading, how long aclose() took:"
    )
    print("milliseconds\n")


def ours(options: argparse.Namespace) -> None:
    """Measure this library, round by round."""
    backend, backend_options = BACKENDS[options.backend]
    print(
        "| read | ticks | p50 | p99 | worst | own p50 | p99 | worst | delivered | lost | deadline late | aclose() |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    plans: list[tuple[Kind | None, str]] = [(None, "nothing read")]
    plans += [(kind, form) for kind in KINDS for form in FORMS]
    p99: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for kind, form in plans:
            measured = partial(measure, kind, form, options.seconds)
            lags, told = anyio.run(measured, backend=backend, backend_options=backend_options)
            name = f"{kind}, {form}" if kind else form
            print(row(name, lags, told), flush=True)
            p99.setdefault(name, []).append(quantiles(lags)[1])
    save(
        options.json,
        [
            claim(
                f"a ticker of 1 ms while events flood in, p99 of its lateness, {name}: ms",
                found,
                None if name == "nothing read" else 10,
                at_least=False,
            )
            for name, found in p99.items()
        ],
    )


def peers(seconds: float) -> None:
    """Measure BCC, each run in a process of its own."""
    print("\n| BCC's poll in a task | |\n|---|---|", flush=True)
    for number in range(len(PEERS)):
        command = [sys.executable, __file__, "--peer", str(number), "--peer-seconds", str(seconds)]
        subprocess.run(command, check=True, timeout=seconds + 60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--peer-seconds", type=float, default=10)
    parser.add_argument("--backend", choices=list(BACKENDS), default="asyncio")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, for machines")
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    if options.peer is not None:
        kind, wakeup = PEERS[options.peer]
        peer(kind, wakeup, options.peer_seconds)
    say_what(options)
    ours(options)
    if options.peer_seconds:
        peers(options.peer_seconds)


if __name__ == "__main__":
    main()
