"""The ledgers: what became of every event, in a stream and on its way to sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

INCOMPLETE: Final = 3
"""The exit status of a program that could not deliver all."""


def counted(*counts: tuple[int | None, str]) -> str:
    """Those counts that are known and not 0, to go on behind others."""
    return "".join(f", {count} {name}" for count, name in counts if count)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A stream's ledger at one moment.  All counts are events, since the stream was opened.

    While the stream runs the figures are read one after the other and may be apart by what happened
    in between.  Once it is closed they balance exactly:

        tried == submitted + lost + skipped
        lost == lost_full + lost_too_large + lost_no_buffer + lost_otherwise
        submitted == received
        received == delivered + undecodable + unread

    What is None is not known: a program of the user's own counts nothing for us, and only a perf buffer
    tells what it had no room for.
    """

    rejected: int | None = 0
    """Events that the filters left out, in the kernel; no others are counted below."""
    tried: int | None = 0
    """Events that the program saw; each has a sequence number.  Counted in the kernel."""
    skipped: int | None = 0
    """Events that were left out because the stream was paused or sampled.  Counted in the kernel."""
    submitted: int | None = 0
    """Events put into the buffer.  Counted in the kernel."""
    lost: int | None = 0
    """Events that could not be put into the buffer.  Counted in the kernel."""
    lost_full: int | None = 0
    """Of them, those for which there was no room (EAGAIN, ENOSPC)."""
    lost_too_large: int | None = 0
    """Those for which there never is (E2BIG)."""
    lost_no_buffer: int | None = 0
    """Those on a CPU that had no part of the buffer yet (ENOENT; perf buffer only)."""
    lost_otherwise: int | None = 0
    """The rest; the last one's error is in `lost_errno`."""
    lost_errno: int = 0
    """The errno of the last one that was lost otherwise; 0 if none was."""
    misses: int | None = 0
    """Runs of the program that the kernel skipped, before it could count them; None where the
    kernel does not tell (before Linux 5.12)."""

    received: int = 0
    """Events taken out of the buffer."""
    delivered: int = 0
    """Events handed to the consumer."""
    undecodable: int = 0
    """Events that did not fit their type; each was raised as a DecodeError."""
    unread: int = 0
    """Events that nobody had asked for when the stream was closed."""

    bytes: int = 0
    """What was taken out of the buffer, headers and padding included."""
    batches: int = 0
    """How many batches that was."""
    late: int = 0
    """Events delivered after younger ones of other CPUs (perf buffer only)."""
    wakeups: int = 0
    """How often the stream slept until the kernel woke it."""
    buffer_size: int = 0
    """Bytes that the kernel's buffer holds, headers included."""
    buffered: int = 0
    """Bytes in it now."""
    buffered_most: int = 0
    """The most bytes that were found in it when it was drained."""

    @property
    def complete(self) -> bool | None:
        """Whether every event that happened has been received: nothing lost, nothing skipped; None if unknown."""
        if self.lost or self.skipped or self.misses:
            return False
        return None if self.lost is None or self.misses is None else True

    def __str__(self) -> str:
        line = f"{self.delivered} delivered"
        if self.tried is None:
            line += f"; {self.received} received, {'unknown' if self.lost is None else self.lost} lost"
        else:
            line += f"; {self.tried} tried = {self.submitted} submitted + {self.lost} lost"
            line += f" + {self.skipped} skipped" if self.skipped else ""
        return line + counted(
            (self.undecodable, "undecodable"),
            (self.unread, "unread"),
            (self.late, "late"),
            (self.rejected, "rejected by filters"),
            (self.misses, "missed by the kernel"),
        )


@dataclass(frozen=True, slots=True)
class SinkStatistics:
    """One sink's ledger at one moment.

    Counts are events unless said otherwise; they balance at any moment:

        accepted + recovered == acknowledged + dropped + failed + spooled + in_flight
    """

    name: str
    """The sink's."""
    accepted: int = 0
    """Events that were to go to the sink."""
    recovered: int = 0
    """Events that were found in the spool: an earlier life of the program had accepted them."""
    acknowledged: int = 0
    """Events that have arrived where the sink sends to."""
    dropped: int = 0
    """Events for which its queue had no room, or for which it had no time left at the end."""
    failed: int = 0
    """Events that the sink will never take, or that do not fit their type; in the dead letters, if there are any."""
    spooled: int = 0
    """Events in the spool, and not on their way; at the end, for the next life of the program."""
    in_flight: int = 0
    """Events in the queue, or on their way; 0 at the end."""
    batches: int = 0
    """How many batches, or parts of them, have been acknowledged."""
    retries: int = 0
    """How often the sink was unavailable, and was offered the same again later."""
    queue_size: int = 0
    """Bytes for which the queue has room."""
    queued: int = 0
    """Bytes that wait in it now."""
    queued_most: int = 0
    """The most bytes that have waited in it."""
    lag: float = 0.0
    """Seconds since the oldest event was accepted that has neither arrived nor been given up; 0 if there is none.
    Those of an earlier life count from when they were found."""
    spool_size: int | None = None
    """Bytes that the spool may hold; None if the sink has none."""
    spool_bytes: int | None = None
    """Bytes of it that are on disk now."""
    away: bool = False
    """Whether the sink was unavailable when it was last asked."""
    last_error: str = ""
    """What the sink last said that it could not do."""

    def __str__(self) -> str:
        line = f"{self.name}: {self.acknowledged} of {self.accepted + self.recovered} events"
        line += f" ({self.recovered} of an earlier life)" if self.recovered else ""
        line += counted(
            (self.dropped, "dropped"),
            (self.failed, "failed"),
            (self.spooled, "in the spool"),
            (self.in_flight, "on their way"),
        )
        if self.retries:
            line += f"; unavailable {self.retries} times"
        return line if not self.last_error else f"{line}; last: {self.last_error}"


@dataclass(frozen=True, slots=True)
class ForwardStatistics:
    """The ledgers of a stream and of the sinks that it is forwarded to.

    stream.delivered == filtered + accepted, for each sink
    """

    stream: Statistics
    sinks: tuple[SinkStatistics, ...] = ()
    filtered: int = 0
    """Events that `where` left out."""

    @property
    def complete(self) -> bool | None:
        """Whether nothing was lost: every event that happened has arrived at each sink, or is in its spool.

        None if the stream's losses are unknown.  What `where` and filters left out, and what nobody had asked for
        when it ended, counts for nothing.
        """
        if self.stream.undecodable or any(
            sink.dropped or sink.failed or sink.in_flight for sink in self.sinks
        ):
            return False
        return self.stream.complete

    def __str__(self) -> str:
        first = f"{self.stream}, {self.filtered} left out by where" if self.filtered else str(self.stream)
        return "\n".join([first, *map(str, self.sinks)])
