"""Events that a sink will never take, each with the reason, as JSON lines in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from ebpfstream.batch import EventBatch
from ebpfstream.errors import DecodeError, SinkError
from ebpfstream.opening import alone, is_there, message, open_whole
from ebpfstream.turns import in_thread

_MODE: Final = 0o600
_log = logging.getLogger("ebpfstream")


class DeadLetters:
    """Appends to the file, one line for each event: time, sink, reason, and the event or the record's bytes.

    Several sinks may name the same file, those of other processes too.  A sink's own file is refused.  When it has been
    moved away (logrotate), the next line goes to a new one.
    """

    def __init__(self, path: str, sink: str) -> None:
        self._path = Path(path)
        self._sink = sink
        self._fd = -1

    async def open(self) -> None:
        """Open the file, or create it; a last line that a crash tore is removed.  Raises SinkError."""
        try:
            await in_thread(self._open)
        except SinkError as error:
            raise SinkError(f"dead_letters={str(self._path)!r}: {error}") from error
        except BaseException:
            self.close()  # cancelled, it was opened nevertheless
            raise

    async def add(self, batch: EventBatch[Any], reason: str) -> None:
        """Append a batch's events.  If that cannot be, this is logged: whoever sends goes on."""
        events = (orjson.Fragment(line) for line in batch.with_lost(()).to_json_lines().splitlines())
        await self._append({"reason": reason, "event": event} for event in events)

    async def add_records(self, records: Iterable[tuple[bytes, DecodeError]]) -> None:
        """The same for records that do not fit their type; their bytes as hexadecimal digits."""
        await self._append({"reason": str(error), "record": data.hex()} for data, error in records)

    async def _append(self, letters: Iterable[dict[str, Any]]) -> None:
        head = {"time": datetime.now(UTC), "sink": self._sink}
        option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z
        lines = b"".join(orjson.dumps(head | letter, option=option) for letter in letters)
        try:
            await in_thread(self._write, lines)
        except OSError as error:
            _log.error("%s: dead letters: %s", self._sink, message("append to", self._path, error))
        except SinkError as error:
            _log.error("%s: dead letters: %s", self._sink, error)

    def _open(self) -> None:
        self._fd = open_whole(self._path, _MODE, shared=True).fd

    def _write(self, lines: bytes) -> None:
        if not is_there(self._path, self._fd):
            old = self._fd
            self._open()
            os.close(old)
        with alone(self._fd):
            end = os.fstat(self._fd).st_size
            rest = memoryview(lines)
            try:
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError:
                os.ftruncate(self._fd, end)  # nothing torn stays
                raise

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
