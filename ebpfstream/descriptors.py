"""A descriptor that others have as well, written to without making it non-blocking for them."""

from __future__ import annotations

import os
import select
import socket
import stat


class SharedOutput:
    """Takes what there is room for, and never waits for whoever reads.

    Making the descriptor non-blocking would change it for all who share it.  A pipe, a terminal or another device is
    opened once more instead; a socket has a flag for each call.  A regular file always blocks, for as long as its disk
    takes.
    """

    def __init__(self, fd: int) -> None:
        """Raises OSError if there is no such descriptor."""
        kind = os.fstat(fd).st_mode
        self._socket: socket.socket | None = None
        self.is_file = stat.S_ISREG(kind)
        self.asks_first = False
        """Whether to look for room before each `some`, which would block without: it could not be opened once more."""
        if self.is_file:
            self.fd = os.dup(fd)
        elif stat.S_ISSOCK(kind):
            self.fd = os.dup(fd)
            self._socket = socket.socket(fileno=self.fd)
        else:
            try:
                self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:  # opened by another user, who handed it to us
                self.fd = os.dup(fd)
                self.asks_first = True

    def some(self, data: bytes | memoryview) -> int:
        """Write as much as there is room for; how many bytes.  Raises BlockingIOError if there is none, OSError."""
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        # A pipe that polls writable takes PIPE_BUF bytes without blocking (pipe(7)).
        return os.write(self.fd, data[: select.PIPE_BUF] if self.asks_first else data)

    def close(self) -> None:
        """Close what was opened; the descriptor that was given stays open."""
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self.fd)
