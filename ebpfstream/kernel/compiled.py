"""Compiled programs, kept from one process to the next: what is kept needs no compiler to be loaded.

For texts of the library's own alone, whose maps are made by the library: a user's program may include any
file, and its maps come into being when BCC compiles it.  Kept are instructions, in a file for each text,
whose name is a digest of all that they come from; the kernel verifies them as it would new ones.

They are where the header trees are (`headers.cache_directory`): in $EBPFSTREAM_CACHE, if that is set.  Set to
nothing, it keeps no programs.  Whatever is wrong there, a program is compiled, and nobody is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ebpfstream import __version__
from ebpfstream.errors import EbpfStreamError
from ebpfstream.kernel import bcc, headers
from ebpfstream.kernel.compiler import Module

KEEP: Final = 64
"""So many programs are kept, those used last."""

_FOLDER: Final = "programs"
_ABANDONED: Final = 3600.0  # so many seconds old, an unfinished file belongs to a process that was killed
# What makes a text into what the compiler sees, and this file's own format.
_SOURCES: Final = ("bcc.py", "btf.py", "compiled.py", "headers.py", "shim.py")
_OWN_HEADER: Final = re.compile(bcc.OWN_HEADER.pattern.encode())  # in bytes
_LIBRARY: Final = "libbcc.so.0"
_LIBRARY_FOLDERS: Final = (
    "lib*",
    "usr/lib*",
    "usr/lib/*-linux-*",
    "usr/local/lib*",
    "usr/local/lib/*-linux-*",
)
# Read by BCC, by clang, by who finds their libraries.
_VARIABLES: Final = re.compile(r"BCC_\w+|LD_\w+|ARCH|CPATH|C_INCLUDE_PATH")


class Kept:
    """What is kept of one text and its flags.  Reads files: for a thread."""

    def __init__(self, text: str, cflags: Sequence[str]) -> None:
        self._text, self._cflags = text, cflags
        self._key = _key(text, cflags)

    def find(self) -> Module | None:
        """The program, if it is kept and nobody else can have written it."""
        if self._key is None:
            return None
        try:
            with _folder() as folder:
                body = _read(folder, self._key)
        except OSError:
            return None
        if body is None:
            return None
        kept = json.loads(body)
        functions = {function: bytes.fromhex(code) for function, code in kept["functions"].items()}
        return Module(functions, {}, {}, kept["license"], kept["kernel_version"])

    def keep(self, module: Module) -> None:
        """Keep what was compiled since, if that can be; and no more than `KEEP` in all."""
        # A header, or the compiler, may have changed meanwhile: then nobody knows which was used.
        if self._key is None or module.maps or self._key != _key(self._text, self._cflags):
            return
        body = json.dumps(
            {
                "functions": {function: code.hex() for function, code in module.functions.items()},
                "license": module.license,
                "kernel_version": module.kernel_version,
            }
        )
        with suppress(OSError), _folder() as folder:
            _write(folder, self._key, body.encode())
            _prune(folder)


def _key(text: str, cflags: Sequence[str]) -> str | None:
    """A digest of all that the compiled text depends on; None if that cannot be told."""
    try:
        parts = [os.fsencode(part) for part in _kernel() + _compiler()]
        parts += [(Path(__file__).parent / name).read_bytes() for name in _SOURCES]
        parts += _program(text, cflags)
    except (EbpfStreamError, OSError, ValueError):
        return None
    # Each with its length: the end of one must not be taken for the beginning of the next.
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()


def _program(text: str, cflags: Sequence[str]) -> list[bytes]:
    """The text, the flags, and all headers that it may include.  Raises ValueError if there may be others."""
    if others := [flag for flag in cflags if not flag.startswith(("-D", "-I"))]:
        raise ValueError(f"who knows what {others} do")
    folders = [Path(flag.removeprefix("-I")) for flag in cflags if flag.startswith("-I")]
    own = sorted(path for folder in folders for path in folder.glob("*.h"))
    parts = [text.encode(errors="surrogatepass"), *(os.fsencode(flag) for flag in cflags)]
    for path in own:
        parts += [os.fsencode(path), path.read_bytes()]
    included = {name for part in parts for name in _OWN_HEADER.findall(part)}
    if strange := included - {os.fsencode(path.name) for path in own}:
        raise ValueError(f"{strange} may be anything")
    return parts


def _kernel() -> list[str]:
    """The running kernel, and where its types come from: BTF, or headers if a text cannot do with that."""
    kernel = headers.Kernel()
    parts = [*os.uname()[2:], kernel.identity(), str(kernel.btf.stat().st_size), repr(kernel.options())]
    for name in ("build", "source"):
        tree = kernel.modules / kernel.release / name
        parts += _state(tree, tree / "include/linux/kconfig.h", tree / "include/generated/autoconf.h")
    return [*parts, str(kernel.kheaders.exists())]


def _compiler() -> list[str]:
    """BCC, and the libraries that it finds.  Raises BccNotFoundError; ValueError if its library is nowhere."""
    binding = bcc.find()
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    libraries = [Path(folder, _LIBRARY) for folder in folders if folder]
    for pattern in _LIBRARY_FOLDERS:
        libraries += sorted(folder / _LIBRARY for folder in Path("/").glob(pattern))
    found = _state(*libraries)
    if not found:
        raise ValueError(f"{_LIBRARY} is in none of the usual folders")
    # The loader's cache is written anew whenever a library is installed: BCC's, or one that it needs.
    loader = _state(Path("/etc/ld.so.cache"))
    files = _state(*(binding / name for name in ("__init__.py", "libbcc.py", "version.py")))
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if _VARIABLES.fullmatch(name))
    return [__version__, *variables, *files, *found, *loader]


def _state(*paths: Path) -> list[str]:
    """Of those that are there, what changes when they are written or replaced."""
    states = []
    for path in paths:
        with suppress(OSError):
            found = path.stat()
            states.append(f"{path} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}")
    return states


@contextmanager
def _folder() -> Iterator[int]:
    """Where programs are kept, open.  Raises OSError if it is not there, or not ours alone."""
    root = None if os.environ.get("EBPFSTREAM_CACHE") == "" else headers.cache_directory()
    if root is None:
        raise FileNotFoundError
    how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    outer = os.open(root, how)
    try:
        _check(outer, stat.S_IFDIR)
        with suppress(FileExistsError):
            os.mkdir(_FOLDER, 0o700, dir_fd=outer)
        folder = os.open(_FOLDER, how, dir_fd=outer)
    finally:
        os.close(outer)
    try:
        _check(folder, stat.S_IFDIR)
        yield folder
    finally:
        os.close(folder)


def _check(file: int, kind: int) -> None:
    """Raises PermissionError for what another user may have written."""
    found = os.fstat(file)
    if stat.S_IFMT(found.st_mode) != kind or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError


def _read(folder: int, name: str) -> bytes | None:
    """What was written under this name; None of a file that is damaged."""
    # Not blocking, should it be a pipe.
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        _check(file, stat.S_IFREG)
        with open(file, "rb", closefd=False) as reader:
            checksum, _, body = reader.read().partition(b"\n")
        if checksum != _checksum(name, body):
            return None
        with suppress(OSError):
            os.utime(file)  # it is used
    finally:
        os.close(file)
    return body


def _write(folder: int, name: str, body: bytes) -> None:
    unfinished = f".{name}-{os.urandom(8).hex()}"
    file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(file, "wb") as writer:  # noqa: PTH123  # a descriptor
            writer.write(_checksum(name, body) + b"\n" + body)
        os.rename(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished, dir_fd=folder)
        raise


def _checksum(name: str, body: bytes) -> bytes:
    """Of a file that is whole, and under its own name."""
    return hashlib.sha256(name.encode() + body).hexdigest().encode()


def _prune(folder: int) -> None:
    """Remove what was used longest ago, and what killed processes left."""
    used = []
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # another process prunes, too
            used.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime, name))
    finished = sorted((entry for entry in used if not entry[1].startswith(".")), reverse=True)
    abandoned = [entry for entry in used if entry[1].startswith(".") and time.time() - entry[0] > _ABANDONED]
    for _, name in finished[KEEP:] + abandoned:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
