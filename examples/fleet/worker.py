"""A worker of the group that reads the fleet's topic: notes every exec of every host in a database, once.

An exec has a name for good: host, boot, stream, CPU, program and sequence number. That is the table's key, so what
comes again, since a host sent it again or a worker was killed before Kafka knew how far it was, changes nothing.
"""

import argparse
import signal
import sqlite3
from pathlib import Path

import anyio

from ebpfstream import KafkaSource, Lost

TABLES = """
CREATE TABLE IF NOT EXISTS execs (
    host TEXT, boot TEXT, stream TEXT, cpu INTEGER, program INTEGER, sequence INTEGER,
    time TEXT, message TEXT, worker TEXT, doubles INTEGER DEFAULT 0,
    PRIMARY KEY (host, boot, stream, cpu, program, sequence)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS losses (
    host TEXT, boot TEXT, stream TEXT, cpu INTEGER, count INTEGER, first INTEGER, last INTEGER, time TEXT
);
"""
EXEC = """
INSERT INTO execs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)
ON CONFLICT DO UPDATE SET doubles = doubles + 1
"""
LOSS = "INSERT INTO losses VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


def opened(path: Path) -> sqlite3.Connection:
    """The database, which several workers write to at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=5)
    database.execute("PRAGMA journal_mode = WAL")
    database.executescript(TABLES)
    return database


async def work(name: str, servers: str, database: sqlite3.Connection) -> None:
    """Until it is cancelled."""
    # The table leaves out doubles, and counts them: it knows of all workers.
    source = KafkaSource(servers, "execs", group="fleet", on_lost="yield", doubles="yield")
    async with source as events:
        async for batch in events.batches():
            # Asking for the next ones says that these are done with: by then they are in the database.
            with database:
                for origin, event in batch:
                    assert origin, "not from an ebpfstream"
                    if isinstance(event, Lost):
                        when = event.time and event.time.isoformat()
                        lost = (event.cpu, event.count, event.first_sequence, event.last_sequence, when)
                        database.execute(LOSS, (*origin, *lost))
                    else:
                        number = (event.cpu, event.program, event.sequence)
                        what = (event.time.isoformat(), event.message, name)
                        database.execute(EXEC, (*origin, *number, *what))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="what this worker is called in the table")
    parser.add_argument("--servers", default="198.51.100.1:9092")
    parser.add_argument("--database", type=Path, default="build/fleet/execs.db")
    arguments = parser.parse_args()
    database = opened(arguments.database)
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work, arguments.name, arguments.servers, database)
            async for _ in signals:
                tasks.cancel_scope.cancel()
    database.close()


if __name__ == "__main__":
    anyio.run(main)
