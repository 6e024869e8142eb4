"""Events as they came out of the buffer together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, cast

from ebpfstream import columns
from ebpfstream.codec import codec, encoder, selection
from ebpfstream.errors import DecodeError
from ebpfstream.events import E_co
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.records import Records, Run
from ebpfstream.values import encode_lost

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

    __slots__ = ("event_type", "fields", "lost", "origin", "records", "wall_clock_offset")

    def __init__(
        self,
        event_type: type[E_co],
        records: Records,
        wall_clock_offset: int = 0,
        lost: tuple[Lost, ...] = (),
        fields: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.event_type = event_type
        self.records = records
        self.wall_clock_offset = wall_clock_offset
        self.lost = lost
        self.fields = fields
        """The fields that JSON has, in this order, each with its name there; None for all, by their own names."""
        self.origin = origin
        """The stream that it comes from; None for batches made otherwise."""

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
        """Each event as a JSON object on a line of its own, fields in the order of the class, or those selected.

        Text is as in the events, and only printable characters stand for themselves; times are
        RFC 3339, UTC.  What is lost stands before the events, a line each: `{"lost":{"cpu":0,"count":3,…}}`.
        Raises DecodeError.
        """
        encode = (
            codec(self.event_type).encode if self.fields is None else encoder(self.event_type, self.fields)
        )
        lines = encode(self.records, self.wall_clock_offset)
        if not self.lost:
            return lines
        return encode_lost(self.lost) + lines

    def to_numpy(self) -> numpy.ndarray[Any, Any]:
        """The events as a structured array of one dimension, for types without tails.

        Integers and flags are of their own width, char arrays raw bytes, computed fields left out.
        The array is a read-only view of the batch's bytes; only where records were withdrawn
        between the events is it a copy.  Raises EventTypeError for types with tails, DecodeError, and
        EbpfStreamError without numpy (the extra `numpy`).
        """
        return columns.to_numpy(self.event_type, self.records)

    def __getitem__(self, part: slice) -> EventBatch[E_co]:
        """Some of the events, next to each other, as a batch; the bytes are shared."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a batch can be cut into pieces, not thinned: use a slice without a step")
        lost = () if start else self.lost  # it stands before the first
        return self._with(self.records.cut(start, stop), lost)

    def keep(self, verdicts: Iterable[object]) -> EventBatch[E_co]:
        """Those of the events for which the verdict, one for each in order, is true; and what is lost.

        The bytes are shared, unless most of them would be held for nothing.
        """
        runs = list(_kept(self.records.runs, verdicts))
        records = self.records._replace(runs=runs, discarded=0)
        if 2 * sum(stride * count for _, stride, _, count in runs) < len(records.data):
            records = records.compact()
        return self._with(records, self.lost)

    def with_lost(self, lost: tuple[Lost, ...]) -> EventBatch[E_co]:
        """The same events with other losses before them; the bytes are shared."""
        return self._with(self.records, lost)

    def with_records(self, records: Records) -> EventBatch[E_co]:
        """Other records of the same type, from the same time, after the same losses."""
        return self._with(records, self.lost)

    def select(self, fields: Mapping[str, str] | Sequence[str]) -> EventBatch[E_co]:
        """The same batch with other JSON: these fields alone, in this order; of a mapping, each by its name there.

        Events, and losses in JSON, stay whole.  Raises ArgumentError for fields that the type does not have.
        """
        return self.showing(selection(self.event_type, fields))

    def showing(self, fields: Mapping[str, str]) -> EventBatch[E_co]:
        """The same of what `selection` made."""
        offset, origin = self.wall_clock_offset, self.origin
        return EventBatch(self.event_type, self.records, offset, self.lost, fields, origin)

    def without_undecodable(self) -> tuple[EventBatch[E_co], list[tuple[bytes, DecodeError]]]:
        """The batch without the records that its type does not fit, and the bytes of those, each with its error."""
        unfit: list[tuple[bytes, DecodeError]] = []
        verdicts: list[bool] = []
        samples = list(self.records.samples())
        for chunk in self.decode():
            if isinstance(chunk, DecodeError):
                unfit.append((samples[len(verdicts)], chunk))
                verdicts.append(False)
            else:
                verdicts += [True] * len(chunk)
        return self.keep(verdicts) if unfit else self, unfit

    def _with(self, records: Records, lost: tuple[Lost, ...]) -> EventBatch[E_co]:
        return EventBatch(self.event_type, records, self.wall_clock_offset, lost, self.fields, self.origin)


def _kept(runs: Iterable[Run], verdicts: Iterable[object]) -> Iterator[Run]:
    """The runs without the records whose verdict is false."""
    verdict = iter(verdicts)
    for position, stride, size, count in runs:
        first = 0
        for number in range(count):
            if not next(verdict):
                if first < number:
                    yield position + first * stride, stride, size, number - first
                first = number + 1
        if first < count:
            yield position + first * stride, stride, size, count - first
