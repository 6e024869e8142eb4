"""Losses found where they happened: gaps in the sequence numbers of a stream's events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from ebpfstream.events import Layout, layout
from ebpfstream.lost import Lost
from ebpfstream.records import Records
from ebpfstream.unpacking import RecordStructs

Key = tuple[int, int]
"""A CPU and a program: each program numbers its events on each CPU."""

_MEMBERS: Final = ("cpu", "program", "sequence")


class Gaps:
    """Knows which number comes next, for each CPU and program."""

    def __init__(self, event_type: type[Any]) -> None:
        plan = layout(event_type)
        members = [member for member in plan.members if member.name in _MEMBERS]
        assert len(members) == len(_MEMBERS), (
            f"a ready-made event has {', '.join(_MEMBERS)}: stamp() writes them"
        )
        self._order = [[member.name for member in members].index(name) for name in _MEMBERS]
        self._size = plan.size
        self._structs = RecordStructs(Layout(plan.kinds, plan.types, members, plan.size))
        self._next: dict[Key, int] = {}

    def find(self, records: Records, time: datetime) -> tuple[Lost, ...]:
        """What is missing before and between these, gathered for each CPU."""
        missing: dict[Key, tuple[int, int, int]] = {}  # count, first, last
        following = self._next
        for cpu, program, sequence in self._numbers(records):
            key = cpu, program
            expected = following.get(key, 0)
            if sequence != expected:
                count, first, _ = missing.get(key, (0, expected, 0))
                missing[key] = count + sequence - expected, first, sequence - 1
            following[key] = sequence + 1
        return _gathered(missing, time) if missing else ()

    def rest(self, ends: Mapping[Key, int], time: datetime) -> tuple[Lost, ...]:
        """What is missing after the last event, when the numbers have ended there."""
        missing: dict[Key, tuple[int, int, int]] = {}
        for key, end in ends.items():
            expected = self._next.get(key, 0)
            if end > expected:
                missing[key] = end - expected, expected, end - 1
                self._next[key] = end
        return _gathered(missing, time)

    def _numbers(self, records: Records) -> Iterator[tuple[int, int, int]]:
        data = memoryview(records.data)
        cpu, program, sequence = self._order
        for position, stride, size, count in records.runs:
            if size >= self._size:
                unpack = self._structs[records.prefix, stride, 1].iter_unpack
                for values in unpack(data[position : position + stride * count]):
                    yield values[cpu], values[program], values[sequence]


def _gathered(missing: Mapping[Key, tuple[int, int, int]], time: datetime) -> tuple[Lost, ...]:
    """One for each CPU; of several programs' numbers none is told, since they are counted apart."""
    by_cpu: dict[int, list[tuple[int, int, int]]] = {}
    for (cpu, _), found in missing.items():
        by_cpu.setdefault(cpu, []).append(found)
    return tuple(
        Lost(cpu, *found[0], time)
        if len(found) == 1
        else Lost(cpu, sum(count for count, _, _ in found), time=time)
        for cpu, found in sorted(by_cpu.items())
    )
