"""Events that a sink will never take, each with the reason, as JSON lines in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from ebpfstream.batch import EventBatch
from ebpfstream.errors import DecodeError, SinkError
from ebpfstream.turns import in_thread

_MODE: Final = 0o600
_log = logging.getLogger("ebpfstream")


class DeadLetters:
    """Appends to the file, one line for each event: time, sink, reason, and the event or the record's bytes."""

    def __init__(self, path: str, sink: str) -> None:
        self._path = path
        self._sink = sink
        self._fd = -1

    async def open(self) -> None:
        """Raises SinkError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            self._fd = await in_thread(os.open, self._path, flags, _MODE)
        except OSError as error:
            raise SinkError(
                f"dead_letters={self._path!r} cannot be opened: {error.strerror}; give a file that can be written"
            ) from error

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
            _log.error("%s: cannot append to the dead letters %s: %s", self._sink, self._path, error.strerror)

    def _write(self, lines: bytes) -> None:
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
