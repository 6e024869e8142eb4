"""Records of equal length in a row, found without looking at each."""

from __future__ import annotations


def equal_headers(headers: memoryview, first: int, step: int, end: int) -> int:
    """How many of the items at `first`, `first + step`, … before `end` equal the first one, in a row.

    Ever longer stretches are compared at once, as long as all are equal.  What lies past the first
    other item is no header any more; it is looked at, and not used.
    """
    header = headers[first]
    if first + step >= end or headers[first + step] != header:
        return 1
    count = 1
    window = 16
    while True:
        start = first + count * step
        stretch = headers[start : min(start + window * step, end) : step].tolist()
        equal = stretch.count(header)
        if equal != len(stretch):
            return count + next(index for index, other in enumerate(stretch) if other != header)
        if not equal:
            return count
        count += equal
        window *= 4
