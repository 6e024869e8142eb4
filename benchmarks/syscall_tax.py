"""What tracing execs costs everybody else: one system call of another process, with and without.

A process calls getppid(2) in a loop; in turn nothing is traced, successful execs are, and failed ones
as well.  Printed are nanoseconds for each turn of the loop (its own cost included), and what each way of
tracing adds; then the same for whole execs (fork, exec and exit of /bin/true).

Run as root: `python benchmarks/syscall_tax.py [--rounds N]`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import Claims, claim, save
from ebpfstream import trace_execve

CALLS = 1_000_000
EXECS = 300
WAYS = ("nothing", "successful execs", "failed execs as well")
_LOOP = f"""
import os, time
from itertools import repeat
getppid = os.getppid
start = time.perf_counter_ns()
for _ in repeat(None, {CALLS}):
    getppid()
print((time.perf_counter_ns() - start) / {CALLS})
"""


def system_call() -> float:
    """Nanoseconds of one turn."""
    return float(subprocess.run([sys.executable, "-c", _LOOP], stdout=subprocess.PIPE, check=True).stdout)


def execs() -> float:
    """Nanoseconds of one process's life."""
    start = time.perf_counter_ns()
    for _ in range(EXECS):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    return (time.perf_counter_ns() - start) / EXECS


async def measure(rounds: int) -> Claims:
    """Take turns, and print."""
    claims: Claims = []
    for name, once in (("system call", system_call), ("process's life", execs)):
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                async with AsyncExitStack() as stack:
                    if way != "nothing":
                        await stack.enter_async_context(trace_execve(failed=way == WAYS[2]))
                    found[way].append(await run_sync(once))
        claims += [
            claim(
                f"added to a {name} where {way} are traced: ns",
                [one - nothing for one, nothing in zip(found[way], found["nothing"], strict=True)],
            )
            for way in WAYS[1:]
        ]
        base = statistics.median(found["nothing"])
        for way, times in found.items():
            added = statistics.median(times) - base
            spread = f"{min(times):.0f} to {max(times):.0f}"
            print(
                f"| {name} | {way} | {statistics.median(times):.0f} ({spread}) | {added:+.0f} |", flush=True
            )
    return claims


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, for machines")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()};")
    print(f"nanoseconds: median of {options.rounds} rounds (least to most), each way in turn\n")
    print("| what | traced | ns | added |\n|---|---|--:|--:|")
    save(options.json, anyio.run(measure, options.rounds))


if __name__ == "__main__":
    main()
