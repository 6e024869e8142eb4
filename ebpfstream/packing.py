"""Batches as bytes, and back: for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from zlib import crc32

import orjson

from ebpfstream.batch import EventBatch
from ebpfstream.errors import EventTypeError
from ebpfstream.events import Tail, layout
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.records import Records

_LENGTH: Final = 4  # bytes that say how long the head is


def pack(batch: EventBatch[Any]) -> bytes:
    """The batch as bytes: a head in JSON, then its records as they were in the kernel's buffer."""
    records = batch.records.compact()
    head = orjson.dumps(
        {
            "type": batch.event_type.__name__,
            "layout": _fingerprint(batch.event_type),
            "prefix": records.prefix,
            "padding": records.padding,
            "runs": records.runs,
            "wall_clock_offset": batch.wall_clock_offset,
            "lost": batch.lost,
            "fields": batch.fields and dict(batch.fields),
            "origin": batch.origin and list(batch.origin),
        }
    )
    return b"".join((len(head).to_bytes(_LENGTH, "little"), head, records.data))


def unpack(data: bytes, event_type: type[Any]) -> EventBatch[Any]:
    """The batch that was packed.  Raises EventTypeError if that was of another type, or another version of it."""
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    head: Mapping[str, Any] = orjson.loads(data[_LENGTH:start])
    if (head["type"], head["layout"]) != (event_type.__name__, _fingerprint(event_type)):
        another = "another version of " if head["type"] == event_type.__name__ else ""
        raise EventTypeError(f"these are events of {another}{head['type']}, not of {event_type.__name__}")
    records = Records(
        data[start:], head["prefix"], [tuple(run) for run in head["runs"]], padding=head["padding"]
    )
    lost = tuple(Lost(**{**one, "time": _time(one["time"])}) for one in head["lost"])
    origin = head["origin"] and Origin(*head["origin"])
    return EventBatch(event_type, records, head["wall_clock_offset"], lost, head["fields"], origin)


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _fingerprint(event_type: type[Any]) -> int:
    """Of how a type lies in a record: the same for the same program in another process."""
    plan = layout(event_type)
    members = [(name, type(kind).__name__, kind.size, offset) for name, kind, offset in plan.members]
    tails = [name for name, kind in plan.kinds.items() if isinstance(kind, Tail)]
    return crc32(repr((members, tails, plan.size)).encode())
