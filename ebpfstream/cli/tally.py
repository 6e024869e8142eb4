"""How often each of many things came: in the last interval, and in all."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Final, Generic, NamedTuple, TypeVar

from ebpfstream.errors import ArgumentError

MOST: Final = 4096
"""Things that are told apart, unless told otherwise."""

K = TypeVar("K", bound=int | str)


class Row(NamedTuple, Generic[K]):
    """One thing, or others together: how often it came."""

    key: K | None
    """None for others."""
    last: int
    """In the last interval."""
    total: int
    """In all."""


class Tally(Generic[K]):
    """Counts things by interval and in all, in bounded memory: when there are too many, the rarest become others.

    A thing that comes again after that begins anew; what it had is among the others, so sums stay exact.
    """

    def __init__(self, most: int = MOST) -> None:
        if most < 2:
            raise ArgumentError(f"most={most} is impossible: give a number of things, 2 or more")
        self._totals = _Bounded[K](most)
        self._coming = _Bounded[K](most)
        self._last = _Bounded[K](most)

    def add(self, counts: Mapping[K, int]) -> None:
        """So many of each have come; they are in the figures once the interval is over."""
        self._coming.add(counts)

    def tick(self) -> None:
        """The interval is over."""
        self._last, self._coming = self._coming, _Bounded[K](self._coming.most)
        self._totals.add(self._last.counts)
        self._totals.others += self._last.others

    def sums(self) -> Row[K]:
        """All things together."""
        return Row(None, self._last.sum(), self._totals.sum())

    def __len__(self) -> int:
        """How many things are told apart."""
        return len(self._totals.counts)

    def rest(self, rows: list[Row[K]]) -> str:
        """What to call the last one of these rows if it is others."""
        return "others" if self._totals.others else f"{len(self) - len(rows) + 1} others"

    def rows(self, room: int, *, by_total: bool = False) -> list[Row[K]]:
        """The busiest things, by the last interval or in all; where there is no room for all, others come last."""
        last, totals = self._last.counts, self._totals.counts

        def rank(key: K) -> tuple[int, int]:
            return (totals[key], last[key]) if by_total else (last[key], totals[key])

        room = max(room, 0)
        fits = len(totals) + bool(self._totals.others) <= room
        chosen = heapq.nsmallest(
            len(totals) if fits else room - 1,
            totals,
            key=lambda key: (*(-number for number in rank(key)), key),
        )
        rows = [Row(key, last[key], totals[key]) for key in chosen]
        whole = self.sums()
        rest = Row[K](
            None, whole.last - sum(row.last for row in rows), whole.total - sum(row.total for row in rows)
        )
        return [*rows, rest] if rest.total and room else rows


class _Bounded(Generic[K]):
    """Counts of not more than so many things, and of others together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.counts: Counter[K] = Counter()
        self.others = 0

    def add(self, counts: Mapping[K, int]) -> None:
        self.counts.update(counts)
        if len(self.counts) > self.most:
            before = self.counts.total()
            # Half of them, so that this is not done for each new one.
            self.counts = Counter(dict(self.counts.most_common(self.most // 2)))
            self.others += before - self.counts.total()

    def sum(self) -> int:
        return self.counts.total() + self.others
