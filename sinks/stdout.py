"""Standard output, as JSON lines or as a table for people."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from typing import Any, Final, Literal

import anyio

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkClosedError, SinkError
from ebpfstream.sink import Sink
from ebpfstream.table import Table

Format = Literal["json", "text"]

_PIPE_BUF: Final = 4096  # a pipe that polls writable takes so many bytes without blocking (pipe(7))


class StdoutSink(Sink):
    """Writes each batch to standard output when it comes, by whole lines, without blocking the event loop.

    `format="json"` is one JSON object a line.  `format="text"` is a table, with colour on a terminal
    (unless NO_COLOR is set).  Characters that a terminal would act on never reach it, in either.
    """

    def __init__(self, format: Format = "json", *, fd: int = 1) -> None:
        if format not in ("json", "text"):
            raise ArgumentError(f'format={format!r} is unknown: give "json" or "text"')
        self._format = format
        self._fd = fd
        self._lines: Callable[[EventBatch[Any]], bytes] = EventBatch.to_json_lines
        self._writer: _Writer | None = None

    async def open(self) -> None:
        """Raises SinkError if there is no standard output."""
        try:
            self._writer = _Writer(self._fd)
        except OSError as error:
            raise SinkError(f"there is no standard output to write to: {error.strerror}") from error
        if self._format == "text":
            colour = os.isatty(self._fd) and not os.environ.get("NO_COLOR")
            self._lines = Table(colour=colour).lines

    async def send(self, batch: EventBatch[Any]) -> None:
        """Returns when the batch has been written.  Raises SinkClosedError if nobody reads any more."""
        assert self._writer is not None, "a sink is opened before it is sent to"
        try:
            await self._writer.write(self._lines(batch))
        except BrokenPipeError as error:
            raise SinkClosedError("whoever read the standard output has closed it") from error
        except OSError as error:
            raise SinkError(f"cannot write to the standard output: {error.strerror}") from error

    async def wait_closed(self) -> None:
        """Return when a pipe's reader has closed it; for anything else, never."""
        if stat.S_ISFIFO(os.fstat(self._fd).st_mode):
            # Nobody can read from this end: it becomes "readable" by EPOLLERR alone (pipe_poll(), fs/pipe.c).
            await anyio.wait_readable(self._fd)
        else:
            await anyio.sleep_forever()

    async def aclose(self) -> None:
        """Close what was opened; the standard output itself stays open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Writer:
    """Writes to a descriptor that may block and is shared with other processes, without blocking.

    Making it non-blocking would change it for all who share it.  A pipe or terminal is opened once
    more instead; a socket has a flag for each call; a regular file does not block.
    """

    def __init__(self, fd: int) -> None:
        kind = os.fstat(fd).st_mode
        self._socket: socket.socket | None = None
        self._polls_first = False
        if stat.S_ISSOCK(kind):
            self._fd = os.dup(fd)
            self._socket = socket.socket(fileno=self._fd)
        elif stat.S_ISREG(kind):
            self._fd = os.dup(fd)
        else:
            try:
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:  # opened by another user, who handed it to us
                self._fd = os.dup(fd)
                self._polls_first = True

    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._polls_first:
                await anyio.wait_writable(self._fd)
            try:
                rest = rest[self._write(rest) :]
            except BlockingIOError:
                await anyio.wait_writable(self._fd)

    def _write(self, data: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._fd, data[:_PIPE_BUF] if self._polls_first else data)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self._fd)
