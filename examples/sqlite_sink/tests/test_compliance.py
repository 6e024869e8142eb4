"""What every sink must stand."""

from __future__ import annotations

import json
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Unpack

import pytest
from ebpfstream_sqlite import SqliteSink  # type: ignore[import-not-found]  # until it is installed

from ebpfstream.sink import Delivery, Sink
from ebpfstream.testing import SinkCompliance


class TestSqlite(SinkCompliance):
    @pytest.fixture(autouse=True)
    def destination(self, tmp_path: Path) -> None:
        self.path = tmp_path / "events.db"

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        sink: Sink = SqliteSink(self.path, **delivery)
        return sink

    def arrived(self) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as database:
            return [
                json.loads(line) for (line,) in database.execute("SELECT event FROM events ORDER BY rowid")
            ]

    def address(self) -> str:
        return f"sqlite:{self.path}?table=execs"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Locked by somebody else."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            yield


class TestRead(TestSqlite):
    @contextmanager
    def away(self) -> Iterator[None]:
        """Read by somebody else: it can be inserted into, but not committed."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            database.execute("BEGIN")
            database.execute("SELECT * FROM events").fetchone()
            yield


class TestFull(TestSqlite):
    @contextmanager
    def away(self) -> Iterator[None]:
        """As if the disk were full: files may hardly grow."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 8192, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
