"""An hour of 100,000 events a second through one stream: the ledger must be exact, memory flat.

A process on CPU 1 calls getppid(2) at that rate, in bursts each millisecond with sleep between; this one, on CPU 0,
reads an event of 64 bytes (72 in a ring buffer, with its header) for each call by `async for`, all in one life of one
stream.  Each minute a line tells what there was.  At the end the exit status is 1 unless

    calls made == tried == submitted + lost, submitted == delivered == iterated;
    no less than 99 % of the rate was offered;
    RSS, and of it what is anonymous, grow by no more than 1 MB an hour, which is 0.003 bytes for an event: the slope
    of the samples after the first tenth of them, in which caches fill; shorter than ten minutes tells nothing;
    descriptors and threads are what they were then.

Pss is told, and not judged: it changes with whoever else has the same libraries.  Nor are losses, which are counted.

Run as root: `python benchmarks/endurance.py --minutes N`, or `make endurance MINUTES=N`.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
from anyio.to_thread import run_sync

sys.path.insert(0, str(Path(__file__).parents[1]))

import ebpfstream
from benchmarks.claims import Claims, claim, save
from benchmarks.memory import WARM_UP, kilobytes, slope
from ebpfstream import EventStream, Statistics
from ebpfstream.bench.measuring import Case, FloodSource, Producers, event_type, producing
from ebpfstream.bench.results import machine

BOUND: Final = 1024
"""By how many KB memory may grow in an hour."""
LEAST: Final = 600
"""Seconds in which growth can be told."""
PACE: Final = 0.99
"""How much of the rate must have been offered."""
BACKENDS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


class Sample(NamedTuple):
    """How things are at one moment."""

    time: float
    delivered: int
    lost: int
    cpu: float
    """Seconds of CPU time so far."""
    rss: int
    """KB, as are the next two."""
    anonymous: int
    pss: int
    fds: int
    threads: int
    objects: int
    """That the garbage collector knows."""

    @classmethod
    def now(cls, ledger: Statistics) -> Sample:
        """As it is, without collecting garbage before."""
        return cls(
            time.monotonic(),
            ledger.delivered,
            ledger.lost or 0,
            time.process_time(),
            kilobytes("Rss"),
            kilobytes("Anonymous"),
            kilobytes("Pss"),
            len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            len(os.listdir("/proc/self/task")),  # noqa: PTH208
            len(gc.get_objects()),
        )


class Ran(NamedTuple):
    """What came of it."""

    samples: list[Sample]
    calls: int
    rate: float
    """Offered, each second."""
    producer: float
    """The CPU time that it took, of a whole CPU."""
    iterated: int
    ledger: Statistics


async def run(case: Case, seconds: float, every: float, producers: Producers) -> Ran:
    """Read, and print a line for each sample."""
    event = event_type(case.size)
    samples: list[Sample] = []
    answers: list[tuple[float, ...]] = []
    iterated = 0
    async with EventStream(FloodSource(case, producers.pids), event) as events:

        async def watch() -> None:
            samples.append(Sample.now(events.statistics()))
            while not answers:
                await anyio.sleep_until(start + every * len(samples))
                samples.append(Sample.now(events.statistics()))
                print(row(len(samples) - 1, *samples[-2:]), flush=True)

        async def end() -> None:
            answers.extend(await run_sync(producers.end, 1, abandon_on_cancel=True))
            events.detach()
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            start = anyio.current_time()
            producers.begin(1, case.rate, seconds)
            tasks.start_soon(watch)
            tasks.start_soon(end)
            async for one in events:
                one.monotonic  # type: ignore[attr-defined]  # noqa: B018
                iterated += 1
    calls, begun, ended, used = answers[0]
    elapsed = (ended - begun) / 1e9
    return Ran(samples, int(calls), calls / elapsed, used / elapsed, iterated, events.statistics())


HEAD: Final = (
    "  no.  events/s       events  lost   CPU s/M  RSS, KB  anonymous     Pss  descriptors  threads"
    "  objects of the gc"
)


def row(number: int, before: Sample, now: Sample) -> str:
    """What one interval was like."""
    events = now.delivered - before.delivered
    rate = events / (now.time - before.time)
    cpu = (now.cpu - before.cpu) / max(events, 1) * 1e6
    return (
        f"{number:5}{rate:10,.0f}{now.delivered:13,}{now.lost:6,}{cpu:10.2f}{now.rss:9,}{now.anonymous:11,}{now.pss:8,}"
        f"{now.fds:13}{now.threads:9}{now.objects:19,}"
    )


def judge(ran: Ran, rate: int) -> dict[str, bool]:
    """What was to be shown, and whether it was."""
    ledger, samples = ran.ledger, ran.samples
    steady = samples[max(int(len(samples) * WARM_UP), 1) :]
    first, last = steady[0], steady[-1]
    return {
        "calls made == tried": ran.calls == ledger.tried,
        "tried == submitted + lost": None not in (ledger.tried, ledger.submitted, ledger.lost)
        and ledger.tried == (ledger.submitted or 0) + (ledger.lost or 0),
        "submitted == delivered == iterated": ledger.submitted == ledger.delivered == ran.iterated,
        f"no less than {PACE:.0%} of {rate:,}/s were offered": ran.rate >= PACE * rate,
        f"RSS grows by no more than {BOUND} KB an hour": flat(samples, lambda sample: sample.rss),
        f"what is anonymous grows by no more than {BOUND} KB an hour": flat(
            samples, lambda sample: sample.anonymous
        ),
        "no more descriptors": last.fds <= first.fds,
        "no more threads": last.threads <= first.threads,
    }


def growth(samples: list[Sample], get: Callable[[Sample], int]) -> float | None:
    """By how much it grows in an hour; None if it is too short to tell."""
    if samples[-1].time - samples[0].time < LEAST:
        return None
    return slope([(sample.time, get(sample)) for sample in samples])


def flat(samples: list[Sample], get: Callable[[Sample], int]) -> bool:
    """Whether it does not grow, as far as can be told."""
    found = growth(samples, get)
    return found is None or found <= BOUND


def report(ran: Ran, options: argparse.Namespace, verdict: dict[str, bool]) -> dict[str, Any]:
    """What is to be told at the end."""
    samples, ledger = ran.samples, ran.ledger
    cpu = samples[-1].cpu - samples[0].cpu
    growths = {
        name: growth(samples, get)
        for name, get in (
            ("RSS, KB/h", lambda sample: sample.rss),
            ("anonymous, KB/h", lambda sample: sample.anonymous),
            ("objects of the gc, 1/h", lambda sample: sample.objects),
        )
    }
    return {
        "machine": machine(),
        "backend": options.backend,
        "buffer": options.buffer,
        "minutes": options.minutes,
        "calls made": ran.calls,
        "offered, 1/s": round(ran.rate),
        "the producer's CPU time, of one CPU": round(ran.producer, 3),
        "tried": ledger.tried,
        "submitted": ledger.submitted,
        "lost": ledger.lost,
        "delivered": ledger.delivered,
        "iterated": ran.iterated,
        "CPU s/M": round(cpu / max(samples[-1].delivered - samples[0].delivered, 1) * 1e6, 3),
        "growth after the first tenth": {
            name: None if found is None else round(found) for name, found in growths.items()
        },
        "samples": [sample._asdict() for sample in samples],
        "verdict": verdict,
    }


def show(found: dict[str, Any]) -> None:
    """The end of what is printed."""
    for name, value in found.items():
        if name in ("machine", "samples", "verdict"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {part}" for key, part in value.items())
        print(f"{name:<40}{value:,}" if isinstance(value, int) else f"{name:<40}{value}")
    for name, right in found["verdict"].items():
        print(f"{'yes' if right else 'NO':<5}{name}")
    if None in found["growth after the first tenth"].values():
        print("too short to tell whether memory is flat")


def claims(ran: Ran, options: argparse.Namespace, growths: dict[str, int | None]) -> Claims:
    """The figures that are worth telling elsewhere."""
    ledger, of = ran.ledger, f"{options.minutes:g} min of {options.rate:,} events/s, {options.buffer}"
    missing = abs(ran.calls - (ledger.delivered + (ledger.lost or 0)))
    return [
        claim(f"{of}: delivered, millions", [ledger.delivered / 1e6]),
        claim(f"{of}: lost", [ledger.lost or 0]),
        claim(f"{of}: neither delivered nor counted as lost", [missing], 0, at_least=False),
        *(
            claim(f"{of}: growth of {name}", [found], BOUND, at_least=False)
            for name, found in growths.items()
            if found is not None and "KB" in name
        ),
    ]


def main() -> int:
    """Run, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=int, default=100_000, help="events a second (100000)")
    parser.add_argument("--buffer", choices=["ring", "perf"], default="ring")
    parser.add_argument("--backend", choices=list(BACKENDS), default="asyncio")
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="look so often (60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report as JSON as well")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"of {Path(ebpfstream.__file__).parent}; {options.backend}; {options.buffer} buffer")
    print(HEAD, flush=True)
    backend, backend_options = BACKENDS[options.backend]
    case = Case(options.buffer, "gathered", rate=options.rate)
    with producing(1) as producers:
        measured = partial(run, case, options.minutes * 60, options.every, producers)
        ran = anyio.run(measured, backend=backend, backend_options=backend_options)
    verdict = judge(ran, options.rate)
    found = report(ran, options, verdict)
    show(found)
    save(options.json, claims(ran, options, found["growth after the first tenth"]), **found)
    return 0 if all(verdict.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
