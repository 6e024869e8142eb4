"""Has everything arrived that the hosts shipped? By the workers' table, and by what the hosts say of themselves.

The table has what all workers have noted, whichever of them was killed; ebpfstream's `Completeness` says of it what is
missing. The last line of a host's log is its ledger: how many events Kafka has acknowledged. Status 0 if all is there.
"""

import argparse
import json
import re
import sqlite3
import sys
import time
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

from ebpfstream import Completeness, Lost, Origin

EXECS = "SELECT host, boot, stream, cpu, program, sequence FROM execs"
LOSSES = "SELECT host, boot, stream, cpu, count, first, last, time FROM losses"


def shipped(folder: Path) -> Counter[str]:
    """By host, what its sink has delivered."""
    delivered: Counter[str] = Counter()
    for log in folder.glob("*.log"):
        ended = [entry for entry in map(json.loads, log.open()) if "ledger" in entry]
        delivered[log.stem] = sum(
            sink["acknowledged"] for entry in ended for sink in entry["ledger"]["sinks"]
        )
    return delivered


def arrived(database: sqlite3.Connection) -> Completeness:
    """What is in the table, whoever noted it."""
    seen = Completeness()
    for *names, cpu, program, sequence in database.execute(EXECS):
        seen.add(Origin(*names), cpu, program, sequence)
    for host, boot, stream, cpu, count, first, last, when in database.execute(LOSSES):
        seen.tell(
            Origin(host, boot, stream), Lost(cpu, count, first, last, when and datetime.fromisoformat(when))
        )
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", type=int, help="how many numbered programs were executed on each host")
    parser.add_argument("--folder", type=Path, default="build/fleet")
    parser.add_argument("--wait", type=float, default=60, help="for what is on its way [seconds]")
    arguments = parser.parse_args()
    sent = shipped(arguments.folder)
    database = sqlite3.connect(arguments.folder / "execs.db")
    until = time.monotonic() + arguments.wait
    while time.monotonic() < until:
        (count,) = database.execute("SELECT count(*) FROM execs").fetchone()
        if count >= sent.total():
            break
        time.sleep(0.5)

    doubles = dict(database.execute("SELECT host, sum(doubles) FROM execs GROUP BY host"))
    numbers: dict[str, Counter[int]] = defaultdict(Counter)
    for host, message in database.execute("SELECT host, message FROM execs"):
        if numbered := re.fullmatch("/bin/true ([0-9]+)", message):
            numbers[host][int(numbered[1])] += 1
    seen = arrived(database)
    wanted = Counter(range(1, arguments.numbers + 1))  # each of them once
    is_complete = bool(sent)
    print("host   shipped  arrived  doubles  missing  told as lost  numbered")
    for host in sorted(sent.keys() | {origin.host for origin in seen}):
        streams = [received for origin, received in seen.items() if origin.host == host]
        # A stream's numbers begin with 0 on each CPU, and so does what has arrived.
        before = sum(next(all_.ranges()).start for one in streams for all_ in one.numbers.values())
        missing = before + sum(one.missing for one in streams)
        events, told = sum(one.events for one in streams), sum(one.told for one in streams)
        print(
            f"{host:<5}{sent[host]:>9}{events:>9}{doubles.get(host, 0):>9}"
            f"{missing:>9}{told:>14}{numbers[host].total():>10}"
        )
        is_complete &= events == sent[host] and missing == told == 0 and numbers[host] == wanted
    for worker, count in database.execute("SELECT worker, count(*) FROM execs GROUP BY worker"):
        print(f"worker {worker} was the first to note {count} of them")
    print("complete" if is_complete else "NOT COMPLETE")
    return not is_complete


if __name__ == "__main__":
    sys.exit(main())
