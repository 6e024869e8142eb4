"""A long run under a mixed load, with consumers that are killed at random: the ledger must stay exact, memory flat.

Four streams are opened, read and left again and again, all on one event loop: execs through a ring
and a perf buffer, and through each a flood of getppid(2), in bursts faster than Python can read, into
buffers that are too small; one of each two samples when it has to.  Meanwhile they are paused, and
their consumers stall, are cancelled, raise, break off, have their stream closed or detached by another
task, or drop it; and other processes that consume are killed with SIGKILL.

Each minute (on asyncio, uvloop and trio in turn) all of it ends, and every stream that was closed is checked:

    tried == submitted + lost + skipped, submitted == received == delivered + undecodable + unread;
    what was iterated is what was delivered; a gap in the numbers is just as long as the Lost before it;
    of a stream that was drained all Lost are all losses, and what was tried is what the producer did.

What a killed process held must be gone from the kernel, and this process must have no BPF object and no
more descriptors and threads than at first.  At the end there is a report; the exit status is 1 if
anything was violated, or memory grew by more than the bound.

Run as root: `python benchmarks/soak.py --minutes N`, or `make soak MINUTES=N`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
from anyio.abc import Process

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import slope
from ebpfstream import (
    EventStream,
    ExecEvent,
    Lost,
    Statistics,
    StreamClosedError,
    SyscallEvent,
    trace_execve,
    trace_syscalls,
)
from tests.kernel import objects

ROOT: Final = Path(__file__).parents[1]
BOUND: Final = 4096
"""By how many KB memory may grow in an hour: 2 KB for each of some 2,000 streams."""

BACKENDS: Final[list[tuple[str, str, dict[str, Any]]]] = [
    ("asyncio", "asyncio", {"use_uvloop": False}),
    ("uvloop", "asyncio", {"use_uvloop": True}),
    ("trio", "trio", {}),
]
WAYS: Final = ("drain", "drain", "drain", "cancel", "break", "raise", "aclose", "drop")
LANES: Final = ("execs, ring", "execs, perf", "flood, ring", "flood, perf")
OBJECTS: Final = ("prog", "map", "link")
COUNTS: Final = (
    "tried",
    "submitted",
    "lost",
    "skipped",
    "misses",
    "delivered",
    "unread",
    "late",
    "wakeups",
)
HANGS: Final = 90  # seconds that no round takes

_EXECS: Final = """
import os, time
for number in range(1 << 62):
    os.waitpid(os.posix_spawn("/bin/true", ["/bin/true", "soak", str(number)], {}), 0)
    time.sleep(0.004)
"""
_FLOOD: Final = """
import os, sys, time
from itertools import repeat
if sys.argv[1]:
    os.sched_setaffinity(0, {int(sys.argv[1])})
print("ready", flush=True)
bursts, calls = map(int, sys.stdin.readline().split())
getppid = os.getppid
for _ in range(bursts):
    for _ in repeat(None, calls):
        getppid()
    time.sleep(0.2)
print("done", flush=True)
sys.stdin.readline()
"""
_VICTIM: Final = """
import anyio, sys
from ebpfstream import trace_execve, trace_syscalls
async def main(kind):
    async with trace_execve(buffer=kind) as execs, trace_syscalls("getppid", buffer=kind, buffer_size=65536):
        print("ready", flush=True)
        async for _ in execs:
            pass
anyio.run(main, sys.argv[1])
"""


@dataclass
class Totals:
    """What came of one minute, or of all."""

    rounds: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    pauses: int = 0
    stalls: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Totals) -> None:
        """Put another minute's to these."""
        self.rounds += other.rounds
        self.ways += other.ways
        self.counts += other.counts
        self.kills += other.kills
        self.pauses += other.pauses
        self.stalls += other.stalls
        self.violations += other.violations


