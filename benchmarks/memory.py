"""Whether a process's memory is flat, in runs that last."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Final

WARM_UP: Final = 0.1
"""The part of the samples, from the beginning, that a slope leaves out."""


def kilobytes(what: str) -> int:
    """Of "Rss", "Pss" (pages that others have as well count in part) or "Anonymous", what this process has."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1])
    raise ValueError(f"the kernel does not tell {what}")


def slope(samples: list[tuple[float, int]]) -> float | None:
    """What it grows by in an hour, of seconds and sizes: the median of what each two samples say (Theil and Sen).

    Single outliers do not move that.  None for fewer than five samples after warming up.
    """
    steady = samples[int(len(samples) * WARM_UP) :]
    slopes = [
        (after - before) / (later - earlier) * 3600
        for (earlier, before), (later, after) in itertools.combinations(steady, 2)
    ]
    return statistics.median(slopes) if len(steady) >= 5 else None
