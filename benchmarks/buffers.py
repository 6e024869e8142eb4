"""Perf buffer against ring buffer: events that a stream takes from a producer that never stops.

The same program submits through each kind in turn, in the same run, from one process on CPU 1 while the
stream reads on CPU 0: typed events by `async for`, by batch, and as JSON lines.  Printed are events per
second (median and spread of the rounds), what was lost, and the ratio.

Run as root: `python benchmarks/buffers.py [--rounds N] [--seconds S]`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parents[1]))

from ebpfstream import EventStream
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.readymade import ReadyMade
from tests.kernel import flood
from tests.kernel.flood import FloodEvent

FORMS = ("async for", "batches", "JSON lines")
BUFFER_SIZE = 16 << 20


async def measure(kind: Kind, form: str, seconds: float) -> tuple[float, float]:
    """Events per second, and the part of all that was lost."""
    with flood.producing(cpu=1) as producer, tempfile.TemporaryDirectory() as folder:
        text = (Path(flood.__file__).parent / "flood.c").read_text()
        path = Path(folder) / "flood.c"
        path.write_text(f"#define TARGET {producer.pid}\n#define LENGTH(n) 44\n{text}")
        hooks = {"flood": RawTracepoint("sys_enter")}
        source = ReadyMade(path, FloodEvent, hooks, buffer=kind, buffer_size=BUFFER_SIZE)
        async with EventStream(source, FloodEvent) as events:
            producer.start(1_000_000_000)
            await anyio.sleep(0.1)
            before, start = events.statistics(), time.perf_counter()
            with anyio.move_on_after(seconds):
                if form == "async for":
                    async for event in events:
                        event.sequence, event.cpu  # noqa: B018
                async for batch in events.batches():
                    if form == "batches":
                        for event in batch:
                            event.sequence, event.cpu  # noqa: B018
                    else:
                        batch.to_json_lines()
            elapsed, after = time.perf_counter() - start, events.statistics()
    assert after.lost is not None
    assert before.lost is not None
    lost = after.lost - before.lost
    part_lost = lost / max(after.received - before.received + lost, 1)
    return (after.delivered - before.delivered) / elapsed, part_lost


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()};")
    print(f"88-byte samples, {BUFFER_SIZE >> 20} MiB in all, producer on CPU 1, reader on CPU 0;")
    print(
        f"thousand events per second: median of {options.rounds} rounds of {options.seconds} s (least to most)\n"
    )
    print("| form | ring | lost | perf | lost | perf / ring |\n|---|--:|--:|--:|--:|--:|")
    for form in FORMS:
        rates: dict[Kind, list[float]] = {"ring": [], "perf": []}
        losses: dict[Kind, list[float]] = {"ring": [], "perf": []}
        for _ in range(options.rounds):
            for kind in rates:
                rate, lost = anyio.run(measure, kind, form, options.seconds)
                rates[kind].append(rate)
                losses[kind].append(lost)
        ratios = [perf / ring for ring, perf in zip(rates["ring"], rates["perf"], strict=True)]
        cells = [
            f"{statistics.median(rates[kind]) / 1e3:.0f} ({min(rates[kind]) / 1e3:.0f} to {max(rates[kind]) / 1e3:.0f})"
            f" | {statistics.median(losses[kind]):.0%}"
            for kind in rates
        ]
        print(f"| {form} | {' | '.join(cells)} | {statistics.median(ratios):.2f} |", flush=True)


if __name__ == "__main__":
    main()