@dataclass
class Rest:
    """What there is of the process when nothing is open."""

    rss: int
    """KB."""
    fds: int
    threads: int
    bpf_objects: int

    @classmethod
    def now(cls, threads: int) -> Rest:
        """How it is, once there are only so many threads any more: trio's end after 10 s of idleness."""
        for _ in range(150):
            if len(list(Path("/proc/self/task").iterdir())) <= threads:
                break
            time.sleep(0.1)
        gc.collect()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(
            int(status["VmRSS"].split()[0]),
            len(list(Path("/proc/self/fd").iterdir())),
            int(status["Threads"]),
            sum(len(objects.held(kind)) for kind in OBJECTS),
        )


class Book:
    """What a consumer saw of one stream, and whether numbers and losses fit."""

    def __init__(self) -> None:
        self.seen = 0
        self.lost = 0
        self.weights = 0
        self.numbers: list[int] = []  # of execs, as the producer counts them
        self.problems: list[str] = []
        self._next: dict[int, int] = defaultdict(int)
        self._missing: dict[int | None, int] = defaultdict(int)

    def note(self, item: ExecEvent | SyscallEvent | Lost) -> None:
        """An event must come just as much later as was said to be lost before it."""
        if isinstance(item, Lost):
            if self._missing[item.cpu]:
                self.problems.append(
                    f"CPU {item.cpu}: {self._missing[item.cpu]} said to be lost came, or never were"
                )
            if item.count is None:
                self.problems.append("a loss without a count")
            else:
                self.lost += item.count
                self._missing[item.cpu] = item.count
            return
        self.seen += 1
        self.weights += item.weight
        gap = item.sequence - self._next[item.cpu]
        if gap:
            if gap < 0 or gap > self._missing[item.cpu]:
                self.problems.append(
                    f"CPU {item.cpu}: number {item.sequence} after {self._next[item.cpu] - 1}, "
                    f"{self._missing[item.cpu]} said to be lost"
                )
            self._missing[item.cpu] -= gap
        self._next[item.cpu] = item.sequence + 1
        if isinstance(item, ExecEvent) and item.args[:2] == ("/bin/true", "soak"):
            self.numbers.append(int(item.args[2]))


def check(ledger: Statistics, book: Book, *, drained: bool, produced: int | None) -> list[str]:
    """What does not balance in a closed stream's ledger; `produced` is what the kernel must have seen, if known."""
    tried, submitted, lost, skipped, misses = (
        -1 if count is None else count
        for count in (ledger.tried, ledger.submitted, ledger.lost, ledger.skipped, ledger.misses)
    )
    causes = (ledger.lost_full, ledger.lost_too_large, ledger.lost_no_buffer, ledger.lost_otherwise)
    wrong = {
        "not all is known": min(tried, submitted, lost, skipped, misses) >= 0 and None not in causes,
        "tried != submitted + lost + skipped": tried == submitted + lost + skipped,
        "lost != its causes": lost == sum(cause or 0 for cause in causes),
        "received != submitted": ledger.received == submitted,
        "received != delivered + undecodable + unread": ledger.received
        == ledger.delivered + ledger.undecodable + ledger.unread,
        "undecodable": ledger.undecodable == 0,
        "iterated != delivered": book.seen == ledger.delivered,
        "more yielded as lost than was": book.lost <= lost,
        "weights are more than tried": book.weights <= tried,
        "drained, but unread": not drained or ledger.unread == 0,
        "drained, but yielded as lost != lost": not drained or book.lost == lost,
        "tried + misses != produced": produced is None or tried + misses == produced,
    }
    found = [f"{what}: {ledger}, {book.seen} seen, {book.lost} yielded as lost, {produced} produced"
             for what, right in wrong.items() if not right]  # fmt: skip
    if drained and not (lost or skipped or misses) and book.numbers:
        first, last = min(book.numbers), max(book.numbers)
        if sorted(book.numbers) != list(range(first, last + 1)):
            found.append(
                f"of the execs {first} to {last} only {len(set(book.numbers))} came, and none is counted as lost"
            )
    return book.problems[:3] + found


