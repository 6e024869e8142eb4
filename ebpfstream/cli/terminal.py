"""The terminal that a live view is shown on: keys without Enter, frames without blocking, all put back at the end."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final, Self

import anyio

from ebpfstream.errors import SinkError

INPUT, OUTPUT = 0, 1
"""The descriptors that are given."""

# xterm's control sequences: the other screen, no cursor, no wrapping (lines of a frame that was made before a resize);
# and back.
_ENTER: Final = b"\x1b[?1049h\x1b[?25l\x1b[?7l"
_LEAVE: Final = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_SEQUENCES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|[^[O])?")  # what arrows, Alt and such send
_BACKGROUND: Final = 0.1  # seconds until it is looked whether this is still a background job
_LFLAG: Final = 3  # termios(3) as Python has it: a list
_IFLAG: Final = 0
_CC: Final = 6


def is_live() -> bool:
    """Whether the standard output is a terminal that can show something else than lines."""
    return os.isatty(OUTPUT) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Terminal:
    """The standard output's terminal while a view has it, and the keys that are pressed.

    Both are descriptors of our own, not blocking: a terminal that takes nothing (a stalled connection) must not stop
    the event loop, and those that we were given belong to others as well.  Keys come from the standard input if that
    is a terminal, else from the controlling terminal; without one there are none.  Ctrl-C stays a signal; Ctrl-S is a
    key, so that nobody stops the view by accident.  Whoever makes one closes it.  Raises SinkError.
    """

    def __init__(self) -> None:
        # Another user's, handed to us, does not open.
        output = _opened(f"/proc/self/fd/{OUTPUT}") or _opened("/dev/tty")
        if output is None:
            raise SinkError(
                "the terminal cannot be opened: is it another user's?  Write to a file with --to file:PATH"
            )
        self._output = output
        self._input = _opened(f"/proc/self/fd/{INPUT}") if os.isatty(INPUT) else _opened("/dev/tty")
        self._before: list[Any] | None = None
        self._shown = self._closed = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines; 80 and 24 if it does not know."""
        with suppress(OSError):
            columns, lines = os.get_terminal_size(self._output)
            if columns and lines:
                return columns, lines
        return 80, 24

    def enter(self) -> None:
        """Show the other screen, and take keys as they are pressed; not while another job has the terminal."""
        if self._shown or self._closed or not self._is_foreground():
            return
        self._shown = True
        if self._input is not None:
            with suppress(termios.error):  # hung up
                self._before = termios.tcgetattr(self._input)
                mode = list(self._before)
                mode[_LFLAG] &= ~(termios.ICANON | termios.ECHO)
                mode[_IFLAG] &= ~termios.IXON
                mode[_CC] = [*mode[_CC]]
                mode[_CC][termios.VMIN], mode[_CC][termios.VTIME] = 1, 0
                # The others than TCSANOW wait for what it has yet to show.
                termios.tcsetattr(self._input, termios.TCSANOW, mode)
        self._write_now(_ENTER)

    def leave(self) -> None:
        """Put everything back, at once."""
        if not self._shown:
            return
        self._shown = False
        self._write_now(_LEAVE)
        if self._input is not None and self._before is not None and self._is_foreground():
            with suppress(termios.error):
                termios.tcsetattr(self._input, termios.TCSANOW, self._before)

    def suspend(self) -> None:
        """Stop as Ctrl-Z stops any program; returns when the process goes on."""
        self.leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # Not SIGSTOP: the kernel ignores this one where nobody is there who could let the process go on.
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.enter()

    async def show(self, frame: str) -> bool:
        """Write it, when the terminal takes it; False once the terminal is gone."""
        rest = memoryview(frame.encode(sys.stdout.encoding or "utf-8", "replace"))
        try:
            while rest and self._shown:
                try:
                    rest = rest[os.write(self._output, rest) :]
                except BlockingIOError:
                    await anyio.wait_writable(self._output)
        except OSError:
            return False
        return True

    async def pressed(self) -> AsyncIterator[str]:
        """What is pressed, character by character; ends with the terminal.  Keys that are sequences are left out."""
        while self._input is not None:
            await anyio.wait_readable(self._input)
            # What is typed is for the shell then, and reading it would stop us (SIGTTIN).
            if not self._is_foreground():
                await anyio.sleep(_BACKGROUND)
                continue
            try:
                keys = os.read(self._input, 1024)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not keys:
                return
            for key in _SEQUENCES.sub("", keys.decode(errors="replace")):
                yield key

    def close(self) -> None:
        """Put everything back, and close what was opened; may be called again."""
        if self._closed:
            return
        self.leave()
        self._closed = True
        os.close(self._output)
        if self._input is not None:
            os.close(self._input)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_foreground(self) -> bool:
        """Whether changing its mode would not stop us (SIGTTOU)."""
        try:
            return self._input is None or os.tcgetpgrp(self._input) == os.getpgrp()
        except OSError:  # not the controlling one: no jobs
            return True

    def _write_now(self, data: bytes) -> None:
        with suppress(OSError, termios.error):
            while data:
                try:
                    data = data[os.write(self._output, data) :]
                except BlockingIOError:
                    # Nobody reads the last frame; throwing it away makes room (pty_flush_buffer(), drivers/tty/pty.c).
                    termios.tcflush(self._output, termios.TCOFLUSH)
                    data = data[os.write(self._output, data) :]


def _opened(path: str) -> int | None:
    with suppress(OSError):
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return None
