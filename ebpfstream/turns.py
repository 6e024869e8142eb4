"""Who may wait for what an iterator yields next: one task at a time, until it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
from anyio import CancelScope

from ebpfstream.errors import StreamBusyError, StreamClosedError


class Turn:
    """Taken by whoever waits for the next `what`; once closed, nobody may wait any more."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = anyio.Lock()
        self._waiting: CancelScope | None = None
        self.closed = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises StreamBusyError if another task has it, StreamClosedError."""
        self.check_open()
        try:
            self._lock.acquire_nowait()
        except anyio.WouldBlock:
            raise StreamBusyError(
                f"another task is waiting for this stream's next {self._what}: "
                f"iterate it in one task, and hand {self._what}s on from there"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    def check_open(self) -> None:
        """Raises StreamClosedError."""
        if self.closed:
            raise StreamClosedError(
                "this stream is closed: call the function that made it again for a new one"
            )

    def waiting(self) -> CancelScope:
        """What to wait in, so that `interrupt` ends it at once."""
        self._waiting = CancelScope()
        return self._waiting

    def interrupt(self) -> None:
        """Let who waits look again at how things are."""
        if self._waiting is not None:
            self._waiting.cancel()

    def close(self) -> anyio.Lock:
        """Nobody may wait from now on; whoever still does is interrupted, and gone when the lock is to be had."""
        self.closed = True
        self.interrupt()
        return self._lock
