"""Quantiles of as many latencies as come, in little memory."""

from __future__ import annotations

from typing import Any, Final

import numpy

_PER_E: Final = 100
"""Classes for each factor of e: one is 1 % wide."""
_CLASSES: Final = 26 * _PER_E  # up to 200 s


class Latencies:
    """Counts latencies in nanoseconds by classes that are 1 % wide."""

    def __init__(self) -> None:
        self._counts = numpy.zeros(_CLASSES, numpy.int64)
        self._kept: list[numpy.ndarray[Any, Any]] = []
        self._number = 0

    def add(self, latencies: numpy.ndarray[Any, Any]) -> None:
        """Some more of them."""
        self._kept.append(latencies)
        self._number += len(latencies)
        if self._number >= _CLASSES:
            self._count()

    def _count(self) -> None:
        if self._kept:
            latencies = numpy.concatenate(self._kept)
            classes = (numpy.log(numpy.maximum(latencies, 1)) * _PER_E).astype(numpy.int64)
            self._counts += numpy.bincount(numpy.minimum(classes, _CLASSES - 1), minlength=_CLASSES)
        self._kept, self._number = [], 0

    def quantile(self, part: float) -> float:
        """Microseconds within which so large a part of them was; 0 without any."""
        self._count()
        reached = numpy.cumsum(self._counts)
        if not reached[-1]:
            return 0.0
        found = int(numpy.searchsorted(reached, part * reached[-1]))
        return float(numpy.exp((found + 0.5) / _PER_E)) / 1e3
