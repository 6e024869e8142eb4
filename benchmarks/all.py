"""Every benchmark whose figures README.md and benchmarks/README.md tell, one after the other, and a summary of them.

In build/bench there are then, for each, what it printed (.txt) and what it found (.json); pictures; and summary.md,
with a line for every figure that is claimed, which stands in benchmarks/README.md as it is.  One that fails is told,
the others go on, and the exit status is 1; so it is where a peer is missing.  A target that is missed is no failure.
What was found before of those that are not run stays, an hour of `make endurance` as well.

Run as root: `python benchmarks/all.py [--only NAME ...] [--rounds N]`, or `make bench ONLY=... ROUNDS=...`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pictures
from benchmarks.claims import Claims, claim, ratio, table

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "build" / "bench"
HANGS: Final = 3600  # seconds that none takes


class Benchmark(NamedTuple):
    """How one is run."""

    title: str
    command: str
    """{rounds} is what was asked for, {seconds} what a measurement may take."""
    rounds: int = 1
    """How often for each round of the longest ones."""


BENCHMARKS: Final = {
    "peers": Benchmark("Peers", "benchmarks/peers/run.py --rounds {rounds} --seconds {seconds}"),
    "buffers": Benchmark(
        "Ring and perf buffer",
        "-m ebpfstream bench buffers --rounds {rounds} --seconds {half} --plot build/bench/buffers-all.png",
    ),
    "kafka": Benchmark("Kafka", "benchmarks/kafka.py --rounds {rounds}", 2),
    "loop": Benchmark(
        "The event loop under a flood",
        "benchmarks/loop.py --rounds {rounds} --seconds {tenfold} --peer-seconds 5",
    ),
    "spool": Benchmark("The queue on disk", "benchmarks/spool.py --rounds {rounds}"),
    "event_forms": Benchmark("Forms of events", "benchmarks/event_forms.py --rounds {rounds}", 4),
    "syscall_tax": Benchmark("What tracing execs adds", "benchmarks/syscall_tax.py --rounds {rounds}", 3),
}
HOUR: Final = {
    "endurance": Benchmark("An hour of 100,000 events a second", "benchmarks/endurance.py --minutes 60")
}


def words(benchmark: Benchmark, rounds: int, seconds: float) -> list[str]:
    """Its command, but for Python."""
    return benchmark.command.format(
        rounds=rounds * benchmark.rounds,
        seconds=f"{seconds:g}",
        half=f"{seconds / 2:g}",
        tenfold=f"{seconds * 10:g}",
    ).split()


def run(name: str, command: list[str]) -> str:
    """Run it, and keep what it says; why it failed, or ""."""
    found, printed = FOLDER / f"{name}.json", FOLDER / f"{name}.txt"
    found.unlink(missing_ok=True)  # of an earlier run
    with printed.open("w") as file:
        try:
            status = subprocess.run(
                [sys.executable, *command, "--json", str(found)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=HANGS,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"has not ended within {HANGS / 60:.0f} min"
    if found.exists():
        content = {"command": " ".join(command), **json.loads(found.read_text())}
        found.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if not status:
        return ""
    last = printed.read_text().strip().splitlines()[-1:]
    return f"ended with status {status}, see {printed.relative_to(ROOT)}: {''.join(last)}"


def of_buffers(found: dict[str, Any]) -> Claims:
    """What README.md says of the two kinds of buffer: one producer that never stops, 64-byte events, 4 MiB."""

    def figures(kind: str, policy: str, name: str) -> list[float]:
        same = {"kind": kind, "policy": policy, "size": 64, "rate": 0, "buffer_size": 4 << 20, "producers": 1}
        (case,) = (case for case in found["cases"] if same.items() <= case.items())
        return [one[name] for one in case["rounds"]]

    def delivered(kind: str, policy: str) -> list[float]:
        return figures(kind, policy, "delivered_rate")

    return [
        claim("ring: million events/s at the limit", [rate / 1e6 for rate in delivered("ring", "gathered")]),
        claim("ring: lost of them, %", [100 * part for part in figures("ring", "gathered", "lost_part")]),
        ratio("perf: events/s, of the ring's", delivered("perf", "gathered"), delivered("ring", "gathered")),
        ratio(
            "ring with the kernel's own wakeups: events/s, of perf's",
            delivered("ring", "each"),
            delivered("perf", "each"),
        ),
    ]


def section(name: str, benchmark: Benchmark, failure: str) -> str:
    """What is told of one."""
    lines = [f"## {benchmark.title}", ""]
    path = FOLDER / f"{name}.json"
    if path.exists():
        found = json.loads(path.read_text())
        lines[-1] = f"`python {found.get('command', benchmark.command)}`: "
        lines[-1] += ", ".join(f"{key} {value}" for key, value in found["machine"].items()) + "."
        claims = of_buffers(found) if name == "buffers" else found["targets"]
        lines += ["", table(claims)]
        if conclusion := found.get("conclusion"):
            lines += ["", conclusion]
        lines += [f"\nLeft out, {who}: {why}" for who, why in found.get("left_out", {}).items()]
    if (picture := pictures.DRAWN.get(name)) and (FOLDER / "pictures" / picture).exists():
        lines += ["", f"![{benchmark.title}](pictures/{picture})"]
    if failure:
        lines += ["", f"**Failed**: {failure}"]
    return "\n".join(lines)


def main() -> int:
    """Run them, and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=3, help="of the longest ones, others have more (3)")
    parser.add_argument("--seconds", type=float, default=1, help="of a measurement (1)")
    options = parser.parse_args()
    if unknown := set(options.only) - set(BENCHMARKS):
        parser.error(f"there is no {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    try:
        for name in options.only or BENCHMARKS:
            print(f"{name} … ", end="", flush=True)
            start = time.monotonic()
            failures[name] = run(name, words(BENCHMARKS[name], options.rounds, options.seconds))
            minutes = (time.monotonic() - start) / 60
            print(f"{minutes:.1f} min" + (f": {failures[name]}" if failures[name] else ""), flush=True)
    finally:
        for why in pictures.draw(FOLDER):
            print(f"no picture: {why}")
            failures["pictures"] = why
        sections = [
            section(name, benchmark, failures.get(name, ""))
            for name, benchmark in {**BENCHMARKS, **HOUR}.items()
            if name in failures or (FOLDER / f"{name}.json").exists()
        ]
        summary = FOLDER / "summary.md"
        summary.write_text("\n\n".join(sections) + "\n")
        print(f"summary: {summary.relative_to(ROOT)}")
    return 1 if any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
