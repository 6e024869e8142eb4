"""One service for each configuration."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ebpfstream.errors import EbpfStreamError

FOLDER: Final = Path("/run/ebpfstream")
"""Where lock files are, unless told otherwise."""

_LONGEST_NAME: Final = 64  # characters of the configuration's name that are in its lock file's
_REMEDY: Final = (
    "give another folder, which this user may write to (systemd makes one with RuntimeDirectory=)"
)


class InstanceError(EbpfStreamError):
    """A configuration runs already, or it cannot be found out whether it does."""


class Instance:
    """Held while a configuration runs: nobody else runs it meanwhile.

        with Instance(Path("exec.toml")):
            ...

    Two paths that lead to one file are one configuration.  What is held is a lock, which ends with the process, however
    that ends; the file that is locked stays, with the process's number and the configuration's path in it while it
    runs.  Processes that this one starts do not hold the lock.

    Entering raises InstanceError.
    """

    def __init__(
        self, configuration: str | os.PathLike[str], folder: str | os.PathLike[str] = FOLDER
    ) -> None:
        self._configuration = Path(configuration)
        self._folder = Path(folder)
        self._fd = -1

    def __enter__(self) -> Self:
        real = self._configuration.resolve()
        path = self._folder / _name(real)
        try:
            fd = self._opened(path)
        except OSError as error:
            raise InstanceError(
                f"cannot make {path}, by which {_IS_ALONE}: {_why(error)}: {_REMEDY}"
            ) from error
        try:
            self._lock(fd, path)
            content = f"{os.getpid()}\n".encode() + os.fsencode(real) + b"\n"
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
        except OSError as error:
            os.close(fd)
            raise InstanceError(
                f"cannot lock {path}, by which {_IS_ALONE}: {_why(error)}: {_REMEDY}"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Removed it is not: somebody may have opened it to wait for its lock, and another then makes a new one.
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
        self._fd = -1

    def _opened(self, path: Path) -> int:
        """Others may write to the folder, too: no link is followed, and no file of theirs is written to."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            fd = os.open(path.name, flags, 0o644, dir_fd=folder)
        finally:
            os.close(folder)
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid():
            return fd
        os.close(fd)
        raise InstanceError(
            f"{path}, by which {_IS_ALONE}, is not a file that this user made: look who did, and remove it"
        )

    def _lock(self, fd: int, path: Path) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.pread(fd, 32, 0).partition(b"\n")[0].decode(errors="replace")
            who = f"process {number}" if number.isdigit() else "another process"
            raise InstanceError(
                f"{self._configuration} runs already, as {who}: stop that one, or give this one a configuration of its "
                "own"
            ) from None


_IS_ALONE: Final = "a configuration runs once only"


def _name(configuration: Path) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", configuration.name)[:_LONGEST_NAME]
    return f"{readable}-{hashlib.sha256(os.fsencode(configuration)).hexdigest()[:16]}.lock"


def _why(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST):
        return "a symbolic link, or no folder, is in its place"
    return os.strerror(error.errno or 0)
