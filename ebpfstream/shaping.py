"""What stands between a stream and its sinks: events left out, secrets replaced, fields chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic

from ebpfstream.batch import EventBatch
from ebpfstream.codec import selection
from ebpfstream.errors import DecodeError
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
            self._redaction = Redaction(redact) if redact else None

    def shape(self, batch: EventBatch[E_co]) -> EventBatch[E_co]:
        """The batch for the sinks.  What `where` raises comes out as it is."""
        if self._where is not None:
            batch = batch.keep(self._verdicts(batch, self._where))
        if self._redaction is not None:
            batch = self._redaction.redact(batch)
        return batch if self._fields is None else batch.select(self._fields)

    @staticmethod
    def _verdicts(batch: EventBatch[E_co], where: Callable[[E_co], object]) -> Iterator[object]:
        for chunk in batch.decode():
            if isinstance(chunk, DecodeError):
                yield True
            else:
                yield from map(where, chunk)