class Enough(Exception):  # noqa: N818
    """Raised by a consumer."""


class Round:
    """One stream, from its opening to its end."""

    def __init__(self, lane: str, execs: int, until: float, totals: Totals) -> None:
        self._lane = lane
        self._flood = lane.startswith("flood")
        self._execs = execs
        self._totals = totals
        self._way = random.choice(WAYS)
        self._batches = random.random() < 0.5
        self._seconds = min(random.uniform(1, 10), max(until - time.monotonic(), 0.5))
        self._book = Book()
        self._drained = False
        self._produced: int | None = None

    async def run(self) -> None:
        """Do it, and check."""
        self._totals.rounds[self._lane] += 1
        self._totals.ways[self._way] += 1
        try:
            with anyio.fail_after(self._seconds + HANGS):
                if not self._flood:
                    await self._with_stream(None)
                    return
                command = [sys.executable, "-I", "-S", "-c", _FLOOD, random.choice(["", "0", "1"])]
                async with await anyio.open_process(command, stderr=None) as producer:
                    try:
                        assert producer.stdout is not None
                        await producer.stdout.receive()
                        await self._with_stream(producer)
                    finally:
                        producer.kill()
        except TimeoutError:
            self._totals.violations.append(f"{self._lane}, {self._way}: hangs")

    def _stream(self, pid: int) -> EventStream[ExecEvent | Lost] | EventStream[SyscallEvent | Lost]:
        ring = self._lane.endswith("ring")
        if self._flood:
            return trace_syscalls(
                "getppid",
                pid=pid,
                buffer="ring" if ring else "perf",
                buffer_size=random.choice([1 << 16, 1 << 20]),
                overload="lose" if ring else "sample",
                on_lost="yield",
            )
        return trace_execve(
            ppid=self._execs,
            buffer="ring" if ring else "perf",
            buffer_size=random.choice([1 << 15, 1 << 20]),
            overload="sample" if ring else "lose",
            on_lost="yield",
        )

    async def _with_stream(self, producer: Process | None) -> None:
        stream = self._stream(producer.pid if producer else 0)
        if self._way == "drop":
            del stream  # its own name for it would keep it
            await self._dropped(producer)
            return
        try:
            async with stream, anyio.create_task_group() as tasks:
                tasks.start_soon(self._disturb, stream, tasks.cancel_scope, producer)
                await self._consume(stream)
                if self._way != "aclose":
                    tasks.cancel_scope.cancel()
        except* Enough:
            pass
        ledger = stream.statistics()
        problems = check(ledger, self._book, drained=self._drained, produced=self._produced)
        self._totals.violations += [f"{self._lane}, {self._way}: {problem}" for problem in problems]
        for name in COUNTS:
            self._totals.counts[name] += getattr(ledger, name) or 0
        self._totals.counts["checked"] += 1
        self._totals.counts["compared with the producer"] += self._produced is not None

    async def _dropped(self, producer: Process | None) -> None:
        """A stream that nobody closes: no ledger, but at rest all of it must be gone."""
        await self._begin(producer)
        with anyio.move_on_after(self._seconds):
            async for item in self._stream(producer.pid if producer else 0):
                self._book.note(item)
        self._totals.violations += [f"{self._lane}, drop: {problem}" for problem in self._book.problems[:3]]

    async def _begin(self, producer: Process | None) -> tuple[int, int]:
        bursts, calls = max(round(self._seconds * 3), 1), random.randint(1000, 30_000)
        if producer is not None:
            assert producer.stdin is not None
            await producer.stdin.send(f"{bursts} {calls}\n".encode())
        return bursts, calls

    async def _consume(self, stream: EventStream[Any]) -> None:
        end = time.monotonic() + self._seconds
        try:
            if self._batches:
                async for batch in stream.batches():
                    for item in batch:
                        self._book.note(item)
                    await self._stall()
                    if self._leaves(end):
                        return
            else:
                async for item in stream:
                    self._book.note(item)
                    if self._book.seen % 1000 == 0:
                        await self._stall()
                    if self._leaves(end):
                        return
            self._drained = self._way == "drain"
        except StreamClosedError:
            if self._way != "aclose":
                raise

    def _leaves(self, end: float) -> bool:
        """Whether the consumer breaks off now."""
        if time.monotonic() > end and self._way == "raise":
            raise Enough
        return time.monotonic() > end and self._way == "break"

    async def _stall(self) -> None:
        """Sleep, rarely."""
        if random.random() < 0.01:
            self._totals.stalls += 1
            await anyio.sleep(random.uniform(0.1, 1.5))

    async def _disturb(
        self, stream: EventStream[Any], scope: anyio.CancelScope, producer: Process | None
    ) -> None:
        """Pause the stream now and then; then end it in the way that was chosen."""
        bursts, calls = await self._begin(producer)
        end = time.monotonic() + self._seconds
        while (left := end - time.monotonic()) > 0:
            await anyio.sleep(min(random.uniform(0.2, 3), left))
            if random.random() < 0.3:
                self._totals.pauses += 1
                stream.pause()
                await anyio.sleep(random.uniform(0.05, 0.5))
                stream.resume()
        if self._way == "drain":
            if producer is not None:
                assert producer.stdout is not None
                await producer.stdout.receive()
                self._produced = bursts * calls
            stream.detach()
        elif self._way == "aclose":
            await stream.aclose()
        else:  # a consumer that gets no event any more cannot break off
            await anyio.sleep(0 if self._way == "cancel" else 1)
            scope.cancel()


