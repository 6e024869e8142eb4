"""Where events come from."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self


class Origin(NamedTuple):
    """One stream of one machine: with an event's CPU, program and sequence number it names the event for good."""

    host: str
    """The machine's name."""
    boot: str
    """The identifier of the time since it was booted (/proc/sys/kernel/random/boot_id)."""
    stream: str
    """The stream's own, by chance; sequence numbers begin anew with each stream."""

    @classmethod
    def new(cls) -> Self:
        """That of a stream which is opened here and now."""
        return cls(socket.gethostname(), _boot_id(), os.urandom(8).hex())


@cache
def _boot_id() -> str:
    """The identifier of the time since this machine was booted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
