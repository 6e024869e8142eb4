"""tracefs: where the kernel describes its tracepoints.  Found, or mounted, wherever it is."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from ebpfstream.errors import AttachError, PrivilegeError, UnsupportedError
from ebpfstream.kernel.bpf import libc
from ebpfstream.kernel.mounts import unescaped

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


def tracepoint_id(category: str, name: str) -> int:
    """The number by which perf_event_open(2) knows a tracepoint.

    Raises AttachError for one that this kernel does not have, PrivilegeError if tracefs cannot be read.
    """
    events = folder() / "events"
    try:
        return int((events / category / name / "id").read_text())
    except PermissionError as error:
        raise PrivilegeError(
            f"tracepoints are described in {events}, which this user cannot read: run as root, or remount it "
            "for the user's group (mount -o remount,gid=…,mode=750)"
        ) from error
    except OSError as error:
        raise AttachError(
            f"there is no tracepoint {category}:{name} in Linux {os.uname().release}"
        ) from error
