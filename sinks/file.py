"""A file of JSON lines that survives crashes, full disks and logrotate, and rotates by itself."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from math import inf
from pathlib import Path
from time import time
from typing import Any, Literal, Self, Unpack

import anyio

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkError, SinkUnavailableError
from ebpfstream.opening import Opened, create, is_there, message, open_whole, sync_folder
from ebpfstream.options import Seconds, Size, check_choice
from ebpfstream.sink import CLOSING, Delivery, Sink
from ebpfstream.sink_url import SinkURL
from ebpfstream.sinks.rotation import (
    LONGEST_ADDITION,
    Compression,
    Compressor,
    Rotated,
    period,
)
from ebpfstream.turns import in_thread

_log = logging.getLogger("ebpfstream")


class FileSink(Sink):
    """Appends each event to a file, as a JSON object on a line of its own.

    **What has arrived** is in the file as whole lines: it survives the end of this process, however that comes.  A
    crash of the machine it survives with `fsync="batch"`, which does not acknowledge before the disk has it, and so
    waits for the disk with each batch; with `fsync=5.0` all but the last five seconds do; with "never" (the default)
    the kernel writes when it likes, usually within half a minute.  If the disk fails to write what was acknowledged
    already, the kernel tells that once, so it is raised once: what was waiting to be written then may be missing, and
    no later flush brings it back.

    **The file** is created with `mode`, exactly; one that exists is appended to, and keeps its own.  Its last line must
    be JSON; if a crash tore it, it is removed, with a warning.  The file is locked (flock) against a second writer.
    What is no regular file is refused.  When logrotate has moved the file away, the next batch goes to a new one;
    its "copytruncate" does no harm either.

    **A write that fails** takes back what is not a whole line, and is SinkUnavailableError, as is everything that a
    running sink cannot do: rotate, or open the file anew.  So no file grows while it cannot be rotated.

    **Rotating.**  With `rotate`, no file grows beyond so many bytes, unless one line is longer (losses count as one
    with the event after them).  With `every`, none holds what was written in two periods: they begin at multiples of so
    many seconds since midnight, UTC, and are looked at when something is written.  Rotated files are called
    `NAME.20261125T045244.123456Z`, by the time at which they were rotated.  The newest `keep` of them stay.  With
    `compress` a thread compresses them, to `….gz` or `….zst` ("zstd" needs the extra `zstd`).  What could not be
    compressed, or not before the end, is when another one is rotated, or such a sink is opened again.
    """

    address_example = "file:exec.jsonl?rotate=100MB&keep=10&compress=gzip"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rotate: Size | None = None,
        every: Seconds | None = None,
        keep: int | None = None,
        compress: Compression | None = None,
        fsync: Literal["never", "batch"] | Seconds = "never",
        mode: int = 0o600,
        **delivery: Unpack[Delivery],
    ) -> None:
        super().__init__(**delivery)
        text = os.fspath(path)
        _check(text, fsync, mode)
        _check_rotating(rotate, every, keep, compress)
        self.name = f"file:{text}"
        self.flush_every = None if isinstance(fsync, str) else fsync
        self._compressor = Compressor(compress) if compress else None
        self._appender = _Appender(Path(text), rotate, every, keep, fsync, mode, self._compressor)

    @classmethod
    def from_url(cls, url: SinkURL) -> Self:
        """`file:exec.jsonl?rotate=100MB`, `file:///var/log/exec.jsonl`; all but the mode can be given."""
        if url.host:
            raise ArgumentError(
                f"{url.text!r}: files have no host: write file:{url.host}{url.path} for a path from here, "
                f"or file:///… for one from the root"
            )
        if not url.path:
            raise ArgumentError(f"{url.text!r} names no file: write for example {cls.address_example}")
        return cls(url.path, **url.arguments(cls, without="path mode"))

    async def open(self) -> None:
        """Open the file, or create it, and repair its end.  Raises SinkError."""
        try:
            await in_thread(self._appender.open)
        except BaseException:
            self._appender.close()  # cancelled, it was opened nevertheless
            raise
        if self._compressor is not None:
            self._compressor.start()

    async def send(self, batch: EventBatch[Any]) -> None:
        """Returns when the batch is in the file.  Raises SinkUnavailableError, DecodeError."""
        await in_thread(self._appender.append, batch)

    async def flush(self) -> None:
        """Returns when the disk has all that was sent; with fsync="never" it does nothing.

        Raises SinkUnavailableError if the disk could not write.  What was waiting then may be missing, and the kernel
        does not try it again: that a later flush succeeds says nothing of it.
        """
        await in_thread(self._appender.flush)

    async def reopen(self) -> None:
        """Go on in a new file if the old one was moved away or deleted.  Raises SinkUnavailableError."""
        await in_thread(self._appender.reopen)

    async def aclose(self, deadline: float = CLOSING) -> None:
        """Close the file, and wait for rotated ones to be compressed."""
        self._appender.close()
        compressor = self._compressor
        if compressor is None:
            return
        compressor.finish()
        try:
            await _ended(compressor, 0.9 * deadline)
        finally:
            compressor.stop()
        await _ended(compressor, 0.1 * deadline)


async def _ended(compressor: Compressor, within: float) -> None:
    with anyio.move_on_after(within):
        while compressor.working:  # noqa: ASYNC110  # a thread cannot be awaited, but it ends once
            await anyio.sleep(0.005)


def _check(path: str, fsync: str | float, mode: int) -> None:
    """Raises ArgumentError."""
    if not path or "\0" in path or path.endswith("/"):
        raise ArgumentError(f"path={path!r} is impossible: give a file's name")
    if fsync not in ("never", "batch") and not (isinstance(fsync, int | float) and 0 < fsync < inf):
        raise ArgumentError(f'fsync={fsync!r} is impossible: give "never", "batch", or seconds, more than 0')
    if not 0 <= mode <= 0o777:
        raise ArgumentError(f"mode={mode:#o} is impossible: give 0o600 or the like")


def _check_rotating(
    rotate: int | None, every: float | None, keep: int | None, compress: Compression | None
) -> None:
    """Raises ArgumentError."""
    if rotate is not None and rotate < 1:
        raise ArgumentError(f"rotate={rotate} is impossible: give bytes, 1 or more")
    if every is not None and not 1 <= every < inf:
        raise ArgumentError(f"every={every} is impossible: give seconds, 1 or more")
    if keep is not None and keep < 1:
        raise ArgumentError(f"keep={keep} is impossible: give a number of rotated files, 1 or more")
    for name, value in (("keep", keep), ("compress", compress)):
        if value is not None and rotate is None and every is None:
            raise ArgumentError(f"{name}={value!r} is about rotated files: give rotate= or every= as well")
    if compress is not None:
        check_choice("compress", compress, Compression)
    if compress == "zstd":
        _find_zstandard()


def _find_zstandard() -> None:
    try:
        import zstandard  # noqa: F401  # the extra `zstd`
    except ImportError as error:
        raise ArgumentError(
            f"compress='zstd' needs a library that is not there ({error}): pip install 'ebpfstream[zstd]', "
            "or give compress='gzip'"
        ) from error


class _SyncError(OSError):
    """What was written since the last time may not be on the disk."""


class _Appender:
    """The file, with blocking calls alone; used by one thread at a time."""

    def __init__(
        self,
        path: Path,
        rotate: int | None,
        every: float | None,
        keep: int | None,
        fsync: str | float,
        mode: int,
        compressor: Compressor | None,
    ) -> None:
        self._given = path
        self._rotate_at = rotate
        self._every = every
        self._keep = keep
        self._fsync = fsync
        self._mode = mode
        self._compressor = compressor
        self._fd = -1
        self._path = path
        self._rotated = Rotated(path)
        self._begun = 0.0
        """When what is in the file was written, as seconds since the epoch: all of it in one period."""
        self._length: int | None = None
        """Where the file is to end, if what was not whole could not be taken back yet."""
        self._unsynced = self._folder_unsynced = False

    def open(self) -> None:
        try:
            self._given = self._given.absolute()
            self._enter(open_whole(self._given, self._mode))
            if self._rotate_at is not None or self._every is not None:
                self._check_rotation(self._path.parent)
                self._rotated.remove_unfinished()
                self._keep_house()
        except OSError as error:
            raise SinkError(message("open", self._given, error)) from error

    def _check_rotation(self, folder: Path) -> None:
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise SinkError(f"{self._path} cannot be rotated: give this user the right to write in {folder}")
        if len(os.fsencode(self._path.name)) + LONGEST_ADDITION > os.pathconf(folder, "PC_NAME_MAX"):
            raise SinkError(f"{self._path} cannot be rotated: give it a shorter name")

    def close(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                self._take_back()
            os.close(self._fd)
            self._fd = -1

    def reopen(self) -> None:
        try:
            self._take_back()
            self._follow()
        except OSError as error:
            raise SinkUnavailableError(message("open", self._given, error)) from error
        except SinkError as error:
            raise SinkUnavailableError(str(error)) from error

    def flush(self) -> None:
        try:
            self._sync()
        except OSError as error:
            raise SinkUnavailableError(message("write to the disk", self._path, error)) from error

    def append(self, batch: EventBatch[Any]) -> None:
        lines = batch.to_json_lines()
        if not lines:
            return
        losses = len(batch.lost)
        # Losses are kept with the first event: what is offered again without it tells of them again.
        first = _after_line(lines, losses + 1 if len(batch) else losses)
        written = _Written()
        failed: OSError | SinkError | None = None
        try:
            self._append(lines, first, written)
        except (OSError, SinkError) as error:
            failed = error
        if self._fsync == "batch" and not isinstance(failed, _SyncError):
            try:
                self._sync()
            except _SyncError as error:
                failed = error
        if failed is None:
            return
        if isinstance(failed, _SyncError) and written.base is not None:
            self._length = written.base
            written.end = written.start
        with suppress(OSError):  # or before the next write
            self._take_back()
        taken = max(lines.count(b"\n", 0, written.end) - losses, 0)
        what = str(failed) if isinstance(failed, SinkError) else message("write to", self._path, failed)
        raise SinkUnavailableError(what, taken) from failed

    def _append(self, lines: bytes, first: int, written: _Written) -> None:
        self._take_back()
        self._follow()
        written.base = os.fstat(self._fd).st_size
        while written.end < len(lines):
            size = os.fstat(self._fd).st_size
            stop = max(self._fitting(lines, written.end, size), 0 if written.end else first)
            if size and (self._is_over() or stop == written.end or self._exceeds(size + stop - written.end)):
                self._rotate()
                written.start, written.base = written.end, 0
                continue
            if not size:
                self._begun = time()
            self._write(lines, written.end, stop, first, written)

    def _fitting(self, lines: bytes, start: int, size: int) -> int:
        """Where the lines from `start` on end that fit into the file; in an empty one, the first does."""
        if self._rotate_at is None:
            return len(lines)
        stop = lines.rfind(b"\n", start, start + max(self._rotate_at - size, 0)) + 1
        return stop or (start if size else lines.index(b"\n", start) + 1)

    def _exceeds(self, size: int) -> bool:
        return self._rotate_at is not None and size > self._rotate_at

    def _is_over(self) -> bool:
        """Whether the file is of an earlier period."""
        return self._every is not None and period(self._begun, self._every) < period(time(), self._every)

    def _write(self, lines: bytes, start: int, stop: int, first: int, written: _Written) -> None:
        position = start
        try:
            with memoryview(lines) as view:
                while position < stop:
                    position += os.write(self._fd, view[position:stop])
                    self._unsynced = True
        except OSError:
            whole = lines.rfind(b"\n", start, position) + 1 or start
            written.end = whole if whole >= first else start
            self._length = os.fstat(self._fd).st_size - (position - written.end)
            raise
        written.end = stop

    def _take_back(self) -> None:
        """Cut off what is not whole.  Raises OSError."""
        if self._length is None:
            return
        found = os.fstat(self._fd)
        if found.st_size > self._length and found.st_nlink:
            os.ftruncate(self._fd, self._length)
        self._length = None

    def _follow(self) -> None:
        """Go on in a new file where the old one no longer is.  Raises OSError, SinkError."""
        if is_there(self._given, self._fd):
            return
        self._sync()
        self._enter(open_whole(self._given, self._mode))

    def _enter(self, opened: Opened) -> None:
        self.close()
        self._fd = opened.fd
        if opened.path != self._path:
            self._path, self._rotated = opened.path, Rotated(opened.path)
        self._folder_unsynced |= opened.created
        self._begun = os.fstat(self._fd).st_mtime

    def _rotate(self) -> None:
        """Raises OSError, and then nothing has changed."""
        self._sync()
        name = self._rotated.new(time())
        original = os.fstat(self._fd)
        self._path.rename(name)
        try:
            fd = create(self._path, stat.S_IMODE(original.st_mode), original)
        except OSError as error:
            if not isinstance(error, FileExistsError | BlockingIOError):  # not over somebody else's file
                name.rename(self._path)
            raise
        os.close(self._fd)
        self._fd = fd
        self._folder_unsynced = True
        self._keep_house()

    def _keep_house(self) -> None:
        if self._keep is not None:
            try:
                self._rotated.expire(self._keep)
            except OSError as error:
                _log.warning("cannot delete rotated files of %s: %s", self._path, error.strerror)
        if self._compressor is not None:
            self._compressor.compress(self._rotated)

    def _sync(self) -> None:
        if self._fsync == "never":
            return
        try:
            if self._folder_unsynced:
                sync_folder(self._path.parent)
                self._folder_unsynced = False
            if self._unsynced:
                os.fdatasync(self._fd)
                self._unsynced = False
        except OSError as error:
            raise _SyncError(error.errno, error.strerror) from error


class _Written:
    """How far a batch has got."""

    end = 0
    """Bytes of its lines that are in files."""
    start = 0
    """Of them, those that are in files rotated meanwhile."""
    base: int | None = None
    """Where the others begin in the file; None before it was looked at."""


def _after_line(lines: bytes, number: int) -> int:
    """Where the line of this number, from 1, ends."""
    position = 0
    for _ in range(number):
        position = lines.index(b"\n", position) + 1
    return position
