"""Header trees to compile a program against, best first.

BCC wants the running kernel's headers.  Few machines have them, and with those of another version a
program compiles and then reads wrong offsets.  The kernel's own description of its types (BTF) is
always right; a tree made from it stands in for headers.

This is imported by the short-lived process that compiles: the standard library only, and little of it.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import stat
import struct
import time
import zlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ebpfstream.errors import UnsupportedError
from ebpfstream.kernel import btf, shim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Final

FORMAT: Final = 3  # raise it when trees come out differently: it makes the cached ones unreachable
KEEP: Final = {"reduced-": 64, "whole-": 8}  # a whole tree is 3 MB, a reduced one a fiftieth
_IN_USE: Final = 3600.0  # a tree used so many seconds ago may still be compiled against

BTF: Final = Path("/sys/kernel/btf/vmlinux")
_RELEASE: Final = os.uname().release


class Kernel(NamedTuple):
    """Where to find what is known of the kernel to compile for; the running one, if nothing is said."""

    btf: Path = BTF
    notes: Path = Path("/sys/kernel/notes")
    modules: Path = Path("/lib/modules")
    kheaders: Path = Path("/sys/kernel/kheaders.tar.xz")
    configs: tuple[Path, ...] = (
        Path("/proc/config.gz"),
        Path("/boot", f"config-{_RELEASE}"),
        Path("/lib/modules", _RELEASE, "config"),
    )
    release: str = _RELEASE

    def identity(self) -> str:
        """Return what tells this kernel from any other: its build id, else a digest of its BTF."""
        if self.btf == BTF:  # the notes are those of the running kernel
            try:
                notes = self.notes.read_bytes()
            except OSError:
                notes = b""
            if found := _build_id(notes):
                return found
        try:
            return hashlib.sha256(self.btf.read_bytes()).hexdigest()
        except OSError as error:
            raise self._no_types(error) from error

    def types(self) -> bytes:
        """Read the kernel's BTF."""
        try:
            return self.btf.read_bytes()
        except OSError as error:
            raise self._no_types(error) from error

    def options(self) -> list[tuple[str, str]]:
        """Read the kernel's CONFIG_ options, from the first file that has them; none if none has."""
        for path in self.configs:
            try:
                data = path.read_bytes()
                if path.suffix == ".gz":
                    data = zlib.decompress(data, 16 + zlib.MAX_WBITS)
            except (OSError, zlib.error):
                continue
            lines = data.decode(errors="replace").splitlines()
            return [
                (name, value)
                for name, equals, value in (line.partition("=") for line in lines)
                if equals and name.startswith("CONFIG_")
            ]
        return []

    def has_headers(self) -> bool:
        """Whether BCC, left to itself, finds this kernel's own headers."""
        # As BCC chooses: Debian splits them in two, and the common half has what BCC looks for.
        build, source = (self.modules / self.release / name for name in ("build", "source"))
        chosen = source if build.is_dir() and source.is_dir() else build
        return (chosen / "include/linux/kconfig.h").is_file() or self.kheaders.exists()

    def _no_types(self, error: OSError) -> UnsupportedError:
        return UnsupportedError(
            f"nothing tells the kernel's types: {self.btf}: {error.strerror}, and the headers of kernel "
            f"{self.release} are not installed under {self.modules}.  Use a kernel built with "
            f"CONFIG_DEBUG_INFO_BTF=y, or install linux-headers-{self.release} (Debian, Ubuntu), "
            f"kernel-devel-{self.release} (Fedora, RHEL) or your distribution's package of that kind"
        )


def _build_id(notes: bytes) -> str | None:
    """Find the build id in ELF notes (elf(5), Elf64_Nhdr), in hexadecimal."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("=III", notes, at)
        name = at + 12
        description = name + (name_size + 3 & ~3)
        if kind == 3 and notes[name : name + name_size] == b"GNU\0":  # NT_GNU_BUILD_ID
            return notes[description : description + size].hex()
        at = description + (size + 3 & ~3)
    return None


def trees(text: str, kernel: Kernel | None = None) -> Iterator[Path | None]:
    """Yield what to compile this C text against, best first; each is made when it is asked for.

    A path is for BCC_KERNEL_SOURCE: first the types that the text can reach, then all of them (for
    types that it reaches through macros, or through files that it includes).  None means the kernel's
    own headers: unset BCC_KERNEL_SOURCE, BCC finds both of their halves only by itself.

    Raise UnsupportedError if there is none of these.
    """
    kernel = kernel or Kernel()
    failure = None
    try:
        yield from _from_btf(text, kernel)
    except UnsupportedError as error:
        failure = error
    if kernel.has_headers():
        yield None
    elif failure:
        raise failure


def _from_btf(text: str, kernel: Kernel) -> Iterator[Path]:
    page_size = os.sysconf("SC_PAGESIZE")
    base = (str(FORMAT), btf.libbpf_version(), kernel.identity(), kernel.release, str(page_size))
    index: btf.Btf | None = None

    def build(tree: Path, program: shim.Program, *, whole: bool) -> None:
        nonlocal index
        index = index or btf.Btf(kernel.types())
        reached = None if whole else index.reachable(program.identifiers)
        types = btf.dump(index.renamed(program.tags, program.ordinary), reached)
        files = shim.files(
            types, program, release=kernel.release, page_size=page_size, options=kernel.options()
        )
        for name, content in files.items():
            _write(tree / "include" / name, content)

    def build_reduced(tree: Path) -> None:
        build(tree, shim.read_program(text), whole=False)

    yield cached("reduced-" + _digest(*base, text), build_reduced)
    # The whole tree serves every program that takes the same names for itself.
    program = shim.read_program(text)._replace(identifiers=frozenset())

    def build_whole(tree: Path) -> None:
        build(tree, program, whole=True)

    yield cached("whole-" + _digest(*base, *(" ".join(sorted(names)) for names in program)), build_whole)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(content)
        if content:  # the rename that makes the tree visible must not reach the disk before this does
            file.flush()
            os.fsync(file.fileno())


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the tree of that name, made by `build` in an empty folder unless the cache has it."""
    root = cache_directory()
    if root is not None:
        try:
            return _tree(root, name, build)
        except OSError:
            pass  # full, read-only, taken away: a tree for this process only will do
    try:
        return _tree(_private_directory(), name, build)
    except OSError as error:
        raise UnsupportedError(
            f"no place to write kernel headers to ({error}): set EBPFSTREAM_CACHE to a folder of your own"
        ) from error


