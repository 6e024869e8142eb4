"""tracefs: where the kernel describes its tracepoints.  Found, or mounted, wherever it is."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from ebpfstream.errors import AttachError, PrivilegeError, UnsupportedError
from ebpfstream.kernel.bpf import libc
from ebpfstream.kernel.mounts import unescaped
from ebpfstream.names import did_you_mean, near

# Documentation/trace/ftrace.rst
_USUAL: Final = Path("/sys/kernel/tracing")
_REMEDY: Final = f"mount -t tracefs tracefs {_USUAL}"


def folder(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Where tracefs is mounted; if it is not, it is mounted at /sys/kernel/tracing.

    Raises UnsupportedError or PrivilegeError, with the command that mounts it.
    """
    for line in mounts.read_bytes().splitlines():
        _, point, kind, *_ = line.split()
        if kind == b"tracefs":
            return Path(os.fsdecode(unescaped(point)))
    if libc().mount(b"tracefs", os.fsencode(_USUAL), b"tracefs", 0, None) == 0:
        return _USUAL
    reason = os.strerror(ctypes.get_errno())
    kind_of_error = PrivilegeError if os.geteuid() else UnsupportedError
    raise kind_of_error(f"tracefs is not mounted, and cannot be mounted here ({reason}): as root, {_REMEDY}")


def tracepoints() -> list[str]:
    """The tracepoints of this kernel, each as `category:name`.  Raises as `tracepoint_id` does."""
    return _read("available_events").splitlines()


def tracepoint_id(category: str, name: str) -> int:
    """The number by which perf_event_open(2) knows a tracepoint.

    Raises AttachError for one that this kernel does not have, PrivilegeError if tracefs cannot be read.
    """
    try:
        return int(_read(f"events/{category}/{name}/id"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        wanted, known = f"{category}:{name}", tracepoints()
        raise AttachError(
            f"there is no tracepoint {wanted} in Linux {os.uname().release}"
            + did_you_mean([*(each for each in known if each.endswith(f":{name}")), *near(wanted, known)])
        ) from None


def raw_tracepoint_hint(name: str) -> str:
    """What an error adds to the name of a raw tracepoint that there is not."""
    try:
        known = tracepoints()
    except (OSError, PrivilegeError, UnsupportedError):
        return ""
    if f"syscalls:{name}" in known:
        # Those are events of raw tracepoints sys_enter and sys_exit (kernel/trace/trace_syscalls.c).
        raw = "sys_exit" if name.startswith("sys_exit") else "sys_enter"
        return (
            f"; it is a tracepoint (syscalls:{name}), but as raw tracepoints all system calls together "
            f"are {raw}"
        )
    names = {each.partition(":")[2] for each in known if not each.startswith("syscalls:")}
    return did_you_mean(near(name, names))


def _read(name: str) -> str:
    path = folder() / name
    try:
        return path.read_text()
    except PermissionError as error:
        raise PrivilegeError(
            f"tracepoints are described in {path.parent}, which this user cannot read: run as root, or "
            "remount it for the user's group (mount -o remount,gid=…,mode=750)"
        ) from error
