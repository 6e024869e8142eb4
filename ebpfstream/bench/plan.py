"""What is measured: one thing varied at a time, for both kinds of buffer and every wakeup policy."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from ebpfstream.bench.measuring import SERIES, Case, Kind, Policy

SIZE: Final = 64
LARGE: Final = 4 << 20
SMALL: Final = 256 << 10
"""The buffer in which rates are varied: one that does not hide what is lost."""


class Sweep(NamedTuple):
    """One member of Case varied, in the order of `points`; all else is as in `base`."""

    varied: str
    title: str
    points: tuple[int, ...]
    base: Case

    def case(self, point: int, series: tuple[Kind, Policy]) -> Case:
        """The point's, for a kind and a policy."""
        kind, policy = series
        varied: dict[str, Any] = {self.varied: point}
        return self.base._replace(kind=kind, policy=policy)._replace(**varied)

    def cases(self) -> list[Case]:
        """All of them; those to be compared follow one another."""
        return [self.case(point, series) for point in self.points for series in SERIES]


class Plan(NamedTuple):
    """The four sweeps."""

    sizes: Sweep
    rates: Sweep
    buffers: Sweep
    producers: Sweep

    def cases(self) -> list[Case]:
        """Each once, whichever sweeps it belongs to."""
        return list(dict.fromkeys(case for sweep in self for case in sweep.cases()))


def plan(quick: bool) -> Plan:
    """Everything, or a few points of each."""
    flood = Case("ring", "each", SIZE, 0, LARGE)
    return Plan(
        Sweep(
            "size",
            "Event size: as many events as one producer can, 4 MiB buffer",
            (64, 1024) if quick else (8, 64, 256, 1024, 4096),
            flood,
        ),
        Sweep(
            "rate",
            "Offered rate: 64-byte events of one producer, 256 KiB buffer",
            (1000, 100_000, 0) if quick else (1000, 10_000, 100_000, 300_000, 1_000_000, 0),
            flood._replace(buffer_size=SMALL),
        ),
        Sweep(
            "buffer_size",
            "Buffer size: as many 64-byte events as one producer can",
            (SMALL, LARGE) if quick else (64 << 10, SMALL, 1 << 20, LARGE, 16 << 20),
            flood,
        ),
        Sweep(
            "producers",
            "Producers: as many 64-byte events as they can, 4 MiB buffer",
            (1, 2),
            flood,
        ),
    )
