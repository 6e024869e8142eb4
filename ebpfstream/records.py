"""Records as they were in the kernel's buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Records of equal length, one after the other: where the first begins, bytes from one to the next,
# bytes of each sample, how many.  A plain tuple: where lengths are mixed there is one for each record.
Run = tuple[int, int, int, int]


def add_records(runs: list[Run], position: int, stride: int, size: int, count: int = 1) -> int:
    """Add records that follow those of the last run: to it, if they are of equal length.  Where they end."""
    if runs and runs[-1][1:3] == (stride, size):
        runs[-1] = (*runs[-1][:3], runs[-1][3] + count)
    else:
        runs.append((position, stride, size, count))
    return position + stride * count


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

    def compact(self) -> Records:
        """The same records in bytes that hold nothing else."""
        if sum(stride * count for _, stride, _, count in self.runs) == len(self.data):
            return self
        parts: list[bytes] = []
        runs: list[Run] = []
        end = 0
        for position, stride, size, count in self.runs:
            parts.append(self.data[position : position + stride * count])
            end = add_records(runs, end, stride, size, count)
        return self._replace(data=b"".join(parts), runs=runs)
