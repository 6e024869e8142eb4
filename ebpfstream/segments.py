"""The files of a spool: segments of entries that are found again behind damage, and the acknowledged position.

An entry is a header of 32 bytes and its payload, filled up to a multiple of 8 bytes.  The header's checksum begins with
the segment's salt and the entry's offset, so that nothing in a payload, and no block of an older file, passes for one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple, Self
from zlib import crc32

_MAGIC: Final = b"eBPFspl1"
_FIELDS: Final = Struct("<8sQIII")  # magic, number of the first event, payload's length, events, its checksum
_HEADER: Final = Struct("<8sQIIII")  # the same, and the checksum of these
HEADER: Final = _HEADER.size
_WINDOW: Final = 1 << 16  # bytes read at once
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW
_MODE: Final = 0o600
_SLOT: Final = Struct("<8sQQQQQ")  # magic, sequence, segment, offset, number, newest dropped segment
_SLOT_DISTANCE: Final = 4096  # no disk tears more than a block
POSITIONS_SIZE: Final = 2 * _SLOT_DISTANCE
MOST: Final = (1 << 32) - 1  # bytes of a payload, events of an entry

_log = logging.getLogger("ebpfstream")


class Position(NamedTuple):
    """Where an entry ends; that of a later one is greater."""

    segment: int
    offset: int
    number: int = 0
    """Of the next event, all counted that the spool ever took."""
    read: int = 0
    """Events read until here since the spool was opened."""


class Found(NamedTuple):
    """An entry's header, and where it is."""

    offset: int
    number: int
    length: int
    events: int
    checksum: int

    @property
    def end(self) -> int:
        """Where the next entry begins."""
        return _aligned(self.offset + HEADER + self.length)


@dataclass(slots=True, eq=False)
class Segment:
    """A file of entries, and the numbers of the events in it: `first` to before `end`."""

    number: int
    salt: int
    size: int = 0
    first: int = 0
    end: int = 0

    @property
    def name(self) -> str:
        """The file's."""
        return f"{self.number:016d}-{self.salt:08x}.segment"

    @classmethod
    def named(cls, name: str) -> Self | None:
        """None if no segment is called so."""
        match = re.fullmatch(r"([0-9]{16})-([0-9a-f]{8})\.segment", name)
        return cls(int(match[1]), int(match[2], 16)) if match else None

    @classmethod
    def create(cls, number: int, first: int, folder: int) -> tuple[Self, int]:
        """A new one, with its file opened for `write`.  Raises OSError."""
        segment = cls(number, secrets.randbits(32), first=first, end=first)
        flags = _FLAGS | os.O_WRONLY | os.O_CREAT | os.O_EXCL
        return segment, os.open(segment.name, flags, _MODE, dir_fd=folder)

    def open(self, folder: int) -> int:
        """The file, opened for `write`.  Raises OSError."""
        return os.open(self.name, _FLAGS | os.O_WRONLY, dir_fd=folder)

    def write(self, file: int, payload: bytes, count: int) -> int:
        """Write an entry behind the last one; where it ends.  Raises OSError, and may have written a part."""
        fields = _FIELDS.pack(_MAGIC, self.end, len(payload), count, crc32(payload))
        checksum = crc32(fields, self.salt ^ (self.size & MOST))
        parts = [fields, checksum.to_bytes(4, "little"), payload, bytes(-len(payload) % 8)]
        end = self.size + entry_size(payload)
        at = self.size + os.pwritev(file, parts, self.size)
        if at < end:
            rest = memoryview(b"".join(parts))
            while at < end:
                at += os.pwrite(file, rest[at - self.size :], at)
        return end


def entry_size(payload: bytes) -> int:
    """Bytes that it takes in a segment."""
    return _aligned(HEADER + len(payload))


def _aligned(size: int) -> int:
    return (size + 7) & ~7


