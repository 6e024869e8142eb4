"""What a stream, or a sink's queue, tells of events that never came."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that never came, because the kernel's buffer, or a sink's queue, had no room for them."""

    cpu: int | None
    """The CPU on which they happened; None for those that a sink's queue had no room for."""
    count: int | None
    """How many; None where the kernel does not say."""
    first_sequence: int | None = None
    """The first one's sequence number; None where nothing numbers them."""
    last_sequence: int | None = None
    """The last one's."""
    time: datetime | None = None
    """When the loss was noticed, in UTC; None where that is not known."""
