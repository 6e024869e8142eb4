"""Events as columns, for numpy."""

from __future__ import annotations

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
        raise EbpfStreamError("to_numpy() needs numpy: pip install ebpfstream[numpy]") from error
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


def _format(member: Member, type: Any) -> str:
    if isinstance(member.kind, Integer):
        return "?" if type is bool else f"{'i' if member.kind.signed else 'u'}{member.kind.size}"
    if isinstance(member.kind, Array):
        return f"({member.kind.count},){'i' if member.kind.item.signed else 'u'}{member.kind.item.size}"
    # As they are: numpy's "S" drops NULs at the end and keeps what stands after the first.
    return f"V{member.kind.size}"
