"""When events came that are not held in memory."""

from __future__ import annotations

from collections import deque
from typing import Final

_FINENESS: Final = 256  # to what part of their age times are kept apart


class Ages:
    """How many events wait in a line, and since when.

    Those that came soon after each other are gathered, so that days of them take little room; they count as old as
    their oldest.
    """

    def __init__(self) -> None:
        self.count = 0
        self._marks: deque[tuple[int, float]] = deque()  # the number of events, and when their oldest came

    @property
    def since(self) -> float | None:
        """When the oldest came; None if there are none."""
        return self._marks[0][1] if self._marks else None

    def add(self, count: int, since: float) -> None:
        """The newest."""
        if not count:
            return
        self.count += count
        if self._marks:
            gathered, began = self._marks[-1]
            if (since - began) * _FINENESS <= since - self._marks[0][1]:
                self._marks[-1] = gathered + count, began
                return
        self._marks.append((count, since))

    def add_oldest(self, count: int, since: float) -> None:
        """Older ones than all that are here."""
        if count:
            self.count += count
            self._marks.appendleft((count, since))

    def take(self, count: int) -> float | None:
        """So many of the oldest are gone: when the first of them came."""
        since = self.since
        self.count -= count
        while count and self._marks:
            here, began = self._marks.popleft()
            if here > count:
                self._marks.appendleft((here - count, began))
            count -= min(here, count)
        return since