class SegmentReader:
    """Reads a segment up to its `size`.  What the disk cannot read is as if it were damaged."""

    def __init__(self, segment: Segment, folder: int) -> None:
        self.segment = segment
        file = os.open(segment.name, _FLAGS | os.O_RDONLY, dir_fd=folder)
        self._file = open(file, "rb", buffering=_WINDOW)  # noqa: PTH123, SIM115  # closed by `close`

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def find(self, offset: int) -> Found | None:
        """The first whole entry with a good header that begins at `offset` or later; its payload may be damaged."""
        found = self._header(self._bytes(offset, HEADER), 0, offset)
        if found is not None and self._is_whole(found):
            return found
        while offset < self.segment.size:
            window = self._bytes(offset, _WINDOW + HEADER)
            at = window.find(_MAGIC)
            while at >= 0:
                found = self._header(window, at, offset + at)
                if found is not None and self._is_whole(found):
                    return found
                at = window.find(_MAGIC, at + 1)
            offset += _WINDOW
        return None

    def end(self, offset: int, number: int) -> tuple[int, int]:
        """Where the last entry ends that `find` finds from there on, and the number after it."""
        while (found := self.find(offset)) is not None:
            offset, number = found.end, found.number + found.events
        return offset, number

    def is_torn(self, offset: int) -> bool:
        """Whether the entry there was not written to its end."""
        head = self._bytes(offset, HEADER)
        return len(head) < HEADER or self._header(head, 0, offset) is not None

    def payload(self, found: Found) -> bytes | None:
        """None if it is damaged."""
        payload = self._bytes(found.offset + HEADER, found.length)
        return payload if len(payload) == found.length and crc32(payload) == found.checksum else None

    def _header(self, data: bytes, at: int, offset: int) -> Found | None:
        if len(data) - at < HEADER:
            return None
        magic, number, length, count, checksum, own = _HEADER.unpack_from(data, at)
        if magic != _MAGIC or own != crc32(data[at : at + HEADER - 4], self.segment.salt ^ (offset & MOST)):
            return None
        return Found(offset, number, length, count, checksum)

    def _is_whole(self, found: Found) -> bool:
        return found.offset + HEADER + found.length <= self.segment.size

    def _bytes(self, offset: int, length: int) -> bytes:
        try:
            self._file.seek(offset)
            return self._file.read(length)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""


class Positions:
    """The file with the acknowledged position: two slots, written in turn, so that a torn one leaves the other."""

    NAME: Final = "position"

    def __init__(self, folder: int) -> None:
        self.file = os.open(self.NAME, _FLAGS | os.O_RDWR | os.O_CREAT, _MODE, dir_fd=folder)
        slots = [self._slot(os.pread(self.file, _SLOT.size + 4, at)) for at in (0, _SLOT_DISTANCE)]
        good = [slot for slot in slots if slot is not None]
        self.is_new = os.fstat(self.file).st_size == 0
        self.is_damaged = not self.is_new and len(good) < 2
        self._sequence, *last = max(good, default=(0, 0, 0, 0, 0))
        self.last: Position | None = Position(*last[:3]) if good else None
        """What was written last; None if nothing was, or it is damaged."""
        self.dropped: int = last[3]
        """The newest segment that was dropped, by its number."""

    def write(self, position: Position, dropped: int) -> None:
        """Raises OSError."""
        sequence = self._sequence + 1
        slot = _SLOT.pack(_MAGIC, sequence, position.segment, position.offset, position.number, dropped)
        os.pwrite(self.file, slot + crc32(slot).to_bytes(4, "little"), sequence % 2 * _SLOT_DISTANCE)
        self._sequence = sequence

    @staticmethod
    def _slot(data: bytes) -> tuple[int, ...] | None:
        slot, checksum = data[: _SLOT.size], data[_SLOT.size :]
        if crc32(slot).to_bytes(4, "little") != checksum:
            return None
        magic, *fields = _SLOT.unpack(slot)
        return tuple(fields) if magic == _MAGIC else None

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)


