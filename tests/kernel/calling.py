"""Processes that make the system calls that they are told, and no others that matter."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from ebpfstream.syscall_names import numbers

MACHINE: Final = os.uname().machine

_CHILD = """
import ctypes, mmap, struct, sys
from ctypes import c_long
libc = ctypes.CDLL(None)
libc.syscall.restype = c_long
space = ctypes.create_string_buffer(4096)
print(ctypes.addressof(space), flush=True)
def by_int_80(number):
    # push rbx; mov eax, number; int 0x80; pop rbx; ret
    code = struct.pack("<BBI2sBB", 0x53, 0xB8, number, bytes((0xCD, 0x80)), 0x5B, 0xC3)
    memory = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
for line in sys.stdin:
    times, *call = map(int, line.split())
    if times:
        call = [c_long(value) for value in call]
        for _ in range(times):
            libc.syscall(*call)
        print("done", flush=True)
    else:
        print(by_int_80(*call), flush=True)
"""


class Caller:
    """A process that makes system calls when it is told to; `space` is where it has 4 KiB of zeros."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._told, self._said = self._process.stdin, self._process.stdout
        self.space = int(self._said.readline())
        self.pid = self._process.pid
        self.comm = Path(f"/proc/{self.pid}/comm").read_text().rstrip("\n")

    def call(self, name: str | int, *arguments: int, times: int = 1) -> None:
        """Make a call so many times, and return."""
        self.start(name, *arguments, times=times)
        self.wait()

    def start(self, name: str | int, *arguments: int, times: int = 1) -> None:
        """The same, without waiting for it."""
        number = numbers()[name] if isinstance(name, str) else name
        print(times, number, *arguments, file=self._told, flush=True)

    def wait(self) -> None:
        """Until what was started has been done."""
        assert self._said.readline() == "done\n"

    def call_32_bit(self, number: int) -> int | None:
        """Make a call by its number for 32-bit programs (x86's int 0x80): what it returned.

        None if it killed the process, as it does where the kernel has no CONFIG_IA32_EMULATION.
        """
        print(0, number, file=self._told, flush=True)
        result = self._said.readline()
        return int(result) if result else None

    def close(self) -> None:
        """Let the process end."""
        with suppress(BrokenPipeError):
            self._told.close()
        self._process.wait()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def bare_program(path: Path, *calls: tuple[str, int]) -> None:
    """Write an executable file that makes these calls, each with its one argument, and nothing else at all."""
    code = b"".join(_call(numbers()[name], argument) for name, argument in calls)
    # Elf64_Ehdr and one Elf64_Phdr, include/uapi/linux/elf.h: all of the file is one segment.
    machine = {"x86_64": 62, "aarch64": 183}[MACHINE]
    base, headers = 0x400000, 64 + 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    size = headers + len(code)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    path.write_bytes(header + segment + code)
    path.chmod(0o755)


def _call(number: int, argument: int) -> bytes:
    if MACHINE == "x86_64":  # mov eax, number; mov rdi, argument; syscall
        return struct.pack("<BI3si2s", 0xB8, number, b"\x48\xc7\xc7", argument, b"\x0f\x05")
    moved = 0xD2800000 | argument << 5 if argument >= 0 else 0x92800000 | ~argument << 5
    return struct.pack("<III", 0xD2800008 | number << 5, moved, 0xD4000001)  # x8, x0; svc #0
