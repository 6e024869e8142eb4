"""What the queue on disk costs: entries appended, read and acknowledged, next to SQLite with a write-ahead log.

Both do the same: one thread appends entries, then reads them in order and acknowledges each 64 (SQLite deletes
them), so that everything is gone at the end; SQLite commits each entry, as `append` promises it to be there
when it returns.  "never" waits for no disk (SQLite: synchronous=OFF), "batch" does at each entry (synchronous=FULL).
Then the checksums, and how long it takes to open a spool that was left full.

Run: `python benchmarks/spool.py [--folder DIR] [--rounds N]`; the folder decides which disk is measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Final, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.claims import Claims, ratio, save
from ebpfstream.spool import Spool

Fsync = Literal["never", "batch"]
PAYLOADS: Final = {64 << 10: (4000, 500), 300: (100_000, 1000)}
"""Bytes of a payload: how many, without and with waiting for the disk."""
AT_ONCE: Final = 64
SIZE: Final = 4 << 30
Times = tuple[float, float]


def spool(folder: Path, payload: bytes, number: int, fsync: Fsync) -> Times:
    """Seconds to append, and to read and acknowledge."""
    queue = Spool(folder, size=SIZE, fsync=fsync)
    queue.open()
    start = perf_counter()
    for _ in range(number):
        queue.append(payload, 1)
    middle = perf_counter()
    for count in range(1, number + 1):
        entry = queue.read()
        assert entry is not None
        if count % AT_ONCE == 0 or count == number:
            queue.acknowledge(entry.end)
    end = perf_counter()
    assert (queue.count, queue.damaged) == (0, 0)
    queue.close()
    return middle - start, end - middle


def sqlite(folder: Path, payload: bytes, number: int, fsync: Fsync) -> Times:
    """The same."""
    folder.mkdir()
    database = sqlite3.connect(folder / "queue", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA synchronous={'OFF' if fsync == 'never' else 'FULL'}")
    database.execute("CREATE TABLE queue (number INTEGER PRIMARY KEY, count INTEGER, payload BLOB)")
    start = perf_counter()
    for _ in range(number):
        database.execute("INSERT INTO queue (count, payload) VALUES (?, ?)", (1, payload))
    middle = perf_counter()
    last = 0
    while rows := database.execute(
        "SELECT number, count, payload FROM queue WHERE number > ? ORDER BY number LIMIT ?", (last, AT_ONCE)
    ).fetchall():
        last = rows[-1][0]
        database.execute("DELETE FROM queue WHERE number <= ?", (last,))
    end = perf_counter()
    database.close()
    return middle - start, end - middle


QUEUES: Final = {"spool": spool, "sqlite3, WAL": sqlite}


def raw(folder: Path, payload: bytes, number: int) -> float:
    """Seconds of the writes alone."""
    folder.mkdir()
    file = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT)
    start = perf_counter()
    for index in range(number):
        os.pwrite(file, payload, index * len(payload))
    taken = perf_counter() - start
    os.close(file)
    return taken


def in_folder(top: Path, run: Callable[[Path], Times]) -> Times:
    """In a folder of its own, on a disk that has nothing else to write."""
    os.sync()
    folder = Path(tempfile.mkdtemp(dir=top))
    try:
        return run(folder / "queue")
    finally:
        shutil.rmtree(folder)


def checksum(function: Callable[[bytes], object], payload: bytes) -> float:
    """Seconds for one."""
    number = 200_000_000 // (len(payload) + 2000)
    start = perf_counter()
    for _ in range(number):
        function(payload)
    return (perf_counter() - start) / number


def opening(folder: Path) -> Times:
    """Seconds to fill a spool with half a gigabyte of small entries, and to open it again."""
    queue = Spool(folder, size=SIZE)
    queue.open()
    start = perf_counter()
    for _ in range(1_600_000):
        queue.append(b"x" * 300, 1)
    filled = perf_counter()
    queue.close()
    closed = perf_counter()
    queue.open()
    opened = perf_counter()
    assert queue.recovered == 1_600_000
    queue.close()
    return filled - start, opened - closed


def main() -> None:
    """Prints where and how it measures, and the tables."""
    parser = argparse.ArgumentParser(description="What the queue on disk costs.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, for machines")
    options = parser.parse_args()
    print(f"{platform.platform()}; Python {platform.python_version()}; SQLite {sqlite3.sqlite_version};")
    print(f"median of {options.rounds} rounds in {options.folder}; µs for each entry.\n")
    print("| payload | fsync | queue | append | read, acknowledge | MB/s appended | the writes alone |")
    print("|---|---|---|---|---|---|---|")
    claims: Claims = []
    for length, numbers in PAYLOADS.items():
        payload = random.Random(1).randbytes(length)
        fsyncs: tuple[Fsync, Fsync] = ("never", "batch")
        for fsync, number in zip(fsyncs, numbers, strict=True):
            alone: list[float] = []
            times: dict[str, list[Times]] = {name: [] for name in QUEUES}
            for _ in range(options.rounds):
                if fsync == "never":
                    taken, _ = in_folder(options.folder, lambda f: (raw(f, payload, number), 0))  # noqa: B023
                    alone.append(taken)
                for name, queue in QUEUES.items():
                    found = in_folder(options.folder, lambda f: queue(f, payload, number, fsync))  # noqa: B023
                    times[name].append(found)
            writes = f"{statistics.median(alone) / number * 1e6:.1f}" if alone else ""
            for name, found_times in times.items():
                append, read = (statistics.median(part) for part in zip(*found_times, strict=True))
                print(
                    f"| {length} | {fsync} | {name} | {append / number * 1e6:.1f} | {read / number * 1e6:.1f} "
                    f"| {length * number / append / 1e6:.0f} | {writes} |"
                )
            ours, theirs = (list(map(sum, times[name])) for name in QUEUES)
            what = f"{length:,} bytes, fsync {fsync}: entries each second, of SQLite's"
            claims.append(ratio(what, theirs, ours))
    print("\n| checksum of | crc32 | adler32 |\n|---|---|---|")
    for length in PAYLOADS:
        payload = random.Random(1).randbytes(length)
        print(
            f"| {length} | {checksum(zlib.crc32, payload) * 1e6:.2f} | {checksum(zlib.adler32, payload) * 1e6:.2f} |"
        )
    save(options.json, claims)
    _, opened = in_folder(options.folder, opening)
    print(f"\nOpening a spool with 1,600,000 entries of 300 bytes: {opened * 1e3:.0f} ms.")


if __name__ == "__main__":
    main()
