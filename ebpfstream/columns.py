"""Columns of events: for numpy, and those of a few integers without it."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any

from ebpfstream.codec import misfit
from ebpfstream.errors import EbpfStreamError, EventTypeError
from ebpfstream.events import Array, Integer, Member, Tail, layout
from ebpfstream.records import Records

if TYPE_CHECKING:
    import numpy


def to_numpy(event_type: type[Any], records: Records) -> numpy.ndarray[Any, Any]:
    """What `EventBatch.to_numpy` returns."""
    try:
        import numpy
    except ImportError as error:
        raise EbpfStreamError("to_numpy() needs numpy: pip install 'ebpfstream[numpy]'") from error
    plan = layout(event_type)
    for name, kind in plan.kinds.items():
        if isinstance(kind, Tail):
            raise EventTypeError(
                f"{event_type.__name__}.{name} has no fixed length, so the events are no array: iterate the batch"
            )
    parts = []
    for position, stride, size, count in records.runs or [(0, plan.size + records.prefix, plan.size, 0)]:
        if not plan.size <= size <= plan.size + records.padding:
            raise misfit(event_type, plan, size)
        columns = numpy.dtype(
            {
                "names": [member.name for member in plan.members],
                "formats": [_format(member, plan.types.get(member.name)) for member in plan.members],
                "offsets": [records.prefix + member.offset for member in plan.members],
                "itemsize": stride,
            }
        )
        parts.append(numpy.frombuffer(records.data, columns, count, position))
    return parts[0] if len(parts) == 1 else numpy.concatenate(parts)


class Integers:
    """Picks the values of some members of a type, which are integers, out of records."""

    def __init__(self, event_type: type[Any], names: Sequence[str]) -> None:
        chosen = [member for member in layout(event_type).members if member.name in names]
        parts, end = ["<"], 0
        for name, kind, offset in chosen:
            assert isinstance(kind, Integer), name
            parts += (f"{offset - end}x", kind.letter)
            end = offset + kind.size
        self._unpack = Struct("".join(parts)).unpack_from
        stored = [member.name for member in chosen]
        self._places = [stored.index(name) for name in names]
        self._in_order = self._places == list(range(len(chosen)))

    def of(self, records: Records) -> list[tuple[int, ...]]:
        """For each record, the values in the order of the names.  The records must fit the type."""
        unpack, data = self._unpack, records.data
        picked = [
            unpack(data, start)
            for position, stride, _, count in records.runs
            for start in range(position + records.prefix, position + records.prefix + stride * count, stride)
        ]
        return (
            picked if self._in_order else [tuple(map(values.__getitem__, self._places)) for values in picked]
        )


def _format(member: Member, type: Any) -> str:
    if isinstance(member.kind, Integer):
        return "?" if type is bool else f"{'i' if member.kind.signed else 'u'}{member.kind.size}"
    if isinstance(member.kind, Array):
        return f"({member.kind.count},){'i' if member.kind.item.signed else 'u'}{member.kind.item.size}"
    # As they are: numpy's "S" drops NULs at the end and keeps what stands after the first.
    return f"V{member.kind.size}"
