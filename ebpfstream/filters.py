"""Which events a ready-made program leaves out, in the kernel."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ebpfstream import text
from ebpfstream.errors import ArgumentError
from ebpfstream.kernel import cgroups

# struct filters in bpf/process.h
_LAYOUT: Final = struct.Struct("<IIIIIIQ16sII")
SIZE: Final = _LAYOUT.size
_PID, _PPID, _UID, _GID, _COMM, _CGROUP, _SELF = (1 << bit for bit in range(7))
_COMM_MAX: Final = 15  # TASK_COMM_LEN - 1


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What an event must meet to be submitted; None demands nothing.

    Numbers are those of the initial namespaces, as in the events.  Raises ArgumentError for what no
    process can have.
    """

    pid: int | None = None
    ppid: int | None = None
    uid: int | None = None
    gid: int | None = None
    comm: str | None = None
    """The whole name, as the event has it: 15 bytes at most."""
    cgroup: str | None = None
    """A cgroup v2 directory, or its path from the root of the hierarchy; its descendants are meant, too."""
    exclude_self: bool = False
    """Leave out this process, and what it starts itself."""

    def __post_init__(self) -> None:
        for name in ("pid", "ppid", "uid", "gid"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 32:
                raise ArgumentError(f"{name}={value} is impossible: give a number from 0 to {(1 << 32) - 1}")
        if self.comm is not None and len(text.encode(self.comm)) > _COMM_MAX:
            raise ArgumentError(
                f"comm={self.comm!r} is too long: the kernel keeps {_COMM_MAX} bytes of a name"
            )

    def pack(self) -> bytes:
        """As the programs read it.  Raises ArgumentError for a cgroup that there is not, or not to be found."""
        criteria = 0
        for bit, value in (
            (_PID, self.pid),
            (_PPID, self.ppid),
            (_UID, self.uid),
            (_GID, self.gid),
            (_COMM, self.comm),
            (_CGROUP, self.cgroup),
        ):
            criteria |= bit if value is not None else 0
        criteria |= _SELF if self.exclude_self else 0
        cgroup_id = level = 0
        if self.cgroup is not None:
            cgroup_id = cgroups.id_of(self.cgroup)
            level = cgroups.level_of(cgroup_id)
        return _LAYOUT.pack(
            criteria,
            self.pid or 0,
            self.ppid or 0,
            self.uid or 0,
            self.gid or 0,
            level,
            cgroup_id,
            text.encode(self.comm or ""),
            # This process as the kernel tells of it whatever namespace it is in.
            Path("/proc/self/ns/pid").stat().st_ino,
            os.getpid(),
        )
