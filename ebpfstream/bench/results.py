"""Figures of several rounds, put together; what follows from them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from ebpfstream import __version__
from ebpfstream.bench.measuring import WATERMARK, Case, Figures, Kind, Policy, producing
from ebpfstream.bench.measuring import measure as measure_case
from ebpfstream.bench.plan import Plan
from ebpfstream.stream import LATENCY

MEANINGS: Final[dict[Policy, str]] = {
    "each": "the kernel's own way: perf wakes for each event, the ring for each that finds the reader waiting",
    "forced": "the ring wakes for each event, too (BPF_RB_FORCE_WAKEUP)",
    "gathered": f"events may gather for {LATENCY * 1e3:g} ms after a wakeup, as streams do unless told otherwise",
    "watermark": f"one wakeup for {WATERMARK >> 10} KiB of events, or a quarter of the buffer if that is less",
}


_COMPARED: Final[tuple[Policy, ...]] = ("each", "gathered", "watermark")


class Result(NamedTuple):
    """A case and its rounds, in order."""

    case: Case
    rounds: list[Figures]

    def _all(self, choose: Callable[[Sequence[float]], float]) -> Figures:
        return Figures._make(choose(values) for values in zip(*self.rounds, strict=True))

    @property
    def median(self) -> Figures:
        """Of each figure by itself."""
        return self._all(statistics.median)

    @property
    def least(self) -> Figures:
        """Of each figure by itself."""
        return self._all(min)

    @property
    def most(self) -> Figures:
        """Of each figure by itself."""
        return self._all(max)


class Results:
    """All of a plan, and where it was measured."""

    def __init__(
        self, plan: Plan, rounds: int, seconds: float, measured: Mapping[Case, list[Figures]]
    ) -> None:
        self.plan = plan
        self.rounds = rounds
        self.seconds = seconds
        self._measured = measured
        self.machine = machine()

    def of(self, case: Case) -> Result:
        """What was measured of it."""
        return Result(case, self._measured[case])

    def rate_ratio(self, policy: Policy, over: Kind, under: Kind) -> float:
        """How many times the events that one kind delivers are those of the other, at the limit: median of rounds."""
        size = self.plan.sizes
        first, second = (
            self._measured[size.base._replace(kind=kind, policy=policy)] for kind in (over, under)
        )
        return statistics.median(
            one.delivered_rate / max(two.delivered_rate, 1) for one, two in zip(first, second, strict=True)
        )

    def method(self) -> str:
        """How it was measured."""
        cpus = sorted(os.sched_getaffinity(0))
        first, second, third = (cpus[index % len(cpus)] for index in range(3))
        return (
            f"Median of {self.rounds} rounds of {self.seconds:g} s for each case, all cases in turn.  Producers call "
            f"getppid(2) on CPU {second} (the second one on CPU {third}), and a program at a raw tracepoint submits "
            f"an event for each call; a process on CPU {first} reads `batches()`, and takes the latency of every "
            "event with numpy.  Losses are exact: calls made = delivered + lost, in each round.  CPU time is in "
            "seconds for a million events: of the producers with their system calls for those offered, of the reader "
            "for those delivered.  RSS is the reader's, with the buffer's pages if the kernel counts them (a ring's)."
        )

    def conclusion(self) -> str:
        """Which to choose when, in a sentence."""
        ring = self.rate_ratio("gathered", "ring", "perf")
        better: Kind = "ring" if ring >= 1 else "perf"
        other: Kind = "perf" if better == "ring" else "ring"
        near = self.rate_ratio("gathered", other, better)
        rates = self.plan.rates
        slowest = min(filter(None, rates.points))
        rare = [self.of(rates.case(slowest, (better, policy))).median for policy in _COMPARED]
        each, gathered = (
            self.of(self.plan.sizes.base._replace(kind=better, policy=policy)).median
            for policy in _COMPARED[:2]
        )
        choice = "either kind" if near > 0.9 else f"the {better} buffer"
        return (
            f"Take {choice} and let events gather: {_count(gathered.delivered_rate)} events/s at the limit by "
            f"{better}, {near:.2f} of that by {other}, while with the kernel's own wakeups the ring delivers "
            f"{self.rate_ratio('each', 'ring', 'perf'):.1f} times as many as perf; latency=0 is for events that must "
            f"come sooner (p50 at {_count(slowest)}/s {time(rare[0].p50)} for {time(rare[1].p50)}) and costs the "
            f"reader {each.consumer_cpu / gathered.consumer_cpu:.1f} times the CPU at the limit, and a fixed watermark "
            f"is for streams that never trickle (p99 at {_count(slowest)}/s {time(rare[2].p99)})."
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, each round too, for machines."""
        return {
            "machine": self.machine,
            "method": self.method(),
            "policies": MEANINGS,
            "units": {
                "size": "bytes",
                "buffer_size": "bytes",
                "rate": "events/s, 0: as many as the producers can",
                "offered_rate": "events/s",
                "delivered_rate": "events/s",
                "lost_part": "of the offered",
                "producer_cpu": "s per million events offered",
                "consumer_cpu": "s per million events delivered",
                "p50": "µs",
                "p99": "µs",
                "p999": "µs",
                "resident": "MB",
                "wakeups": "1/s",
            },
            "sweeps": [
                {"varied": sweep.varied, "title": sweep.title, "points": sweep.points} for sweep in self.plan
            ],
            "cases": [
                {
                    **result.case._asdict(),
                    "wake_every": result.case.wake_every,
                    "median": result.median._asdict(),
                    "least": result.least._asdict(),
                    "most": result.most._asdict(),
                    "rounds": [figures._asdict() for figures in result.rounds],
                }
                for result in map(self.of, self._measured)
            ],
            "conclusion": self.conclusion(),
        }


async def measure(plan: Plan, rounds: int, seconds: float, done: Callable[[Case | None], None]) -> Results:
    """Measure all cases in turn, as often as there are rounds; `done` is told each that begins, and None at the end.

    Raises what opening a stream may raise.
    """
    measured: dict[Case, list[Figures]] = {case: [] for case in plan.cases()}
    with producing(max(plan.producers.points)) as producers:
        for _ in range(rounds):
            for case, figures in measured.items():
                done(case)
                figures.append(await measure_case(case, seconds, producers))
    done(None)
    return Results(plan, rounds, seconds, measured)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
    return {
        "processor": f"{os.cpu_count()} x {model or platform.machine()}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "ebpfstream": __version__,
        "python": platform.python_version(),
        "anyio": version("anyio"),
        "numpy": version("numpy"),
    }


def size(number: int) -> str:
    """Bytes, in the unit that suits them."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if number >= 1 << shift:
            return f"{number >> shift} {unit}"
    return f"{number} B"


def time(microseconds: float) -> str:
    """A duration in the unit that suits it."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.1f} s"
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.0f} ms"
    return f"{microseconds / 1e3:.1f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} µs"


def _count(number: float) -> str:
    if number >= 1e6:
        return f"{number / 1e6:.2g} M"
    return f"{number / 1e3:.3g} k"
