"""Signals that ask a program to end: in good order, or, asked again, at once."""

from __future__ import annotations

from time import monotonic
from typing import Final

_ECHO: Final = 0.5
"""Seconds.  timeout(1), for one, sends a signal to the program and to its process group: that is one request."""


class Asked:
    """How often a program has been asked to end."""

    def __init__(self) -> None:
        self.by = 0
        """The last signal's number; 0 before the first."""
        self._at = 0.0

    def to_end(self, number: int) -> bool:
        """Note a signal; whether it means at once, since it is not the first, nor the same one at the same time."""
        now = monotonic()
        again = self.by != 0 and (number != self.by or now - self._at >= _ECHO)
        self.by, self._at = number, now
        return again
