"""Where functions are in ELF files: what uprobes are attached to.

BCC's own resolver finds them, with its rules.  As its library maps LLVM as well, it is loaded in a
short-lived child alone, like BCC's compiler (`bcc`): only the standard library and modules that need
nothing else may be imported here.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from ebpfstream.errors import ArgumentError, AttachError, EbpfStreamError
from ebpfstream.kernel import bcc, child
from ebpfstream.names import did_you_mean, near

_TIME_LIMIT: Final = 60  # seconds; a debug file of gigabytes takes some

_STT_GNU_IFUNC: Final = 10  # elf.h


def resolve(
    name: str, symbol: str | None = None, address: int | None = None, pid: int = -1, offset: int = 0
) -> tuple[str, int]:
    """Where a probe goes: the file, and how many bytes into it.  Takes some 0.1 s, in another process.

    `name` is a path, or a library without its `lib` and `.so`: `c` is the libc that the dynamic loader
    finds.  With `pid` it is what that process has loaded, or what has this path in its root.  In it,
    either the function `symbol` and `offset` bytes into that, or the `address` that the file's own
    headers give (as `nm` and `objdump` show it).

    Raises AttachError for what there is not, with names that are near; BccNotFoundError, ArgumentError.
    """
    if (symbol is None) is (address is None):
        raise ArgumentError("a probe needs either a symbol or an address")
    if offset < 0 or (address or 0) < 0 or (offset and address is not None):
        raise ArgumentError("an offset is counted from a symbol, and neither it nor an address is below 0")
    (found,) = _ask({"name": _absolute(name), "symbol": symbol, "address": address, "pid": pid})
    path, position = found
    return path, position + offset


def matching(name: str, pattern: str, pid: int = -1) -> list[tuple[str, int]]:
    """Where all functions are whose names a regular expression matches from their beginning.

    Each place once, though several names may be there.  Otherwise like `resolve`.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"{pattern!r} is no regular expression: {error}") from error
    return _ask({"name": _absolute(name), "pattern": pattern, "pid": pid})


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if "/" in name else name


