"""The same work done by others, each as its users write it, measured in turn in the same run.

An event of 64 bytes (72 in a ring buffer, with its header) for each getppid(2) of one process, producer.c on CPU 1;
whoever consumes runs on CPU 0, and is started anew for each round.  In one life of a peer: how long until it was
attached, its memory, what it costs while nothing happens, at 1,000, 10,000 and 100,000 events a second, what it
adds to a system call (bursts of 1,000, so that no buffer fills), and what it takes from a producer that never
stops.  How late events are, at 1,000 a second, is found in a life of its own, for noting that costs.  All buffers
have 16 MiB in all; what is written goes to a file in memory.  CPU time is that of the process; all that is
Python has the same interpreter.  "calls": the same with what trace_syscalls() tells of a call.  "asyncio alone": an
event loop with nothing but a timer, as a measure of what waking costs on this machine.

What is executed is a file that does nothing, again and again.  This library keeps what it has compiled: "first" is
a start with nothing kept, as on a new machine.

A peer that fails or is not installed is left out, and the exit status is 1.

Run as root: `python benchmarks/peers/run.py [--rounds N] [--seconds S] [--only WORD] [--json FILE]`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import claims
from benchmarks.peers import build, catalogue, targets
from benchmarks.peers.catalogue import Peer
from benchmarks.peers.process import Producer, Running
from ebpfstream.bench.results import machine

RATES: Final = (1_000, 10_000, 100_000)
Figures = dict[str, float]
Results = dict[str, list[Figures]]
T = TypeVar("T")

COLUMNS: Final = {
    "rate": ("k events/s at flood", 1e3),
    "offered": ("k/s offered", 1e3),
    "lost": ("lost, %", 0.01),
    "cpu_flood": ("CPU s/M at flood", 1),
    "cpu_1000": ("at 1 k/s", 1),
    "cpu_10000": ("at 10 k/s", 1),
    "cpu_100000": ("at 100 k/s", 1),
    "p50": ("latency p50, µs", 1e3),
    "p99": ("p99, µs", 1e3),
    "start": ("s to attached", 1),
    "memory": ("MB", 1),
    "memory_most": ("MB at most", 1),
    "idle_cpu": ("idle CPU, ms/s", 1e-3),
    "idle_switches": ("idle switches/s", 1),
    "call": ("ns added to a call", 1),
}
EXEC_COLUMNS: Final = {
    "cpu_exec": ("CPU µs per exec", 1e3),
    "lost": ("lost, %", 0.01),
    "exec": ("µs added to an exec", 1e3),
    "start_first": ("s to attached, first", 1),
    "start": ("s to attached", 1),
    "memory": ("MB", 1),
    "memory_most": ("MB at most", 1),
    "idle_cpu": ("idle CPU, ms/s", 1e-3),
    "idle_switches": ("idle switches/s", 1),
}


def started(
    peer: Peer, command: tuple[str, ...], producer: Producer, file: Path, **environment: str
) -> Running:
    """A peer that is attached."""
    filled = [part.format(target=producer.pid, file=file) for part in command]
    environment = {**peer.environment(), **environment}
    return Running(filled, environment, file if peer.writes else None, peer.events_of_perf)


def idle(running: Running, seconds: float) -> Figures:
    """What it costs while nothing happens."""
    time.sleep(0.3)
    cpu, switches = running.cpu(), running.switches()
    time.sleep(seconds)
    return {
        "idle_cpu": (running.cpu() - cpu) / seconds,
        "idle_switches": (running.switches() - switches) / seconds,
    }


def life(peer: Peer, folder: Path, seconds: float) -> Figures:
    """All that is found in one life, but for latencies."""
    before_all = bare_call(folder)
    producer = Producer(folder)
    try:
        with started(peer, peer.command, producer, folder / "events") as running:
            figures = {"start": running.start, "memory": running.memory(), **idle(running, seconds)}
            for rate in RATES:
                before, cpu = running.settled(), running.cpu()
                produced = producer.run(f"paced {seconds} {rate}")
                time.sleep(0.05)
                cpu, after = running.cpu() - cpu, running.settled()
                figures[f"cpu_{rate}"] = cpu / produced.calls * 1e6
                figures[f"lost_{rate}"] = 1 - (after.events - before.events) / produced.calls
            produced = producer.run(f"burst {seconds} 1000 10000")
            figures["call"] = produced.nanoseconds / produced.calls
            before, cpu = running.settled(), running.cpu()
            producer.begin(f"flood {seconds + 0.3}")
            time.sleep(0.3)
            first = running.consumed()
            time.sleep(seconds - 0.05)
            last = running.consumed()
            produced = producer.end()
            after = running.settled()
            figures["rate"] = (last.events - first.events) / (last.time - first.time)
            figures["cpu_flood"] = (running.cpu() - cpu) / max(after.events - before.events, 1) * 1e6
            figures["offered"] = produced.calls / produced.nanoseconds * 1e9
            figures["lost"] = max(1 - (after.events - before.events) / produced.calls, 0)
            if after.lost is not None and before.lost is not None:
                figures["lost_told"] = (after.lost - before.lost) / produced.calls
            figures["memory_most"] = running.memory("VmHWM")
    finally:
        producer.close()
    figures["call"] -= (before_all + bare_call(folder)) / 2
    return figures


def lateness(peer: Peer, folder: Path, seconds: float) -> Figures:
    """How late events are when there are 1,000 a second."""
    producer = Producer(folder)
    try:
        with started(peer, peer.latency, producer, folder / "events") as running:
            producer.run(f"paced {seconds} 1000")
            running.settled()
            found = sorted(running.close())
    finally:
        producer.close()
    return {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100]}


def exec_life(peer: Peer, folder: Path, seconds: float) -> Figures:
    """The same for what is executed."""
    producer = Producer(folder)
    how = f"exec {seconds} /bin/true"
    figures: Figures = {}
    try:
        before_all = producer.run(how)
        kept: dict[str, str] = {}
        if peer.keeps:
            cache = folder / "kept"
            shutil.rmtree(cache, ignore_errors=True)
            kept["EBPFSTREAM_CACHE"] = str(cache)
            with started(peer, peer.command, producer, folder / "events", **kept) as running:
                figures["start_first"] = running.start
        with started(peer, peer.command, producer, folder / "events", **kept) as running:
            figures.setdefault("start_first", running.start)
            figures.update(start=running.start, memory=running.memory(), **idle(running, seconds))
            before, cpu = running.settled(), running.cpu()
            produced = producer.run(how)
            time.sleep(0.05)
            cpu, after = running.cpu() - cpu, running.settled()
            count = after.events - before.events
            figures["cpu_exec"] = cpu / produced.calls * 1e9
            figures["lost"] = max(1 - count / produced.calls, 0)
            figures["exec"] = produced.nanoseconds / produced.calls
            figures["memory_most"] = running.memory("VmHWM")
        after_all = producer.run(how)
        for one in (before_all, after_all):
            figures["exec"] -= one.nanoseconds / one.calls / 2
    finally:
        producer.close()
    return figures


def floor(folder: Path, seconds: float) -> Figures:
    """What the timer alone takes, in the units of those who read: for as many events as there would have been."""
    producer = Producer(folder)
    try:
        with started(catalogue.FLOOR, catalogue.FLOOR.command, producer, folder / "events") as running:
            figures = {"start": running.start, "memory": running.memory()}
            for rate in RATES:
                before, cpu = running.consumed(), running.cpu()
                produced = producer.run(f"paced {seconds} {rate}")
                cpu = running.cpu() - cpu
                figures[f"cpu_{rate}"] = cpu / produced.calls * 1e6
                if rate == RATES[0]:
                    figures["cpu_turn"] = cpu / (running.consumed().events - before.events)
    finally:
        producer.close()
    return figures


def loss_at(peer: Peer, folder: Path, rate: float, seconds: float) -> float:
    """What part is lost when so many come in a second."""
    producer = Producer(folder)
    try:
        with started(peer, peer.command, producer, folder / "events") as running:
            before = running.consumed()
            produced = producer.run(f"paced {seconds} {rate}")
            return max(1 - (running.settled().events - before.events) / produced.calls, 0)
    finally:
        producer.close()


def bare_call(folder: Path) -> float:
    """Nanoseconds of a system call that nobody looks at."""
    producer = Producer(folder)
    try:
        produced = producer.run("burst 0.5 1000 10000")
    finally:
        producer.close()
    return produced.nanoseconds / produced.calls


class Run:
    """Everybody in turn, again and again; who fails is noted, and left out."""

    def __init__(self, hello: list[Peer], execs: list[Peer], folder: Path, seconds: float) -> None:
        self.hello, self.execs = hello, execs
        self._folder = folder
        self._seconds = seconds
        self.results: Results = {peer.name: [] for peer in [*hello, *execs, catalogue.FLOOR]}
        self.losses: dict[str, float] = {}
        self.failures: dict[str, str] = {}

    def measure(self, rounds: int) -> None:
        """So often."""
        ways = [(peer, self._hello) for peer in self.hello] + [(peer, self._exec) for peer in self.execs]
        if self.hello:
            ways.append((catalogue.FLOOR, lambda peer: floor(self._folder, self._seconds)))
        for number in range(rounds):
            for peer, way in ways:
                say(f"round {number + 1} of {rounds}: {peer.name}")
                # Nothing, if it fails: rounds are compared by their number.
                self.results[peer.name].append(self._tried(peer, way) or {})
        if bcc := [one["rate"] for one in self.results.get(targets.BCC_RING, []) if one]:
            rate = targets.TIMES * statistics.median(bcc)
            for peer in self.hello:
                if peer.kind == "ring" and not peer.name.startswith("calls"):
                    say(f"losses: {peer.name}")
                    lost = self._tried(
                        peer, lambda peer: loss_at(peer, self._folder, rate, max(self._seconds, 3))
                    )
                    if lost is not None:
                        self.losses[peer.name] = lost
        say("")

    def _tried(self, peer: Peer, way: Callable[[Peer], T]) -> T | None:
        try:
            return way(peer)
        except (RuntimeError, OSError, ValueError) as error:
            self.failures[peer.name] = str(error)
            return None

    def _hello(self, peer: Peer) -> Figures:
        figures = life(peer, self._folder, self._seconds)
        if peer.latency:
            figures.update(lateness(peer, self._folder, max(self._seconds, 2)))
        return figures

    def _exec(self, peer: Peer) -> Figures:
        return exec_life(peer, self._folder, self._seconds)


def say(what: str) -> None:
    """Tell whoever waits at a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what:60}", end="", file=sys.stderr, flush=True)


