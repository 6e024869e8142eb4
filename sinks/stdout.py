"""Standard output, as JSON lines or as a table for people."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Any, Final, Literal, Self, Unpack

import anyio

from ebpfstream.batch import EventBatch
from ebpfstream.descriptors import SharedOutput
from ebpfstream.errors import ArgumentError, SinkClosedError, SinkError, SinkUnavailableError
from ebpfstream.options import check_choice
from ebpfstream.sink import CLOSING, Delivery, Sink
from ebpfstream.sink_url import SinkURL
from ebpfstream.table import Table
from ebpfstream.turns import in_thread

Format = Literal["json", "text"]

_CANNOT: Final = "cannot write to the standard output"
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


class StdoutSink(Sink):
    """Writes each batch to standard output when it comes, without blocking the event loop.

    A batch has arrived when the system has taken it: a pipe's reader has yet to read it, a file's disk to be written.

    `format="json"` is one JSON object a line.  `format="text"` is a table, with colour on a terminal
    (unless NO_COLOR is set).  Characters that a terminal would act on never reach it, in either.
    `fd` is the descriptor to write to, if that is to be another one.

    What it writes to belongs to others as well, so nothing is ever taken back.  Where a line was cut short, because
    the send was cancelled or a disk is full, the next send writes its rest first, and closing does if that can be at
    once, or within its deadline.  The event of such a line has not been `taken`; offered again it is not written again.
    """

    name = "stdout"
    address_example = "stdout:?format=text"

    def __init__(self, format: Format = "json", *, fd: int = 1, **delivery: Unpack[Delivery]) -> None:
        super().__init__(**delivery)
        check_choice("format", format, Format)
        self._format = format
        self._fd = fd
        self._table: Table | None = None
        self._writer: _Writer | None = None
        self._rest = b""
        """What has to be written before anything else."""
        self._begun = b""
        """The lines with which a batch that is offered again begins, and which have been written up to `_rest`."""

    @classmethod
    def from_url(cls, url: SinkURL) -> Self:
        """The sink of `stdout:` or `stdout:?format=text`."""
        if url.host or url.path:
            raise ArgumentError(f"{url.text!r}: {url.scheme}: takes no host and no path, only ?format=text")
        return cls(**url.arguments(cls, without="fd"))

    async def open(self) -> None:
        """Raises SinkError if there is no standard output."""
        try:
            self._writer = _Writer(self._fd)
        except OSError as error:
            raise SinkError(f"there is no standard output to write to: {error.strerror}") from error
        if self._format == "text":
            self._table = Table(colour=os.isatty(self._fd) and not os.environ.get("NO_COLOR"))

    async def send(self, batch: EventBatch[Any]) -> None:
        """Returns when the batch has been written.

        Raises SinkClosedError if nobody reads any more, SinkUnavailableError if the disk is full.
        """
        assert self._writer is not None, "a sink is opened before it is sent to"
        lines = self._lines(batch)
        begun, self._begun = self._begun, b""
        before, done = self._rest, 0
        if begun and lines.startswith(begun):
            before, done = b"", len(begun) - len(self._rest)
        self._rest = before
        try:
            await self._writer.write(before + lines[done:])
        except OSError as error:
            taken = self._remember(lines, before, done, len(batch.lost))
            if error.errno in _FULL:
                raise SinkUnavailableError(f"{_CANNOT}: {error.strerror}", taken) from error
            if isinstance(error, ConnectionError):
                raise SinkClosedError("whoever read the standard output has closed it") from error
            raise SinkError(f"{_CANNOT}: {error.strerror}") from error
        except BaseException:
            self._remember(lines, before, done, len(batch.lost))
            self._begun = b""  # nobody offers it again
            raise
        self._rest = b""

    def _remember(self, lines: bytes, before: bytes, done: int, losses: int) -> int:
        """What of a line that was cut short has yet to be written; how many events have been in full."""
        assert self._writer is not None
        written = self._writer.written
        if written < len(before):
            self._rest = before[written:]
            return 0
        position = done + written - len(before)
        start = lines.rfind(b"\n", 0, position) + 1
        end = position if start == position else lines.index(b"\n", position) + 1
        self._rest = lines[position:end]
        taken = max(lines.count(b"\n", 0, position) - losses, 0)
        self._begun = lines[start if taken else 0 : end]
        return taken

    def _lines(self, batch: EventBatch[Any]) -> bytes:
        if self._table is None:
            return batch.to_json_lines()
        # The heading is no event's: it is written once, before whatever comes.
        self._rest += self._table.lines(EventBatch(batch.event_type, batch.records.cut(0, 0)))
        return self._table.lines(batch)

    async def wait_closed(self) -> None:
        """Return when a pipe's reader has closed it; for anything else, never."""
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            # Nobody can read from this end: it becomes "readable" by EPOLLERR alone (pipe_poll(), fs/pipe.c).
            await anyio.wait_readable(self._fd)
        else:
            await anyio.sleep_forever()

    async def aclose(self, deadline: float = CLOSING) -> None:
        """Close what was opened; the standard output itself stays open."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                if self._rest:
                    with suppress(OSError), anyio.move_on_after(deadline):
                        await writer.write(self._rest)
            finally:
                writer.close()


class _Writer:
    """Writes all of what it is given, without blocking the event loop: waits for room, or writes a file in a thread."""

    def __init__(self, fd: int) -> None:
        self._output = SharedOutput(fd)
        self.written = 0
        """Bytes of what was given to write last that have been, whether or not all were."""

    async def write(self, data: bytes) -> None:
        self.written = 0
        rest = memoryview(data)
        if self._output.is_file:
            await in_thread(self._write_all, rest)
            return
        while self.written < len(rest):
            if self._output.asks_first:
                await anyio.wait_writable(self._output.fd)
            try:
                self.written += self._output.some(rest[self.written :])
            except BlockingIOError:
                await anyio.wait_writable(self._output.fd)

    def _write_all(self, data: memoryview) -> None:
        while self.written < len(data):
            self.written += self._output.some(data[self.written :])

    def close(self) -> None:
        self._output.close()
