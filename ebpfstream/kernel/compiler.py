"""C text → maps and instructions, by BCC in a child process (`bcc` is the child's side)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, NamedTuple

import anyio

from ebpfstream.errors import CompileError
from ebpfstream.kernel import bcc, child
from ebpfstream.kernel.bpf import Map, MapType, instructions_of
from ebpfstream.turns import to_the_end

_ERRORS_SHOWN: Final = 3
_CALL_POINTER: Final = 0x8D
# What clang says of names that only headers have.
_WITHOUT_HEADERS: Final = ("use of undeclared identifier", "implicit declaration of function")
_FD_SPACE: Final = socket.CMSG_SPACE(4 * bcc.SCM_MAX_FD)


class Described(NamedTuple):
    """What BCC says of a map: its key's and its value's type (`descriptions` reads them; None if there is none).

    Of an output, the names of the fields of what the program submits to it.
    """

    key: Any
    value: Any
    fields: list[str]


@dataclass(frozen=True)
class Module:
    """A compiled text: nothing of it runs yet.

    `functions` are instructions by name; in them stand the numbers of `numbered`, in the maps' place.
    `maps` are in the kernel already, by the name they have in the text.
    """

    functions: dict[str, bytes]
    maps: dict[str, Map]
    numbered: dict[int, Map]
    license: str
    kernel_version: int
    described: dict[str, Described] = field(default_factory=dict)


async def compile(text: str, cflags: Sequence[str] = ()) -> Module:  # noqa: A001
    """Compile a program in BCC's dialect.  Takes some 0.3 s, in another process.

    Raises BccNotFoundError, UnsupportedError (no BTF and no headers), CompileError.
    """
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as log:
        with theirs:
            request.write(json.dumps({"text": text, "cflags": list(cflags)}).encode())
            request.seek(0)
            process = _started(request, log, theirs)
        body, received = await _received_whole(ours, process)
        log.seek(0)
        return _module(body, received, log.read().decode(errors="replace"), process.returncode)


def _started(request: IO[bytes], log: IO[bytes], theirs: socket.socket) -> subprocess.Popen[bytes]:
    """The child; returns when it runs, a millisecond later."""
    command = child.command("bcc", str(theirs.fileno()))
    try:
        return subprocess.Popen(
            command,
            stdin=request,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
            cwd="/",
            process_group=0,  # a terminal's Ctrl-C is for us alone
        )
    except OSError as error:
        raise CompileError(
            f"the compiler's process cannot be started: {command[0]}: {error.strerror}; it is this Python, which this "
            "user must be able to execute"
        ) from error


async def _received_whole(ours: socket.socket, process: subprocess.Popen[bytes]) -> tuple[bytes, list[int]]:
    """All that the child hands back until it has ended; cancelled, it leaves neither the child nor a descriptor."""
    received: list[int] = []
    try:
        return await _receive(ours, received), received
    except BaseException:
        process.kill()
        try:
            await to_the_end(_receive, ours, received)
        finally:
            for fd in received:
                os.close(fd)
        raise
    finally:
        process.wait()  # its end of the socket is closed last of all: this does not block


async def _receive(parent: socket.socket, received: list[int]) -> bytes:
    """All that the child sends until it ends; descriptors are added to `received`."""
    parent.setblocking(False)
    body = bytearray()
    while True:
        await anyio.wait_readable(parent)
        # socket.recv_fds() does not pass flags on in Python 3.11, and children would inherit the maps.
        data, ancillary, _, _ = parent.recvmsg(1 << 20, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        for _, _, fds in ancillary:
            received.extend(array("i", fds[: len(fds) // 4 * 4]))
        if not data:
            return bytes(body)
        body += data


def _module(body: bytes, received: list[int], log: str, returncode: int) -> Module:
    if not body:
        raise CompileError(
            f"the compiler ended with {returncode} and said nothing of it"
            + (f": {log.strip().splitlines()[-1]}" if log.strip() else ""),
            log,
        )
    result: dict[str, Any] = json.loads(body)
    if failure := child.error_of(result):
        raise CompileError(_message(str(failure), log), log) if isinstance(failure, CompileError) else failure
    maps: dict[str, Map] = {}
    numbered: dict[int, Map] = {}
    described: dict[str, Described] = {}
    for table, fd in zip(result["maps"], received, strict=True):
        name = table["name"]
        made = Map(fd, MapType(table["type"]), table["key_size"], table["value_size"], table["max_entries"])
        maps[name] = numbered[table["fd"]] = made
        described[name] = Described(_parsed(table["key"]), _parsed(table["value"]), table["fields"])
    return Module(
        {name: bytes.fromhex(code) for name, code in result["functions"].items()},
        maps,
        numbered,
        result["license"],
        result["kernel_version"],
        described,
    )


def _parsed(description: str) -> Any:
    """None where there is nothing to read; BCC's JSON is none for `char x[sizeof(struct y)]`."""
    try:
        return json.loads(description)
    except json.JSONDecodeError:
        return None


def _message(message: str, log: str) -> str:
    """The first errors of the log, each with the lines that show where; the rest counted."""
    shown: list[str] = []
    count = 0
    for line in log.splitlines():
        if " error: " in line or line.startswith("error: "):
            count += 1
        if 0 < count <= _ERRORS_SHOWN and line.strip():
            shown.append("  " + line.removeprefix("/virtual/"))
    if count > _ERRORS_SHOWN:
        shown.append(f"  ({count - _ERRORS_SHOWN} more errors are in the error's `log`)")
    if not shown:
        shown = ["  " + line for line in log.strip().splitlines()[-5:]]
    if any(error in log for error in _WITHOUT_HEADERS):
        shown.append(
            "  (if that is a macro or an inline function of the kernel's: types come from BTF, which has neither; "
            "define it in the program, or install the kernel's headers)"
        )
    return message + ":\n" + "\n".join(shown) if shown else message


def has_unwritten_calls(instructions: bytes) -> bool:
    """Whether a map's method is called that BCC did not rewrite: such a call goes through a pointer."""
    return any(opcode == _CALL_POINTER for _, opcode, *_ in instructions_of(instructions))
