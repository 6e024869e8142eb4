"""A queue on disk that survives the process, and most of what may befall a disk."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from threading import Lock
from typing import Final, Literal

from ebpfstream.errors import ArgumentError, SinkError, SinkRejectedError, SinkUnavailableError
from ebpfstream.segments import (
    MOST,
    POSITIONS_SIZE,
    Position,
    Positions,
    Remains,
    Segment,
    SegmentReader,
    entry_size,
)

_SMALLEST: Final = 64 << 10
_BLOCK: Final = 4096
_KEPT: Final = 1 << 20
# Bytes of a last segment with nothing to deliver that stay on disk, so that not each batch makes a file.

_log = logging.getLogger("ebpfstream")


@dataclass(slots=True)
class Entry:
    """What was appended, and `end`, by which it is acknowledged."""

    payload: bytes
    count: int
    """How many events are in it."""
    end: Position


class Spool:
    """Entries in order, in segment files in a folder of their own; what is acknowledged is deleted.

    All calls block; they may come from several threads.  One process at a time has the folder (flock).

    **What is appended survives** the end of this process, however that comes.  A crash of the machine it survives with
    `fsync="batch"`, by which `append` returns when the disk has it; with a number of seconds the owner calls `sync`
    so often; with "never" the kernel writes when it likes.  What was read but not acknowledged is read again by
    the next life: at least once, and after a crash of the machine perhaps what was acknowledged shortly before as well.

    **Damage** (bits that flipped, a file cut short or gone, zeros after a power cut) loses the entries that it hit
    and no others.  It is noticed when the place is read, or at `open` for what is missing altogether, then counted in
    `damaged`, and told as a warning with file and offset.

    **No more than `size` bytes** are on disk, in whole blocks of 4 KiB.  When that is reached, whole segments go, of
    `size` / 16 (4 KiB to 64 MiB) or one entry that is larger: the oldest of which nothing was read that is
    not acknowledged yet.  What was read and is not acknowledged stays.
    """

    recovered = 0
    """Events found at `open` that no earlier life saw acknowledged; those damaged are counted until they are read."""
    count = 0
    """Events in it that are neither acknowledged nor dropped nor known to be damaged."""
    nbytes = 0
    """Bytes on disk."""
    damaged = 0
    """Events lost by damage in this life; where it cannot be known how many, 1."""

    def __init__(
        self, folder: Path, *, size: int, fsync: Literal["never", "batch"] | float = "never"
    ) -> None:
        if size < _SMALLEST:
            raise ArgumentError(f"size={size} is impossible for a spool: give {_SMALLEST} bytes or more")
        if fsync not in ("never", "batch") and not (isinstance(fsync, int | float) and 0 < fsync < inf):
            raise ArgumentError(
                f'fsync={fsync!r} is impossible: give "never", "batch", or seconds, more than 0'
            )
        self.folder = folder
        self.size = size
        self._fsync = fsync
        self._segment_size = min(max(size // 16, _BLOCK), 64 << 20)
        self._lock = Lock()
        self._forget()

    def _forget(self) -> None:
        self._folder = self._file = -1  # that of the last segment
        self._positions: Positions | None = None
        self._segments: list[Segment] = []
        self._reader: SegmentReader | None = None
        self._acknowledged = self._at = self._handed = Position(0, 0)
        """What is acknowledged; what is to be read next; the end of the last entry that was read."""
        self._end = (0, 0)
        self._next = 1
        self._dropped = self._untold = 0
        """The newest segment that was dropped; events dropped by an `append` that then failed."""
        self._is_torn = self._unsynced = self._folder_unsynced = False
        self.recovered = self.count = self.nbytes = self.damaged = 0

    # --- opening

    def open(self) -> None:
        """Make the folder, or find in it what an earlier life left.  Raises SinkError."""
        with self._lock:
            try:
                self._open()
            except OSError as error:
                self._release()
                raise SinkError(
                    f"the spool {self.folder} cannot be opened: {error.strerror}; give a folder on a disk with "
                    "room, where this user can write"
                ) from error
            except BaseException:
                self._release()
                raise

    def _open(self) -> None:
        self._release()
        self._forget()
        self.folder.mkdir(0o700, parents=True, exist_ok=True)
        self._folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SinkError(
                f"the spool {self.folder} is in use by another process: give each a folder of its own"
            ) from error
        self._positions = positions = Positions(self._folder)
        remains = Remains(self.folder, self._folder, positions)
        self._segments, self.damaged, self._dropped = remains.segments, remains.missing, positions.dropped
        self._acknowledged = self._at = self._handed = at = remains.acknowledged
        self._end, self._next = at[:2], max(at.segment, self._dropped) + 1
        self.nbytes = POSITIONS_SIZE + sum(_on_disk(segment.size) for segment in self._segments)
        if self._segments:
            last = self._segments[-1]
            self._file = last.open(self._folder)
            self._end, self._next = (last.number, last.size), max(last.number + 1, self._next)
            self.count = sum(segment.end - segment.first for segment in self._segments[1:])
            self.count += self._segments[0].end - at.number
        self.recovered = self.count
        if positions.is_damaged or positions.last is None or at[:3] != positions.last[:3]:
            for _ in range(2):  # both slots, so that none is ahead of it, and each has its block of the disk
                self._write_position()
            self._folder_unsynced = True
        self._delete_acknowledged()

    # --- appending

    def append(self, payload: bytes, count: int) -> int:
        """Add an entry; how many events that were not read yet were dropped to make room for it.

        Raises OSError if the disk is full or fails, SinkUnavailableError if there is no room because of what was read
        and is not acknowledged, SinkRejectedError if there never can be; then nothing of it is in the spool.  What was
        dropped nevertheless is told by the next one that returns.
        """
        with self._lock:
            last = self._segments[-1] if self._file >= 0 else None
            need = entry_size(payload)
            if _on_disk(need) > min(self.size - POSITIONS_SIZE, MOST):
                raise SinkRejectedError(
                    f"{len(payload)} bytes can never fit into the spool {self.folder} of {self.size} bytes: "
                    "make it larger, or batches smaller"
                )
            if last is not None and last.size and last.size + need > self._segment_size:
                last = None
            size = last.size if last else 0
            self._make_room(_on_disk(size + need) - _on_disk(size), last)
            if last is None:
                last = self._start_segment()
            self._write(last, payload, count)
            dropped, self._untold = self._untold, 0
            return dropped

    def _make_room(self, growth: int, last: Segment | None) -> None:
        over = self.nbytes + growth - self.size
        if over <= 0:
            return
        is_idle = self._handed <= self._acknowledged
        victims = []
        for segment in self._segments:
            if over <= 0 or segment is last:
                break
            if is_idle or segment.number > self._handed.segment:
                victims.append(segment)
                over -= _on_disk(segment.size)
        if over > 0:
            raise SinkUnavailableError(
                f"the spool {self.folder} is full ({self.nbytes} of {self.size} bytes) of what is being delivered: "
                "try again, or make it larger"
            )
        for segment in victims:
            dropped = max(segment.end - max(segment.first, self._at.number), 0)
            self.count -= dropped
            self._untold += dropped
        at, newest = self._at, victims[-1]
        is_within = any(s.number == at.segment and s.size > at.offset for s in self._segments)
        if at.segment <= newest.number and not (is_within and at.segment < victims[0].number):
            self._at = Position(newest.number, newest.size, newest.end, at.read)
        self._dropped = newest.number
        if is_idle:
            self._acknowledged = self._handed = self._at
        self._write_position()
        for segment in victims:
            self._delete(segment)

    def _start_segment(self) -> Segment:
        if self._file >= 0:
            if self._fsync != "never":
                self._sync_file(self._file)
            self._close_file()
        first = self._segments[-1].end if self._segments else self._at.number
        segment, self._file = Segment.create(self._next, first, self._folder)
        self._segments.append(segment)
        self._next += 1
        self._folder_unsynced = True
        return segment

    def _write(self, segment: Segment, payload: bytes, count: int) -> None:
        self._take_back(segment)
        try:
            end = segment.write(self._file, payload, count)
            self._unsynced = True
            if self._fsync == "batch":
                self._sync_folder()
                self._sync_file(self._file)
        except BaseException:
            self._is_torn = True
            with suppress(OSError):  # or before the next one
                self._take_back(segment)
            raise
        self.nbytes += _on_disk(end) - _on_disk(segment.size)
        self.count += count
        segment.size = end
        segment.end += count
        self._end = (segment.number, end)

    def _take_back(self, segment: Segment) -> None:
        if self._is_torn:
            self._close_reader()  # it may have read ahead
            os.ftruncate(self._file, segment.size)
            self._is_torn = False

    # --- reading

    @property
    def unread(self) -> bool:
        """Whether there is something to read; it may turn out to be damaged."""
        return self._at[:2] < self._end

    def read(self) -> Entry | None:
        """The next entry that was not read yet since `open`; None if all were.  Raises OSError."""
        with self._lock:
            while self.unread:
                reader = self._reader
                if reader is None or self._at.offset >= reader.segment.size:
                    reader = self._reader = self._enter()
                entry = self._next_entry(reader) if reader else None
                if entry is not None:
                    return entry
            return None

    def _enter(self) -> SegmentReader | None:
        """Go to the segment of which something is to be read; None if there is none any more."""
        self._close_reader()
        for segment in self._segments:
            if segment.number < self._at.segment:
                continue
            if segment.number > self._at.segment:
                self._at = Position(segment.number, 0, segment.first, self._at.read)
            if self._at.offset < segment.size:
                try:
                    return SegmentReader(segment, self._folder)
                except FileNotFoundError:
                    self._skip(segment, segment.size, segment.end)
            elif self._at.number < segment.end:  # it was cut short
                self._skip(segment, self._at.offset, segment.end)
        return None

    def _next_entry(self, reader: SegmentReader) -> Entry | None:
        """None if it is damaged, and all that is in the segment."""
        segment = reader.segment
        found = reader.find(self._at.offset)
        if found is None:
            self._skip(segment, segment.size, segment.end)
            return None
        if found.offset != self._at.offset or found.number > self._at.number:
            self._skip(segment, found.offset, found.number)
        number = found.number + found.events
        payload = reader.payload(found)
        if payload is None:
            self._skip(segment, found.end, number)
            return None
        self._at = self._handed = Position(segment.number, found.end, number, self._at.read + found.events)
        return Entry(payload, found.events, self._at)

    def _skip(self, segment: Segment, offset: int, number: int) -> None:
        at = self._at
        lost = max(number - at.number, 0)
        _log.warning(
            "%s: %d bytes from %d on are damaged: %d events are lost",
            self.folder / segment.name,
            offset - at.offset,
            at.offset,
            lost,
        )
        self.damaged += lost
        self.count -= lost
        self._at = Position(segment.number, offset, number, at.read)

    def acknowledge(self, end: Position) -> None:
        """Everything up to the end of this entry is delivered: no later life reads it again.

        Raises OSError if that could not be written; the next call tries it again.
        """
        with self._lock:
            if end > self._at:
                raise ArgumentError(f"{end} cannot be acknowledged: nothing was read up to there")
            self._acknowledge(max(end, self._acknowledged))

    def _acknowledge(self, end: Position) -> None:
        self.count -= end.read - self._acknowledged.read
        # What is behind the last one handed out is damaged or dropped.
        self._acknowledged = self._at if end >= self._handed else end
        try:
            self._write_position()
        finally:
            self._delete_acknowledged()

    def _write_position(self) -> None:
        assert self._positions is not None
        self._positions.write(self._acknowledged, self._dropped)

    def _delete_acknowledged(self, *, kept: int = _KEPT) -> None:
        position, is_synced = self._acknowledged[:3], self._fsync == "never"
        while self._segments:
            segment = self._segments[0]
            is_last = len(self._segments) == 1 and self._file >= 0
            if (segment.number, segment.size, segment.end) > position or (is_last and segment.size < kept):
                break
            if not is_synced:  # or what is deleted would be missed after a power cut
                assert self._positions is not None
                os.fdatasync(self._positions.file)
                is_synced = True
            self._delete(segment)

    def _delete(self, segment: Segment) -> None:
        if segment is self._segments[-1]:
            self._close_file()
        if self._reader is not None and self._reader.segment is segment:
            self._close_reader()
        with suppress(FileNotFoundError):
            os.unlink(segment.name, dir_fd=self._folder)
        self._segments.remove(segment)
        self.nbytes -= _on_disk(segment.size)

    # --- to the disk

    def sync(self) -> None:
        """Returns when the disk has what was appended; with "never" it does nothing.  Raises OSError."""
        if self._fsync == "never":
            return
        with self._lock:
            self._sync_folder()
            if not self._unsynced:
                return
            file = os.dup(self._file)  # nobody waits for the disk but the caller
            self._unsynced = False
        try:
            os.fdatasync(file)
        except OSError:
            self._unsynced = self._file >= 0
            raise
        finally:
            os.close(file)

    def _sync_file(self, file: int) -> None:
        if self._unsynced:
            os.fdatasync(file)
            self._unsynced = False

    def _sync_folder(self) -> None:
        if self._folder_unsynced:
            os.fsync(self._folder)
            self._folder_unsynced = False

    # --- the end

    def close(self) -> None:
        """Leave the rest to the next life.  Raises OSError."""
        with self._lock:
            if self._folder < 0:
                return
            try:
                self._acknowledge(self._acknowledged)
                self._delete_acknowledged(kept=0)
                if self._fsync != "never":
                    self._sync_folder()
                    self._sync_file(self._file)
            finally:
                self._release()

    def _release(self) -> None:
        self._close_reader()
        self._close_file()
        if self._positions is not None:
            self._positions.close()
            self._positions = None
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._unsynced = self._is_torn = False


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