class Remains:
    """What an earlier life left in a folder: found without reading it all, and its end made whole.

    What is missing altogether is told as a warning and counted; damage elsewhere is found by who reads it.
    """

    def __init__(self, path: Path, folder: int, positions: Positions) -> None:
        self._path, self._folder = path, folder
        self.segments: list[Segment] = []
        self.missing = 0
        """Events; 1 where it cannot be known how many."""
        self._last = last = positions.last
        for name in os.listdir(folder):  # of a descriptor
            if (segment := Segment.named(name)) is None:
                continue
            if last is not None and segment.number < last.segment:
                os.unlink(name, dir_fd=folder)  # acknowledged: the earlier life did not get to it
            else:
                segment.size = os.stat(name, dir_fd=folder).st_size
                self.segments.append(segment)
        self.segments.sort(key=lambda segment: segment.number)
        if self.segments and (last is None or positions.is_damaged):
            what = "damaged" if positions.is_damaged else "missing"
            _log.warning(
                "%s is %s: what was delivered before may be delivered again", path / positions.NAME, what
            )
        self._number_events(positions)
        self._find_gaps(None if positions.is_damaged else last, positions.dropped)
        self.acknowledged = self._clamped(last)

    def _number_events(self, positions: Positions) -> None:
        """Find which events each segment has by where the next one starts; its own entries are looked at if need be."""
        starts = [self._start(segment) for segment in self.segments]
        while starts and starts[-1] is None and not self._begin(self.segments[-1]):
            # So the end of the one before is the end of all.
            starts.pop()
            segment = self.segments.pop()
            with closing(SegmentReader(segment, self._folder)) as reader:
                self._note_end(segment, 0, is_torn=reader.is_torn(0))
            os.unlink(segment.name, dir_fd=self._folder)
        last = positions.last
        known = (found.number for found in starts if found)
        number = last.number if last is not None else next(known, 0)
        follows = [two.number == one.number + 1 for one, two in pairwise(self.segments)]
        if self.segments:
            ahead = self.segments[0].number - last.segment if last is not None else -1
            follows.insert(0, ahead == 0 or (ahead == 1 and not positions.is_damaged))
        for index, segment in enumerate(self.segments):
            found = starts[index]
            # What is not there, while the segment before is, is damaged in one of the two, and found by who reads.
            is_known = found is not None and (found.offset == self._begin(segment) or not follows[index])
            segment.first = found.number if found and is_known else number
            is_last = index + 1 == len(self.segments)
            after = starts[index + 1] if not is_last and follows[index + 1] else None
            if after is not None and after.offset == 0:
                number = after.number
            else:
                number = self._look_through(segment, is_last=is_last)
            segment.end = number

    def _begin(self, segment: Segment) -> int:
        """Behind what is acknowledged of it."""
        last = self._last
        return last.offset if last and last.segment == segment.number else 0

    def _start(self, segment: Segment) -> Found | None:
        with closing(SegmentReader(segment, self._folder)) as reader:
            return reader.find(self._begin(segment))

    def _look_through(self, segment: Segment, *, is_last: bool) -> int:
        """The number after its last good entry; what is behind that in the last segment is cut off."""
        with closing(SegmentReader(segment, self._folder)) as reader:
            end, number = reader.end(self._begin(segment), segment.first)
            is_torn = reader.is_torn(end)
        if is_last and end != segment.size:
            self._note_end(segment, end, is_torn=is_torn)
            file = segment.open(self._folder)
            try:
                os.ftruncate(file, end)
            finally:
                os.close(file)
            segment.size = end
        return number

    def _note_end(self, segment: Segment, end: int, *, is_torn: bool) -> None:
        if end >= segment.size:
            return
        where = (self._path / segment.name, segment.size - end, end)
        if is_torn:
            _log.warning("%s: the last %d bytes, from %d on, are a torn entry: cut off", *where)
        else:
            self.missing += 1
            _log.warning(
                "%s: the last %d bytes, from %d on, are damaged: an unknown number of events is lost", *where
            )

    def _find_gaps(self, last: Position | None, dropped: int) -> None:
        """Between segments alone: within one, and between two that follow, `_number_events` leaves none."""
        if not self.segments:
            return
        end = last.number if last is not None else self.segments[0].first
        for segment in self.segments:
            lost = segment.first - end
            if lost > 0 and segment.number - 1 > dropped:  # or an earlier life has told it
                self.missing += lost
                _log.warning(
                    "%s: what was before %s is missing: %d events are lost", self._path, segment.name, lost
                )
            end = segment.end

    def _clamped(self, last: Position | None) -> Position:
        if not self.segments:
            return last or Position(0, 0)
        first = self.segments[0]
        if last is None or last.segment != first.number:
            return Position(first.number, 0, first.first)
        return last._replace(offset=min(last.offset, first.size))
