"""What systemd is told of the service, and how often it wants to hear that it lives: sd_notify(3)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Final

from ebpfstream.text import encodable, printable

_LONGEST: Final = 500  # characters of a status: systemd takes 4,096 bytes of a message (NOTIFY_BUFFER_MAX)


class Notifier:
    """Tells systemd how the service is; without systemd it tells nobody, and nothing else is different.

    Nothing here waits or raises.  What systemd does not take at the moment is sent before the next message, so that no
    state is lost to a full socket; of each kind the latest.  The variables by which systemd says where it listens are
    taken out of the environment: they are not for processes that this one starts.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        interval = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._waiting: dict[str, str] = {}  # messages by their first variable
        if address.startswith(("/", "@")):  # there is AF_VSOCK as well, for whole machines
            with suppress(OSError):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.watchdog_interval = self._interval(interval, watched)
        """Seconds between two calls of `alive`: half of what systemd allows.  None if it does not ask for them."""

    def _interval(self, microseconds: str, watched: str) -> float | None:
        if self._socket is None or watched not in ("", str(os.getpid())):
            return None
        try:
            return max(int(microseconds), 0) / 2e6 or None
        except ValueError:
            return None

    def ready(self, status: str = "") -> None:
        """Everything is attached and open, after the start or a reload."""
        self._tell(f"READY=1\nSTATUS={_line(status)}" if status else "READY=1")

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The end has begun."""
        self._tell("STOPPING=1")

    def status(self, status: str) -> None:
        """A line for people, as `systemctl status` shows it."""
        self._tell(f"STATUS={_line(status)}")

    def alive(self) -> None:
        """The loop goes round."""
        self._tell("WATCHDOG=1")

    def close(self) -> None:
        """Tell nothing any more.  Closing again does nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, message: str) -> None:
        if self._socket is None:
            return
        name = message.partition("=")[0]
        self._waiting.pop(name, None)  # the newer one goes behind what came between
        self._waiting[name] = message
        with suppress(OSError):  # nobody is there, or the socket is full
            for name, message in list(self._waiting.items()):
                self._socket.sendto(
                    message.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address
                )
                del self._waiting[name]


def _line(text: str) -> str:
    """The text as one line, which cannot hold another variable."""
    return printable(encodable(" ".join(text.splitlines())))[:_LONGEST]