def table(results: Results, columns: dict[str, tuple[str, float]]) -> str:
    """Medians, with the least and the most."""
    lines = [
        "| | " + " | ".join(title for title, _ in columns.values()) + " |",
        "|---" + "|--:" * len(columns) + "|",
    ]
    for name, rounds in results.items():
        cells = []
        for key, (_, unit) in columns.items():
            values = sorted(figures[key] / unit for figures in rounds if key in figures)
            if not values:
                cells.append("")
                continue
            cell = (
                f"{statistics.median(values):,.3g}"
                if values[-1] < 1000
                else f"{statistics.median(values):,.0f}"
            )
            cells.append(cell if len(values) == 1 else f"{cell} ({values[0]:.3g} to {values[-1]:.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement")
    parser.add_argument("--only", default="", help="peers that have this in their names")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    options = parser.parse_args()
    if lack := build.missing("producer"):
        sys.exit(f"peers: {lack}")
    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        os.environ["EBPFSTREAM_CACHE"] = str(folder / "cache")  # whatever was kept before says nothing
        build.build(folder)
        hello, execs = catalogue.hello(folder), catalogue.execs()
        missing = {part: build.missing(part) for part in dict.fromkeys(peer.part for peer in hello + execs)}
        hello, execs = (
            [peer for peer in peers if options.only in peer.name and not missing[peer.part]]
            for peers in (hello, execs)
        )
        found = {**machine(), **build.versions()}
        print(", ".join(f"{key} {value}" for key, value in found.items()))
        print(
            f"medians of {options.rounds} rounds of {options.seconds:g} s for each figure (least to most)\n"
        )
        run = Run(hello, execs, folder, options.seconds)
        run.measure(options.rounds)
    floor = [catalogue.FLOOR] if hello else []
    for peers, columns in (([*hello, *floor], COLUMNS), (execs, EXEC_COLUMNS)):
        if peers:
            print(table({peer.name: run.results[peer.name] for peer in peers}, columns), end="\n\n")
    if run.losses:
        print(f"Lost at {targets.TIMES} times the rate that BCC's callback takes from a ring:")
        for name, lost in run.losses.items():
            print(f"  {name}: {lost:.1%}")
        print()
    verdicts = targets.judge(run.results, run.losses)
    print(claims.table(verdicts))
    left_out = {**{part: lack for part, lack in missing.items() if lack}, **run.failures}
    for name, why in left_out.items():
        print(f"\nLeft out, {name}: {why}")
    claims.save(
        options.json,
        verdicts,
        machine=found,
        rounds=options.rounds,
        seconds=options.seconds,
        results=run.results,
        losses=run.losses,
        left_out=left_out,
    )
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
