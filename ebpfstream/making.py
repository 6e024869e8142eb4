"""Batches made of events, where no program in the kernel made them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from ebpfstream import text
from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError
from ebpfstream.events import LENGTH_SUFFIX, Array, Char, Event, Integer, Kind, Layout, Tail, layout
from ebpfstream.lost import Lost
from ebpfstream.records import Records, Run, add_records

E = TypeVar("E", bound=Event)

_PREFIX: Final = 8  # the ring buffer's header, which nobody reads any more


def batch_of(
    event_type: type[E], events: Iterable[E], lost: Iterable[Lost] = (), wall_clock_offset: int = 0
) -> EventBatch[E]:
    """A batch as it comes out of a stream, of these events, and with these losses.

    Computed fields and times of day are not looked at: they are made of the others.  For a field that a function
    makes of a record's bytes, give these.  Raises ArgumentError for values that a record cannot hold.
    """
    plan = layout(event_type)
    data, runs = bytearray(), list[Run]()
    for event in events:
        if event.__class__ is not event_type:
            raise ArgumentError(f"a batch is of one type: {event!r} is no {event_type.__name__}")
        sample = _pack(plan, event)
        stride = _PREFIX + (len(sample) + 7) // 8 * 8
        add_records(runs, len(data), stride, len(sample))
        data += (bytes(_PREFIX) + sample).ljust(stride, b"\0")
    return EventBatch(event_type, Records(bytes(data), _PREFIX, runs), wall_clock_offset, tuple(lost))


def _pack(plan: Layout, event: Event) -> bytes:
    packed = {name: _packed(event, name, kind) for name, kind in plan.kinds.items()}
    tails = {name: packed[name] for name, kind in plan.kinds.items() if isinstance(kind, Tail)}
    for name, data in tails.items():
        packed[name + LENGTH_SUFFIX] = len(data).to_bytes(4, "little")
    struct = bytearray(plan.size)
    for name, kind, offset in plan.members:
        if name not in packed:
            raise ArgumentError(f"{name} is part of several fields: such types cannot be packed")
        struct[offset : offset + kind.size] = packed[name]
    return bytes(struct) + b"".join(tails.values())


def _packed(event: Event, name: str, kind: Kind) -> bytes:
    value = getattr(event, name, None)
    try:
        match kind, value:
            case Integer(size, signed), int():
                return value.to_bytes(size, "little", signed=signed)
            case Array(item, count), [*items] if len(items) == count:
                return b"".join(one.to_bytes(item.size, "little", signed=item.signed) for one in items)
            case Tail(None), [*strings]:
                return b"".join(text.encode(string) + b"\0" for string in strings)
            case ((Tail(None) | Char()), str()):
                value = text.encode(value)
    except OverflowError:
        pass  # said below
    if not hasattr(kind, "size"):
        if isinstance(value, bytes) or not isinstance(kind, Tail):
            return value if isinstance(value, bytes) else b""  # what is computed is in no record
    elif isinstance(value, bytes) and len(value) <= kind.size:
        return value.ljust(kind.size, b"\0")
    raise ArgumentError(
        f"{event.__class__.__name__}.{name} cannot be {getattr(event, name, None)!r}: it is a {kind}"
    )
