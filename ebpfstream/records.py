"""Records as they were in the kernel's buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Records of equal length, one after the other: where the first begins, bytes from one to the next,
# bytes of each sample, how many.  A plain tuple: where lengths are mixed there is one for each record.
Run = tuple[int, int, int, int]


class Records(NamedTuple):
    """Bytes copied once from the buffer, and where in them the records lie.

    `prefix` bytes stand before each sample in its record.  `discarded` records were the program's
    own to withdraw, and are in no run.  Up to `padding` bytes at the end of a sample may be none of it.
    """

    data: bytes
    prefix: int
    runs: list[Run]
    discarded: int = 0
    padding: int = 0

    def samples(self) -> Iterator[bytes]:
        """Each record's sample."""
        for position, stride, size, count in self.runs:
            for start in range(position + self.prefix, position + self.prefix + stride * count, stride):
                yield bytes(self.data[start : start + size])

    def cut(self, start: int, stop: int) -> Records:
        """The records from the one numbered `start` to before `stop`; the bytes are shared."""
        runs: list[Run] = []
        number = 0
        for position, stride, size, count in self.runs:
            first, last = max(start - number, 0), min(stop - number, count)
            if first < last:
                runs.append((position + first * stride, stride, size, last - first))
            number += count
        return self._replace(runs=runs, discarded=0)
