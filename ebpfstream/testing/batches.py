"""Batches made of events, as tests want them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from ebpfstream import making
from ebpfstream.batch import EventBatch
from ebpfstream.events import U64, Comm, Event, Tail
from ebpfstream.lost import Lost

E = TypeVar("E", bound=Event)


@dataclass
class ExampleEvent(Event):
    """An event as any other."""

    number: U64
    comm: Comm
    message: Annotated[str, Tail()]


def make_batch(
    events: Iterable[E], *, lost: Iterable[Lost] = (), type: type[E] | None = None
) -> EventBatch[E]:
    """A batch as it comes out of a stream, of these events, all of one type, and with these losses.

    `type` is needed where there are no events, and it is not ExampleEvent.  Computed fields and times of day are
    not looked at: they are made of the others.  For a field that a function makes of a record's bytes, give these.
    Raises ArgumentError for values that a record cannot hold.
    """
    listed = list(events)
    event_type: Any = type or (listed[0].__class__ if listed else ExampleEvent)
    return making.batch_of(event_type, listed, lost)
