"""What stands between a stream and its sinks: events left out, secrets replaced, fields chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic

from ebpfstream.batch import EventBatch
from ebpfstream.codec import selection
from ebpfstream.errors import ArgumentError, DecodeError
from ebpfstream.events import E_co
from ebpfstream.redaction import Redaction


class Shaping(Generic[E_co]):
    """Makes of a batch the one that sinks are given.

    `where` sees events as they are; then secrets are replaced (`redact`); then JSON gets its fields.  Losses, and
    records that do not fit their type, pass.  With none of them a batch stays itself.  Raises ArgumentError for fields
    that the type does not have, and for patterns that are none.
    """

    def __init__(
        self,
        event_type: type[Any],
        *,
        where: Callable[[E_co], object] | None = None,
        fields: Mapping[str, str] | Sequence[str] | None = None,
        redact: Redaction | Sequence[str] | bool = False,
    ) -> None:
        self._where = where
        self._fields = None if fields is None else selection(event_type, fields)
        if isinstance(redact, Redaction):
            self._redaction: Redaction | None = redact
        elif redact is True:
            self._redaction = Redaction()
        else:
            self._redaction = None if redact is False else Redaction(redact)

    def shape(self, batch: EventBatch[E_co]) -> EventBatch[E_co]:
        """The batch for the sinks.  What `where` raises comes out as it is."""
        if self._where is not None:
            batch = batch.keep(self._verdicts(batch, self._where))
        if self._redaction is not None:
            batch = self._redaction.redact(batch)
        if self._fields is None:
            return batch
        return batch.showing(self._fields)

    @staticmethod
    def _verdicts(batch: EventBatch[E_co], where: Callable[[E_co], object]) -> Iterator[object]:
        for chunk in batch.decode():
            if isinstance(chunk, DecodeError):
                yield True
            else:
                yield from map(where, chunk)


def named_fields(chosen: Iterable[str]) -> dict[str, str]:
    """Fields given as text, `pid` or `comm=name`: the names in JSON by those of the fields, in their order.

    Raises ArgumentError for a field that is given twice, or has no name.
    """
    fields: dict[str, str] = {}
    for part in chosen:
        name, _, new = (piece.strip() for piece in part.partition("="))
        if not name:
            raise ArgumentError(f"{part!r} names no field: give pid, or comm=name for another name in JSON")
        if name in fields:
            raise ArgumentError(f"the field {name!r} is given twice: give it once")
        fields[name] = new or name
    return fields