def _tree(root: Path, name: str, build: Callable[[Path], None]) -> Path:
    tree = root / name
    with _locked(root, fcntl.LOCK_SH):  # so that it is not pruned between being found and being marked
        if _mark_used(tree):
            return tree
    import shutil  # not for a hit: these two cost more than all the rest of it
    import tempfile

    new = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        build(new)
        try:
            new.rename(tree)
        except OSError:
            if not tree.is_dir():  # else another process was first, with the same tree
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _prune(root)
    return tree


def _mark_used(tree: Path) -> bool:
    try:
        os.utime(tree)
    except FileNotFoundError:
        return False
    except OSError:  # a read-only file system: nobody prunes there
        return tree.is_dir()
    return True


@contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    file = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, how)
        yield
    finally:
        os.close(file)


def _prune(root: Path) -> None:
    """Remove the trees used longest ago, beyond those to keep, and what killed processes left."""
    import shutil

    doomed: list[Path] = []
    try:
        with _locked(root, fcntl.LOCK_EX):
            for path in _superfluous(root):
                # Renamed first: half of a tree must not be found under its name.
                aside = path.with_name(f".old-{os.getpid()}-{path.name}")
                path.rename(aside)
                doomed.append(aside)
    except OSError:
        pass  # another process prunes, or the next one will
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)


def _superfluous(root: Path) -> list[Path]:
    """What is beyond the number to keep of its kind, and not in use."""
    trees: dict[str, list[tuple[float, Path]]] = {}
    for entry in os.scandir(root):
        prefix = entry.name[: entry.name.find("-") + 1]
        if prefix in (*KEEP, ".new-", ".old-"):
            used = entry.stat(follow_symlinks=False).st_mtime
            trees.setdefault(prefix, []).append((used, Path(entry)))
    now, superfluous = time.time(), list[Path]()
    for prefix, found in trees.items():
        found.sort(reverse=True)
        superfluous += [path for used, path in found[KEEP.get(prefix, 0) :] if now - used > _IN_USE]
    return superfluous


def cache_directory() -> Path | None:
    """Return where trees are kept from one process to the next; None if no place can be trusted.

    $EBPFSTREAM_CACHE; or /var/cache/ebpfstream for root, and ebpfstream below $XDG_CACHE_HOME or
    ~/.cache for others.  What is in there is compiled into programs for the kernel, so nobody else may
    be able to write it, or to put another folder in its place.
    """
    if chosen := os.environ.get("EBPFSTREAM_CACHE"):
        path = Path(chosen).absolute()
    elif os.geteuid() == 0:
        path = Path("/var/cache/ebpfstream")
    else:
        home = os.environ.get("XDG_CACHE_HOME", "")
        try:
            # Relative paths are to be ignored, says the XDG Base Directory Specification.
            path = Path(home if home.startswith("/") else Path.home() / ".cache", "ebpfstream")
        except RuntimeError:  # no home
            return None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.parent.resolve(strict=True) / path.name
        path.mkdir(mode=0o700, exist_ok=True)
        return path if _trusted(path) else None
    except OSError:
        return None


def _trusted(path: Path) -> bool:
    user, found = os.geteuid(), path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        return False
    for parent in path.parents:
        above = parent.lstat()
        if above.st_uid not in (0, user) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
            return False
    return os.access(path, os.W_OK | os.X_OK, effective_ids=True)


@cache
def _private_directory() -> Path:
    """Make a folder for this process alone, removed when it exits."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="ebpfstream-"))
    _private[path] = os.getpid()
    atexit.register(clean_up)
    return path


_private: dict[Path, int] = {}  # by the process that made it, which its forked children are not


def clean_up() -> None:
    """Remove what this process keeps outside of the cache; before os._exit(), which runs no atexit."""
    import shutil

    for path in [path for path, owner in _private.items() if owner == os.getpid()]:
        shutil.rmtree(path, ignore_errors=True)
        del _private[path]
    _private_directory.cache_clear()
