"""Events into an SQLite database."""

from __future__ import annotations

import json
import os
import sqlite3
from typing import Any, Self, Unpack

from anyio.to_thread import run_sync

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkError, SinkUnavailableError
from ebpfstream.sink import CLOSING, Delivery, Sink
from ebpfstream.sink_url import SinkURL
from ebpfstream.turns import in_thread, to_the_end

# What passes: the database is locked, the disk is full, or does not answer.
_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
}


class SqliteSink(Sink):
    """Inserts each event into a table: its `time`, if it has one, its `kind`, and the `event` as JSON.

    Losses are rows of the kind "lost".  A batch is one transaction.  It has arrived when that is committed, and
    survives a crash of the machine from then on.
    """

    address_example = "sqlite:/var/lib/execs.db?table=execs"

    def __init__(
        self, path: str | os.PathLike[str], *, table: str = "events", **delivery: Unpack[Delivery]
    ) -> None:
        super().__init__(**delivery)
        if not os.fspath(path):
            raise ArgumentError(f"sqlite: names no file: write for example {self.address_example}")
        if not table.isidentifier():
            raise ArgumentError(f"table={table!r} is no name: give letters, digits and _, such as execs")
        self.name = f"sqlite:{os.fspath(path)}"
        self._path = path
        self._table = table
        self._connection: sqlite3.Connection | None = None

    @classmethod
    def from_url(cls, url: SinkURL) -> Self:
        if url.host:
            raise ArgumentError(f"{url.text!r}: a database has no host: write {cls.address_example}")
        return cls(url.path, **url.arguments(cls, without="path"))

    async def open(self) -> None:
        """Open the database, and make it and the table if need be.  Raises SinkError."""
        try:
            await in_thread(self._open)
        except BaseException:  # cancelled, the thread has gone on nevertheless
            await self.aclose()
            raise

    async def send(self, batch: EventBatch[Any]) -> None:
        """Returns when the batch is committed."""
        await in_thread(self._insert, batch)

    async def aclose(self, deadline: float = CLOSING) -> None:
        """Close the database; that takes no time, as nothing is left to be written."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await to_the_end(run_sync, connection.close)

    # --- in a thread, one after the other

    def _open(self) -> None:
        try:
            # No transactions but those begun below; a database that is locked is not waited for.
            self._connection = sqlite3.connect(
                self._path, timeout=0, isolation_level=None, check_same_thread=False
            )
            self._connection.execute(f'CREATE TABLE IF NOT EXISTS "{self._table}" (time, kind, event)')
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _insert(self, batch: EventBatch[Any]) -> None:
        connection = self._connection
        assert connection is not None, "a sink is opened before it is sent to"
        rows = self._rows(batch)
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(f'INSERT INTO "{self._table}" VALUES (?, ?, ?)', rows)  # noqa: S608
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _rows(self, batch: EventBatch[Any]) -> list[tuple[str | None, str, str]]:
        """Raises DecodeError, before anything is inserted."""
        lines = batch.to_json_lines().decode().split("\n")[:-1]
        rows = []
        for number, line in enumerate(lines):
            is_lost = number < len(batch.lost)
            fields = json.loads(line)["lost"] if is_lost else json.loads(line)
            rows.append((fields.get("time"), "lost" if is_lost else batch.event_type.__name__, line))
        return rows

    def _error(self, error: sqlite3.Error) -> SinkError:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNAVAILABLE:
            return SinkUnavailableError(f"cannot write to {self.name}: {error}")
        return SinkError(f"cannot use {self.name}: {error}: is it a database, and may you write to it?")