async def killer(until: float, totals: Totals) -> None:
    """Processes that consume, and are killed; the kernel must free what they held."""
    while time.monotonic() < until - 3:
        try:
            await kill_one(totals)
        except TimeoutError:
            totals.violations.append("another process: hangs")
        await anyio.sleep(random.uniform(0, 4))


async def kill_one(totals: Totals) -> None:
    """Raises TimeoutError if it cannot be started."""
    command = [sys.executable, "-c", _VICTIM, random.choice(["ring", "perf"])]
    async with await anyio.open_process(command, stderr=None, cwd=ROOT) as victim:
        try:
            with anyio.fail_after(HANGS):
                assert victim.stdout is not None
                await victim.stdout.receive()
            held = {kind: objects.held(kind, victim.pid) for kind in OBJECTS}
            await anyio.sleep(random.uniform(0, 6))
        finally:
            victim.send_signal(signal.SIGKILL)
        await victim.wait()
    totals.kills += 1
    if not all(held.values()):
        totals.violations.append(f"a consumer had nothing to free: {held}")
    for kind, ids in held.items():
        for _ in range(100):  # the kernel waits for grace periods
            if not objects.existing(kind, ids):
                break
            await anyio.sleep(0.1)
        else:
            totals.violations.append(f"of a killed process's {kind}s the kernel still has {len(ids)}")


async def warm_up() -> None:
    """Start a process and a thread: a loop may keep descriptors for the next ones (uvloop does)."""
    await anyio.run_process([sys.executable, "-c", ""])
    await anyio.to_thread.run_sync(int)


async def minute(seconds: float, execs: int, totals: Totals) -> None:
    """All of it at once."""
    until = time.monotonic() + seconds

    async def rounds(lane: str) -> None:
        while time.monotonic() < until - 1:
            await Round(lane, execs, until - 1, totals).run()

    async with anyio.create_task_group() as tasks:
        for lane in LANES:
            tasks.start_soon(rounds, lane)
        tasks.start_soon(killer, until, totals)


