"""Events as they came out of the buffer together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, cast

from ebpfstream import columns
from ebpfstream.codec import codec, encode_lost
from ebpfstream.errors import DecodeError
from ebpfstream.events import E_co
from ebpfstream.lost import Lost
from ebpfstream.records import Records

if TYPE_CHECKING:
    import numpy


def wall_clock_offset() -> int:
    """CLOCK_REALTIME - CLOCK_MONOTONIC now, in nanoseconds; it changes when the clock is set."""
    before = time.monotonic_ns()
    now = time.time_ns()
    return now - (before + time.monotonic_ns()) // 2


class EventBatch(Generic[E_co]):
    """Events as they came out of the buffer together, decoded when they are asked for.

    Iterating makes the events, each time anew; `to_json_lines()` does without them.  The batch owns
    its bytes: it may be kept, and sent elsewhere, for as long as one likes.

    Of a stream with `on_lost="yield"` the batch has in `lost` what is missing before and among its
    events; iterating yields that first, and JSON begins with it.  The last batch may be nothing else.
    """

    __slots__ = ("event_type", "lost", "records", "wall_clock_offset")

    def __init__(
        self,
        event_type: type[E_co],
        records: Records,
        wall_clock_offset: int = 0,
        lost: tuple[Lost, ...] = (),
    ) -> None:
        self.event_type = event_type
        self.records = records
        self.wall_clock_offset = wall_clock_offset
        self.lost = lost

    def __len__(self) -> int:
        """How many events; what is lost does not count."""
        return sum(run[3] for run in self.records.runs)

    def __repr__(self) -> str:
        return f"<EventBatch of {len(self)} {self.event_type.__name__}, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes in memory, record headers included."""
        return len(self.records.data)

    def __iter__(self) -> Iterator[E_co]:
        """The events, in order.  Raises DecodeError at a record that the type does not fit."""
        yield from cast("tuple[E_co, ...]", self.lost)  # the stream's type says that it may hold such
        for chunk in self.decode():
            if isinstance(chunk, DecodeError):
                raise chunk
            yield from chunk

    def decode(self) -> Iterator[list[E_co] | DecodeError]:
        """The events in lists of some hundred; in place of a record that the type does not fit, the error."""
        return codec(self.event_type).decode(self.records, self.wall_clock_offset)

    def to_json_lines(self) -> bytes:
        """Each event as a JSON object on a line of its own, fields in the order of the class.

        Text is as in the events, and only printable characters stand for themselves; times are
        RFC 3339, UTC.  What is lost stands before the events, a line each: `{"lost":{"cpu":0,"count":3,…}}`.
        Raises DecodeError.
        """
        lines = codec(self.event_type).encode(self.records, self.wall_clock_offset)
        if not self.lost:
            return lines
        return encode_lost(self.lost) + lines

    def to_numpy(self) -> numpy.ndarray[Any, Any]:
        """The events as a structured array of one dimension, for types without tails.

        Integers and flags are of their own width, char arrays raw bytes, computed fields left out.
        The array is a read-only view of the batch's bytes; only where records were withdrawn
        between the events is it a copy.  Needs the extra `numpy`.  Raises EventTypeError for types
        with tails, DecodeError.
        """
        return columns.to_numpy(self.event_type, self.records)

    def __getitem__(self, part: slice) -> EventBatch[E_co]:
        """Some of the events, next to each other, as a batch; the bytes are shared."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a batch can be cut into pieces, not thinned: use a slice without a step")
        lost = () if start else self.lost  # it stands before the first
        return EventBatch(self.event_type, self.records.cut(start, stop), self.wall_clock_offset, lost)
