"""The system calls of this machine: their names, their numbers, how many arguments each takes."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from typing import Final

from ebpfstream.errors import ArgumentError, EbpfStreamError, UnsupportedError
from ebpfstream.kernel import tracefs
from ebpfstream.names import did_you_mean, near

MOST_ARGUMENTS: Final = 6

# As the tables call what the kernel calls otherwise (uname -m).
_ARCHITECTURES: Final = {"aarch64": "arm64", "ppc64le": "powerpc64"}


@cache
def numbers() -> dict[str, int]:
    """All system calls of this architecture that the installed tables know, whatever the running kernel has.

    Raises UnsupportedError.
    """
    # Not before they are needed.  The tables follow the kernel's releases.
    import system_calls  # type: ignore[import-untyped]

    machine = platform.machine()
    tables = system_calls.syscalls()
    found = {}
    for name in tables.names():
        try:
            found[name] = tables.get(name, _ARCHITECTURES.get(machine, machine))
        except system_calls.NotSupportedSystemCall:
            pass  # another architecture's
        except system_calls.NoSuchArchitecture:
            raise UnsupportedError(f"the package system-calls has no table for {machine}") from None
    return found


@cache
def _names() -> dict[int, str]:
    return {number: name for name, number in numbers().items()}


def number_of(call: str | int, most: int) -> int:
    """The number of a system call given by its name, or itself if it is one of the first `most`.

    Raises ArgumentError.
    """
    if isinstance(call, int):
        if not 0 <= call < most:
            raise ArgumentError(
                f"there is no system call {call}: give a name, or a number from 0 to {most - 1}"
            )
        return call
    known = numbers()
    if call not in known:
        raise ArgumentError(
            f"there is no system call {call!r} on {platform.machine()}{did_you_mean(near(call, known))}"
            " (one that is newer than the package system-calls can be given by its number)"
        )
    return known[call]


def name_of(number: int) -> str:
    """The name of a number, or `syscall_467` of one that is not in the tables."""
    return _names().get(number) or f"syscall_{number}"


@cache
def argument_count(number: int) -> int:
    """How many arguments a system call takes, as far as the running kernel tells (in tracefs); else 6."""
    name = name_of(number)
    with suppress(OSError, EbpfStreamError):
        events = tracefs.folder() / "events/syscalls"
        # Some are called otherwise in the kernel's source: newuname, sendfile64.
        for known in (name, f"new{name}", f"{name}64"):
            with suppress(FileNotFoundError):
                fields = (events / f"sys_enter_{known}/format").read_text().partition("__syscall_nr;")[2]
                return fields.count("\tfield:")
    return MOST_ARGUMENTS