def report(minutes: float, totals: Totals, first: Rest, rests: list[tuple[float, Rest]]) -> dict[str, Any]:
    """What is to be told at the end."""
    rss = [rest.rss for _, rest in rests]
    growth = slope([(at, rest.rss) for at, rest in rests])
    counts = totals.counts
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") >> 20
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {memory} MB",
        "kernel": platform.release(),
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("ebpfstream", "anyio", "trio", "uvloop")),
        "minutes": round(minutes, 1),
        "rounds": dict(totals.rounds),
        "left by": dict(totals.ways),
        "processes killed": totals.kills,
        "pauses": totals.pauses,
        "stalls": totals.stalls,
        "ledgers checked": counts["checked"],
        "of them, compared with what a producer did": counts["compared with the producer"],
        "events": {name: counts[name] for name in COUNTS},
        "RSS at rest, KB": {"least": min(rss), "median": statistics.median(rss), "most": max(rss)},
        "RSS slope, KB/h": None if growth is None else round(growth),
        "RSS slope allowed, KB/h": BOUND,
        "at rest": {
            name: sorted({asdict(rest)[name] for _, rest in rests})
            for name in ("fds", "threads", "bpf_objects")
        },
        "at first": asdict(first),
        "violations": totals.violations,
    }


def show(found: dict[str, Any]) -> None:
    """One page."""
    print("\nSoak\n")
    for name, value in found.items():
        if name == "violations":
            continue
        if isinstance(value, dict):
            value = ", ".join(
                f"{key} {part:,}" if isinstance(part, int) else f"{key} {part}" for key, part in value.items()
            )
        print(f"{name:<45}{value:,}" if isinstance(value, int) else f"{name:<45}{value}")
    print(f"{'violations':<45}{len(found['violations'])}")
    for violation in found["violations"][:20]:
        print(f"  {violation}")


def main() -> int:
    """Run, print each minute, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="check so often (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report as JSON as well")
    options = parser.parse_args()
    totals, rests = Totals(), []
    execs = subprocess.Popen([sys.executable, "-I", "-S", "-c", _EXECS])
    try:
        for _, backend, backend_options in BACKENDS:
            anyio.run(warm_up, backend=backend, backend_options=backend_options)
        first = Rest.now(threads=1)
        start = time.monotonic()
        end = start + options.minutes * 60
        for number in itertools.count(1):
            name, backend, backend_options = BACKENDS[(number - 1) % len(BACKENDS)]
            now = Totals()
            seconds = min(options.every, end - time.monotonic())
            try:
                anyio.run(minute, seconds, execs.pid, now, backend=backend, backend_options=backend_options)
            except Exception as error:
                now.violations.append(f"{name}: {error!r}: {getattr(error, 'exceptions', '')}")
            rest = Rest.now(first.threads)
            rests.append((time.monotonic(), rest))
            if rest.bpf_objects or rest.fds > first.fds or rest.threads > first.threads:
                now.violations.append(f"{name}: left behind: {rest}, at first {first}")
            totals.add(now)
            counts = now.counts
            print(
                f"{number:3} {name:8}{now.rounds.total():4} rounds, {now.kills:2} kills, "
                + ", ".join(
                    f"{counts[key]:,} {key}"
                    for key in ("tried", "delivered", "lost", "skipped", "unread", "misses")
                )
                + f"; {rest.rss:,} KB, {rest.fds} fds, {rest.threads} threads, {rest.bpf_objects} BPF objects; "
                f"{len(now.violations)} violations",
                flush=True,
            )
            for violation in now.violations[:5]:
                print(f"    {violation}", flush=True)
            if time.monotonic() > end - 1:
                break
    finally:
        execs.kill()
        execs.wait()
    found = report((time.monotonic() - start) / 60, totals, first, rests)
    show(found)
    growth = found["RSS slope, KB/h"]
    flat = growth is None or growth <= BOUND
    print(
        "memory is not flat"
        if not flat
        else "memory: too short to tell"
        if growth is None
        else "memory is flat"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if flat and not totals.violations else 1


if __name__ == "__main__":
    sys.exit(main())
