"""What files were rotated into: names, how many stay, compressing."""

from __future__ import annotations

import fcntl
import gzip
import logging
import os
import re
import stat
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Final, Literal, cast

Compression = Literal["gzip", "zstd"]

_log = logging.getLogger("ebpfstream")

_DAY: Final = 86_400.0
_AT_ONCE: Final = 1 << 20
_SUFFIXES: Final[dict[Compression, str]] = {"gzip": ".gz", "zstd": ".zst"}
_PART: Final = ".part"  # what is not whole yet

LONGEST_ADDITION: Final = len(".20261125T045244.123456Z.zst.part")
"""Characters that are added to a file's name."""


def period(seconds: float, every: float) -> tuple[float, float]:
    """Where a time since the epoch lies: periods begin at multiples of `every` since midnight, UTC.

    Those of a day and more begin at multiples of it since 1970.
    """
    if every >= _DAY:
        return seconds // every, 0
    day, second = divmod(seconds, _DAY)
    return day, second // every


class Rotated:
    """The rotated files of one file: `NAME.20261125T045244.123456Z`, beside it, compressed or not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pattern = re.compile(
            re.escape(path.name)
            + r"\.(?P<stamp>[0-9]{8}T[0-9]{6}\.[0-9]{6}Z)(?P<packed>\.gz|\.zst)?(?P<part>\.part)?"
        )
        # Held while names change: else a file could come back compressed that is not kept any longer.
        self._names = threading.Lock()

    def new(self, now: float) -> Path:
        """A name that is not taken, and comes after all that are, also when the clock was set back."""
        moment = datetime.fromtimestamp(now, UTC)
        with self._names:
            found = self._found()
        if found:
            last = datetime.fromisoformat(found[-1]["stamp"])
            moment = max(moment, last + timedelta(microseconds=1))
        return self._beside(f"{self._path.name}.{moment:%Y%m%dT%H%M%S.%fZ}")

    def expire(self, keep: int) -> None:
        """Delete all but the newest `keep`; what cannot be deleted is tried again the next time."""
        with self._names:
            whole = [found for found in self._found() if not found["part"]]
            expired = set(sorted({found["stamp"] for found in whole})[:-keep])
            for found in whole:
                if found["stamp"] in expired:
                    path = self._beside(found.string)
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        _log.warning(
                            "cannot delete %s, which is beyond keep=%d: %s", path, keep, error.strerror
                        )

    def remove_unfinished(self) -> None:
        """Delete what an earlier life did not compress to its end, unless it is still at it."""
        for found in self._found():
            if found["part"]:
                part = self._beside(found.string)
                with suppress(OSError), os.fdopen(_open_plain(part), "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    part.unlink()

    def uncompressed(self) -> list[Path]:
        """The oldest first."""
        return [
            self._beside(found.string) for found in self._found() if not found["packed"] and not found["part"]
        ]

    def compress(self, path: Path, kind: Compression, ended: threading.Event) -> None:
        """Put a compressed file in the place of one of ours, unless it is `ended` before.  Raises OSError."""
        packed = path.with_name(path.name + _SUFFIXES[kind])
        part = packed.with_name(packed.name + _PART)
        with (
            os.fdopen(_open_plain(path), "rb", buffering=0) as source,
            os.fdopen(_create(part), "wb") as target,
        ):
            try:
                fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is being made: see remove_unfinished
                _pack(source, target, kind, ended)
                _make_alike(target.fileno(), os.fstat(source.fileno()))
                # Whatever `fsync` is: the original goes now, and was safe long since.
                os.fsync(target.fileno())
                with self._names:
                    whole = not ended.is_set() and path.exists()
                    if whole and os.path.samestat(part.stat(), os.fstat(target.fileno())):
                        part.rename(packed)
                        path.unlink()
            finally:
                part.unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        return self._path.with_name(name)

    def _found(self) -> list[re.Match[str]]:
        """Names of ours, by age."""
        names = (self._pattern.fullmatch(entry.name) for entry in self._path.parent.iterdir())
        return sorted(
            (name for name in names if name and _is_time(name["stamp"])), key=lambda name: name.string
        )


class Compressor:
    """A thread that compresses rotated files, one after the other, whenever it is told that there are some."""

    def __init__(self, kind: Compression) -> None:
        self._kind = kind
        self._jobs: SimpleQueue[Rotated | None] = SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ebpfstream compression", daemon=True)

    @property
    def working(self) -> bool:
        """Whether its thread is there."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def compress(self, files: Rotated) -> None:
        """Compress those that are not; what cannot be is tried again with the next call."""
        self._jobs.put(files)

    def finish(self) -> None:
        """Let it end when all is compressed."""
        self._jobs.put(None)

    def stop(self) -> None:
        """Let it end within a moment; what is not compressed yet stays as it is."""
        self._ended.set()
        self._jobs.put(None)

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone, on Linux
        while files := self._jobs.get():
            try:
                for path in files.uncompressed():
                    self._compress(files, path)
            except OSError as error:  # of the folder
                _log.warning("cannot look for rotated files to compress: %s", error)

    def _compress(self, files: Rotated, path: Path) -> None:
        if self._ended.is_set():
            return
        try:
            files.compress(path, self._kind, self._ended)
        except FileNotFoundError:
            pass  # deleted meanwhile
        except OSError as error:
            _log.warning("cannot compress %s, so it stays as it is for now: %s", path, error.strerror)


def _is_time(stamp: str) -> bool:
    try:
        return datetime.fromisoformat(stamp).year < datetime.max.year
    except ValueError:
        return False


def _pack(source: IO[bytes], target: IO[bytes], kind: Compression, ended: threading.Event) -> None:
    """Compress all, or as much as there is time for."""
    with _packer(target, kind) as packer:
        while data := source.read(_AT_ONCE):
            if ended.is_set():
                break
            packer.write(data)
    target.flush()


def _packer(target: IO[bytes], kind: Compression) -> IO[bytes]:
    if kind == "gzip":
        return cast("IO[bytes]", gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=target))
    import zstandard  # the extra `zstd`

    made: Any = zstandard.ZstdCompressor(write_checksum=True).stream_writer(target, closefd=False)
    return cast("IO[bytes]", made)


def _open_plain(path: Path) -> int:
    """Whoever may write to the folder may have put anything there under such a name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "it is no regular file")
    return fd


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _make_alike(fd: int, original: os.stat_result) -> None:
    """Give a file the owner, mode and times of another."""
    with suppress(PermissionError):
        os.fchown(fd, original.st_uid, original.st_gid)
    os.fchmod(fd, stat.S_IMODE(original.st_mode))
    os.utime(fd, ns=(original.st_atime_ns, original.st_mtime_ns))