def _ask(request: dict[str, Any]) -> list[tuple[str, int]]:
    try:
        done = subprocess.run(
            child.command("symbols"),
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_TIME_LIMIT,
            cwd="/",
            process_group=0,  # a terminal's Ctrl-C is for us alone
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AttachError(
            f"the symbols of {request['name']} were not read within {_TIME_LIMIT} s: give the address instead"
        ) from error
    if not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise AttachError(
            f"the reader of {request['name']}'s symbols ended with {done.returncode}"
            + (f": {said[-1]}" if said else " and said nothing of it")
        )
    result = json.loads(done.stdout)
    if failure := child.error_of(result):
        raise failure
    return [(path, offset) for path, offset in result["places"]]


class _Resolver:
    """BCC's functions that deal with symbols; in the child."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        types: Any = library.bcc_resolve_symname.argtypes
        self._option, self._symbol = types[4]._type_, types[5]._type_
        self._callback: Any = library.bcc_foreach_function_symbol.argtypes[1]

    def library(self, name: str, pid: int) -> str | None:
        """A library's path, in that process's root if it is one's."""
        found = self._library.bcc_procutils_which_so(os.fsencode(name), max(pid, 0))
        return os.fsdecode(ctypes.cast(found, ctypes.c_char_p).value or b"") if found else None

    def offset(self, path: str, symbol: str, address: int = 0, kinds: int = 0) -> int | None:
        """Where in the file a symbol or an address is; with `kinds`, bits by symbols' types, only of those."""
        option = ctypes.byref(self._option(1, 1, 1, kinds)) if kinds else None
        found = self._symbol()
        status = self._library.bcc_resolve_symname(
            os.fsencode(path), symbol.encode(), address, 0, option, ctypes.byref(found)
        )
        return int(found.offset) if status == 0 else None

    def functions(self, path: str) -> list[tuple[str, int]]:
        """The names and addresses of a file's functions."""
        found: list[tuple[str, int]] = []

        def add(name: bytes, address: int) -> int:
            found.append((name.decode(errors="replace"), address))
            return 0

        self._library.bcc_foreach_function_symbol(os.fsencode(path), self._callback(add))
        return found


def _places(resolver: _Resolver, request: dict[str, Any]) -> list[tuple[str, int]]:
    path = _file(resolver, request["name"], request["pid"])
    if "pattern" in request:
        return [(path, offset) for offset in _matching(resolver, path, request["pattern"])]
    if request["symbol"] is not None:
        return [(path, _function(resolver, path, request["symbol"]))]
    address: int = request["address"]
    offset = resolver.offset(path, "", address)
    if offset is None:
        raise AttachError(f"there is no code at {address:#x} in {path} (`objdump -d` shows addresses)")
    return [(path, offset)]


def _matching(resolver: _Resolver, path: str, pattern: str) -> list[int]:
    functions = resolver.functions(path)
    addresses = {address for name, address in functions if re.match(pattern, name)}
    if not addresses:
        raise AttachError(
            f"no function of {path} matches {pattern!r}" + ("" if functions else f", {_no_symbols(path)}")
        )
    offsets = (resolver.offset(path, "", address) for address in addresses)
    return sorted(offset for offset in offsets if offset is not None)


def _function(resolver: _Resolver, path: str, symbol: str) -> int:
    offset = resolver.offset(path, symbol)
    if offset is None:
        raise AttachError(_no_such_function(path, symbol, [name for name, _ in resolver.functions(path)]))
    if resolver.offset(path, symbol, kinds=1 << _STT_GNU_IFUNC) is not None:
        # A probe on it would see the dynamic loader choose, once for each process, and no call.
        names = sorted(name for name, _ in resolver.functions(path) if symbol in name and name != symbol)
        raise AttachError(
            f"{symbol} in {path} is never called: it only chooses a function for this CPU when a program "
            f"starts. Give the chosen one" + (f", such as {', '.join(names[:5])}" if names else "")
        )
    return offset


def _file(resolver: _Resolver, name: str, pid: int) -> str:
    """The path of a library or a binary: an ELF file."""
    root = f"/proc/{pid}/root" if pid >= 0 else ""
    if root and not Path(root).parent.exists():
        raise AttachError(f"there is no process {pid}")
    path: str | None = name
    if "/" not in name:
        path = resolver.library(name, pid)
        if not path:
            raise AttachError(_no_such_library(name, pid))
    path = f"{root}{path}"
    try:
        with Path(path).open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        folder = Path(path).parent
        known = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
        similar = [str(folder / each) for each in near(Path(path).name, known)]
        raise AttachError(f"there is no file {path}" + did_you_mean(similar)) from error
    except OSError as error:
        raise AttachError(f"{path} cannot be read: {error.strerror}") from error
    if start != b"\x7fELF":
        script = " but a script: probe its interpreter" if start.startswith(b"#!") else ""
        raise AttachError(f"{path} is no ELF file{script}")
    return path


def _no_such_library(name: str, pid: int) -> str:
    if pid >= 0:
        maps = Path(f"/proc/{pid}/maps").read_text()
        known = set(re.findall(r"/lib([^/\n]+?)[-.][^/\n]*\n", maps))
    else:
        listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
        known = set(re.findall(r"(?m)^\s*lib(\S+?)\.so", listing))
    short = re.sub(r"^lib|\.so[.\d]*$", "", name)
    program = shutil.which(name)
    where = f"process {pid} has loaded no library" if pid >= 0 else "the dynamic loader knows no library"
    return f"{where} {name!r}; others are given by their path" + did_you_mean(
        [*([program] if program else []), *near(short, known)]
    )


def _no_such_function(path: str, symbol: str, known: list[str]) -> str:
    if not known:
        return f"there is no function {symbol} in {path}, {_no_symbols(path)}"
    # Names of C++ and Rust are written into the symbol, each after its length.
    mangled = "".join(f"{len(part)}{part}" for part in symbol.split("::"))
    longer = [name for name in known if mangled in name or name.startswith(f"{symbol}.")]
    return f"{path} has no function {symbol} of its own" + did_you_mean(longer + near(symbol, known))


def _no_symbols(path: str) -> str:
    return (
        f"which has no symbols (it is stripped): install its debug symbols, or give an address "
        f"(`objdump -d {path}` shows them)"
    )


def main() -> None:
    """Run as the child: the question comes on standard input, the answer leaves on standard output."""
    answer = os.dup(1)
    os.dup2(2, 1)  # where libraries print to
    try:
        resolver = _Resolver(bcc.load(bcc.find()))
        result: dict[str, Any] = {"places": _places(resolver, json.load(sys.stdin))}
    except EbpfStreamError as error:
        result = child.answer(error)
    with os.fdopen(answer, "w") as file:
        json.dump(result, file)
    os._exit(0)  # LLVM's destructors have nothing to add
