"""The service for an hour, with restarts of its broker and of itself: nothing that it accepted is lost.

`ebpfstream run` forwards every exec of this machine to Apache Kafka, through a spool (durable), and to a file that
rotates.  A process executes a program with a running number, 200 times a second.  All the while something is done to
them, in an order by chance (--seed says it again), each thing told with its time:

    kill-broker      SIGKILL the broker, start it again after ten seconds
    pause-broker     SIGSTOP it for twenty, which is longer than a request may take
    terminate        SIGTERM the service, start it again; terminate-away: while the broker stands still
    kill             SIGKILL the service, start it again; kill-away: while the broker stands still
    rename           move its file away and send SIGHUP, as logrotate does
    filter, where    SIGHUP with other filters, or another `where`: what these leave out is executed; and back
    break            SIGHUP with a configuration that is none; and back

In the last quarter the service is not restarted, so that one life is long.  At the end all is drained, and librdkafka
reads the topic.  The exit status is 1 unless, for each life of the service (its stream in the headers),

    all sequence numbers of each CPU from 0 to the highest are in the topic, but for what `where` left out and what is
    told as lost; as events came first they are in order, in each partition and for each key;
    what came twice is of the time around a SIGKILL or a fault of the broker, until all arrived at once again;
    after SIGTERM: the exit status is 0, all ledgers balance, accepted == in the topic, acknowledged == in the files,
    what it left in its spool is what the next life found there;
    after SIGKILL: no less is in the topic than the metrics said to be accepted just before, and in the files no less
    than was acknowledged;
    each number that was executed from when it was attached until the signal is in the topic (for SIGKILL: until the
    last event that was accepted), or told as lost; what filters or `where` left out is not there;
    every line of the files is a whole JSON object, no event is there twice; it logged no error beside the broken
    configuration; within two minutes after each thing all arrives at once again.

Memory, descriptors and threads of the last life, after the first time that the broker was away in it, are told and,
if that is ten minutes, judged.

Run as root, with Java and Maven: `python benchmarks/service.py --minutes N`, or `make service MINUTES=N`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import Claims, claim, save
from benchmarks.memory import WARM_UP, slope
from benchmarks.service_check import Check
from benchmarks.service_lives import EVERY, Sample
from benchmarks.service_run import ACTIONS, RESTARTS, Run
from ebpfstream.bench.results import machine
from tests.kafka import jars

UNDISTURBED: Final = 0.75
"""The part of the time after which the service is not restarted any more."""
LONG: Final = 600.0
"""Seconds of a life that tell whether memory is flat."""
BOUND: Final = 32 << 10
"""KB by which memory may grow in an hour: 45 bytes for each of 200 events a second."""


def plan(seconds: float, every: float, chance: random.Random) -> Iterator[tuple[float, str]]:
    """All that can be done, in an order by chance, and again and again: seconds from the beginning, and what."""
    left: list[str] = []
    at = every / 2
    is_quiet = False
    while at < seconds - every / 2:
        if not is_quiet and seconds >= LONG and at > UNDISTURBED * seconds:
            is_quiet = True
            left.insert(0, "kill-broker")
        left = [what for what in left if not (is_quiet and what in RESTARTS)]
        if not left:
            left = chance.sample(list(ACTIONS), len(ACTIONS))
            continue
        yield at, left.pop(0)
        at += every * chance.uniform(0.7, 1.3)


def rows(run: Run, check: Check) -> list[dict[str, Any]]:
    """What there is to tell of each life."""
    made = []
    for life, found in zip(run.lives, check.found, strict=True):
        kafka, file = life.sink("kafka"), life.sink("file")
        first, last = (life.samples[0], life.samples[-1]) if life.samples else (None, None)
        cpu = None
        if first and last and last.delivered > first.delivered:
            cpu = round((last.cpu - first.cpu) / (last.delivered - first.delivered) * 1e6, 1)
        made.append(
            {
                "life": life.number,
                "from, s": round(life.began / 1e9 - run.began, 1),
                "to, s": round(life.ended / 1e9 - run.began, 1),
                "ended by": life.how or "itself",
                "status": life.status,
                "accepted": kafka["accepted"],
                "in topic": found.received.events,
                "twice": found.received.doubles,
                "missing": found.missing,
                "left out": life.left_out,
                "told lost": found.received.told,
                "spooled": kafka["spooled"],
                "recovered": kafka["recovered"],
                "written": file["acknowledged"],
                "in files": found.lines,
                "numbers": found.required,
                "absent": len(found.absent),
                "unaccepted": found.unaccepted,
                "RSS, KB": last and last.rss,
                "fds": last and last.fds,
                "threads": last and last.threads,
                "CPU µs": cpu,
            }
        )
    return made


def growths(samples: Sequence[Sample]) -> dict[str, int | None]:
    """RSS in an hour after the first tenth, the others from the first quarter to the last; None: too short to tell."""
    is_long = bool(samples) and samples[-1].time - samples[0].time >= LONG
    found: dict[str, int | None] = {"RSS, KB/h": None, "descriptors": None, "threads": None}
    if is_long:
        steady = samples[int(len(samples) * WARM_UP) :]
        thinned = steady[:: len(steady) // 200 + 1]
        rss = slope([(sample.time, sample.rss) for sample in thinned])
        found["RSS, KB/h"] = None if rss is None else round(rss)
        quarter = len(steady) // 4
        for name, get in (("descriptors", lambda one: one.fds), ("threads", lambda one: one.threads)):
            first, last = (
                statistics.median(map(get, part)) for part in (steady[:quarter], steady[-quarter:])
            )
            found[name] = round(last - first)
    return found


def judge(growth: dict[str, int | None]) -> list[str]:
    """What grows that must not."""
    bounds = {"RSS, KB/h": BOUND, "descriptors": 2, "threads": 2}
    return [
        f"{name} of the last life: {found}, allowed are {bounds[name]}"
        for name, found in growth.items()
        if found is not None and found > bounds[name]
    ]


def report(run: Run, check: Check, options: argparse.Namespace) -> dict[str, Any]:
    """What is to be told at the end."""
    lives = rows(run, check)
    growth = growths(run.steady)
    return {
        "machine": {
            **machine(),
            "Kafka": jars.version(),
            **{name: version(name) for name in ("aiokafka", "confluent-kafka")},
        },
        "method": f"one broker, topic of 3 partitions; {options.rate:g} numbers a second asked for, all other execs of "
        f"the machine as well; seed {options.seed}; metrics read every {EVERY:g} s, which is in the CPU time",
        "minutes": round(sum(row["to, s"] - row["from, s"] for row in lives) / 60, 2),
        "numbers executed": len(run.executed),
        "numbers, 1/s": round(len(run.executed) / run.executed.seconds, 1) if run.executed else 0,
        "records in the topic": check.records,
        "growth of the last life": growth,
        "lives": lives,
        "done": [done._asdict() for done in run.done],
        "violations": check.violations + judge(growth),
    }


def show(found: dict[str, Any]) -> None:
    """The end of what is printed."""
    print()
    table = [list(found["lives"][0]), *([str(one) for one in row.values()] for row in found["lives"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print()
    for name in ("minutes", "numbers executed", "numbers, 1/s", "records in the topic"):
        print(f"{name:<25}{found[name]:,}")
    print(f"{'things done':<25}{len(found['done'])}")
    for name, value in found["growth of the last life"].items():
        print(f"growth of {name:<15}{'too short to tell' if value is None else value}")
    print(f"{'violations':<25}{len(found['violations'])}")
    for violation in found["violations"]:
        print(f"  {violation}")
    print("NOT as it should be" if found["violations"] else "nothing that was accepted is lost")


def claims(found: dict[str, Any]) -> Claims:
    """The figures that are worth telling elsewhere."""
    lives, of = found["lives"], f"the service for {found['minutes']:.0f} min"

    def total(name: str) -> int:
        return sum(row[name] for row in lives)

    restarts = {how: sum(row["ended by"] == how for row in lives) for how in ("SIGTERM", "SIGKILL")}
    neither = total("missing") - total("left out") - total("told lost")
    return [
        claim(f"{of}: lives, of which {restarts['SIGKILL']} ended by SIGKILL", [len(lives)]),
        claim(f"{of}: events accepted, thousands", [total("accepted") / 1e3]),
        claim(f"{of}: of them neither in the topic nor told as lost", [neither], 0, at_least=False),
        claim(f"{of}: numbers executed that did not arrive", [total("absent")], 0, at_least=False),
        claim(f"{of}: events that came twice", [total("twice")]),
        claim(f"{of}: violations", [len(found["violations"])], 0, at_least=False),
    ]


def main() -> int:
    """Run, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=200, help="numbers a second (200)")
    parser.add_argument(
        "--every", type=float, metavar="SECONDS", help="do something so often (120, or less for a short run)"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), help="of the order")
    parser.add_argument("--folder", type=Path, help="keep everything there; it must be empty")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report as JSON as well")
    options = parser.parse_args()
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty: give another --folder")
    seconds = options.minutes * 60
    every = options.every or min(120, seconds / 12)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ebpfstream-service-"))
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"seed {options.seed}; everything is in {folder}", flush=True)
    with Run(folder, rate=options.rate) as run:
        run.go(plan(seconds, every, random.Random(options.seed)), seconds)
        print("looking at what has arrived", flush=True)
        found = report(run, Check(run.evidence()), options)
    show(found)
    save(options.json, claims(found), **found)
    if not found["violations"] and not options.folder:
        shutil.rmtree(folder)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
