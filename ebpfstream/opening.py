"""Files of JSON lines that are appended to: opened, locked, a torn last line repaired; what to do if that fails."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final, NamedTuple

from ebpfstream.errors import SinkError

_log = logging.getLogger("ebpfstream")

# O_NONBLOCK: what turns out to be no regular file is not waited for.
_FLAGS: Final = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_TRIES: Final = 100
_BLOCK: Final = 1 << 16
_LONGEST_LINE: Final = 64 << 20  # longer than any that we write
_PATIENCE: Final = 5.0  # seconds: somebody else may be writing to a disk that is slow

_REMEDIES: Final = {
    errno.ENOSPC: "make room on its disk, or keep fewer files (keep=)",
    errno.EDQUOT: "make room, or raise the quota",
    errno.EFBIG: "let files grow longer (ulimit -f), or rotate them before (rotate=)",
    errno.EIO: "look at the disk (dmesg)",
    errno.EROFS: "its file system can only be read; if it was writable before, look at the disk (dmesg)",
    errno.ENOENT: "make its folder",
    errno.ENOTDIR: "make its folder",
    errno.EACCES: "give this user the right to write there, or another file",
    errno.EPERM: "take away its attributes that forbid it (lsattr), or give another file",
    errno.EBUSY: "it is mounted itself: mount its folder instead",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def message(doing: str, path: Path, error: OSError) -> str:
    """What went wrong, and what to do about it."""
    remedy = _REMEDIES.get(error.errno or 0, "give another file if this does not pass")
    return f"cannot {doing} {path}: {error.strerror}: {remedy}"


class Opened(NamedTuple):
    """A file to append to, locked; its last line is whole."""

    fd: int
    path: Path
    """Where it really is."""
    created: bool


def open_whole(path: Path, mode: int, *, shared: bool = False) -> Opened:
    """Open a file of JSON lines, or create it with that mode exactly; a last line that a crash tore is removed.

    A `shared` one may be opened by others who share it, and each appends to it while it is `alone`.  Raises SinkError
    for what is no regular file, or not ours, or written to by somebody else.
    """
    try:
        for _ in range(_TRIES):
            if (opened := _open(path, mode, shared)) is not None:
                return opened
    except BlockingIOError as error:
        raise SinkError(
            f"cannot open {path}: another process or sink is writing to it: give each a file of its own"
        ) from error
    except OSError as error:
        raise SinkError(message("open", path, error)) from error
    raise SinkError(f"cannot open {path}: it is moved away again and again: look who does that")


def is_there(path: Path, fd: int) -> bool:
    """Whether the path still leads to the file that is open: logrotate moves files away.  Raises OSError."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def create(path: Path, mode: int, like: os.stat_result | None = None, *, lock: int = fcntl.LOCK_EX) -> int:
    """A new file, locked, with that mode exactly, and the owner of another one.  Raises OSError."""
    fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, mode)
    try:
        if like is not None:
            with suppress(PermissionError):
                os.fchown(fd, like.st_uid, like.st_gid)
        os.fchmod(fd, mode)  # whatever the umask
        fcntl.flock(fd, lock | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def alone(fd: int) -> Iterator[None]:
    """Nobody else who shares the file is in here meanwhile.  Raises OSError if somebody does not come out."""
    ends_at = time.monotonic() + _PATIENCE
    while True:
        try:
            _lock_for_moments(fd, fcntl.F_WRLCK)
            break
        except BlockingIOError:
            if time.monotonic() > ends_at:
                raise
        time.sleep(0.005)
    try:
        yield
    finally:
        _lock_for_moments(fd, fcntl.F_UNLCK)


def _lock_for_moments(fd: int, kind: int) -> None:
    """Beside flock, which says who has the file open: a lock of the open file, not of the process."""
    # struct flock of fcntl(2): type, whence, start, length, process.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))


def _open(path: Path, mode: int, shared: bool) -> Opened | None:
    """None if it was moved away meanwhile."""
    lock = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with suppress(FileNotFoundError):
        _check_kind(path, path.stat().st_mode)
    real = path.resolve()  # what is rotated is the file, not a link to it
    try:
        fd, created = create(real, mode, lock=lock), True
    except FileExistsError:
        try:
            fd, created = os.open(real, _FLAGS), False
        except FileNotFoundError:
            return None
    try:
        fcntl.flock(fd, lock | fcntl.LOCK_NB)
        found = os.fstat(fd)
        _check_kind(path, found.st_mode)
        # Whoever had the lock may have rotated the file before giving it up.
        if os.path.samestat(path.stat(), found):
            with alone(fd) if shared else nullcontext():
                _repair(fd, path)
            return Opened(fd, real, created)
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise SinkError(f"{path} is a folder: give a file's name in it")
    if not stat.S_ISREG(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise SinkError(
            f"{path} is a {kind}, and only a regular file can be repaired and rotated: give a regular file; "
            "for events, use stdout: and let the shell redirect it"
        )


def _repair(fd: int, path: Path) -> None:
    """Make a file end with a whole line, if it is one of JSON lines; only what a crash left is removed."""
    found = os.fstat(fd)
    if not found.st_size:
        return
    end = _before_zeros(fd, found.st_size)
    before, tail = _end(fd, end)
    ours = before is None or _is_object(before)
    if ours and tail and _is_object(tail):
        if end < found.st_size:
            os.ftruncate(fd, end)
        os.write(fd, b"\n")
    elif ours and (not tail or tail.startswith(b"{")):
        if removed := found.st_size - (end - len(tail)):
            os.ftruncate(fd, end - len(tail))
            _log.warning(
                "%s ended with an event that was not written whole: removed its %d bytes", path, removed
            )
    else:
        raise SinkError(f"{path} does not end with a line of JSON: give another file")
    os.utime(fd, ns=(found.st_atime_ns, found.st_mtime_ns))  # it tells when the last event was written


def _before_zeros(fd: int, size: int) -> int:
    """Where the zeros begin with which a file ends: a power cut may leave them where data were to be."""
    while size:
        start = max(size - _BLOCK, 0)
        if block := os.pread(fd, size - start, start).rstrip(b"\0"):
            return start + len(block)
        size = start
    return 0


def _end(fd: int, end: int) -> tuple[bytes | None, bytes]:
    """The last line before `end` that is none of white space, if there is one, and what stands behind its newline."""
    length = _BLOCK
    while True:
        start = max(end - length, 0)
        head, _, tail = os.pread(fd, end - start, start).rpartition(b"\n")
        _, newline, before = head.rstrip().rpartition(b"\n")
        if newline or not start:
            return before or None, tail
        if length > _LONGEST_LINE:
            return b"", tail  # no line of ours
        length *= 2


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def sync_folder(folder: Path) -> None:
    """Let the names in a folder survive a power cut.  Raises OSError."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # who may use it, may not always read it
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
