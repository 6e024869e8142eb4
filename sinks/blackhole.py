"""Nowhere: to measure what everything before a sink costs."""

from __future__ import annotations

from typing import Any, Unpack

from ebpfstream.batch import EventBatch
from ebpfstream.sink import Delivery, Sink


class BlackholeSink(Sink):
    """Discards what it is given, and acknowledges it; `events` and `bytes` say how much that was."""

    name = "blackhole"

    def __init__(self, **delivery: Unpack[Delivery]) -> None:
        super().__init__(**delivery)
        self.events = 0
        """Events that it was given."""
        self.bytes = 0
        """Bytes of the batches that they came in."""

    async def send(self, batch: EventBatch[Any]) -> None:
        """Count it."""
        self.events += len(batch)
        self.bytes += batch.nbytes
